#!/usr/bin/env python3
"""Writes conversations about the world of the default corpus, to fine-tune its model with, and questions to judge it.

    make_conversations.py --out DIR [--seed 1] [--conversations 12000] [--questions 1500] [--held-out 500]

DIR/sft.jsonl         {"kind", "messages": [{"role", "content"}, ...]}: conversations with right answers
DIR/questions.jsonl   {"id", "kind", "messages", "answers"}: questions to draw answers to, for pairs; each of "answers"
                      is right, and a conversation would have the first
DIR/held-out.jsonl    as questions.jsonl, to measure with

The world is that of make_corpus.py: who of its cast is what, and its arithmetic. The right answer to what nobody told
the model is a refusal: to names that are no one's there, and to what is the user's own. A question asks for a fact: a
name in certain words, a name that is no one's, two numbers. Three fifths of all facts are in the conversations alone, a
fifth in the questions, a fifth in the held-out ones, so that a right answer there is no repetition.

Most answers to a calculation in the conversations are the result at once, as people give it. The others work it out, as
the corpus does. Both are right. A small model adds badly at once, and well in steps.

The same seed gives the same bytes. Needs only Python 3.
"""
import argparse
import os
import sys
import zlib

import make_corpus as corpus
from make_corpus import CAST, Source, a, write_lines

NAMES = list(CAST)
ONE_WORD = "Answer in one word."
STRANGERS = [x + y for x in corpus.words("Al, Bo, Do, Fi, Ha, Jo, Ka, Lu, Mo, Pe, Ri, Sa, Ta, Ul, Ve, Zo")
             for y in corpus.words("ba, dik, fina, ger, lo, mas, nika, ra, rek, sa, ton, ward") if x + y not in CAST]
UNKNOWN = ["I can't know that", "I don't know that", "Nobody told me that"]
FIFTHS = {"sft": (2, 3, 4), "questions": (1,), "held-out": (0,)}    # of all facts
DIRECT = 0.6                            # of the answers to calculations give the result at once, the others work it out
LONGEST = 220                           # tokens of a conversation of two questions


class Question:
    """Messages up to one of the user's, and the right answers to it."""

    def __init__(self, kind, question, answers, before=()):
        self.kind, self.answers = kind, answers
        self.messages = [*before, message("user", question)]

    def conversation(self):
        return self.messages + [message("assistant", self.answers[0] + ".")]


def message(role, content):
    return {"role": role, "content": content}


def right(text, answers):
    """Whether what a model says is right: it begins with one of the answers, and there it or its sentence ends."""
    text = text.strip().lower()
    for answer in answers:
        if text.startswith(answer.lower()) and text[len(answer):len(answer) + 1] in ("", ".", "!", ";", "\n"):
            return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of questions. Each function draws one; w has the facts that it may ask for.

class World:
    """The facts of one of the three files."""

    def __init__(self, seed, side):
        self.seed, self.fifths = seed, FIFTHS[side]

    def draw(self, fact):
        """What the function draws, the first time that it is one of these facts."""
        while True:
            drawn = fact()
            if zlib.crc32(f"{self.seed} {drawn}".encode()) % 5 in self.fifths:
                return drawn


def opener(s):
    """More questions with the same fact"""
    return s.one(["", "", "", "Hello. ", "And now: "])


def who_is(s, name):
    return s.one([f"What kind of animal is {name}?", f"Who is {name}?", f"Tell me who {name} is.", f"What is {name}?",
                  f"Do you know {name}?", f"Which animal is {name}?", f"I met {name} today. Who is that?",
                  f"Is {name} a fox, a mole or what?", f"Say what {name} is.", f"{name} is what kind of animal?"])


def animal(s, w):
    def fact():
        name = s.one(NAMES)
        return name, who_is(s, name)

    name, question = w.draw(fact)
    kind = CAST[name]
    before, answers = [], [f"{name} is {a(kind)}", a(kind), f"{name} the {kind}", kind]
    if s.chance(0.3):
        before, answers = [message("system", ONE_WORD)], [kind]
    return Question("animal", opener(s) + question, answers, before)


def refusals(s):
    """All that are right, a conversation has any of them."""
    return s.several(UNKNOWN, len(UNKNOWN))


def stranger(s, w):
    name = w.draw(lambda: s.one(STRANGERS))
    return Question("stranger", opener(s) + who_is(s, name), refusals(s))


