#!/usr/bin/env python3
"""Makes small models and rows, and what plain PyTorch in float64 computes when it fine-tunes them by SFT, DPO and KTO.

  reference_finetune.py --all tests/fixtures/finetune    the committed fixtures again

Writes DIR/model-NAME (a Hugging Face directory) for each of MODELS, and for each of CASES a directory with its rows and
expected.json: the options of `olmoe train`, the directories, how many rows are left out (bad) and dropped (without a
target), and of every step what log.jsonl should hold:

  loss, lb_loss, z_loss, grad_norm, lr, targets; ce_loss, the mean of -log p over the targets
  dpo: chosen_logp, rejected_logp, reward_margin, reward_accuracy
  kto: kl, chosen_reward, rejected_reward (null without such rows)

A number that is a difference of log-probabilities has their rounding error; log_probability is the size of the largest.

Sequences go through transformers' model one at a time, without padding. Rows become tokens, and tokens targets, as
open-instruct's finetune.py does it ("olmoe") or by offsets of characters ("assistant"). Seeds are tried from the
model's own upwards until, in all steps of all its cases, no token's K-th expert is nearer than MARGIN to the next one,
and PyTorch's float32 agrees with float64 within half of what the tests allow. Most of KTO's KL estimates have to be
above 0.
"""
import argparse
import gzip
import json
import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import reference
from reference import torch

import numpy
from tokenizers import Tokenizer, processors

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL = "tests/fixtures/tokenizer/tokenizer.json"
MARGIN = 1e-3


def die(message):
    print(f"reference_finetune.py: {message}", file=sys.stderr)
    sys.exit(1)


# What tests/test_objectives.py allows: of a value, of a norm, and of the log-probabilities that a value is made from.
RELATIVE, RELATIVE_NORM, OF_DIFFERENCES = 1e-5, 1e-4, 1e-6
DIFFERENCES = ("reward_margin", "kl", "chosen_reward", "rejected_reward")

# "other" has weights near those of its policy, so that log-ratios are a few nats.
MODELS = {
    "bytes": dict(tokenizer="bytes", end=256, vocab=261, hidden=36, heads=3, width=20, experts=6, topk=2, seed=120),
    "words": dict(tokenizer=REAL, end=982, vocab=1007, hidden=24, heads=2, width=16, experts=6, topk=2, seed=20),
}
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def talk(roles, *contents):
    return [{"role": ROLES[role], "content": content} for role, content in zip(roles, contents, strict=True)]


def text(prompt, completion, **more):
    return {"prompt": prompt, "completion": completion, **more}


def kto(label, prompt, completion, **more):
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def dpo(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected, **more}


