#!/usr/bin/env python3
"""Writes the default corpus: about 4 MB of little stories, arithmetic, dialogues and programs, drawn from a grammar.

    make_corpus.py --out DIR [--seed 0] [--train-bytes 4000000] [--val-bytes 200000] [--questions 100]

DIR/train.jsonl, val.jsonl   a document a line: {"id": "story-000123", "text": "..."}; the id starts with the domain
DIR/train.txt, val.txt       the same texts, separated by an empty line, to read and to compress
DIR/entropy.json             bits per byte of the grammar's own choices, by domain and over all
DIR/tasks/stories.jsonl, arithmetic.jsonl, dialogues.jsonl, programs.jsonl
                             questions with four choices, as `olmoe evaluate --tasks` reads them

Every random choice adds -log2 of its probability to the entropy. A perfect model that knew the grammar could not spend
less, except where two ways through the grammar give the same text: so the figure is an upper bound of the text's
entropy, and close to it. The same seed gives the same bytes. Needs only Python 3.
"""
import argparse
import json
import math
import os
import random
import re
import sys


class Source:
    """Random choices that count their bits. Only Random.random() is used: its sequence is the same in any Python 3."""

    def __init__(self, seed):
        self.uniform = random.Random(seed).random
        self.bits = 0.0

    def one(self, items):
        """One of the items; an item that is listed twice is twice as likely."""
        item = items[int(self.uniform() * len(items))]
        self.bits += math.log2(len(items) / items.count(item))
        return item

    def either(self, *ways):
        """Calls one of the functions: only the choices of the way taken are made and counted."""
        return self.one(ways)()

    def number(self, low, high):
        self.bits += math.log2(high - low + 1)
        return low + int(self.uniform() * (high - low + 1))

    def chance(self, p):
        yes = self.uniform() < p
        self.bits -= math.log2(p if yes else 1 - p)
        return yes

    def several(self, items, n):
        """n different items, in random order."""
        items = list(items)
        chosen = []
        for _ in range(n):
            chosen.append(self.one(items))
            items.remove(chosen[-1])
        return chosen


def capital(text):
    return text[0].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Words

def words(text):
    return [" ".join(w.split()) for w in text.split(",")]


SHE = words("Anna, Bella, Clara, Dora, Ella, Flora, Greta, Hanna, Ida, Julia, Kira, Lina, Mia, Nora, Olga, Rosa")
HE = words("Adam, Ben, Carl, David, Emil, Felix, Hugo, Ivan, Jonas, Konrad, Leo, Max, Noah, Oscar, Paul, Ralf")
KINDS = words("""
    fox, mouse, owl, hare, mole, otter, bear, frog, squirrel, badger, duck, goat, robin, beaver, hedgehog, donkey, wolf,
    deer, raven, lizard, turtle, goose, pony, rabbit, sparrow, snail, cat, dog, camel, monkey, tiger, pigeon""")
CAST = dict(zip(SHE + HE, KINDS))     # who is what is the same in every story
TRAITS = words("""
    small, brave, shy, clever, old, young, lazy, gentle, quiet, merry, proud, curious, hungry, tired, grumpy, friendly,
    nervous, polite, careful, clumsy, patient, sleepy, noisy, stubborn, lonely, famous, greedy, wise, happy, sad, angry,
    worried""")
PLACES = words("""
    market, mill, lake, forest, harbour, meadow, village, castle, bridge, orchard, river, tower, garden, school, bakery,
    station, library, theatre, museum, farm, island, valley, beach, cave, desert, swamp, temple, palace, park, quarry,
    vineyard, lighthouse""")
LOOKS = words("""
    golden, silver, wooden, broken, rusty, tiny, heavy, shiny, dusty, painted, red, blue, green, yellow, black, white,
    brown, grey, purple, orange, round, square, long, short, soft, hard, warm, cold, wet, dry, clean, dirty, cheap,
    precious, ancient, modern, bent, cracked, empty, hollow""")
THINGS = words("""
    key, bell, lantern, crown, drum, ring, clock, boat, mirror, spoon, flute, coin, map, kite, hammer, umbrella, book,
    hat, cup, basket, coat, letter, ball, lamp, chair, bag, knob, table, rope, wheel, candle, ladder, bottle, button,
    pencil, blanket, bucket, shovel, needle, violin, trumpet, puppet, statue, ticket, carpet, pillow, kettle, helmet,
    shield, anchor, cart, feather, pebble, ribbon, mask, glove""")
