"""olmoe evaluate and the evaluations of training runs: the same figures from both, on any ranks and after a resume,
while the training stays the same bit for bit; and what is refused.

The program is ./olmoe, or what OLMOE names. That the figures are right is test_evaluate.py's.
"""
import gzip
import json
import os
import random
import shutil
import signal
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
CONFIG = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu", "vocab_size": 320,
          "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 96,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "norm_topk_prob": False, "eos_token_id": 256,
          "pad_token_id": 256, "initializer_range": 0.05, "tie_word_embeddings": False}
TIMES = {"ms", "tokens_per_s", "mfu"}       # of a step: they differ between runs
ROUNDING = 1e-5                             # relative: what the order of sums in fp32 may change


def request(doc=0, idx=0, label=0, context="A cat", continuation=" sat", **more):
    return {"request_type": "loglikelihood", "doc_id": doc, "idx": idx, "label": label,
            "request": {"context": context, "continuation": continuation}, **more}


def requests(n, seed):
    """n documents: of one context or of several, of one token or many"""
    draw, lines = random.Random(seed), []
    for doc in range(n):
        choices = draw.choice([1, 2, 3, 5])
        label, shared = draw.randrange(choices), draw.random() < 0.6
        for idx in range(choices):
            context = f"{doc} cats " * draw.choice([1, 1, 4]) if shared else f"{idx} dogs "
            continuation = draw.choice(["", " "]) + draw.choice(["7", "is it so", "no", "x" * draw.randrange(1, 90)])
            lines.append(request(doc, idx, label, context, continuation))
    draw.shuffle(lines)
    return lines


def write(path, lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return path


def tokens(path, n, seed):
    draw = random.Random(seed)
    path.write_bytes(struct.pack(f"<{n}H", *(draw.choice([draw.randrange(97, 123), 32, 256]) for _ in range(n))))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a config and tokens to train on, .npy; two sets and two tasks"""
    d = tmp_path_factory.mktemp("evaluate")
    (d / "config.json").write_text(json.dumps(CONFIG))
    tokens(d / "train.npy", 4000, 1)
    return SimpleNamespace(
        folder=d, sets=[tokens(d / "wiki.npy", 96 * 5 + 40, 2), tokens(d / "code.npy", 96, 3)],
        tasks=[write(d / "arc_easy.v2.jsonl.gz", requests(19, 4)), write(d / "mine.jsonl", requests(3, 5))])


def run(*words, ranks=1, code=0, cwd=None):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    threads = max(1, (os.cpu_count() or 1) // ranks)
    done = subprocess.run([*launcher, OLMOE, *map(str, words)], capture_output=True, text=True, timeout=300, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done


def train_words(files, out, *more):
    return ["train", "--config", files.folder / "config.json", "--tokenizer", "bytes",
            "--data", files.folder / "train.npy", "--out", out, "--steps", 5, "--batch", 2, "--seq", 48,
            "--warmup", 2, "--save-every", 2, "--peak-tflops", 1, *more]


def eval_words(files, *more):
    return ["--eval-tasks", *files.tasks, "--eval-perplexity", *files.sets, "--eval-every", 2, "--eval-start", *more]


def log(out):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "step" in line]


def evals(line):
    return {key: value for key, value in line.items() if key.startswith("eval/")}


@pytest.fixture(scope="module")
def watched(files):
    """A training run that is evaluated: its directory, and what it printed"""
    out = files.folder / "watched"
    return out, run(*train_words(files, out, *eval_words(files))).stdout


def figures_as_log(j):
    """What a log says of the figures of OUT.json"""
    line = {}
    for name, t in j["tasks"].items():
        line |= {f"eval/downstream/{name}_acc": t["acc"], f"eval/downstream/{name}_len_norm": t["acc_norm"],
                 f"eval/downstream_bpb/{name}_bpb": t["bpb"], f"eval/downstream_ce_loss/{name}_ce_loss": t["ce_loss"]}
    for name, s in j["perplexity"].items():
        line |= {f"eval/{name}/CrossEntropyLoss": s["loss"], f"eval/{name}/Perplexity": s["perplexity"]}
    return line


def test_the_figures_of_a_run_are_those_of_its_checkpoints(files, watched, tmp_path):
    out, said = watched
    lines = {line["step"]: evals(line) for line in log(out)}
    assert [step for step in lines if lines[step]] == [0, 2, 4, 5] and list(lines) == [0, 1, 2, 3, 4, 5]
    for step in (2, 4, 5):
        done = run("evaluate", "--model", out / f"step-{step:08}", "--tokenizer", "bytes", "--tasks", *files.tasks,
                   "--perplexity", *files.sets, "--batch", 2, "--json", tmp_path / "o.json")
        assert figures_as_log(json.loads((tmp_path / "o.json").read_text())) == lines[step]
        assert done.stdout in said
    assert lines[5] != lines[2]


def test_the_table_marks_what_olmo_reports(watched):
    rows = {line.split()[0]: line for line in watched[1].splitlines() if line.startswith("  ")}
    acc, mine = rows["arc_easy"].split(), rows["mine"].split()
    assert acc[1] == "19" and acc[2].endswith("*") and not acc[3].endswith("*") and "*" not in rows["mine"]
    assert mine[1] == "3" and rows["wiki"].split()[1] == str(5 * 95)


@pytest.mark.parametrize("more", [[], ["--recompute", 2, "--lb", "global"]], ids=["plain", "recompute"])
def test_evaluating_changes_nothing_of_the_training(files, tmp_path, more):
    """Its pieces are longer than the training's sequences, so that more memory is planned, too."""
    alone, with_evals = tmp_path / "alone", tmp_path / "evals"
    run(*train_words(files, alone, *more))
    run(*train_words(files, with_evals, *eval_words(files), *more))
    for step in (2, 4, 5):
        for file in (alone / f"step-{step:08}").iterdir():
            assert file.read_bytes() == (with_evals / f"step-{step:08}" / file.name).read_bytes()

    def lasting(out):
        return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("eval/")}
                for line in log(out) if line["step"] > 0]
    assert lasting(alone) == lasting(with_evals)