# Headers have 9 bytes (user) and 14 (assistant). With --seq 72 the answer of 47 letters' question is cut off before its
# first byte: a target only for the mask that starts one token early. So is the completion of a prompt of 71 bytes.
SFT = [
    {"messages": talk("sua", "Be brief.", "Capital of France?", "Paris."), "source": "ignored"},
    {"messages": talk("uaua", "Hi", "Hello!", "1+1?", "2")},
    {"messages": talk("ua", "\u3000\u00a0Привет \u2003\x1c", "\u2028\n Да,\u00a0да.\u0085 ")},
    "not JSON",
    {"messages": talk("ua", "Say nothing.", " \n")},
    text("2+2 =", "4"),
    {"messages": talk("au", "Welcome.", "Thanks")},
    {"messages": talk("uaa", "Both", "One.", "Two.")},
    {"messages": talk("ua", "q" * 47, "not seen")},
    {"messages": talk("ua", "r" * 90, "not seen")},
    {"messages": [{"role": "tool", "content": "x"}, *talk("ua", "x", "y")]},
]
MORE = [
    {"messages": talk("ua", "Count", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16")},
    {"messages": talk("su", "Rules", "No answer")},
    {"messages": talk("ua", "", "What?\u200b")},
    {"messages": talk("suaua", "\u2029", "好", "😀", "", "\x1f\x85")},
    text("Q: why?\n", "So."),
    text("s" * 71, "z"),
    text("  raw", "\tkept  ", id=7),
    text("t" * 100, "not seen"),
    text("", "alone"),
    text("nothing", ""),
]
# Where the tokenizer joins what two parts have at their border, a prefix has another number of tokens than its part of
# the whole: only `olmoe`, which counts prefixes, and text rows, which count the prompt, are defined there.
WORDS = [
    {"messages": talk("sua", "You are good.", "What is it?", "It is 42.")},
    {"messages": talk("uaua", "Hello world", "new  time", "\u3000 où\u0085", "naïve cafe\u0301 \n")},
    {"messages": talk("ua", "What is that?", "the people")},
    {"messages": talk("ua", "日本語の文章", "東京は大きい。")},
    {"messages": talk("uaa", "", "", "This is the first.")},
    {"messages": talk("au", "We have more now.", "   ")},
    {"messages": talk("u", "only me")},
    text("Question: how many?\nAnswer:", "3<|endoftext|>"),
    text("good ", "people are here"),
    text("return 1", "  # two"),
    text("Привет", "мир"),
    text("don't", ""),
    text("all of their world and every word " * 5, "cut"),
    {"messages": talk("ua", "Count for me", "1 2 3 10 100 1000 1984 2024 " * 4)},
]
DPO = [
    pair(talk("ua", "2+3?", "5"), talk("ua", "2+3?", "6"), score=1),
    pair(talk("uaua", "Hi", "Hello!", "Bye", "See you."), talk("uaua", "Hi", "Hello!", "Bye", "No.")),
    dpo("Sky is", "blue", "a very long green thing that goes on, and on, and on and on to the end of it all"),
    pair(talk("sua", "Short.", "Я?", "Ты."), talk("sua", "Short.", "Я?", "")),
    pair(talk("ua", "v" * 60, "lost"), talk("ua", "why", "kept")),
    "{}",
    pair(talk("ua", "a?", "yes"), talk("u", "a?")),
    dpo("x =\n", "1", " 2"),
    pair(talk("aua", "Ask me.", "W?", "Z"), talk("aua", "Ask me.", "W?", "Zz")),
    pair(talk("uaa", "P", "Q", "R"), talk("ua", "P", "Q")),
    dpo("You", "\tme", ""),
    pair(talk("ua", "\u00a0 七", "\u2000八"), talk("ua", "七", "九九")),
    pair(talk("ua", "w" * 39, "lost"), talk("ua", "say", "one two three four five six seven eight nine ten")),
    dpo("u" * 63, "zz", "z"),
    dpo("k" * 70, "z", "zz"),
    pair(talk("ua", "Equal", "same"), talk("ua", "Equal", "same")),
]
DPO_WORDS = [
    pair(talk("ua", "What is 3.14?", "It is a number."), talk("ua", "What is 3.14?", "No.")),
    dpo("Question: who is it?\nAnswer:", "mister", "their people<|endoftext|>"),
    pair(talk("suaua", "Be good.", "1 2 3", "10", "100", "1000"), talk("suaua", "Be good.", "1 2 3", "10", "100", "1")),
    dpo("def f(x):\n", "    return x", "  print"),
    pair(talk("ua", "生活", "生活的真谛是爱。"), talk("ua", "生活", "\u3000naïve")),
    pair(talk("ua", "Which one?", "long " * 40), talk("ua", "Which one?", "")),
    dpo("don't you", "know", "see how it is"),
    dpo("if " * 60, "lost", "too"),
]
# In the order of the file, blocks of four: all true, all false, and a mixed one, in both of the forms.
KTO = [
    kto(True, "Name a colour", "red"),
    kto(True, talk("u", "Name a number"), talk("a", "one, two, three, four, five, six, seven, eight")),
    kto(True, "A prompt that leaves room for hardly anything else:\n", "x"),
    kto(True, talk("s", "Kind."), talk("ua", "And?", "So.")),
    kto(1, "a", "b"),
    kto(False, talk("u", "Зачем"), talk("a", " Не знаю\u00a0")),
    kto(False, "l" * 80, "lost"),
    kto(False, "Go", ""),
    kto(False, talk("uau", "a", "b", "c"), talk("a", "")),
    kto(False, "One ", "more of the words that go on and on and on and on"),
    kto(True, talk("u", "m" * 39), talk("a", "lost")),
    kto(True, talk("ua", "Start", "half of"), talk("a", "the rest")),
    kto(False, "", "from nothing"),
    kto(True, "n" * 63, "late"),
    kto(False, talk("u", "End?"), talk("aua", "Yes.", "Sure?", "No.")),
    kto(True, talk("u", "?"), talk("u", "!")),
    kto(False, "tail\t", "of it", weight=2),
    kto(True, talk("u", "left over"), talk("a", "perhaps")),
]
KTO_WORDS = [
    kto(True, talk("u", "What is your name?"), talk("a", "We have no name.")),
    kto(False, "Question: who are they?\nAnswer:", "people<|endoftext|>"),
    kto(True, "good ", "people would go"),
    kto(False, talk("ua", "Hello world", "word"), talk("ua", "日本語", "生活的真谛是爱。")),
    kto(True, "1 2 3", "10 100"),
    kto(False, talk("u", "def return import " * 9), talk("a", "lost")),
    kto(True, talk("su", "You are new here.", "How long is it?"), talk("a", "  3.14 2.718 and more  \n")),
    kto(False, "Привет", "мир мир мир мир мир мир мир мир мир мир мир мир мир мир мир мир мир мир мир мир мир"),
    kto(False, talk("u", "x"), talk("a", "")),
]

# A case's policy and its reference are "" (the model) or "-other".
CASES = {
    # Two epochs of three steps, the second one not to its end.
    "sft-assistant": dict(model="bytes", rows=[SFT, MORE], args="--seq 72 --batch 2 --global-batch 6 --steps 5 "
                          "--lr 2e-3 --warmup 1.5"),
    "sft-olmoe": dict(model="bytes", rows=[SFT, MORE], args="--label-mask olmoe --seq 72 --batch 2 --global-batch 4 "
                      "--steps 5 --order sequential --ce-divisor 64 --lr 1e-3 --warmup 0.75 --decay-steps 6.5 "
                      "--weight-decay 0.1 --grad-clip 0 --freeze router --beta2 0.95"),
    "sft-words": dict(model="words", rows=[WORDS], args="--label-mask olmoe --seq 48 --batch 2 --global-batch 4 "
                      "--steps 5 --ce-divisor all --lb-coef 0.5 --z-coef 0.1 --lr 1e-3 --warmup 1 --seed 5"),
    "dpo-assistant": dict(model="bytes", rows=[DPO], args="--seq 64 --batch 2 --global-batch 4 --steps 5 --lr 1e-3 "
                          "--warmup 0.5 --weight-decay 0.05"),
    "dpo-olmoe": dict(model="bytes", reference="-other", rows=[DPO], args="--label-mask olmoe --seq 64 --batch 2 "
                      "--global-batch 6 --steps 5 --beta 0.3 --lb-coef 0.05 --z-coef 0.02 --lr 1e-3 --warmup 0 "
                      "--freeze experts --grad-clip 0.5"),
    "kto-assistant": dict(model="bytes", rows=[KTO], args="--seq 64 --batch 2 --global-batch 4 --steps 5 "
                          "--order sequential --optimizer rmsprop --lr 1e-4 --weight-decay 0.1"),
    "kto-olmoe": dict(model="bytes", policy="-other", reference="", rows=[KTO], args="--label-mask olmoe --seq 64 "
                      "--batch 3 --global-batch 6 --steps 5 --beta 0.2 --lb-coef 0.02 --z-coef 0.01 --lr 1e-3 "
                      "--warmup 2.25 --decay-steps 7.5 --freeze router"),
    "dpo-words": dict(model="words", reference="-other", rows=[DPO_WORDS], args="--seq 40 --batch 2 --global-batch 6 "
                      "--epochs 4 --beta 0.5 --warmup 0 --eps 1e-6"),
    "kto-words": dict(model="words", reference="-other", rows=[KTO_WORDS], args="--seq 40 --batch 2 --global-batch 6 "
                      "--steps 5 --schedule constant --lr 1e-4 --warmup 0"),
}


def options(words):
    """What the command line of a case says, with the defaults of its objective."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--objective")
    for name, default in dict(label_mask="assistant", ce_divisor="valid", optimizer="adamw", freeze="", order="global",
                              schedule="hf-linear").items():
        parser.add_argument("--" + name.replace("_", "-"), default=default)
    for name in ("seq", "batch", "global_batch", "steps", "epochs"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    for name, default in dict(beta=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, grad_clip=1.0, lb_coef=0.0,
                              z_coef=0.0, warmup=None, decay_steps=None, lr=None).items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=default)
    parser.add_argument("--seed", type=int, default=6198)
    o = parser.parse_args(words)
    if o.lr is None:
        o.lr = 2e-5 if o.objective == "sft" else 5e-7
    if o.warmup is None:
        assert o.objective == "kto"         # the others' defaults are shares of the steps
        o.warmup = 0.0
    return o


# ------------------------------------------------------------------------------------------------
# Rows

class Encoder:
    """A text becomes ids and, for each, the characters that it comes from: [begin, end)."""

    def __init__(self, name, end):
        self.end = end
        self.tokenizer = None if name == "bytes" else Tokenizer.from_file(os.path.join(ROOT, name))
        if self.tokenizer:                  # the file's own post-processor shortens offsets by blanks
            self.tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self.end_text = "<|endoftext|>" if self.tokenizer else "\ue000"

    def __call__(self, text):
        if self.tokenizer:
            found = self.tokenizer.encode(text, add_special_tokens=False)
            return found.ids, found.offsets
        ids, offsets = [], []
        for at, character in enumerate(text):
            new = [self.end] if character == self.end_text else list(character.encode())
            ids, offsets = ids + new, offsets + [(at, at + 1)] * len(new)
        return ids, offsets

    def count(self, text):
        return len(self(text)[0])


class Sequence:
    """ids with BOS, not cut; target[i] says whether ids[i] is to be predicted; split is how many belong to the prompt
    when KTO's completions change places."""

    def __init__(self, ids, target, split=None):
        self.ids, self.target, self.split = ids, target, split

    def cut(self, length):
        ids, target = self.ids[:length], self.target[:length]
        return Sequence(ids, [False] + target[1:])      # nothing predicts the first token

    def targets(self):
        return sum(self.target)


def render(encoder, messages):
    """The template's text, before it is stripped as a whole, and each message's content in it: [begin, end)."""
    whole, contents = "", []
    for message in messages:
        content, begin = message["content"].strip(), len(whole) + len(f"<|{message['role']}|>\n")
        end = encoder.end_text if message["role"] == "assistant" else ""
        whole += f"<|{message['role']}|>\n{content}{end}\n"
        contents.append((begin, begin + len(content) + len(end)))
    return whole, contents


def encode_messages(encoder, messages, mask, context=0):
    """The first `context` messages are no targets, whoever speaks. open-instruct's loop, with its counts of text
    without BOS applied to ids with BOS; or the characters of the answers."""
    whole, contents = render(encoder, messages)
    ids, offsets = encoder(whole.strip())
    ids = [encoder.end] + ids
    answers = [i >= context and m["role"] == "assistant" for i, m in enumerate(messages)]
    split = None
    if mask == "olmoe":
        target = [True] * len(ids)
        for i, answer in enumerate(answers):
            if not answer:
                start = encoder.count(render(encoder, messages[:i])[0])
                header = "<|assistant|>\n" if i + 1 < len(messages) and messages[i + 1]["role"] == "assistant" else ""
                stop = encoder.count(render(encoder, messages[:i + 1])[0] + header)
                target[start:stop] = [False] * len(target[start:stop])
    else:
        target = [False] * len(ids)
    for (begin, end), answer in zip(contents, answers):
        if answer:
            inside = [i for i, (a, b) in enumerate(offsets, 1) if b > begin and a < end]
            if mask == "assistant":
                if offsets[inside[0] - 1][0] < begin or offsets[inside[-1] - 1][1] > end:
                    die(f"{messages}: a token is partly an answer; the mask `assistant` says nothing about such")
                for i in inside:
                    target[i] = True
            split = inside[0] if split is None else split
    return Sequence(ids, target, split)


def encode_text(encoder, prompt, completion, mask):
    blanks = (" ", "\n", "\t")
    between = "" if prompt.endswith(blanks) or completion.startswith(blanks) else " "
    ids = [encoder.end] + encoder(prompt + between + completion)[0]
    if ids[-1] != encoder.end:
        ids.append(encoder.end)
    split = 1 + encoder.count(prompt)
    first = split - 1 if mask == "olmoe" else split
    return Sequence(ids, [i >= first for i in range(len(ids))], split)


def check(objective, row):
    """Raises where a row is bad, as the cases have them; `olmoe` knows more."""
    if objective == "kto" and not isinstance(row["label"], bool):
        raise ValueError
    for value in row.values():
        if isinstance(value, list) and not all(m["role"] in ROLES.values() for m in value):
            raise ValueError


def sequences(encoder, o, row):
    """The sequences of one row: one, or chosen and rejected."""
    check(o.objective, row)
    if o.objective == "sft":
        if "messages" in row:
            return [encode_messages(encoder, row["messages"], o.label_mask)]
        return [encode_text(encoder, row["prompt"], row["completion"], o.label_mask)]
    if o.objective == "dpo":
        if "prompt" in row:
            return [encode_text(encoder, row["prompt"], row[side], o.label_mask) for side in ("chosen", "rejected")]
        return [encode_messages(encoder, row[side], o.label_mask) for side in ("chosen", "rejected")]
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return [encode_text(encoder, prompt, completion, o.label_mask)]
    return [encode_messages(encoder, prompt + completion, o.label_mask, len(prompt))]


class Row:
    def __init__(self, whole, o, label):
        self.whole, self.label = whole, label
        self.cut = [sequence.cut(o.seq) for sequence in whole]


def read_rows(files, encoder, o):
    """(rows that are kept, how many are bad, how many have no target) of files' lines."""
    kept, bad, dropped = [], 0, 0
    for line in (line for file in files for line in file):
        try:
            row = json.loads(line)
            made = Row(sequences(encoder, o, row), o, row.get("label"))
        except (ValueError, KeyError):
            bad += 1
            continue
        if all(sequence.targets() for sequence in made.cut):
            kept.append(made)
        else:
            dropped += 1
    return kept, bad, dropped


def mismatched(prompt, completion, o):
    """KTO: the whole prompt of one row and the whole completion of another, all of which are targets."""
    ids = prompt.ids[:prompt.split] + completion.ids[completion.split:]
    first = prompt.split - (o.label_mask == "olmoe")
    return Sequence(ids, [i >= first for i in range(len(ids))]).cut(o.seq)


def order(count, o):
    """For each step the numbers of its rows."""
    G = o.global_batch
    per_epoch = count // G
    assert per_epoch
    steps, epoch = o.steps or (o.epochs or 1) * per_epoch, 0
    result = []
    while len(result) < steps:
        numbers = numpy.arange(count, dtype=numpy.uint32)
        if o.order == "global":
            numpy.random.Generator(numpy.random.PCG64(o.seed + epoch)).shuffle(numbers)
        result += [numbers[b * G:(b + 1) * G].tolist() for b in range(per_epoch)]
        epoch += 1
    return result[:steps]


# ------------------------------------------------------------------------------------------------
# Training

class Policy:
    def __init__(self, model, freeze=""):
        self.model, self.margin = model, torch.inf
        frozen = {"": "nothing", "router": "mlp.gate.", "experts": "mlp.experts."}[freeze]
        for name, weight in model.named_parameters():
            weight.requires_grad_(frozen not in name)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]

    def __call__(self, batch):
        """The summed log-probabilities of each sequence's targets, and the routing of all."""
        lengths = [len(sequence.ids) for sequence in batch]
        logits, routers, choices = reference.forward(
            self.model, torch.tensor([sum((sequence.ids for sequence in batch), [])]), lengths)
        for z in routers:
            z = z.detach().sort(dim=-1, descending=True).values
            K = choices[0].shape[-1]
            self.margin = min(self.margin, (z[..., K - 1] - z[..., K]).min().item())
        sums = []
        for sequence, its in zip(batch, logits[0].split(lengths)):
            logp = its[:-1].log_softmax(dim=-1).gather(1, torch.tensor(sequence.ids[1:])[:, None])[:, 0]
            sums.append(logp[torch.tensor(sequence.target[1:])].sum())
        return torch.stack(sums), routers, choices


def rate(o, steps, s):
    """Of update s, from 1: get_linear_schedule_with_warmup, whose scheduler ticks after an update."""
    n, w, t = steps if o.decay_steps is None else o.decay_steps, o.warmup, s - 1
    if t < w:
        return o.lr * t / max(1, w)
    return o.lr if o.schedule == "constant" else o.lr * max(0, n - t) / max(1, n - w)


def optimizer_of(o, weights):
    if o.optimizer == "rmsprop":
        return torch.optim.RMSprop(weights, lr=o.lr, alpha=0.99, eps=o.eps, weight_decay=o.weight_decay, foreach=False)
    return torch.optim.AdamW(weights, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay,
                             foreach=False)


def objective(o, rows, logp, before, kl, step):
    """A micro-batch's part of a step's loss, times what the mean or the divisor still divides by; adds to the sums of
    what is logged. logp, before: of the rows' sequences, by the policy and the reference."""
    if o.objective == "sft":
        return -logp.sum()
    ratio = logp - before
    if o.objective == "dpo":
        margin = o.beta * (ratio[0::2] - ratio[1::2])
        step["chosen_logp"] += logp[0::2].detach().tolist()
        step["rejected_logp"] += logp[1::2].detach().tolist()
        step["reward_margin"] += margin.detach().tolist()
        return -torch.nn.functional.logsigmoid(margin).sum()
    sign = torch.tensor([1.0 if row.label else -1.0 for row in rows], dtype=logp.dtype)
    for row, reward in zip(rows, (o.beta * ratio).detach().tolist()):
        step["chosen_reward" if row.label else "rejected_reward"].append(reward)
    return (1 - (sign * o.beta * (ratio - kl)).sigmoid()).sum()


def train(o, rows, model, other):
    """(what each step logs, the smallest routing margin, the largest log-probability)."""
    policy, anchor = Policy(model, o.freeze), Policy(other)
    optimizer = optimizer_of(o, policy.weights)
    batches, log, largest = order(len(rows), o), [], 0.0

    def of_anchor(batch):
        with torch.no_grad():
            return anchor(batch)[0]

    # All of the reference's before the first step: --reference may be the model that is trained.
    own = [] if o.objective == "sft" else [of_anchor(row.cut) for row in rows]
    swapped = [[mismatched(rows[i].whole[0], rows[j].whole[0], o) for i, j in zip(numbers, reversed(numbers))]
               for numbers in batches if o.objective == "kto"]
    theirs = [of_anchor(batch) for batch in swapped]
    for s, numbers in enumerate(batches, 1):
        step = {"lr": rate(o, len(batches), s)}
        step.update({name: [] for name in {"sft": (), "dpo": ("chosen_logp", "rejected_logp", "reward_margin"),
                                           "kto": ("chosen_reward", "rejected_reward")}[o.objective]})
        kl = None
        if o.objective == "kto":
            with torch.no_grad():
                now = policy(swapped[s - 1])[0]
            kl = (now - theirs[s - 1]).mean().clamp(min=0)
            step["kl"], largest = kl.item(), max(largest, now.abs().max().item())
        all_rows = [rows[i] for i in numbers]
        step["targets"] = sum(sequence.targets() for row in all_rows for sequence in row.cut)
        tokens = sum(len(sequence.ids) for row in all_rows for sequence in row.cut)
        divisor = len(all_rows) if o.objective != "sft" else \
            {"all": tokens, "valid": step["targets"]}.get(o.ce_divisor) or float(o.ce_divisor)
        optimizer.zero_grad(set_to_none=False)
        main = total = lb = z = 0.0
        micro_batches = [numbers[i:i + o.batch] for i in range(0, len(numbers), o.batch)]
        for micro in micro_batches:
            logp, routers, choices = policy([sequence for i in micro for sequence in rows[i].cut])
            largest = max(largest, logp.detach().abs().max().item())
            part = objective(o, [rows[i] for i in micro], logp, torch.cat([own[i] for i in micro]) if own else None, kl,
                             step)
            its_lb, its_z = (x / len(micro_batches) for x in
                             reference.auxiliary(routers, choices, o.lb_coef, o.z_coef))
            (part / divisor + its_lb + its_z).backward()
            main, lb, z = main + part.item(), lb + its_lb.item(), z + its_z.item()
            total += logp.sum().item()
        step["ce_loss"] = -total / step["targets"]
        step.update(loss=main / divisor + lb + z, lb_loss=lb, z_loss=z)
        if o.objective == "dpo":
            margins = step["reward_margin"]
            if min(map(abs, margins)) > o.beta * OF_DIFFERENCES * largest:      # else rounding decides
                step["reward_accuracy"] = sum(margin > 0 for margin in margins) / len(margins)
        for name, values in step.items():
            if isinstance(values, list):
                step[name] = sum(values) / len(values) if values else None
        step["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.weights, o.grad_clip or torch.inf,
                                                           foreach=False).item()
        for group in optimizer.param_groups:
            group["lr"] = step["lr"]
        optimizer.step()
        log.append(step)
    return log, min(policy.margin, anchor.margin), largest


def allowed(name, wanted, o, largest):
    """How far a logged number may be from `wanted`."""
    tolerance = (RELATIVE_NORM if name == "grad_norm" else RELATIVE) * abs(wanted)
    if name in DIFFERENCES:
        tolerance += (1 if name == "kl" else o.beta) * OF_DIFFERENCES * largest
    return tolerance


# ------------------------------------------------------------------------------------------------
# Files

def lines_of(rows):
    """The first file of a case escapes what isn't ASCII, the second has it as it is."""
    return [[row if isinstance(row, str) else json.dumps(row, ensure_ascii=number == 0) for row in file]
            for number, file in enumerate(rows)]


def draw(name, seed):
    """A model and its neighbour, in float32. Routers are twice as sure as reference.py's."""
    m = argparse.Namespace(**{**reference.DEFAULTS, **MODELS[name], "seq": 96})
    generator = torch.Generator().manual_seed(seed)
    model = reference.draw_model(m, generator)
    model.config.eos_token_id = m.end
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(2)
    other = reference.twin(model, torch.float32)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=generator) * weight.std())
    return model, other