SPOTS = words("""
    fence, well, oak, rock, gate, barn, stove, bench, hedge, wall, statue, fountain, haystack, chimney, window, door,
    roof, bush, pond, stable, cupboard, tent, wagon, stage""")
WHERE = words("under, behind, beside, near, above, below, inside, opposite")
STUFF = words("""
    clay, straw, brick, leather, sand, paper, glass, wool, copper, snow, moss, cotton, rope, oak, stone, mud, iron,
    silk, bone, wax, ice, cork, pine, linen""")
FOODS = words("""
    apples, pears, eggs, plums, lemons, onions, cakes, tomatoes, cherries, nuts, beans, carrots, figs, grapes, melons,
    pies, rolls, cookies, berries, olives, peaches, turnips, waffles, potatoes, dates, limes, peas, leeks, mushrooms,
    noodles, pancakes, sausages""")
FEEL = words("""
    glad, sad, proud, angry, afraid, bored, calm, cheerful, confused, jealous, sleepy, surprised, thirsty, thankful,
    upset, worried, amused, ashamed, curious, dizzy""")
MOVES = words("""
    walked, ran, crept, marched, hurried, wandered, rode, sailed, danced, climbed, limped, strolled, travelled, jumped,
    swam, drove""")
FINDS = words("""
    found, saw, hid, dropped, noticed, buried, picked up, bought, sold, lost, painted, cleaned, broke, mended, borrowed,
    stole, burned, caught, drew, kicked""")
HOW = words("""
    slowly, quickly, loudly, quietly, bravely, sadly, gladly, politely, carefully, suddenly, kindly, proudly, softly,
    angrily, calmly, shyly, boldly, coldly, eagerly, firmly, gently, happily, lazily, nervously""")
TIMES = words("""
    one morning, after lunch, at noon, the next day, before sunrise, late at night, on Monday, on Friday, on Sunday,
    in spring, in summer, in autumn, in winter, a week later, at midnight, that evening, in May, at dawn, in June,
    one day, after work, long ago, at sunset, in March""")
WHEN = words("""
    today, tomorrow, tonight, on Monday, on Tuesday, on Friday, on Sunday, next week, in May, at noon, after work,
    before lunch, in June, soon, at dawn, next year""")
STORMS = words("storm, breeze, cloud, fog, blizzard, shower, flood, whirlwind")
JOBS = words("""
    baker, farmer, tailor, fisher, florist, potter, smith, printer, teacher, doctor, painter, singer, pilot, judge,
    carpenter, gardener, miller, sailor, cook, dentist, nurse, writer, dancer, barber, king, queen, pirate, soldier""")
TASKS = words("""
    mend, paint, sell, clean, buy, find, hide, fetch, carry, open, borrow, draw, drop, move, measure, wrap, burn,
    polish, weigh, wash""")
NUMBERS = words("no, one, two, three, four, five, six, seven, eight, nine, ten")
FAMILY = words("brother, sister, mother, father, uncle, aunt, cousin, friend")


def a(text):
    return ("an " if text[0] in "aeiou" else "a ") + text


