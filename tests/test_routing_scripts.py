"""Scripts about routing: what learned.py finds in a run, check_routing.py on counts made from the published values, and
the figures of plot_routing.py."""
import json
import math
import os
import random
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import check_routing
import routing_files
from made_up_routing import DOMAINS, agreeing, analysis, write, write_default_run, write_npy, write_step


def call(script, *words):
    return subprocess.run([sys.executable, ROOT / "scripts" / script, *map(str, words)], capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------
# Reading

def is_refused(path, words, parts=("coactivation", "vocabulary", "saturation")):
    with pytest.raises(routing_files.Unreadable) as caught:
        routing_files.read(str(path), parts)
    message = str(caught.value)
    assert words in message and str(path) in message and "\n" not in message, message


def good(**more):
    return analysis([[[0, 1], [2, 3]], [[1, 2], [3, 0]]], 4, {"a": (0, 1), "b": (1, 2)}, **more)


def changed(*keys, to):
    data = good(saturation={"top1": [0.5, 1], "topk": [None, 1]})
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    return json.dumps(data)


@pytest.mark.parametrize("text, words", [
    ("", "no JSON"), ("[1", "no JSON"), ("[" * 100000, "no JSON"), ('{"layers": NaN}', "no JSON"), ("[]", "no object"),
    ("{}", "layers is no number"), (changed("layers", to=True), "layers"), (changed("experts", to=0), "experts"),
    (changed("k", to=5), "k is 5, more than the 4 experts"), (changed("layers", to=3), "counts is not 3 x 4"),
    (changed("domains", to={}), "no domains"), (changed("domains", "a", to=7), 'domain "a" has no number'),
    (changed("domains", "b", "tokens", to=-1), 'domain "b" has no number of tokens'),
    (changed("domains", to={"b": {**good()["domains"]["b"], "tokens": 0}}), "no domain has a token"),
    (changed("domains", "b", "load_balancing_loss", to="8"), "load_balancing_loss"),
    (changed("domains", "b", "top1", 1, 3, to=-1), 'domain "b": top1 is not 2 x 4 counts'),
    (changed("coactivation", 1, 3, to=[0, 0, 0]), "coactivation is not 2 x 4 x 4"),
    (changed("coactivation_ranked", to=None), "coactivation_ranked is not"),
    (changed("vocabulary", to=[]), "vocabulary/input/by_layer is not 2"),
    (changed("vocabulary", "predicted", "by_expert", 0, to=[1, 1]), "vocabulary/predicted/by_expert is not 2 x 4"),
    (changed("vocabulary", "target", "top", 0, 0, to=[{"id": 1}]), "vocabulary/target/top is not 2 x 4"),
    (changed("saturation", to=[1, 1]), "saturation/top1 is not 2"),
    (changed("saturation", "topk", to=[1]), "saturation/topk is not 2"), (changed("step", to="1"), "step"),
    (changed("choices", to=3), "choices"), (changed("texts", to={"1": 1}), "texts")])
def test_what_is_refused(tmp_path, text, words):
    (tmp_path / "out.json").write_text(text)
    is_refused(tmp_path / "out.json", words)


def test_what_is_read(tmp_path):
    data = good(saturation={"top1": [0.5, 1], "topk": [None, 1]}, step=3, choices="x.npy", texts={"1": "\n"})
    path = str(write(tmp_path / "a.json", data))
    assert routing_files.read(path, ("coactivation", "vocabulary", "saturation")) == data
    less = {name: data[name] for name in ("layers", "experts", "k", "domains")}
    assert routing_files.read(str(write(tmp_path / "a.json", less))) == less
    empty = {"tokens": 0, "load_balancing_loss": None, "counts": [[0] * 4] * 2, "top1": [[0] * 4] * 2}
    path = str(write(tmp_path / "a.json", {**less, "domains": {"empty": empty, **less["domains"]}}))
    assert routing_files.read(path) == less             # as --max-tokens leaves a domain of documents
    is_refused(tmp_path / "none.json", "No such file")
    is_refused(tmp_path, "Is a directory")
    (tmp_path / "latin").write_bytes(b'{"a": "\xff"}')
    is_refused(tmp_path / "latin", "no JSON")


CHOICES = [[[0, 1], [2, 3]], [[1, 0], [3, 1]], [[2, 1], [0, 1]]]


@pytest.mark.parametrize("damage, words", [
    (lambda whole: whole[:-1], "not tokens x 2 x 2 bytes"), (lambda whole: whole + b"\0", "not tokens x 2 x 2 bytes"),
    (lambda whole: whole[:-1] + b"\4", "none of 4 experts"), (lambda whole: whole[:40], "no .npy file"),
    (lambda whole: b"", "no .npy file"), (lambda whole: whole.replace(b"PY\1", b"PY\2"), "no .npy file"),
    (lambda whole: whole.replace(b"|u1", b"|i1"), "not tokens x"),
    (lambda whole: whole.replace(b"False", b"True "), "not tokens x"),
    (lambda whole: whole.replace(b"(3, 2, 2)", b"(3, 4, 1)"), "not tokens x"),
    (lambda whole: whole.replace(b"(3, 2, 2)", b"(3, 2, x)"), "no .npy file"),
    (lambda whole: whole.replace(b"'shape'", b"'shade'"), "no .npy file"), (None, "No such file")],
    ids=["short", "long", "expert", "header", "empty", "version", "signed", "order", "shape", "word", "key", "none"])
def test_choices_that_are_refused(tmp_path, damage, words):
    path = write_step(tmp_path, 7, CHOICES, 4, {"a": (0, 3)})
    data, file = routing_files.read(str(path)), tmp_path / "routing-00000007.npy"
    assert list(routing_files.read_choices(str(path), data)) == [0, 1, 2, 3, 1, 0, 3, 1, 2, 1, 0, 1]
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    with pytest.raises(routing_files.Unreadable) as caught:
        routing_files.read_choices(str(path), data)
    assert words in str(caught.value) and str(file) in str(caught.value)


def test_saturation_by_its_definition():
    """Of random choices, against sets. (OLMoE's paper, section 5.1: the mean over tokens of |E(t) and E(T)| / k.)"""
    draw = random.Random(3)
    tokens, layers, experts, k = 50, 3, 7, 3
    early, late = ([[draw.sample(range(experts), k) for _ in range(layers)] for _ in range(tokens)] for _ in range(2))
    top1, topk = routing_files.saturation(*(bytes(e for token in choices for chosen in token for e in chosen)
                                            for choices in (early, late)), layers, k)
    for l in range(layers):
        pairs = [(a[l], b[l]) for a, b in zip(early, late)]
        assert math.isclose(top1[l], sum(a[0] == b[0] for a, b in pairs) / tokens)
        assert math.isclose(topk[l], sum(len(set(a) & set(b)) / k for a, b in pairs) / tokens)


def test_steps_are_compared_in_their_order(tmp_path):
    choices = [[[0, 1]], [[1, 2]], [[2, 0]], [[3, 1]]]
    paths = {step: write_step(tmp_path, step, agreeing(choices, 7, same), 7, {"a": (0, 4)})
             for step, same in ((20, 4), (9, 3), (100, 1))}
    files = [(str(path), routing_files.read(str(path))) for path in (paths[step] for step in (100, 9, 20))]
    last, points = routing_files.run_saturation(files)
    assert last == 100 and [step for step, *_ in points] == [9, 20]
    assert [top1 for _, top1, _ in points] == [[0.5], [0.25]]       # 9 changed the last token, too; 20 changed none
    assert routing_files.run_saturation(files[:1]) == (100, [])


# ------------------------------------------------------------------------------------------------
# learned.py

@pytest.fixture
def default_run(tmp_path):
    """Calls learned.py on a default run without tasks, whose bars are met but for those of its routing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "train.txt").write_text("hello\n" * 10000)
    (tmp_path / "val.txt").write_bytes(random.Random(1).randbytes(3000))
    (tmp_path / "entropy.json").write_text(json.dumps({"bits_per_byte": dict.fromkeys([*DOMAINS, "all"], 1.0)}))
    step = {"step": 4, "ms": 40.0, "val_loss": 1.0, "val_bpb": 1.25, "balance": [{"max_over_mean": 1.5, "dead": 0}]}
    (tmp_path / "run/log.jsonl").write_text(json.dumps(step) + "\n")
    return lambda: call("learned.py", tmp_path, tmp_path / "run")


SETTLING = " of the top 2 experts at step 3 are those of step 4; "


@pytest.mark.parametrize("settled, words, missed", [
    ((20, 40, 60), "0.75" + SETTLING + "0.25 at step 1, 0.12 at random", False),
    ((60, 70, 60), "0.75" + SETTLING + "0.75 at step 1", True),         # it has to rise
    ((8, 40, 60), "0.75" + SETTLING + "0.10 at step 1", True),          # random choices agree on 0.125
    ((20, 60), "0.75 of the top 2 experts at step 2 are those of step 3; 0.25 at step 1", False),
    ((60,), "- nothing to compare with: saturation needs the routing of three steps", True)],
    ids=["rises", "does_not_rise", "random", "three", "two"])
def test_bar_of_saturation(default_run, tmp_path, settled, words, missed):
    write_default_run(tmp_path, tmp_path / "run", settled=settled)
    done = default_run()
    line, = [line for line in done.stdout.splitlines() if "experts at step" in line or "saturation needs" in line]
    assert words in line and line.endswith("MISSED" if missed else "ok"), done.stdout
    assert done.returncode == missed and done.stderr == ""


def test_saturation_is_of_all_choices(default_run, tmp_path):
    """In another order they are the same."""
    write_default_run(tmp_path, tmp_path / "run")
    path = tmp_path / "run/routing-00000003.npy"
    whole = path.read_bytes()
    choices = whole[-80 * 4:]
    path.write_bytes(whole[:-80 * 4] + bytes(choices[i ^ 1] for i in range(len(choices))))
    assert "0.75" + SETTLING in default_run().stdout


def test_saturation_of_one_text(default_run, tmp_path):
    """Steps from before the validation text changed are not compared."""
    write_default_run(tmp_path, tmp_path / "run", settled=(1, 20, 40, 60))
    path = tmp_path / "run/routing-00000001.json"
    write(path, {**json.loads(path.read_text()), "text": "another"})
    assert "0.75 of the top 2 experts at step 4 are those of step 5; 0.25 at step 2, " in default_run().stdout


def test_bar_of_domains(default_run, tmp_path):
    write_default_run(tmp_path, tmp_path / "run")
    done = default_run()
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if "'s tokens" in line]
    assert lines == [f"1.00 of {name}'s tokens have expert {2 * i} of layer 0, of the others 0.00; 1.5 times that is "
                     f"0.00 ok" for i, name in enumerate(DOMAINS)]
    assert done.returncode == 0


@pytest.mark.parametrize("count, words", [(10, "0.50 of dialogue's"), (9, "0.45 of dialogue's"), (2, "0.10 of dialog")],
                         ids=["enough", "too_few", "below_uniform"])
def test_bar_of_one_domain(default_run, tmp_path, count, words):
    """Expert 9 of layer 1 has 1/3 of the other tokens, all of the stories. No other expert takes its uniform share of
    the dialogues, 1/8, even where no other token has it."""
    write_default_run(tmp_path, tmp_path / "run")
    data = json.loads((tmp_path / "routing.json").read_text())
    counts = data["domains"]["dialogue"]["counts"]
    counts[:] = [[2] * 16, [2] * 16]
    counts[1][9] = count                                                    # of 20 tokens
    write(tmp_path / "routing.json", data)
    done = default_run()
    line, = [line for line in done.stdout.splitlines() if "dialogue" in line]
    assert words in line and line.endswith("ok" if count == 10 else "MISSED") and done.returncode == (count != 10)
    assert ("expert 9 of layer 1, of the others 0.33; 1.5 times that is 0.50 " in line) == (count != 2)


def test_domains_of_random_choices(default_run, tmp_path):
    write_default_run(tmp_path, tmp_path / "run", apart=False, settled=(80, 160, 320), tokens=640)
    done = default_run()
    lines = [line for line in done.stdout.splitlines() if "'s tokens" in line]
    assert len(lines) == 4 and all(line.endswith("MISSED") for line in lines) and done.returncode == 1


@pytest.mark.parametrize("remove, words", [
    ("run/routing-*.json", "run/routing-*.json: no such file; remove {run} to start over"),
    ("routing.json", "/routing.json: no such file; remove {run} to start over"),
    ("run/routing-00000002.npy", "run/routing-00000002.npy: No such file or directory")],
    ids=["steps", "end", "choices"])
def test_a_run_without_routing(default_run, tmp_path, remove, words):
    write_default_run(tmp_path, tmp_path / "run")
    for path in tmp_path.glob(remove):
        path.unlink()
    done = default_run()
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.endswith(words.format(run=tmp_path / "run") + "\n"), done.stderr


def test_a_domain_is_missing(default_run, tmp_path):
    write_default_run(tmp_path, tmp_path / "run")
    data = json.loads((tmp_path / "routing.json").read_text())
    data["domains"]["val"] = data["domains"].pop("code")
    write(tmp_path / "routing.json", data)
    done = default_run()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "has no domain code" in done.stderr


def test_another_text_has_no_bars(default_run, tmp_path):
    (tmp_path / "entropy.json").unlink()
    assert default_run().returncode == 0
    write_default_run(tmp_path, tmp_path / "run", settled=(60, 40, 20))
    done = default_run()
    assert done.returncode == 0 and "0.25" + SETTLING in done.stdout and "MISSED" not in done.stdout


# ------------------------------------------------------------------------------------------------
# check_routing.py

def released(names, tokens=check_routing.TOKENS):
    """OUT.json whose counts are the published shares, of the texts with these names; other experts have none."""
    domains = {}
    for name in names:
        published = check_routing.published_name(name)
        counts, top1 = ([[0] * 64 for _ in range(16)] for _ in range(2))
        for layer, experts in zip(check_routing.LAYERS, check_routing.TOP8.get(published, ())):
            for expert, value in experts.items():
                counts[layer][expert] = round(value / 100 * tokens)
        for (layer, expert), value in check_routing.TOP1.get(published, {}).items():
            top1[layer][expert] = round(value / 100 * tokens)
        domains[name] = {"tokens": tokens, "counts": counts, "top1": top1,
                         "load_balancing_loss": check_routing.LOSS["base"].get(published)}
    return {"layers": 16, "experts": 64, "k": 8, "domains": domains}


TEXTS = ("arxiv", "b3g", "c4", "github_oss_with_stack", "wikipedia")


def test_published_values_are_whole():
    """A slip of typing in them would show: of each layer the four highest come first, in order, then the two lowest."""
    assert set(check_routing.TOP8) == {"arxiv", "github", "wikipedia", "book", "c4", "tulu"}
    for name, layers in [*check_routing.TOP8.items(), *((of, t["tulu"]) for of, t in check_routing.TUNED.items())]:
        for experts in layers:
            values = list(experts.values())
            assert values == sorted(values, reverse=True) and len(values) == (6 if len(layers[0]) == 6 else 4), name
            assert all(0 <= expert < 64 for expert in experts) and min(values[:4]) > 12.5 > max([0, *values[4:]]), name
            assert sum(values) < 800
    for name, experts in check_routing.TOP1.items():
        for (layer, expert), value in experts.items():
            assert value < check_routing.TOP8[name][check_routing.LAYERS.index(layer)][expert]


def test_the_published_values_agree_with_themselves(tmp_path):
    done = call("check_routing.py", write(tmp_path / "a.json", released(TEXTS)))
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.split()[0] in check_routing.TOP8 and line.count(".") == 3]
    assert done.returncode == 0 and len(rows) == 5 * 3 * 6 + 8 + 3, done.stdout + done.stderr
    assert all(line.endswith(" 0.00") for line in rows)
    assert "in order, in 15 of 15 layers" in done.stdout and "not in it: tulu" in lines
    assert lines[-2].startswith("load-balancing loss: 3 values, largest difference 0.00")
    assert lines[-1].startswith("percentage points: 98 values, largest difference 0.00")


def test_what_is_off_is_named(tmp_path):
    data = released(TEXTS)
    data["domains"]["github_oss_with_stack"]["counts"][7][2] += 3133             # 1.50 % of 208,896
    data["domains"]["wikipedia"]["top1"][15][57] -= 1044                        # 0.50 %
    data["domains"]["c4"]["load_balancing_loss"] -= 0.25
    done = call("check_routing.py", write(tmp_path / "a.json", data))
    lines = done.stdout.splitlines()
    off = [" ".join(line.split()) for line in lines[1:] if line.count(".") == 3 and not line.endswith(" 0.00")]
    assert off == ["c4 load-balancing loss 9.09 8.84 0.25", "github layer 7, expert 2 75.56 77.06 1.50",
                   "wikipedia layer 15, expert 57, first choice 32.62 32.12 0.50"], done.stdout
    assert "in order, in 14 of 15 layers" in done.stdout            # 2 is no longer below 17
    assert lines[-2:] == ["load-balancing loss: 3 values, largest difference 0.25 (c4)",
                          "percentage points: 98 values, largest difference 1.50 (github, layer 7, expert 2)"]


def test_other_names_and_releases(tmp_path):
    path = write(tmp_path / "a.json", released(("book", "github", "arxiv_texts", "poems"), 2048))
    done = call("check_routing.py", path)
    assert "percentage points: 59 values" in done.stdout and "poems" not in done.stdout, done.stdout
    assert "book: of 2,048 tokens; the published values are of 208,896" in done.stdout
    tulu = released(("tulu", "c4"))
    tulu["domains"]["tulu"]["counts"][0][21] = round(0.3691 * check_routing.TOKENS)
    done = call("check_routing.py", write(path, tulu), "--model", "sft")
    lines = done.stdout.splitlines()
    assert "tulu       layer  0, expert 21                      36.91    36.91        0.00" in lines
    assert "percentage points: 12 values" in lines[-1] and "largest difference 0.04 (c4)" in lines[-2], done.stdout
    assert call("check_routing.py", path, "--model", "dpo").stdout.count("tulu ") == 12


@pytest.mark.parametrize("change, words", [
    ({"k": 4}, "16 layers, 64 experts, k 4; OLMoE-1B-7B has 16, 64 and 8"), ({"layers": 4}, "counts is not 4 x 64"),
    ({"domains": {}}, "no domains"), ({"domains": released(["poems"])["domains"]}, "is a published one: arxiv, github"),
    ({"domains": released(["b3g", "book"])["domains"]}, "two domains are book"), (None, "No such file")],
    ids=["k", "layers", "empty", "others", "twice", "none"])
def test_what_cannot_be_compared(tmp_path, change, words):
    if change is not None:
        write(tmp_path / "a.json", {**released(["arxiv"]), **change})
    done = call("check_routing.py", tmp_path / "a.json")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and words in done.stderr


def test_help_has_the_command():
    assert "--seq 2048 --max-tokens 208896" in call("check_routing.py", "--help").stdout


# ------------------------------------------------------------------------------------------------
# plot_routing.py

# Reads a list of calls, each the words of one, and prints of each [what it said, {figure: what it shows}]. Only the
# calls whose last word is "draw" make real pictures.
DRIVER = r"""
import contextlib, io, json, sys, warnings
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import plot_routing
warnings.simplefilter("error")
save, figures = plot_routing.plt.Figure.savefig, plot_routing.figures
shown = {}

def texts(artist):
    return [(t.get_text(), t.get_fontsize()) for t in artist.findobj(plot_routing.matplotlib.text.Text) if t.get_text()]

def line(l):
    return {"label": l.get_label(), "marker": l.get_marker(), "colour": l.get_color(), "style": l.get_linestyle(),
            "points": [[float(x), None if y != y else float(y)] for x, y in zip(l.get_xdata(), l.get_ydata())]}

def described(axis):
    return {"title": axis.get_title(), "x": axis.get_xlabel(), "y": axis.get_ylabel(),
            "lines": [line(l) for l in axis.get_lines()],
            "bars": [bar.get_height() for bars in axis.containers for bar in bars],
            "image": [image.get_array().tolist() for image in axis.get_images()],
            "ticks": [[t.get_text() for t in of.get_ticklabels()] for of in (axis.xaxis, axis.yaxis)],
            "texts": [t.get_text() for t in axis.texts]}

def noted(*words):
    for name, figure in figures(*words):
        sizes = [size for _, size in texts(figure)]
        shown[name] = {"axes": [described(axis) for axis in figure.axes], "texts": [t for t, _ in texts(figure)],
                       "smallest": min(sizes), "inches": list(figure.get_size_inches())}
        yield name, figure

plot_routing.figures = noted
for words in json.load(sys.stdin):
    real = words[-1] == "draw"
    plot_routing.plt.Figure.savefig = save if real else lambda figure, file, **_: file.write(b"picture")
    sys.argv[1:] = words[:-1] if real else words
    shown.clear()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            plot_routing.main()
        except SystemExit as error:
            print(f"exit {error.code}")
    print(json.dumps([said.getvalue(), shown]))
"""

# k 2, 4 experts: the agreement of steps 1, 2 and 3 with step 4
RUN = [[[[0, 1], [2, 3]], [[3, 2], [2, 0]], [[0, 1], [1, 3]], [[2, 3], [0, 1]]],
       [[[0, 2], [3, 2]], [[3, 1], [2, 3]], [[0, 1], [1, 3]], [[3, 0], [0, 1]]],
       [[[0, 1], [3, 2]], [[3, 1], [2, 3]], [[0, 1], [3, 1]], [[2, 3], [1, 0]]],
       [[[0, 1], [2, 3]], [[3, 1], [2, 3]], [[0, 1], [3, 1]], [[3, 2], [0, 1]]]]
TOP1 = [[75, 100, 75], [75, 50, 50]]                    # layer, step
TOPK = [[87.5, 75, 100], [87.5, 100, 100]]
TWO = {"a": (0, 1), "b $x$ <\n": (1, 4)}


def worded():
    """A file with a vocabulary: three layers, 5 experts, k 3."""
    draw = random.Random(4)
    data = analysis([[draw.sample(range(5), 3) for _ in range(3)] for _ in range(30)], 5, TWO)
    for i, of in enumerate(data["vocabulary"].values()):
        of["by_layer"] = [0.1 * i + 0.2 * l for l in range(3)]
        of["by_expert"][1] = [0.5, None, 0.9, 0.3, 0.7] if i == 0 else [0.1 * i, 0.2 * i, 0.3 * i, None, 0.5 * i]
        of["by_expert"][2] = [0.25] * 5
    top = {kind: of["top"][1] for kind, of in data["vocabulary"].items()}
    top["input"][2] = [{"id": 7, "share": 1.0, "count": 12}, {"id": 8, "share": 0.5, "count": 10}]
    top["predicted"][2] = [{"id": 9, "share": 0.9, "count": 12}, {"id": 6, "share": 0.8, "count": 12}]
    top["input"][4] = [{"id": 10, "share": 0.25, "count": 99}] * 15
    top["predicted"][0] = [{"id": 11, "share": 0.995, "count": 10}]
    top["target"][3] = [{"id": 12, "share": 1.0, "count": 10}]          # is in no column
    data["texts"] = {"6": "", "7": " $a$ \n", "8": "\ud800世\x1b", "10": "the", "11": "x" * 40}
    return data


def olmoe_file():
    """OLMoE's shape, two texts of its authors."""
    return {**analysis([[list(range(8))] * 16], 64, {"a": (0, 1)}), **released(("b3g", "c4"))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """{name of a call: [what it said, {figure: what it shows}]}, and the folder."""
    pytest.importorskip("matplotlib", reason="figures of routing: needs python3-matplotlib")
    at = tmp_path_factory.mktemp("plot")
    for folder in ("run", "other", "models"):
        (at / folder).mkdir()
    for step in (4, 2, 1, 3):
        write_step(at / "run", step, RUN[step - 1], 4, TWO)
    write_step(at / "run", 9, RUN[0], 4, TWO, text="another")
    for name, step in (("early", 1), ("middle", 2)):
        saturation = {"top1": [0.25 * step, 0.5], "topk": [0.5, None]}
        write(at / f"models/{name}.json", good(model=f"x/{name}", later="x/final", saturation=saturation))
    write(at / "words.json", worded())
    write(at / "olmoe.json", olmoe_file())
    write(at / "one.json", analysis([[[0], [1]], [[2], [0]]], 3, {"a": (0, 2)}))
    (at / "torn.json").write_text('{"layers": ')
    for step in (1, 2):
        write_step(at / "other", step, RUN[0][:4 - step], 4, {"a": (0, 4 - step)})
    run = [str(at / f"run/routing-0000000{step}.json") for step in (3, 1, 4, 2, 1)]
    calls = {"run": [*run, "draw"], "texts": [*run, str(at / "run/routing-00000009.json")],
             "models": [str(at / f"models/{name}.json") for name in ("early", "middle")],
             "model": [str(at / "models/early.json"), "--out", str(at / "one-")], "words": [str(at / "words.json")],
             "last": [str(at / "words.json"), "--layer", "2"], "olmoe": [str(at / "olmoe.json")],
             "one": [str(at / "one.json")],
             "layer": [str(at / "words.json"), "--layer", "3", "--out", str(at / "no")],
             "folder": [str(at / "words.json"), "--out", str(at / "nowhere/x")],
             "shapes": [str(at / f"other/routing-0000000{step}.json") for step in (1, 2)],
             **{name: [str(at / "words.json"), str(at / name), "--out", str(at / "no")]
                for name in ("none.json", "torn.json")}}
    for name, folder in (("taken", "taken-tokens.svg"), ("half", "half-domains.svg.tmp")):
        (at / folder).mkdir()
        calls[name] = [str(at / "words.json"), "--out", str(at / name)]
    done = subprocess.run([sys.executable, "-c", DRIVER, ROOT / "scripts"], input=json.dumps(list(calls.values())),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"at": at, **dict(zip(calls, map(json.loads, done.stdout.splitlines())))}


NAMES = ("saturation", "coactivation", "domains", "vocabulary", "tokens")


def values(line):
    return [y for _, y in line["points"]]


def test_files_are_whole(drawn):
    said, figures = drawn["run"]
    prefix = drawn["at"] / "run/routing-00000004"
    assert list(figures) == list(NAMES[:4]) and "no table of tokens: no id occurs often enough" in said
    assert said.splitlines()[1:] == [f"{prefix}-{name}.{ending}" for name in figures for ending in ("png", "svg")]
    for name, figure in figures.items():
        png = (drawn["at"] / f"{prefix}-{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND"
        assert abs(int.from_bytes(png[16:20], "big") - 300 * figure["inches"][0]) <= 1          # for print at its size
        root = xml.etree.ElementTree.parse(f"{prefix}-{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(list(root.iter())) > 50


def test_fonts_can_be_read_in_print(drawn):
    """At least 8 points on a page's text width, as it is printed."""
    for call, (_, figures) in ((name, of) for name, of in drawn.items() if name != "at"):
        for name, figure in figures.items():
            assert figure["smallest"] >= 8 and 2 <= figure["inches"][0] <= 6.76, (call, name)


def test_saturation_of_a_run(drawn):
    """Against the last step, of each layer, whatever the order of the files, in which one was named twice."""
    axes = drawn["run"][1]["saturation"]["axes"]
    assert [axis["title"] for axis in axes] == ["first choice (top 1)", "all choices (top 2)"]
    assert axes[0]["y"] == "router saturation (%)\nagainst step 4" and axes[0]["x"] == "training step"
    for axis, of_layers, chance in zip(axes, (TOP1, TOPK), (25, 50)):
        *layers, at_random = axis["lines"]
        assert [line["points"] for line in layers] == [[[s, y] for s, y in enumerate(of, 1)] for of in of_layers]
        assert values(at_random) == [chance] * 2 and axis["texts"] == [f"random {chance}.0 %"]
        assert len({line["marker"] for line in layers}) == len({line["colour"] for line in layers}) == 2


def test_steps_of_another_text_are_not_compared(drawn):
    said, figures = drawn["texts"]
    assert [values(line) for line in figures["saturation"]["axes"][0]["lines"][:2]] == TOP1
    assert "routing-00000009-domains.png" in said           # the largest step is described


def test_saturation_of_models(drawn):
    top1, topk = drawn["models"][1]["saturation"]["axes"]
    assert top1["ticks"][0] == ["early", "middle"] and "against final" in top1["y"] and top1["x"] == "checkpoint"
    assert [values(line) for line in top1["lines"]] == [[25, 50], [50, 50], [25, 25]]
    assert [values(line) for line in topk["lines"]] == [[50, 50], [None, None], [50, 50]]
    top1, topk = drawn["model"][1]["saturation"]["axes"]
    assert top1["lines"][0]["points"] == [[0, 25], [1, 50]] and top1["x"] == "layer" and "early" in top1["y"]


def test_coactivation(drawn):
    """N_ij / N_i in %, nothing on the diagonal, and the experts of the highest scores first."""
    data = worded()
    axes = [axis for axis in drawn["words"][1]["coactivation"]["axes"] if axis["title"]]
    assert [axis["title"] for axis in axes] == ["layer 0", "layer 1", "layer 2"] * 2
    for i, axis in enumerate(axes):
        l, pairs = i % 3, data["coactivation" if i < 3 else "coactivation_ranked"]
        tokens = [data["coactivation"][l][e][e] for e in range(5)]
        experts = [int(text) for text in axis["ticks"][1]]
        assert sorted(experts) == list(range(5)) and axis["ticks"][0] == axis["ticks"][1]
        scores = [[100 * pairs[l][a][b] / tokens[a] for b in experts] for a in experts]
        for x, row in enumerate(axis["image"][0]):
            for y, score in enumerate(row):
                assert score is None if x == y else math.isclose(score, scores[x][y]), (i, x, y)
        best = max(score for x, row in enumerate(scores) for y, score in enumerate(row) if x != y)
        assert scores[0][1] == best or scores[1][0] == best
    assert len([axis for axis in drawn["run"][1]["coactivation"]["axes"] if axis["title"]]) == 2     # k is 2
    assert "a token has one expert" in drawn["one"][0] and "coactivation" not in drawn["one"][1]


def test_strongest_experts():
    """From the highest pair down: first those of 2 and 4, then 0, which comes with 4."""
    pytest.importorskip("matplotlib", reason="test_strongest_experts: needs python3-matplotlib")
    code = ("import sys; sys.dont_write_bytecode = True; sys.path.insert(0, sys.argv[1]); import plot_routing\n"
            "pairs, tokens = [[6, 0, 1, 0, 5], [0, 0, 0, 0, 0], [1, 0, 3, 0, 3], [0, 0, 0, 9, 1], [5, 0, 3, 1, 10]], "
            "[6, 0, 3, 9, 10]\n"
            "scores = plot_routing.pair_scores(pairs, tokens)\n"
            "print(scores[4], scores[1], *(plot_routing.strongest(scores, n) for n in (16, 3, 1)))")
    done = subprocess.run([sys.executable, "-c", code, ROOT / "scripts"], capture_output=True, text=True)
    assert done.stdout.strip() == \
        "[50.0, 0.0, 30.0, 10.0, None] [None, None, None, None, None] [2, 4, 0, 3] [2, 4, 0] [2]", done.stderr


def test_domains(drawn):
    data = worded()
    figure = drawn["words"][1]["domains"]
    axes = figure["axes"][:6]
    for i, axis in enumerate(axes):
        domain, l = list(data["domains"].values())[i // 3], i % 3
        for height, count in zip(axis["bars"], domain["counts"][l]):
            assert math.isclose(height, 100 * count / domain["tokens"])
        uniform, = axis["lines"]
        assert values(uniform) == [60, 60] and len(axis["bars"]) == 5
        assert axis["texts"] == [str(axis["bars"].index(max(axis["bars"])))]
    assert [axis["y"] for axis in axes if axis["y"]] == ["a", r"b \$x\$ <\n"]
    assert "uniform: 60.0 %" in figure["texts"] and "published" not in figure["texts"]


def test_published_values_are_beside_ours(drawn):
    axes = [axis for axis in drawn["olmoe"][1]["domains"]["axes"]]
    for i, axis in enumerate(axes[:6]):
        experts = check_routing.TOP8[("book", "c4")[i // 3]][i % 3]
        uniform, published = axis["lines"]
        assert values(uniform) == [12.5] * 2
        assert published["points"] == [[expert, value] for expert, value in experts.items()]
        assert all(abs(axis["bars"][expert] - value) < 0.01 for expert, value in experts.items())
    assert "published" in drawn["olmoe"][1]["domains"]["texts"]


def test_vocabulary(drawn):
    by_layer, by_expert = drawn["words"][1]["vocabulary"]["axes"][:2]
    kinds = ["input id", "next id in the text", "predicted next id"]
    assert [line["label"] for line in by_layer["lines"]] == kinds
    for i, line in enumerate(by_layer["lines"]):
        assert all(math.isclose(y, 10 * i + 20 * l) for l, y in enumerate(values(line)))
    assert by_expert["ticks"][0] == ["2", "4", "0", "3", "1"]               # by the input's; 1 owns no id
    dots, means = by_expert["lines"][::2], by_expert["lines"][1::2]
    assert [round(values(line)[0], 6) for line in means] == [20, 30, 40]
    assert [[y and round(y, 6) for y in values(line)] for line in dots] == [
        [90, 70, 50, 30, None], [30, 50, 10, None, 20], [60, 100, 20, None, 40]]
    assert len({line["marker"] for line in dots}) == len({line["colour"] for line in dots}) == 3
    assert "layer 2" in drawn["last"][1]["vocabulary"]["axes"][1]["title"]


def test_tokens(drawn):
    texts = drawn["words"][1]["tokens"]["texts"]
    assert texts[:3] == ["expert", "input ids of layer 1: token, share (%)", "predicted next ids: token, share (%)"]
    shown = texts[3:]
    assert shown[:5] == ["2", r"␣\$a\$␣\n", "100", "<D800><4E16><1B>", "50"]               # clearest favourites first
    assert shown[5:12] == ["#9", "90", "#6", "80", "0", "x" * 15 + "…", "100"]
    assert shown[12] == "4" and set(shown[13:]) == {"the", "25"} and 2 * 8 <= len(shown[13:]) < 2 * 15
    assert "tokens" not in drawn["last"][1] and "no table" in drawn["last"][0]


@pytest.mark.parametrize("call, words", [
    ("layer", "--layer 3: "), ("folder", "nowhere/x-"), ("none.json", "none.json: No such file"),
    ("torn.json", "torn.json: no JSON"), ("shapes", "of another shape than"), ("taken", "taken-tokens.svg: Is a dir"),
    ("half", "half-domains.svg: Is a directory")], ids=["layer", "folder", "none", "torn", "shapes", "taken", "half"])
def test_bad_input_writes_nothing(drawn, call, words):
    said, _ = drawn[call]
    last = said.splitlines()[-1]
    assert last.startswith("exit plot_routing.py: ") and words in last, said
    assert not any(line.startswith("exit") or "png" in line for line in said.splitlines()[:-1])
    written = [path.name for path in drawn["at"].rglob("*") if path.suffix in (".png", ".svg", ".tmp")]
    prefixes = ("no-", "x-", "taken-", "half-", "routing-00000001", "routing-00000002")
    assert sorted(name for name in written if name.startswith(prefixes)) == ["half-domains.svg.tmp", "taken-tokens.svg"]


def test_one_picture_for_each_file(drawn):
    assert (drawn["at"] / "one--saturation.svg").read_bytes() == b"picture"
    assert not [path for path in drawn["at"].rglob("*.tmp") if path.is_file()]