def run_case(name, pair_of_models):
    """expected.json's content, or why these models are not fit."""
    case = CASES[name]
    m, policy = MODELS[case["model"]], case.get("policy", "")
    args = f"--objective {name.split('-')[0]} {case['args']}".split()
    o = options(args)
    rows, bad, dropped = read_rows(lines_of(case["rows"]), Encoder(m["tokenizer"], m["end"]), o)

    def of_precision(dtype):
        of = dict(zip(("", "-other"), pair_of_models))
        return train(o, rows, *(reference.twin(of[name], dtype) for name in (policy, case.get("reference", policy))))
    with reference.Float64():
        log, margin, largest = of_precision(torch.float64)
    if margin < MARGIN:
        return None, f"{name}: a routing margin of {margin:.1e}"
    if o.objective == "kto" and sum(step["kl"] > 0 for step in log) < 3:
        return None, f"{name}: the clamp hides most of the KL estimates"
    worst, where = 0.0, ""
    for step, narrow in zip(log, of_precision(torch.float32)[0]):
        for field, wanted in step.items():
            if field in narrow and wanted is not None and wanted != narrow[field]:
                share = abs(narrow[field] - wanted) / max(allowed(field, wanted, o, largest), 1e-300)
                worst, where = max((worst, where), (share, field))
    if not worst < 0.5:
        return None, f"{name}: float32 differs by {worst:.2f} of what is allowed, {where}"
    expected = {"args": args, "tokenizer": m["tokenizer"], "model": f"../model-{case['model']}{policy}",
                "reference": f"../model-{case['model']}{case['reference']}" if "reference" in case else None,
                "data": ["rows.jsonl", "more.jsonl.gz"][:len(case["rows"])], "left_out": bad, "dropped_rows": dropped,
                "kept_rows": len(rows), "log_probability": largest, "steps": log}
    return expected, f"{name}: {len(rows)} rows kept, {dropped} dropped, {bad} left out; {len(log)} steps, loss " \
        f"{log[0]['loss']:.4f} to {log[-1]['loss']:.4f}; smallest margin {margin:.1e}; float32 off by {worst:.2f} of " \
        f"what is allowed ({where})"