class Phrases:
    """Noun phrases that several domains use."""

    def __init__(self, s):
        self.s = s

    def thing(self):
        return self.s.one(LOOKS) + " " + self.s.one(THINGS)

    def animal(self):
        return self.s.one(TRAITS) + " " + self.s.one(KINDS)

    def person(self):
        return self.s.one(TRAITS) + " " + self.s.one(JOBS)

    def place(self):
        return self.s.one(LOOKS) + " " + self.s.one(PLACES)

    def spot(self):
        return self.s.one(WHERE) + " the " + self.s.one(SPOTS)

    def foods(self):
        return " and ".join(self.s.several(FOODS, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Stories: two animals of a fixed cast, and what happens to them.

def story(s):
    p = Phrases(s)
    names = s.several(SHE + HE, 2)
    kinds = [CAST[name] for name in names]

    def find(name, kind, she, other):
        opening = f"{capital(s.one(TIMES))} {name} the {kind} {s.one(MOVES)} to the {p.place()}"
        return f"{opening} and {s.one(FINDS)} {a(p.thing())} {p.spot()}." + s.either(
            lambda: f" It was made of {s.one(STUFF)} and {s.one(STUFF)}.",
            lambda: f" {capital(she)} felt {s.one(FEEL)} and {s.one(FEEL)}.",
            lambda: f" \"It is {s.one(LOOKS)}!\" said {name} {s.one(HOW)}.",
            lambda: "")

    def meet(name, kind, she, other):
        stranger = p.animal()
        return f"{capital(p.spot())} {name} met {a(stranger)} with {a(p.thing())}. " + s.either(
            lambda: f"\"Do you want {p.foods()}?\" asked the {stranger} {s.one(HOW)}.",
            lambda: f"\"I am {s.one(FEEL)},\" said the {stranger} {s.one(HOW)}.",
            lambda: f"The {stranger} {s.one(FINDS)} {a(p.thing())} and {s.one(MOVES)} to the {s.one(PLACES)}.")

    def share(name, kind, she, other):
        return s.either(
            lambda: f"{name} gave {other} {s.one(NUMBERS[2:])} {s.one(LOOKS)} {s.one(FOODS)} for {a(p.thing())}.",
            lambda: f"They ate {s.one(FOODS)} with {p.foods()} {p.spot()}.",
            lambda: f"{name} cooked {p.foods()}, but {other} wanted {s.one(LOOKS)} {s.one(FOODS)}.")

    def build(name, kind, she, other):
        opening = f"{name} the {kind} made {a(p.thing())} of {s.one(STUFF)} and {s.one(STUFF)}"
        return f"{opening} for {a(p.person())}" + s.either(
            lambda: f", and {other} {s.one(FINDS)} it {s.one(HOW)}.",
            lambda: f" from the {p.place()}.")

    def weather(name, kind, she, other):
        return (f"Then {a(s.one(LOOKS))} {s.one(STORMS)} came from the {p.place()}, "
                f"and {name} {s.one(MOVES)} {s.one(HOW)} and hid {p.spot()}.")

    def say(name, kind, she, other):
        return s.either(
            lambda: f"\"Never trust {a(p.animal())} {s.one(WHEN)},\" said {other} {s.one(HOW)}.",
            lambda: f"\"I want to be {a(p.person())},\" said {name} {s.one(HOW)}.",
            lambda: f"\"Are you {s.one(FEEL)}?\" asked {name}. \"No, I am {s.one(FEEL)},\" said {other} {s.one(HOW)}.",
            lambda: f"\"We must {s.one(TASKS)} the {p.thing()} {s.one(WHEN)},\" said {name} {s.one(HOW)}.")

    def dream(name, kind, she, other):
        return f"{name} dreamed of {a(p.animal())} with {a(p.thing())} and {a(p.thing())}."

    sentences = [s.either(
        lambda: (f"Once upon a time there was {a(s.one(TRAITS))} {kinds[0]} named {names[0]} "
                 f"who lived in {a(p.place())} with {names[1]} the {kinds[1]}."),
        lambda: f"{names[0]} the {kinds[0]} and {names[1]} the {kinds[1]} lived {p.spot()} in {a(p.place())}.",
        lambda: (f"In {a(p.place())} lived {names[0]}, {a(s.one(TRAITS))} {kinds[0]}, "
                 f"and {names[1]}, {a(s.one(TRAITS))} {kinds[1]}."))]
    for _ in range(s.number(3, 9)):
        scene = s.one([find, find, meet, share, build, weather, say, dream])
        me = s.number(0, 1)
        sentences.append(scene(names[me], kinds[me], "she" if names[me] in SHE else "he", names[1 - me]))
    sentences.append(s.either(
        lambda: f"And {names[0]} was {s.one(FEEL)} ever after.",
        lambda: f"So {names[0]} and {names[1]} {s.one(MOVES)} home {s.one(HOW)}.",
        lambda: f"{names[0]} kept the {p.thing()} for ever."))
    return "\n".join(sentences)


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues: the speakers alternate, and an answer takes up its question.

def dialogue(s):
    p = Phrases(s)
    speakers = s.several(SHE + HE, 2)

    def search(you, me):
        x = s.one(THINGS)
        question = s.either(
            lambda: f"Where is the {s.one(LOOKS)} {x} of the {s.one(JOBS)}?",
            lambda: f"Who took the {s.one(LOOKS)} {x} {s.one(WHEN)}?")
        return [question] + s.either(
            lambda: [f"It is {p.spot()} in the {p.place()}."],
            lambda: [f"The {p.person()} has it.", f"No, the {s.one(JOBS)} has {a(p.thing())}."],
            lambda: [f"I {s.one(FINDS)} the {x} {p.spot()}."])

    def shop(you, me):
        x, price = s.one(FOODS), s.number(2, 10)
        question = f"How much are the {s.one(LOOKS)} {x}?"
        answer = f"{capital(NUMBERS[price])} coins, with {s.one(LOOKS)} {p.foods()}."
        if price <= 5:
            reply = f"Only {NUMBERS[price]}? I take {s.number(2, 40)} {s.one(WHEN)}."
        else:
            reply = f"{capital(NUMBERS[price])} is too much, I want {s.one(LOOKS)} {s.one(FOODS)}."
        return [question, answer, reply]

    def plan(you, me):
        return [f"Will you {s.one(TASKS)} the {p.thing()} {s.one(WHEN)}, {you}?"] + s.either(
            lambda: [f"Yes, and then I {s.one(TASKS)} the {p.thing()}."],
            lambda: [f"No, I must {s.one(TASKS)} {a(p.thing())} for the {p.person()}."],
            lambda: [f"Only if you {s.one(TASKS)} my {p.thing()} {s.one(WHEN)}."])

    def trip(you, me):
        place = s.one(PLACES)
        return [f"Shall we go to the {place} {s.one(WHEN)}?"] + s.either(
            lambda: [f"No, the {place} is {s.one(LOOKS)} and {s.one(LOOKS)}."],
            lambda: [f"I would rather go to the {p.place()} {s.one(WHEN)}."],
            lambda: [f"Yes, with {p.foods()}, {s.one(FOODS)} and {a(p.thing())}."])

    def family(you, me):
        job = s.one(JOBS)
        return [f"Is your {s.one(FAMILY)} {a(s.one(TRAITS))} {job}?"] + s.either(
            lambda: [f"Yes, {a(job)} from the {p.place()}."],
            lambda: [f"No, {a(p.person())} with {a(p.animal())}."],
            lambda: [f"Yes, a {job} who sells {p.foods()}."])

    def taste(you, me):
        x, y = s.several(FOODS, 2)
        return [f"Do you like {x} with {y}?"] + s.either(
            lambda: [f"I like {x}, {p.foods()}, but not {s.one(LOOKS)} {y}."],
            lambda: [f"No, I like {p.foods()}.",
                     f"Then I bring {s.one(NUMBERS[2:])} {s.one(LOOKS)} {s.one(FOODS)} {s.one(WHEN)}."])

    def feel(you, me):
        feeling = s.one(FEEL)
        return [f"Why are you {feeling}, {you}?"] + s.either(
            lambda: [f"I lost my {p.thing()} {p.spot()}."],
            lambda: [f"The {p.animal()} ate my {p.foods()}."],
            lambda: [f"I am not {feeling}, but {s.one(FEEL)} and {s.one(FEEL)}."],
            lambda: [f"There was {a(p.animal())} {p.spot()}."],
            lambda: [f"{capital(a(p.person()))} {s.one(FINDS)} my {p.thing()}."])

    turns = []

    def say(topic):
        n = len(turns) % 2
        turns.extend(topic(speakers[1 - n], speakers[n]))

    say(lambda you, me: s.either(
        lambda: [f"Good morning, {you}.", f"Hello, {me}, I am {s.one(FEEL)}."],
        lambda: [f"Hello, {you}, you look {s.one(FEEL)}."]))
    for _ in range(s.number(5, 12)):
        say(s.one([search, shop, plan, trip, family, taste, feel]))
    say(lambda you, me: [f"Goodbye, {you}.", f"See you {s.one(WHEN)}."])
    return "\n".join(f"{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: small numbers, and every step of a longer sum written out.

def arithmetic(s):
    p = Phrases(s)

    def fact():
        x, y = s.number(1, 9), s.number(1, 9)
        return s.one([f"{x} + {y} = {x + y}", f"{x + y} - {x} = {y}", f"{x} x {y} = {x * y}", f"{x * y} / {x} = {y}"])

    def facts():
        return ", ".join(fact() for _ in range(s.number(2, 5))) + "."

    def columns():
        x, y = s.number(11, 49), s.number(11, 49)
        ones, carry = x % 10 + y % 10, (x % 10 + y % 10) // 10
        tens = f"{x // 10} + {y // 10}{' + 1' if carry else ''} = {x // 10 + y // 10 + carry}"
        return f"{x} + {y}: {x % 10} + {y % 10} = {ones}, {tens}, sum {x + y}."

    def count():
        step, start = s.number(1, 9), s.number(0, 20)
        return f"By {step}: " + ", ".join(str(start + i * step) for i in range(s.number(3, 5))) + "."

    def compare():
        x, d = s.number(10, 89), s.number(1, 9)
        return s.one([f"{x + d} is {d} more than {x}.", f"{x} is {d} less than {x + d}.",
                      f"{x} < {x + d}.", f"{x + d} > {x}."])

    def parity():
        h = s.number(1, 40)
        return s.one([f"{2 * h} is even.", f"{2 * h + 1} is odd."])

    def problem():
        who, what, x, y = s.one(SHE + HE), p.thing(), s.number(2, 20), s.number(1, 9)
        return s.either(
            lambda: (f"{who} has {x} {what}s and {s.one(['buys', 'finds', 'gets', 'makes'])} {y}: "
                     f"{x} + {y} = {x + y}."),
            lambda: (f"{who} has {x + y} {what}s and {s.one(['sells', 'loses', 'breaks', 'hides'])} {y}: "
                     f"{x + y} - {y} = {x}."))

    def chain():
        x = s.number(1, 20)
        text = f"Take {x}"
        for _ in range(s.number(2, 4)):
            y = s.number(1, 9)
            if x > y and s.chance(0.5):
                x -= y
                text += f", minus {y} is {x}"
            else:
                x += y
                text += f", plus {y} is {x}"
        return text + "."

    kinds = [facts, facts, columns, count, compare, parity, problem, problem, chain]
    return "\n".join(s.one(kinds)() for _ in range(s.number(10, 35)))


# ---------------------------------------------------------------------------------------------------------------------
# Code: a small language, and after > what it prints.

def code(s):
    p = Phrases(s)

    def output(lines, printed):
        return "\n".join(lines + [f"> {x}" for x in printed])

    def variables():
        name, other = s.several(THINGS, 2)
        x, y = s.number(10, 80), s.number(1, 9)
        sign = s.one("+-")
        result = x + y if sign == "+" else x - y
        return output([f"{name} = {x}", f"{other} = {name} {sign} {y}", f"print {other}"], [result])

    def branch():
        name, x, limit = s.one(THINGS), s.number(1, 99), s.one([10, 50, 90])
        yes, no = s.several(LOOKS, 2)
        lines = [f"{name} = {x}", f'if {name} > {limit}: print "{yes}"', f'else: print "{no}"']
        return output(lines, [yes if x > limit else no])

    def loop():
        low, n, k = s.number(1, 9), s.number(2, 4), s.number(1, 9)
        sign = s.one("+*")
        results = [i + k if sign == "+" else i * k for i in range(low, low + n)]
        return output([f"for i in {low}..{low + n - 1}: print i {sign} {k}"], results)

    def repeat():
        n, text = s.number(2, 3), p.animal()
        return output([f'repeat {n}: print "{text}"'], [text] * n)

    def function():
        name, k = s.one(TASKS), s.number(1, 9)
        sign = s.one("+-*")
        lines = [f"def {name}(x): return x {sign} {k}"]
        for _ in range(s.number(1, 3)):
            x = s.number(1, 9) if sign == "*" else s.number(10, 80)
            lines += [f"print {name}({x})", f"> {x * k if sign == '*' else x + k if sign == '+' else x - k}"]
        return "\n".join(lines)

    def array():
        items = s.several(s.one([KINDS, LOOKS, THINGS, FOODS, PLACES, JOBS]), s.number(3, 7))
        what, printed = s.one([("first", items[0]), ("last", items[-1]), ("count", len(items)), ("second", items[1])])
        return output([f"list = [{', '.join(items)}]", f"print {what}(list)"], [printed])

    def numbers():
        items = [s.number(1, 99) for _ in range(s.number(3, 6))]
        i = s.number(0, 2)
        return output([f"row = {items}", f"print row[{i}]"], [items[i]])

    def comment():
        return f"# {s.one(TASKS)} the {p.thing()} of the {p.person()}"

    kinds = [variables, branch, loop, repeat, function, array, array, numbers, comment, comment]
    return "\n".join(s.one(kinds)() for _ in range(s.number(8, 22)))


# ---------------------------------------------------------------------------------------------------------------------

DOMAINS = {"story": story, "arithmetic": arithmetic, "dialogue": dialogue, "code": code}


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice. A question is the beginning of a document, up to where what comes next is settled by what stands
# before. What is wrong there is right elsewhere, so that only the context tells them apart.
#
# Each kind of question is a function of a text: (where the right choice begins, where it ends, three wrong ones), or
# None where the text has no place for it.

LONGEST = 256       # characters of a context with any of its choices: the positions of the default run
NAME = "|".join(SHE + HE)
SORTS = [TRAITS + LOOKS, PLACES + SPOTS + THINGS, KINDS + JOBS, STUFF, FOODS, FEEL, MOVES + FINDS, HOW, WHERE]
ABOUT = {"Where": "search", "Who": "search", "How": "shop", "Will": "plan", "Shall": "trip", "Is": "family",
         "Do": "taste", "Why": "feel"}          # a dialogue's questions, by their first word


def beginning(s, write):
    """Of a new document, without half a word at the end"""
    return write(s)[:LONGEST].rpartition(" ")[0]


def match(s, pattern, text):
    found = list(re.finditer(pattern, text, re.M))
    return s.one(found) if found else None


def number(s, text, pattern):
    """The four are in a row. The right one may be any of them, so that none is a better guess."""
    m = match(s, pattern, text)
    if not m:
        return None
    right = int(m[1])
    low = max(0, right - s.number(0, 3))
    return *m.span(1), [str(x) for x in range(low, low + 4) if x != right]


def piece(s, text, write, pieces):
    """The wrong ones are pieces of other documents. pieces(text) gives (begin, end, sort); all four differ in sort."""
    found = list(pieces(text))
    if not found:
        return None
    begin, end, sort = s.one(found)
    sorts, wrong = [sort], []
    while len(wrong) < 3:
        other = beginning(s, write)
        fit = [p for p in pieces(other) if p[2] not in sorts]
        if fit:
            first, last, sort = s.one(fit)
            sorts.append(sort)
            wrong.append(other[first:last])
    return begin, end, wrong


def sort_of(word, sorts):
    """The number of the list that has the word; None where none has it, or more than one"""
    found = [i for i, words in enumerate(sorts) if word in words]
    return found[0] if len(found) == 1 else None


def animal(s, text):
    """Who is what. One of the wrong ones is the story's other animal."""
    m = match(s, rf"\b({NAME}) the (\w+)", text)
    if not m:
        return None
    kinds = {CAST[name] for name in re.findall(rf"\b({NAME})\b", text)}
    there = sorted(kinds - {m[2]})
    return *m.span(2), there + s.several([kind for kind in KINDS if kind not in kinds], 3 - len(there))


def sentence(s, text):
    """The end of a sentence, which begins with a word of a certain sort"""
    def pieces(text):
        for m in re.finditer(r"(?<= )(?=((\w+)[^.,?!\"\n]*\.))", text):
            sort = sort_of(m[2], SORTS)
            if sort is not None and not re.search(NAME, m[1]):
                yield *m.span(1), sort
    return piece(s, text, story, pieces)


def result(s, text):
    """Of a fact, a longer sum, a problem or a chain"""
    return number(s, text, r"(?: =| is|, sum) (\d+)[,.]")


def row(s, text):
    """The last number of a row with equal steps"""
    return number(s, text, r"^By \d+: .*, (\d+)\.")


def reply(s, text):
    """The wrong ones are to other questions."""
    def pieces(text):
        for m in re.finditer(r"(?=^\w+: (\w+).*\?\n\w+: (.*)\n)", text, re.M):
            if m[1] in ABOUT:
                yield *m.span(2), ABOUT[m[1]]
    return piece(s, text, dialogue, pieces)


def listener(s, text):
    """Who is spoken to, after the first line, which has both names. One of the wrong ones is the speaker."""
    m = match(s, rf"\n(\w+): .*, ({NAME})\b", text)
    if not m:
        return None
    names = re.findall(rf"\b({NAME})\b", text)
    return *m.span(2), [m[1]] + s.several([name for name in CAST if name not in names], 2)


def printed_word(s, text):
    """An item of a list, or one of two words"""
    def pieces(text):
        for m in re.finditer(r"\n> (\w+)\n", text):
            sort = sort_of(m[1], [KINDS, LOOKS, THINGS, FOODS, PLACES, JOBS])
            if sort is not None:
                yield *m.span(1), sort
    return piece(s, text, code, pieces)


def printed_number(s, text):
    """Of a loop, or the length of a list"""
    return number(s, text, r"(?:^print count.*|^for .*|^> \d+)\n> (\d+)\n")


QUESTIONS = {"stories": (story, [animal, sentence]), "arithmetic": (arithmetic, [result, row]),
             "dialogues": (dialogue, [reply, listener]), "programs": (code, [printed_word, printed_number])}


def question(s, task, kind, known, taken):
    """A context, the right choice, and wrong ones. The text `known` does not have the answer, `taken` not the context.
    None of the choices begins with another, which would always be the likelier one."""
    while True:
        text = beginning(s, QUESTIONS[task][0])
        found = kind(s, text)
        if found:
            begin, end, wrong = found
            context, choices = text[:begin - 1], sorted([text[begin:end], *wrong])
            clear = not any(y.startswith(x) for x, y in zip(choices, choices[1:]))
            fits = begin + max(map(len, choices)) <= LONGEST
            if clear and fits and text[:end] not in known and context not in taken:
                return context, text[begin:end], wrong


def requests(s, task, n, known):
    """The lines of n questions, one for each choice"""
    kinds, taken = QUESTIONS[task][1], set()
    for i in range(n):
        context, right, wrong = question(s, task, kinds[i % len(kinds)], known, taken)
        taken.add(context)
        choices = s.several([right, *wrong], 4)
        for idx, choice in enumerate(choices):
            yield {"request_type": "loglikelihood", "request": {"context": context, "continuation": " " + choice},
                   "task_name": task, "doc_id": i, "idx": idx, "label": choices.index(right)}


# ---------------------------------------------------------------------------------------------------------------------

def write_lines(path, rows):
    with open(path, "w", encoding="ascii", newline="\n") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def split(s, size):
    """Documents until they hold size bytes: (domain, text, bits). The domain is a choice like any other."""
    documents, total = [], 0
    while total < size:
        before = s.bits
        domain = s.one(list(DOMAINS))
        text = DOMAINS[domain](s)
        documents.append((domain, text, s.bits - before))
        total += len(text)
    return documents


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-bytes", type=int, default=4000000)
    parser.add_argument("--val-bytes", type=int, default=200000)
    parser.add_argument("--questions", type=int, default=100, help="of each task")
    options = parser.parse_args()
    if min(options.train_bytes, options.val_bytes, options.questions) < 1:
        sys.exit("make_corpus.py: --train-bytes, --val-bytes and --questions have to be positive")

    source, whole = Source(options.seed), {}
    try:
        os.makedirs(os.path.join(options.out, "tasks"), exist_ok=True)
        for name, size in (("train", options.train_bytes), ("val", options.val_bytes)):
            documents = split(source, size)
            write_lines(os.path.join(options.out, name + ".jsonl"),
                        ({"id": f"{domain}-{i:06d}", "text": text} for i, (domain, text, _) in enumerate(documents)))
            whole[name] = "\n\n".join(text for _, text, _ in documents) + "\n"
            with open(os.path.join(options.out, name + ".txt"), "w", encoding="ascii", newline="\n") as f:
                f.write(whole[name])
            print(f"{name}: {len(documents)} documents, {sum(len(text) for _, text, _ in documents)} bytes")
        entropy, size = {}, {}
        for domain in list(DOMAINS) + ["all"]:
            mine = [d for d in documents if domain in (d[0], "all")]
            size[domain] = sum(len(text) for _, text, _ in mine)
            entropy[domain] = sum(bits for _, _, bits in mine) / size[domain] if mine else None
        with open(os.path.join(options.out, "entropy.json"), "w", encoding="ascii", newline="\n") as f:
            json.dump({"bits_per_byte": entropy, "bytes": size, "seed": options.seed}, f, indent=2)
            f.write("\n")
        for task in QUESTIONS:
            write_lines(os.path.join(options.out, "tasks", task + ".jsonl"),
                        requests(source, task, options.questions, whole["train"]))
    except OSError as error:
        sys.exit(f"make_corpus.py: {error.filename or options.out}: {error.strerror}")
    print("entropy of the grammar's choices on the validation text, bits per byte:",
          ", ".join(f"{domain} {value:.3f}" for domain, value in entropy.items() if value is not None))


if __name__ == "__main__":
    main()