def close(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=ROUNDING), key


@pytest.mark.parametrize("ranks, more", [(2, []), (4, ["--ep", 2, "--zero", 1]), (3, ["--ep", 1])],
                         ids=["2", "4, experts over 2", "3"])
def test_ranks(files, tmp_path, ranks, more):
    """Each takes its share; with experts over ranks also the one that has nothing left joins in. Before training: what
    ranks change in the weights is another test's."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    shape = ["--steps", 1, "--batch", 1, "--global-batch", 12, *eval_words(files)]
    run(*train_words(files, whole, *shape))
    run(*train_words(files, out, *shape, *more), ranks=ranks)
    for a, b in zip(log(whole), log(out), strict=True):
        close(evals(a), evals(b))


@pytest.mark.parametrize("option", ["--eval-tasks", "--eval-perplexity"])
def test_ranks_that_see_other_files(files, tmp_path, option):
    """As where a disk is not shared"""
    folders = [tmp_path / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        if option == "--eval-tasks": write(folder / "file", [request(continuation=f" {number}")])
        else: tokens(folder / "file", 96, number)
    words = list(map(str, train_words(files, tmp_path / "out", option, "file")))
    done = subprocess.run(["mpirun", "--allow-run-as-root", "--oversubscribe", "-wdir", folders[0], "-np", "1", OLMOE,
                           *words, ":", "-wdir", folders[1], "-np", "1", OLMOE, *words],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert "olmoe: rank 1: the files of --eval-tasks or --eval-perplexity are not those that rank 0 sees" in done.stderr


def test_resuming(files, watched, tmp_path):
    """A resumed run's log has the figures of one that never stopped, and the line of step 0 once."""
    out = tmp_path / "run"
    run(*train_words(files, out, *eval_words(files), "--steps", 3))
    shutil.rmtree(out / "step-00000003")
    run(*train_words(files, out, *eval_words(files), "--resume"))
    lines = log(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [evals(line) for line in lines if line["step"] != 3] == [
        evals(line) for line in log(watched[0]) if line["step"] != 3]


def test_limit_seq_and_batch(files, watched, tmp_path):
    """--limit keeps documents whole; other batches give the same figures but for rounding."""
    model, found = watched[0] / "step-00000005", {}
    for name, more in {"all": [], "one": ["--batch", 1], "short": ["--seq", 90, "--batch", 50],
                       "few": ["--limit", 4, "--batch", 2]}.items():
        run("evaluate", "--model", model, "--tokenizer", "bytes", "--tasks", *files.tasks, "--perplexity", *files.sets,
            *more, "--json", tmp_path / "o.json", "--samples", tmp_path / f"{name}.jsonl")
        found[name] = json.loads((tmp_path / "o.json").read_text())
    close(figures_as_log(found["all"]), figures_as_log(found["one"]))
    assert found["short"]["perplexity"]["wiki"]["tokens"] == (96 * 5 + 40) // 90 * 89
    assert found["few"]["tasks"]["arc_easy"]["n"] == 4 and found["few"]["tasks"]["mine"]["n"] == 3
    assert found["few"]["perplexity"].keys() == found["one"]["perplexity"].keys()
    samples = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
               for name in ("all", "few")}
    kept = [s["doc_id"] for s in samples["few"] if s["task"] == "arc_easy"]
    assert kept == [s["doc_id"] for s in samples["all"] if s["task"] == "arc_easy"][:4]