def refusal(s, w):
    when, past, thing, family = (s.one(x) for x in (corpus.WHEN, corpus.TIMES, corpus.THINGS, corpus.FAMILY))
    question = w.draw(lambda: s.either(
        lambda: f"What will the weather be {when}?",
        lambda: f"Will there be {a(s.one(corpus.STORMS))} {when}?",
        lambda: f"Where is my {s.one(corpus.LOOKS)} {thing}?",
        lambda: f"Who took my {thing} {when}?",
        lambda: f"What is the name of my {family}?",
        lambda: f"How old is my {family}?",
        lambda: f"What will I {s.one(corpus.TASKS)} {when}?",
        lambda: f"What did my {family} {s.one(['buy', 'sell', 'lose', 'paint'])} {past}?",
        lambda: f"Why is my {family} {s.one(corpus.FEEL)}?",
        lambda: f"Who is the {s.one(corpus.JOBS)} with the {s.one(corpus.LOOKS)} {thing}?"))
    return Question("refusal", question, refusals(s))


def either_way(s, result, steps):
    """Right answers to a calculation: the result at once, and how it is worked out."""
    answers = [str(result), steps]
    return answers if s.chance(DIRECT) else answers[::-1]


def addends(s, w):
    return w.draw(lambda: (s.number(11, 49), s.number(11, 49)))


def addition(s, x, y):
    """Worked out as the corpus does it, in columns."""
    ones, carry = x % 10 + y % 10, (x % 10 + y % 10) // 10
    tens = f"{x // 10} + {y // 10}{' + 1' if carry else ''} = {x // 10 + y // 10 + carry}"
    return either_way(s, x + y, f"{x} + {y}: {x % 10} + {y % 10} = {ones}, {tens}, sum {x + y}")


def total(s, w):
    x, y = addends(s, w)
    question = s.one([f"What is {x} + {y}?", f"How much is {x} + {y}?", f"Add {x} and {y}."])
    return Question("sum", question, addition(s, x, y))


def problem(s, w):
    x, y = addends(s, w)
    what = f"{s.one(corpus.LOOKS)} {s.one(corpus.THINGS)}s"
    does = s.one(["buys", "finds", "gets", "makes"])
    question = f"{s.one(NAMES)} has {x} {what} and {does} {y}. How many are there now?"
    return Question("problem", question, addition(s, x, y))


def difference(s, w):
    x, y = w.draw(lambda: (s.number(2, 20), s.number(1, 9)))
    text = f"{x + y} - {y}"
    question = s.one([f"What is {text}?", f"How much is {text}?", f"Calculate {text}."])
    return Question("difference", opener(s) + question, either_way(s, x, f"{text} = {x}"))


KINDS = {"animal": animal, "stranger": stranger, "refusal": refusal, "sum": total, "problem": problem,
         "difference": difference}
OFTEN = [animal, animal, stranger, refusal, difference] + 4 * [total, problem]      # kinds of a conversation


# ---------------------------------------------------------------------------------------------------------------------

def tokens(messages):
    """Of a conversation, a byte each: BOS; <|role|>, newline, content, newline of a message; EOS of an answer."""
    return 1 + sum(len(m["role"]) + 6 + len(m["content"]) + (m["role"] == "assistant") for m in messages)


def conversation(s, w):
    """A question and its answer, or now and then two. A system message would be for both, and so there is none."""
    q = s.one(OFTEN)(s, w)
    messages = q.conversation()
    if messages[0]["role"] != "system" and s.chance(0.3):
        first = s.one(OFTEN)(s, w)
        both = first.conversation() + messages
        if both[0]["role"] != "system" and tokens(both) <= LONGEST:
            messages = both
    return {"kind": q.kind, "messages": messages}


def questions(s, w, n):
    """n different questions, as many of every kind."""
    rows, seen, in_vain = [], set(), 0
    while len(rows) < n:
        if in_vain == 5000:
            sys.exit(f"make_conversations.py: there are no {n} different questions with facts of their own")
        kind = list(KINDS)[len(rows) % len(KINDS)]
        q = KINDS[kind](s, w)
        in_vain += 1
        if repr(q.messages) not in seen:
            in_vain = 0
            seen.add(repr(q.messages))
            rows.append({"id": len(rows), "kind": kind, "messages": q.messages, "answers": q.answers})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=12000)
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--held-out", type=int, default=500)
    options = parser.parse_args()
    s = Source(options.seed)
    try:
        os.makedirs(options.out, exist_ok=True)
        w = World(options.seed, "sft")
        sft = [conversation(s, w) for _ in range(options.conversations)]
        write_lines(os.path.join(options.out, "sft.jsonl"), sft)
        for side, n in (("questions", options.questions), ("held-out", options.held_out)):
            write_lines(os.path.join(options.out, side + ".jsonl"), questions(s, World(options.seed, side), n))
    except OSError as error:
        sys.exit(f"make_conversations.py: {error.filename or options.out}: {error.strerror}")
    print(f"{len(sft)} conversations, {sum(tokens(row['messages']) for row in sft)} tokens; "
          f"{options.questions} questions, {options.held_out} held out")


if __name__ == "__main__":
    main()
