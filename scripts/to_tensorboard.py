#!/usr/bin/env python3
"""Writes the logs of training runs as TensorBoard's event files.

    to_tensorboard.py OUT... [--follow]

OUT is the directory that `olmoe train --out` writes to. The events go to OUT/tensorboard, in the place of those of an
earlier call; `build/venv/bin/tensorboard --logdir OUT` shows them. The tags are the names of log.jsonl: `loss`, `mfu`,
`sent_bytes/rows`, `eval/downstream/copa_acc`, and of a report of the experts' balance `balance/layer 0/entropy`. A
number that was not finite is a NaN. The configuration is a text, `config`. With --follow it goes on as the log grows,
until Ctrl-C.

A line of the log has no time of its own: the newest is given that of the file, and those before it as many milliseconds
less as their steps took.

Needs the package tensorboard: `make venv`, then build/venv/bin/python scripts/to_tensorboard.py.
"""
import argparse
import json
import math
import os
import sys
import time

try:
    from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError as error:
    sys.exit(f"to_tensorboard.py: {error.name or error} is missing; make venv installs it, for build/venv/bin/python")

SUFFIX = ".olmoe"                           # of the files that this script wrote, and may remove


def fail(message):
    sys.exit(f"to_tensorboard.py: {message}")


class Log:
    """The lines of a log as they come, from where the last call ended."""

    def __init__(self, out):
        self.path = os.path.join(out, "log.jsonl")
        self.restart()

    def restart(self):
        self.offset, self.number, self.last = 0, 0, b""

    def replaced(self, f):
        """Is what was read no longer there? A run that resumes cuts its log off after the checkpoint's step."""
        f.seek(self.offset - len(self.last))
        return f.read(len(self.last)) != self.last

    def lines(self):
        """What is new, (was it read from the beginning, time of the file, records). A line without its line break, of
        a run that was killed or is writing, is not there yet."""
        with open(self.path, "rb") as f:
            if self.replaced(f):
                self.restart()
            first, records = self.offset == 0, []
            f.seek(self.offset)
            for line in f:
                if not line.endswith(b"\n"):
                    break
                self.offset, self.number, self.last = self.offset + len(line), self.number + 1, line
                try:
                    record = json.loads(line)
                except ValueError:
                    fail(f"{self.path}:{self.number}: not JSON; is this the log of a training run?")
                if not isinstance(record, dict) or not isinstance(record.get("ms", 0.0), (int, float)):
                    fail(f"{self.path}:{self.number}: this is not the log of a training run")
                records.append(record)
            return first, os.fstat(f.fileno()).st_mtime, records


def scalars(record, prefix=""):
    """(tag, number) of all that a line has, without its step and the counts of rows by expert."""
    for name, value in record.items():
        if prefix == "" and name == "balance":
            for l, layer in enumerate(value):
                yield from scalars({k: v for k, v in layer.items() if k != "counts"}, f"balance/layer {l}/")
        elif isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif value is None or isinstance(value, (bool, int, float)):
            if prefix or name != "step":
                yield prefix + name, math.nan if value is None else float(value)


def text_of(config):
    """The configuration as TensorBoard's text plugin shows it."""
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"))
    markdown = "".join(f"    {line}\n" for line in json.dumps(config, indent=1).split("\n"))
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[markdown.encode()],
                                    tensor_shape=tensor_shape_pb2.TensorShapeProto())
    return summary_pb2.Summary.Value(tag="config", metadata=metadata, tensor=tensor)


class Events:
    """The event file of a run."""

    def __init__(self, out):
        self.folder = os.path.join(out, "tensorboard")
        os.makedirs(self.folder, exist_ok=True)
        for name in os.listdir(self.folder):
            if name.startswith("events.out.tfevents.") and name.endswith(SUFFIX):
                os.remove(os.path.join(self.folder, name))
        self.writer = EventFileWriter(self.folder, filename_suffix=SUFFIX)
        self.empty = True

    def add(self, first, end, records):
        """Records whose last step ended at `end`. Where they are the first of the log and others were written, these
        are declared void."""
        steps = [record for record in records if "step" in record]
        at = end - sum(record.get("ms") or 0 for record in steps) / 1000
        if first and not self.empty and records:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.writer.add_event(event_pb2.Event(wall_time=at, step=0, session_log=start))
        for record in records:
            if "step" in record:
                at += (record.get("ms") or 0) / 1000
                values = [summary_pb2.Summary.Value(tag=tag, simple_value=x) for tag, x in scalars(record)]
            elif "config" in record:
                values = [text_of(record["config"])]
            else:
                continue
            summary = summary_pb2.Summary(value=values)
            self.writer.add_event(event_pb2.Event(wall_time=at, step=record.get("step", 0), summary=summary))
            self.empty = False
        self.writer.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="OUT", help="directory of a training run")
    parser.add_argument("--follow", action="store_true", help="go on as the log grows, until Ctrl-C")
    options = parser.parse_args()
    runs = [(Log(out), out) for out in options.runs]
    for log, out in runs:                   # all are looked at before anything is written
        while True:
            try:
                if not any("step" in record for record in log.lines()[2]) and not options.follow:
                    fail(f"{log.path}: no training step in it yet")
                break
            except OSError as error:
                if not options.follow or not os.path.isdir(out):
                    fail(f"{log.path}: {error.strerror}; name the --out directory of a training run")
            time.sleep(1)
        log.restart()
    try:
        written = [(log, Events(out)) for log, out in runs]
        for log, events in written:
            print(events.folder, flush=True)
        while True:
            for log, events in written:
                events.add(*log.lines())
            if not options.follow:
                break
            time.sleep(1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    for _, events in written:
        events.writer.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