BAD_LINES = {
    "no JSON": ("{", "not a JSON object"), "a list": ("[]", "not a JSON object"),
    "no doc_id": (request(idx=1), "doc_id is missing"),
    "a text for a number": (request(doc="seven"), 'doc_id is "seven"'), "a fraction": (request(idx=0.5), "idx is 0.5"),
    "a negative idx": (request(idx=-1), "idx is -1"), "true": (request(label=True), "label is true"),
    "no request": ({"doc_id": 0, "idx": 1, "label": 0}, "request is missing"),
    "no continuation": (request(idx=1), "continuation is missing"),
    "a context of numbers": (request(idx=1, context=[1, 2]), "context is [1,2]"),
    "another type": (request(request_type="generate_until"), 'request_type is "generate_until"'),
    "an empty continuation": (request(idx=1, continuation=""), "the continuation is empty"),
    "a space alone": (request(idx=1, continuation=" "), "the continuation is empty"),
    "a long continuation": (request(idx=1, continuation="x" * 97),
                            "the continuation has 97 tokens, more than --seq 96"),
    "two labels": (request(idx=1, label=1), "label is 1, but 0 on an earlier line of document 0"),
    "a choice twice": (request(), "document 0 has idx 0 already, on line 1"),
    "a large idx": (request(idx=5000), "idx is 5000"),
}
del BAD_LINES["no doc_id"][0]["doc_id"], BAD_LINES["no continuation"][0]["request"]["continuation"]
BAD_FILES = {
    "a choice missing": ([request(), request(idx=2)], "document 0 has no request with idx 1"),
    "a label beyond": ([request(label=2), request(idx=1, label=2)], "the label of document 0 is 2, of 2 choices"),
    "unconditional ones alone": ([request(doc=1000000)], "no request in it"),
    "blank lines": (["", " "], "no request in it"), "nothing": ([], "empty"),
}


def refused(words, *parts, **more):
    done = run(*words, code=1, **more)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("olmoe: ") and done.stdout == ""
    for part in parts:
        assert part in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(files, watched, tmp_path, name):
    line, reason = BAD_LINES[name]
    path = write(tmp_path / "bad.jsonl", [request(), line])
    refused(["evaluate", "--model", watched[0] / "step-00000005", "--tokenizer", "bytes", "--tasks", path, "--json",
             tmp_path / "o.json"], f"{path}:2: {reason}")
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(files, watched, tmp_path, name):
    lines, reason = BAD_FILES[name]
    path = write(tmp_path / "bad.jsonl", lines)
    refused(["evaluate", "--model", watched[0] / "step-00000005", "--tokenizer", "bytes", "--tasks", path],
            f"{path}: {reason}")


