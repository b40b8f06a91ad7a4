#!/usr/bin/env python3
"""Draws the course of one or several training runs: loss, validation, learning rate and expert load over the steps. Of
runs that evaluate, also the losses of their sets and the accuracies in their tasks; of runs that fine-tune, the loss
that they minimise, and what DPO and KTO make of answers.

    plot.py OUT... [--out FILE.png]

OUT is the directory that `olmoe train --out` wrote to, or its log.jsonl. The picture goes to plot.png in the first OUT.
Needs matplotlib (Debian: python3-matplotlib).
"""
import argparse
import json
import math
import os
import sys

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py: matplotlib is missing; install python3-matplotlib (make setup does) and run it with that "
             "python3")

# Of runs with --eval-every: title -> what stands before and after a set's or a task's name in the log's fields
EVALUATION = {"loss of evaluation sets (nats a token)": ("eval/", "/CrossEntropyLoss"),
              "accuracy in tasks": ("eval/downstream/", "_acc"),
              "accuracy in tasks, by log-probability a character": ("eval/downstream/", "_len_norm")}

# Of runs with --objective sft, dpo or kto: title -> fields of the log that are drawn together
FINE_TUNING = {"loss that is minimised": ["loss"],
               "log-probability of answers": ["chosen_logp", "rejected_logp"],
               "reward of chosen over rejected": ["reward_margin"],
               "pairs with the larger reward chosen": ["reward_accuracy", "val_reward_accuracy"],
               "KL estimate": ["kl", "val_kl"],
               "reward": ["chosen_reward", "rejected_reward"]}


def read(out):
    """The steps of a run, in order. A resumed run logs some steps twice: the last one counts."""
    path = os.path.join(out, "log.jsonl") if os.path.isdir(out) else out
    steps = {}
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        sys.exit(f"plot.py: {path}: {reason}; name the --out directory of a training run")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:
            if number == len(lines):        # a line without its line break: the run was killed, or is still writing
                continue
            sys.exit(f"plot.py: {path}:{number}: not JSON; is this the log of a training run?")
        if isinstance(record, dict) and "step" in record:
            steps[record["step"]] = record
    if not steps:
        sys.exit(f"plot.py: {path}: no training step in it yet")
    return [steps[step] for step in sorted(steps)]