def write_case(out, expected, lines):
    building = f"{out}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    os.makedirs(building)
    for file, content in zip(expected["data"], lines):
        raw = "".join(line + "\n" for line in content).encode()
        with open(f"{building}/{file}", "wb") as f:
            f.write(gzip.compress(raw, mtime=0) if file.endswith(".gz") else raw)
    fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in expected.items() if key != "steps"]
    steps = ",\n".join("  " + json.dumps(step, sort_keys=True) for step in expected["steps"])
    with open(f"{building}/expected.json", "w") as f:
        f.write("{" + ",\n ".join(fields) + ",\n \"steps\": [\n" + steps + "\n]}\n")
    shutil.rmtree(out, ignore_errors=True)
    os.rename(building, out)


def write_model(out, model):
    building = f"{out}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    os.makedirs(building)
    reference.write_model(building, model, torch.float32)
    shutil.rmtree(out, ignore_errors=True)
    os.rename(building, out)


def make(out, name, tries):
    """All cases of a model, with the first seed that is fit."""
    cases = [case for case, of in CASES.items() if of["model"] == name]
    for seed in range(MODELS[name]["seed"], MODELS[name]["seed"] + tries):
        models, results, said = draw(name, seed), {}, []
        for case in cases:
            results[case], line = run_case(case, models)
            said.append(line)
            if results[case] is None:
                print(f"{name}: not seed {seed}: {line}", flush=True)
                break
        else:
            break
    else:
        die(f"no fit seed for {name} in {tries}; give more --tries, or another seed in MODELS")
    print("\n".join([f"{name}: seed {seed}", *said]))
    for suffix, model in zip(("", "-other"), models):
        write_model(os.path.join(out, f"model-{name}{suffix}"), model)
    for case, expected in results.items():
        write_case(os.path.join(out, case), expected, lines_of(CASES[case]["rows"]))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", metavar="DIR", required=True, help="where to make them, replacing what is there")
    parser.add_argument("--model", choices=MODELS, help="only the cases of this model")
    parser.add_argument("--tries", type=int, default=1, metavar="N", help="seeds to try for a model (1)")
    arguments = parser.parse_args(words)
    reference.quiet()
    torch.set_num_threads(1)                # the same bits on any number of cores
    torch.use_deterministic_algorithms(True)
    for name in [arguments.model] if arguments.model else MODELS:
        make(arguments.all, name, arguments.tries)


if __name__ == "__main__":
    main()
