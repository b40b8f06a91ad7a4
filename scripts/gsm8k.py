#!/usr/bin/env python3
"""GSM8K, word problems of arithmetic, by generation: makes prompts with examples, and scores what a model answers.

    gsm8k.py prompts --train train.jsonl --test test.jsonl --out prompts.jsonl [--shots 8] [--seed N] [--limit N]
    olmoe generate --model DIR --input prompts.jsonl --json --temperature 0 --max-tokens 512 --stop Question: > answers
    gsm8k.py score prompts.jsonl answers

The two sets are those of github.com/openai/grade-school-math: {"question", "answer"} a line, and an answer's last line
is "#### 18". All prompts have the same examples before their question, the first of the training set or, with --seed,
drawn from it, in this form:

    Question: <question>
    Answer: <its lines before the last one, without a calculator's notes such as <<48/2=24>> >
    The answer is 18.

An answer is right if the last number in it before the next "Question:" equals the set's: 18.00 is 18. A number is
digits, which may have commas before each three, and a decimal point with digits after it. A $ before it is passed over.
A - before it is its sign, unless a letter, a digit or a closing bracket is before that: 5-3 ends in 3. What follows, a
full stop or %, does not matter. No number is a wrong answer. With several samples of a prompt (generate --n) a question
counts as their mean.
"""
import argparse
import json
import random
import re
import statistics
import sys
from fractions import Fraction

from rows import whole

NUMBER = re.compile(r"((?<![\w)\]])-)?\$?"                            # sign
                    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)")


def fail(message):
    sys.exit(f"gsm8k.py: {message}")


def value(match):
    sign, digits = match.groups(default="")
    return Fraction(sign + digits.replace(",", ""))


def last_number(text):
    """The last number before the next question, or None"""
    numbers = list(NUMBER.finditer(text.split("Question:")[0]))
    return value(numbers[-1]) if numbers else None


def lines(path, *fields):
    """(where it is, object) of each line. Ends the program where a line is no object with these fields."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    found = json.loads(line)
                except ValueError:
                    fail(f"{where}: no JSON")
                for name, kind in fields:
                    if not isinstance(found, dict) or not isinstance(found.get(name), kind):
                        fail(f"{where}: no JSON object with {', '.join(name for name, _ in fields)}")
                yield where, found
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    except UnicodeDecodeError:
        fail(f"{path}: it is not UTF-8")


# ------------------------------------------------------------------------------------------------
# Prompts

def problems(path):
    """(question, reasoning, number as it is written) of each line of a set"""
    found = []
    for where, line in lines(path, ("question", str), ("answer", str)):
        reasoning, mark, number = line["answer"].rpartition("####")
        if not mark or not NUMBER.fullmatch(number.strip()):
            fail(f"{where}: the answer does not end in #### and a number")
        found.append((line["question"].strip(), re.sub("<<.*?>>", "", reasoning).strip(), number.strip()))
    return found


def example(question, reasoning, number):
    return f"Question: {question}\nAnswer: {reasoning}\nThe answer is {number}.\n\n"


def write_prompts(options):
    if options.shots < 0 or (options.limit is not None and options.limit < 1):
        fail("--shots is at least 0, and --limit at least 1")
    train, test = problems(options.train), problems(options.test)[:options.limit]
    if len(train) < options.shots:
        fail(f"{options.train}: {len(train)} problems, fewer than --shots {options.shots}")
    if not test:
        fail(f"{options.test}: no problem in it")
    shots = train[:options.shots] if options.seed is None else random.Random(options.seed).sample(train, options.shots)
    before = "".join(example(*shot) for shot in shots)
    try:
        with whole(options.out) as file:
            for i, (question, _, number) in enumerate(test):
                prompt = {"id": i, "prompt": f"{before}Question: {question}\nAnswer:", "answer": number}
                file.write((json.dumps(prompt, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        fail(f"{options.out}: {error.strerror or error}")
    print(f"{options.out}: {len(test):,} prompts with {options.shots} examples each")


# ------------------------------------------------------------------------------------------------
# Scores

def score(options):
    right, answers = {}, {}                 # id -> the right number; id -> {number of the sample: was it right?}
    unended = numberless = 0
    for where, line in lines(options.prompts, ("id", int), ("answer", str)):
        number = NUMBER.fullmatch(line["answer"])
        if not number or line["id"] in right:
            fail(f"{where}: the answer is no number, or the id was there before; make it by gsm8k.py prompts")
        right[line["id"]] = value(number)
    if not right:
        fail(f"{options.prompts}: no prompt in it")
    for where, line in lines(options.answers, ("id", int), ("sample", int), ("text", str)):
        if line["id"] not in right:
            fail(f"{where}: the id {line['id']} is none of {options.prompts}")
        samples = answers.setdefault(line["id"], {})
        if line["sample"] in samples:
            fail(f"{where}: the id {line['id']} was there before")
        number = last_number(line["text"])
        samples[line["sample"]] = number == right[line["id"]]
        numberless += number is None
        unended += line.get("finish") == "length" and "Question:" not in line["text"]
    missing = [i for i in right if i not in answers]
    if missing:
        fail(f"{options.answers}: {len(missing)} of {len(right)} prompts have no answer, the first the id {missing[0]}")
    report([statistics.fmean(samples.values()) for samples in answers.values()], unended, numberless)


def report(scores, unended, numberless):
    """scores: of each question. Their mean's standard error is sqrt(p (1 - p) / (n - 1)) where each has one sample."""
    n = len(scores)
    error = f"{statistics.stdev(scores) / n ** 0.5:.4f}" if n > 1 else "undefined"
    print(f"{n:,} questions: accuracy {statistics.fmean(scores):.4f}, standard error {error}")
    if numberless:
        print(f"without a number: {numberless:,} answers")
    if unended:
        print(f"cut off by generate's --max-tokens before they ended: {unended:,} answers")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="make the prompts")
    prompts.add_argument("--train", required=True, metavar="FILE.jsonl", help="the examples' set")
    prompts.add_argument("--test", required=True, metavar="FILE.jsonl", help="the questions' set")
    prompts.add_argument("--out", required=True, metavar="FILE.jsonl", help="for generate --input")
    prompts.add_argument("--shots", type=int, default=8, metavar="N", help="examples before a question (8)")
    prompts.add_argument("--seed", type=int, metavar="N", help="draw the examples; default: the first")
    prompts.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    scores = commands.add_parser("score", help="score the answers")
    scores.add_argument("prompts", metavar="PROMPTS.jsonl", help="as they were given to generate")
    scores.add_argument("answers", metavar="ANSWERS.jsonl", help="what generate --json printed")
    options = parser.parse_args()
    (write_prompts if options.command == "prompts" else score)(options)


if __name__ == "__main__":
    main()