def draw(axis, run, value, **style):
    """A curve of the steps where the run has the value; a single one is a dot, and none has no entry in the legend."""
    points = [(record["step"], value(record)) for record in run]
    points = [(step, y) for step, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
    if len(points) == 1:
        style["marker"] = "o"
    if points:
        axis.plot([step for step, _ in points], [y for _, y in points], **style)


def fine_tunes(run):
    return any("targets" in record for record in run)


def evaluated(runs, title):
    """The sets or tasks that any of the runs has something for: name -> field of the log"""
    before, after = EVALUATION[title]
    fields = dict.fromkeys(field for run in runs for record in run for field in record)
    return {field[len(before):-len(after)]: field for field in fields
            if field.startswith(before) and field.endswith(after)}


def panels_of(runs):
    """The titles of EVALUATION and FINE_TUNING that any of the runs has something for"""
    names = {name for run in runs if fine_tunes(run) for record in run for name in record if record[name] is not None}
    return [title for title in EVALUATION if evaluated(runs, title)] \
        + [title for title, fields in FINE_TUNING.items() if names.intersection(fields)]


def draw_evaluation(axis, title, runs, names):
    """One run: a colour a set or task. Several: a colour a run, and a line style a set or task."""
    for i, (run, name) in enumerate(zip(runs, names)):
        for j, (what, field) in enumerate(evaluated(runs, title).items()):
            colour, line, label = (f"C{j % 10}", "-", what) if len(runs) == 1 else \
                (f"C{i}", ("-", "--", ":", "-.")[j % 4], f"{name}: {what}")
            draw(axis, run, lambda r: r.get(field), color=colour, linestyle=line, linewidth=1, marker="o", markersize=3,
                 label=label)
    axis.set_title(title)


def draw_fine_tuning(axis, title, runs, names):
    """A colour a run, a line style a field; those of a validation are dots."""
    for i, (run, name) in enumerate(zip(runs, names)):
        for field, line in zip(FINE_TUNING[title], ("-", "--")):
            style = {"linestyle": line} if not field.startswith("val_") else {"marker": "o", "linestyle": "none"}
            label = field if len(runs) == 1 else f"{name}: {field}"
            if fine_tunes(run):
                draw(axis, run, lambda r: r.get(field), color=f"C{i}", label=label, linewidth=1, **style)
    axis.set_title(title)


def axes_of(more):
    """The figure with 2 x 2 axes, and below them `more`, in two columns"""
    rows = 2 + (more + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.5 * rows), sharex=True)
    axes = list(axes.flat)
    if more % 2:                            # the one above is then the lowest of its column
        axes.pop().set_visible(False)
        axes[-2].xaxis.set_tick_params(labelbottom=True)
    for axis in axes[-2:]:
        axis.set_xlabel("step")
    return figure, axes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="OUT", help="directory of a training run")
    parser.add_argument("--out", metavar="FILE.png", help="default: plot.png in the first OUT")
    options = parser.parse_args()
    runs = [read(out) for out in options.runs]
    first = options.runs[0]
    folder = first if os.path.isdir(first) else os.path.dirname(first) or "."
    picture = options.out or os.path.join(folder, "plot.png")

    names = [os.path.basename(os.path.abspath(out)) for out in options.runs]
    panels = panels_of(runs)
    figure, (loss, validation, rate, load, *below) = axes_of(len(panels))
    for axis, title in zip(below, panels):
        (draw_evaluation if title in EVALUATION else draw_fine_tuning)(axis, title, runs, names)
    for i, (name, run) in enumerate(zip(names, runs)):
        colour = f"C{i}"
        draw(loss, run, lambda r: r.get("ce_loss"), color=colour, label=name, linewidth=1)
        draw(validation, run, lambda r: r.get("val_bpb", r.get("val_loss")), color=colour, marker="o", markersize=3,
             label=name)
        draw(rate, run, lambda r: r.get("lr"), color=colour, label=name)
        layers = max(len(r.get("balance") or []) for r in run)
        for l in range(layers):
            def max_over_mean(r, l=l):
                balance = r.get("balance") or []
                return balance[l].get("max_over_mean") if l < len(balance) else None
            # One run: a colour a layer. Several: a colour a run, and fainter for deeper layers.
            if len(runs) == 1:
                style = {"color": f"C{l % 10}", "label": f"layer {l}"}
            else:
                style = {"color": colour, "alpha": 1 - 0.7 * l / layers, "label": name if l == 0 else None}
            draw(load, run, max_over_mean, linewidth=1, **style)

    loss.set_title("training loss (cross entropy, nats a token)")
    in_bits = any("val_bpb" in record for run in runs for record in run)
    in_nats = not any("chosen_logp" in record or "kl" in record for run in runs for record in run)
    validation.set_title("validation (bits a byte)" if in_bits else
                         "validation loss" + (" (nats a token)" if in_nats else ""))
    rate.set_title("learning rate")
    load.set_title("expert load, largest over mean" + (", by layer" if len(runs) == 1 else ""))
    load.axhline(1, color="grey", linewidth=0.5)
    for axis in (loss, validation, rate, load, *below):
        axis.grid(alpha=0.3)
        entries = axis.get_legend_handles_labels()[0]
        if entries and (len(runs) > 1 or axis is load or len(entries) > 1):
            axis.legend(fontsize=8 if len(entries) < 13 else 5, ncol=2 if axis is load or len(entries) > 12 else 1)
    figure.tight_layout()
    try:
        figure.savefig(picture, dpi=110)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {picture}: {getattr(error, 'strerror', None) or error}")
    print(picture)


if __name__ == "__main__":
    main()