def test_other_bad_input(files, watched, tmp_path):
    model = watched[0] / "step-00000005"
    evaluate = ["evaluate", "--model", model, "--tokenizer", "bytes"]
    tasks, task = ["--tasks", files.tasks[0]], files.tasks[0]
    packed = gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in requests(50, 1)))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:len(packed) // 2])
    (tmp_path / "arc_easy.jsonl").write_bytes(b"")
    shutil.copy(files.sets[1], tmp_path / "wiki.npy")
    tokens(tmp_path / "short.npy", 50, 1)
    (tmp_path / "set.parquet").write_bytes(b"PAR1....PAR1")
    (tmp_path / ".jsonl").write_bytes(b"{}")
    refused(evaluate, "evaluate needs --tasks FILES or --perplexity FILES")
    refused(["evaluate", *tasks], "evaluate needs --model DIR")
    refused(evaluate[:3] + tasks, "tasks need a tokenizer")
    refused([*evaluate, *tasks, "--seq", 97], "97", "max_position_embeddings 96")
    refused([*evaluate, *tasks, "--seq", 1], "pieces of 1 token")
    refused([*evaluate, "--tasks", tmp_path / "cut.jsonl.gz"], "cut.jsonl.gz:", "damaged or cut short")
    refused([*evaluate, "--tasks", task, tmp_path / "arc_easy.jsonl"], "another file is named arc_easy")
    refused([*evaluate, "--perplexity", *files.sets, tmp_path / "wiki.npy"], "another file is named wiki")
    refused([*evaluate, "--perplexity", tmp_path / "short.npy"], "no sequence of 96 tokens", "short.npy")
    refused([*evaluate, "--tasks", tmp_path / "set.parquet"], "scripts/render_tasks.py makes requests of it")
    refused([*evaluate, "--tasks", tmp_path / ".jsonl"], "no name is left")
    refused([*evaluate, "--tasks", tmp_path / "none.jsonl"], "none.jsonl: cannot be read: No such file")
    refused([*evaluate, "--tasks", tmp_path], "not a regular file")
    refused([*evaluate, *tasks, "--json", tmp_path], "it is a directory")
    refused([*evaluate, *tasks, "--json", tmp_path / "no" / "o.json"], "o.json: No such file")
    refused([*evaluate, "--perplexity", files.sets[0], "--samples", tmp_path / "s"], "--samples needs --tasks")
    refused([*evaluate, *tasks, "--samples", tmp_path / "s", "--json", tmp_path / "s"], "are the same file")
    refused([*evaluate, *tasks, "--samples", tmp_path / "s", "--json", f"{tmp_path}/./s"], "are the same file")
    before = (tmp_path / "short.npy").read_bytes()
    refused([*evaluate, "--perplexity", tmp_path / "short.npy", "--json", f"{tmp_path}/./short.npy"],
            "short.npy is a file of --perplexity; name another")
    assert (tmp_path / "short.npy").read_bytes() == before
    refused([*evaluate, *tasks, "--json", tmp_path / ("x" * 252)], "File name too long")
    # In a training run: before its directory is there
    for words, reason in (([*eval_words(files, "--eval-tasks", task)], "another file is named arc_easy"),
                          (["--eval-every", 2], "--eval-every needs"), (["--eval-start"], "--eval-start needs"),
                          (["--eval-seq", 20], "--eval-seq needs"),
                          (["--eval-tasks", tmp_path / "cut.jsonl.gz"], "damaged or cut short"),
                          (["--eval-perplexity", files.sets[0], "--eval-seq", 100], "max_position_embeddings 96")):
        refused(train_words(files, tmp_path / "out", *words), reason)
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_written(files, watched, tmp_path):
    """The table is printed, the figures are written before the samples, the file that was there stays."""
    model, full = watched[0] / "step-00000005", "/dev/full"
    words = ["evaluate", "--model", model, "--tokenizer", "bytes", "--tasks", files.tasks[1], "--json", full]
    done = run(*words, code=1)
    assert done.stderr == f"olmoe: cannot write {full}: No space left on device\n" and "mine" in done.stdout
    out = tmp_path / "o.json"
    assert run(*words[:-1], out, "--samples", full, code=1).stderr.startswith(f"olmoe: cannot write {full}: ")
    before = out.read_bytes()
    run(*words[:-1], out, "--limit", 1)
    assert out.read_bytes() != before and json.loads(out.read_text())["tasks"]["mine"]["n"] == 1
    assert sorted(tmp_path.iterdir()) == [out]


def test_where_links_lead(files, watched, tmp_path):
    """A link stays, and its file is replaced; what standard output goes to keeps what is in it."""
    words = ["evaluate", "--model", watched[0] / "step-00000005", "--tokenizer", "bytes", "--tasks", files.tasks[1]]
    target, link, screen = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "screen.txt"
    link.symlink_to(target.name)
    target.write_text("before")
    run(*words, "--json", link)
    assert link.is_symlink() and json.loads(target.read_text())["tasks"]["mine"]["n"] == 3
    (tmp_path / "out").symlink_to("/proc/self/fd/1")            # as /dev/stdout
    screen.write_text("before\n")
    with screen.open("a") as out:
        subprocess.run([OLMOE, *map(str, words), "--json", tmp_path / "out"], stdout=out, check=True, timeout=300)
    said = screen.read_text()
    assert said.startswith("before\n  task ") and json.loads(said[said.index("{"):]) == json.loads(target.read_text())
    assert (tmp_path / "out").is_symlink() and not list(tmp_path.glob("*.tmp"))


def test_odd_names_and_ids(files, watched, tmp_path):
    """A name that is not UTF-8; document numbers of any size; one document has no standard error."""
    path = write(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), [request(999999), request(1000000), {"doc_id": 1 << 40}])
    said = run("evaluate", "--model", watched[0] / "step-00000005", "--tokenizer", "bytes", "--tasks", path,
               "--json", tmp_path / "o.json").stdout
    figures = json.loads((tmp_path / "o.json").read_text())["tasks"]["caf\ufffd"]
    assert figures["n"] == 1 and figures["acc_stderr"] is None and "nan" not in said
    run(*train_words(files, tmp_path / "run", "--eval-tasks", path, "--steps", 1))
    assert evals(log(tmp_path / "run")[-1])["eval/downstream/caf\ufffd_acc"] == 1


def test_a_stop_does_not_wait_for_an_evaluation(files, tmp_path):
    """The step is saved; the log has no figures that were not computed."""
    path, out = write(tmp_path / "long.jsonl", [request(n, context=f"{n:090}") for n in range(15000)]), tmp_path / "run"
    words = train_words(files, out, "--eval-tasks", path, "--eval-every", 1, "--eval-start")
    with subprocess.Popen([OLMOE, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("| out"):                        # near the end of the table, before the first step
                process.send_signal(signal.SIGTERM)
                break
        said = process.stdout.read()
        assert process.wait(timeout=300) == 0, said
    assert "no evaluation: the run was asked to stop" in said and "stopped at step 1 and saved" in said
    assert [(line["step"], evals(line)) for line in log(out)] == [(1, {})] and (out / "step-00000001").is_dir()


def test_damaged_weights(files, watched, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(watched[0] / "step-00000005", model)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    tensors = json.loads(data[8:8 + header])
    begin, end = tensors["lm_head.weight"]["data_offsets"]
    data[8 + header + begin:8 + header + end] = struct.pack("<f", float("nan")) * ((end - begin) // 4)
    weights.write_bytes(data)
    words = ["evaluate", "--model", model, "--tokenizer", "bytes", "--json", tmp_path / "o.json"]
    for more in (["--tasks", files.tasks[1]], ["--perplexity", files.sets[0]]):
        refused([*words, *more], "not finite; are the model's weights damaged?")
    assert not (tmp_path / "o.json").exists()
