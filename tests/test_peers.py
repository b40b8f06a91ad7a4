"""olmoe against transformers on PyTorch, on shapes drawn by a seed, both ways:

  their directory -> our logits, routing, losses, gradients, AdamW steps (olmoe verify), of rows of equal length and of
  sequences of several lengths, which transformers runs one by one; prompts of several lengths (olmoe generate)
  our training -> a directory that transformers opens whole, and their logits, losses and gradients from it are ours
  the same rows -> SFT by transformers' Trainer, DPO and KTO by TRL's trainers

Run by `make test-peers`: build/venv/bin/python -m pytest tests/test_peers.py. PEER_SEED repeats a run, PEER_SHAPES sets
the number of shapes, OLMOE is the FP32 program (default ./olmoe); with OLMOE_BF16, directories that a BF16 program
writes are opened also.
"""
import argparse
import array
import json
import os
import random
import subprocess
import sys

import pytest

pytestmark = pytest.mark.peers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLMOE = os.path.abspath(os.environ.get("OLMOE", os.path.join(ROOT, "olmoe")))
PROGRAMS = {"fp32": OLMOE}
if os.environ.get("OLMOE_BF16"):
    PROGRAMS["bf16"] = os.path.abspath(os.environ["OLMOE_BF16"])
SEED = int(os.environ.get("PEER_SEED") or random.SystemRandom().randrange(10**6))
SHAPES = int(os.environ.get("PEER_SHAPES", 6))


def draw(number):
    """Options of reference.py. The first shapes each hold one special case."""
    r = random.Random(f"{SEED} {number}")
    heads, E = r.randint(1, 4), r.randint(2, 12)
    o = dict(layers=r.randint(1, 3), heads=heads, hidden=heads * r.choice([4, 6, 10, 16]), vocab=r.randint(16, 300),
             experts=E, topk=r.randint(1, E), width=r.randint(1, 40), batch=r.randint(1, 4), seq=r.randint(2, 70),
             rope_theta=r.choice([100.0, 10000.0, 500000.0]), rms_norm_eps=r.choice([1e-6, 1e-5, 1e-3]),
             norm_topk_prob=r.random() < 0.5, ignore=r.choice([0.0, 0.3]), lb_coef=10 ** r.uniform(-3, 0),
             z_coef=10 ** r.uniform(-3, 0), lr=10 ** r.uniform(-4, -2.5), beta1=r.choice([0.8, 0.9]),
             beta2=r.choice([0.95, 0.999]), eps=r.choice([1e-8, 1e-5]), weight_decay=r.choice([0.0, 0.1]),
             grad_clip=r.choice([0.0, 0.3, 1.0]), ce_divisor=r.choice(["valid", "all"]), seed=r.randrange(10**6))
    special = [dict(topk=1, norm_topk_prob=False), dict(topk=E), dict(seq=1),
               dict(seq=r.randint(257, 400), batch=1, layers=1), dict(experts=24, topk=2, batch=1, seq=5),
               dict(experts=1, topk=1)]
    return {**o, **(special[number] if number < len(special) else {})}


@pytest.fixture(scope="module", autouse=True)
def peers(request):
    """scripts/reference.py as a module. The seed is printed once, and with every failure."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nPEER_SEED={SEED}: {SHAPES} shapes, {' and '.join(PROGRAMS)} program", flush=True)
    try:
        sys.path.insert(0, os.path.join(ROOT, "scripts"))
        import reference
    except SystemExit:
        pytest.fail("test_peers.py needs torch and transformers: run it by `make test-peers`", pytrace=False)
    for program in PROGRAMS.values():
        if not os.access(program, os.X_OK):
            pytest.fail(f"{program} is not there; build it, or name it by OLMOE or OLMOE_BF16", pytrace=False)
    reference.quiet()
    return reference


def reference_directory(peers, path, options):
    """PyTorch's own float32 run has to agree with float64 on a shape; where a draw is too close to a tie, the next one
    is taken."""
    for attempt in range(20):
        words = ["--out", str(path), "--seed", str(options["seed"] + attempt)]
        for key, value in options.items():
            option = "--" + key.replace("_", "-")
            if isinstance(value, bool):
                words.append(option if value else option.replace("--", "--no-", 1))
            elif key != "seed":
                words += [option, str(value)]
        try:
            peers.main(words)
            return path
        except SystemExit:
            print(f"seed {options['seed'] + attempt} is not fit, drawing again")
    pytest.fail(f"no fit reference in twenty draws: {options}", pytrace=False)


def olmoe(*words, program=OLMOE):
    words = [program, *map(str, words)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=600)
    called = f"PEER_SEED={SEED} {' '.join(words)}"
    assert result.returncode == 0, f"{called}: exit {result.returncode}\n{result.stderr}{result.stdout}"
    return result.stdout


def without_gradients(peers, source, path, keep):
    """The same reference without its gradients, for the tighter limit of logits and losses."""
    with peers.safe_open(str(source), "pt") as file:
        names = [name for name in file.keys() if not name.startswith("grad.") and keep(name)]
        tensors = {name: file.get_tensor(name) for name in names}
        peers.write_safetensors(str(path), tensors, file.metadata())


@pytest.mark.parametrize("number", range(SHAPES))
def test_theirs_in_ours(peers, tmp_path, number):
    options = draw(number)
    print(f"PEER_SEED={SEED} {json.dumps(options)}")
    model = reference_directory(peers, tmp_path / "model", options)
    table = olmoe("verify", "--model", model, "--reference", model / "reference.safetensors")
    print(table)
    assert "they agree" in table.splitlines()[-1]
    losses = tmp_path / "losses.safetensors"
    without_gradients(peers, model / "reference.safetensors", losses, lambda name: True)
    olmoe("verify", "--model", model, "--reference", losses, "--rtol", "1e-5")


def draw_ragged(number, precision):
    """Options of reference.py for sequences of several lengths. 128 is a CPU build's ATTENTION_BLOCK."""
    r = random.Random(f"{SEED} ragged {number} {precision}")
    lengths = [1, 1, 1, r.randint(129, 170), *(r.randint(2, 60) for _ in range(r.randint(1, 3)))]
    ones = [1] * (r.randint(5, 20) if precision == "fp32" else 64)      # bf16's errors are those of many numbers
    special = [lengths, ones, [128, 1, r.randint(257, 280), 129], [r.randint(130, 200)], lengths]
    lengths = list(special[number]) if number < len(special) else lengths
    r.shuffle(lengths)
    options = {**draw(100 + number), "lengths": ",".join(map(str, lengths)), "ignore": 0.3,
               "weights": number != 4, "norm_topk_prob": number % 2 == 0, "steps": 3}
    del options["batch"], options["seq"]
    # Every token has to have its margin at all layers and ranks. bf16's has to be wide.
    options["topk"] = min(options["topk"], 4)
    if sum(lengths) > 300:
        options.update(layers=1, topk=min(options["topk"], 2))
    if precision == "bf16":
        options.update(bf16=True, margin=0.2, topk=min(options["topk"], 2), layers=min(options["layers"], 2), steps=0)
    return lengths, options


def edited(peers, source, path, edit):
    """The same reference after edit(tensors)."""
    with peers.safe_open(str(source), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        edit(tensors)
        peers.write_safetensors(str(path), tensors, file.metadata())
    return path


def failures(model, reference):
    """Names of the tensors that differ: at least one must."""
    words = [OLMOE, "verify", "--model", str(model), "--reference", str(reference)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1 and result.stdout.endswith("they DIFFER\n"), result.stdout + result.stderr
    return {line.split()[0] for line in result.stdout.splitlines() if "FAILED" in line}


@pytest.mark.parametrize("number", range(SHAPES))
def test_ragged(peers, tmp_path, number):
    """Sequences of several lengths in one micro-batch, with weights of the targets: transformers runs each sequence
    alone. Faults are seen: tokens that see another sequence, a weight that is another target's. (Positions that go on
    over the sequences' ends would be no fault: RoPE depends on their differences.)"""
    import torch
    lengths, options = draw_ragged(number, "fp32")
    print(f"PEER_SEED={SEED} {json.dumps(options)}")
    model = reference_directory(peers, tmp_path / "model", options)
    full = model / "reference.safetensors"
    print(olmoe("verify", "--model", model, "--reference", full))
    losses = tmp_path / "losses.safetensors"
    without_gradients(peers, full, losses, lambda name: True)
    olmoe("verify", "--model", model, "--reference", losses, "--rtol", "1e-5")

    def other_ends(tensors):
        wrong = [lengths[0] // 2, lengths[0] - lengths[0] // 2]
        if len(lengths) > 1:                # the shortest two neighbours become one, unless all their tokens are equal
            parts = tensors["inputs"][0].split(lengths)
            pairs = [i for i in range(len(lengths) - 1) if len(set(torch.cat(parts[i:i + 2]).tolist())) > 1]
            i = min(pairs, key=lambda i: lengths[i] + lengths[i + 1])
            wrong = [*lengths[:i], lengths[i] + lengths[i + 1], *lengths[i + 2:]]
        tensors["lengths"] = torch.tensor(wrong, dtype=torch.int32)

    def other_weights(tensors):
        tensors["weights"] = tensors["weights"].roll(1)

    wrong = tmp_path / "wrong.safetensors"
    assert "logits" in failures(model, edited(peers, full, wrong, other_ends))
    if options["weights"]:
        failed = failures(model, edited(peers, full, wrong, other_weights))
        assert {"ce_loss", "grad.lm_head.weight"} <= failed and not {"logits", "lb_loss", "z_loss"} & failed


@pytest.mark.skipif("bf16" not in PROGRAMS, reason="OLMOE_BF16 names no program")
@pytest.mark.parametrize("number", range((SHAPES + 1) // 2))
def test_ragged_bf16(peers, tmp_path, number):
    """Logits and losses as close as test_ours_in_theirs wants them; the gradients' limit is three times the error of
    the worst tensor of PyTorch's own bf16 runs."""
    options = draw_ragged(number, "bf16")[1]
    print(f"PEER_SEED={SEED} {json.dumps(options)}")
    model = reference_directory(peers, tmp_path / "model", options)
    full, logits = model / "reference.safetensors", tmp_path / "logits.safetensors"
    without_gradients(peers, full, logits, lambda name: True)
    print(olmoe("verify", "--model", model, "--reference", logits, program=PROGRAMS["bf16"]))
    with peers.safe_open(str(full), "pt") as file:
        worst = max(float(file.metadata()[f"bf16_{attention}_worst_grad"]) for attention in ("eager", "sdpa"))
    rtol = ["--rtol", max(0.03, 3 * worst)]
    print(olmoe("verify", "--model", model, "--reference", full, *rtol, program=PROGRAMS["bf16"]))


@pytest.mark.skipif("bf16" not in PROGRAMS, reason="OLMOE_BF16 names no program")
@pytest.mark.parametrize("worst, agrees", [(0.04, False), (0.08, True)])
def test_limit_of_a_gradient_in_bf16(peers, tmp_path, worst, agrees):
    """A gradient that is 1/6 off, where PyTorch's own bf16 run is `worst` off: three times that is allowed."""
    model, name = os.path.join(ROOT, "tests", "fixtures", "bf16"), "grad.lm_head.weight"
    with peers.safe_open(os.path.join(model, "reference.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = {**file.metadata(), **{f"bf16_{a}_worst_grad": str(worst) for a in ("eager", "sdpa")}}
    tensors[name] = tensors[name] * 1.2
    peers.write_safetensors(str(tmp_path / "edited.safetensors"), tensors, metadata)
    words = [PROGRAMS["bf16"], "verify", "--model", model, "--reference", str(tmp_path / "edited.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert [line.split()[0] for line in done.stdout.splitlines() if "FAILED" in line] == ([] if agrees else [name])
    assert done.returncode == (0 if agrees else 1), done.stdout + done.stderr


@pytest.mark.parametrize("number", range(2))
def test_prompts_of_several_lengths(peers, tmp_path, number):
    """Prompts in one batch, drawn tokens after them: their log-probabilities are those of transformers, which reads
    each text alone and whole."""
    import torch
    lengths, options = draw_ragged(4 * number, "fp32")
    model = reference_directory(peers, tmp_path / "model", {**options, "steps": 0})
    with peers.safe_open(str(model / "reference.safetensors"), "pt") as file:
        prompts = [part.tolist() for part in file.get_tensor("inputs")[0].long().split(lengths)]
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = max(lengths) + 8
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in prompts))
    theirs = peers.OlmoeForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager",
                                                    experts_implementation="eager", local_files_only=True)
    with peers.Float64():
        theirs = peers.twin(theirs, torch.float64)
    compared = 0
    for batch in (3, len(prompts)):
        lines = olmoe("generate", "--model", model, "--input", tmp_path / "in.jsonl", "--batch", batch, "--json",
                      "--logprobs", "--temperature", 1, "--max-tokens", 8, "--seed", options["seed"]).splitlines()
        assert len(lines) == len(prompts)
        for prompt, sample in zip(prompts, map(json.loads, lines)):
            text = torch.tensor([prompt + sample["ids"]])
            with torch.no_grad(), peers.Float64():
                logits, routers, _ = peers.forward(theirs, text)
            expected = logits[0].log_softmax(dim=-1)[:-1].gather(1, text[0, 1:, None])[len(prompt) - 1:, 0]
            # Up to the first token, if any, that either of two experts could have: prompts are drawn without such.
            ties = (peers.margins(routers, options["topk"])[0, len(prompt):] < 1e-4).nonzero()
            sure = int(ties[0]) + 1 if len(ties) else len(expected)
            for ours, wanted in zip(sample["logprobs"][:sure], expected.tolist()):
                assert abs(ours - wanted) < 1e-4, (prompt, sample, expected)
                compared += 1
    assert compared > 8 * len(prompts)


@pytest.mark.parametrize("precision", PROGRAMS)
@pytest.mark.parametrize("number", range(SHAPES))
def test_ours_in_theirs(peers, tmp_path, number, precision):
    import torch
    options = {**draw(number), "seq": 32}
    print(f"PEER_SEED={SEED} {json.dumps(options)}")
    shape = reference_directory(peers, tmp_path / "shape", {**options, "steps": 0})
    r = random.Random(f"{SEED} {number} tokens")
    tokens = array.array("H", [r.randrange(options["vocab"]) for _ in range(64 * 32)])
    (tmp_path / "tokens.npy").write_bytes(tokens.tobytes())
    olmoe("train", "--config", shape / "config.json", "--data", tmp_path / "tokens.npy", "--steps", 3, "--batch", 2,
          "--seq", 32, "--lr", 0.01, "--warmup", 0, "--eps", 1e-3, "--peak-tflops", 1, "--seed", options["seed"],
          "--out", tmp_path / "run", program=PROGRAMS[precision])
    ours = tmp_path / "run" / "step-00000003"

    model, loading = peers.OlmoeForCausalLM.from_pretrained(ours, output_loading_info=True, local_files_only=True)
    assert not any(loading.values()), loading
    assert model.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    config = peers.OlmoeConfig.from_pretrained(shape)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_experts", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps", "norm_topk_prob",
                  "rope_parameters", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        assert getattr(model.config, field) == getattr(config, field), field

    # Fresh routers choose by small differences: a margin that they reach, and that float32's rounding does not. The
    # more experts a token chooses, the more differences there are: then fewer tokens, so that some draw of them keeps
    # the margin.
    topk = options["topk"]
    theirs = reference_directory(peers, tmp_path / "theirs", {
        **options, "model": ours, "batch": 1 if topk > 2 else 2, "seq": max(2, min(32, 40 // topk)),
        "margin": 0.001 if topk <= 2 else 0.0001})
    full = theirs / "reference.safetensors"
    if precision == "fp32":
        print(olmoe("verify", "--model", ours, "--reference", full))
    logits = tmp_path / "logits.safetensors"
    without_gradients(peers, full, logits, lambda name: precision == "fp32" or name != "losses")
    rtol = ["--rtol", "1e-5"] if precision == "fp32" else []
    print(olmoe("verify", "--model", ours, "--reference", logits, *rtol, program=PROGRAMS[precision]))


def test_attention_errors(peers):
    """tests/fixtures/attention.safetensors has the errors of PyTorch's bf16 attention. They depend on the processor."""
    import reference_attention
    with peers.safe_open(os.path.join(ROOT, "tests", "fixtures", "attention.safetensors"), "pt") as file:
        committed = file.metadata()
    found = reference_attention.errors()
    assert found.keys() == committed.keys() and len(found) == 24
    for name, error in found.items():
        assert 0.8 <= float(error) / float(committed[name]) <= 1.25, (name, error, committed[name])


def test_layerwise(peers, tmp_path):
    """scripts/reference_layerwise.py, which never holds a whole model, computes bit for bit what transformers' whole
    model does."""
    import reference_layerwise as layerwise
    import torch
    r = random.Random(f"{SEED} layerwise")
    heads, E = r.randint(1, 4), r.randint(2, 12)
    shape = dict(num_hidden_layers=r.randint(1, 4), hidden_size=heads * r.choice([6, 10, 16]),
                 num_attention_heads=heads, num_key_value_heads=heads, num_experts=E,
                 num_experts_per_tok=r.randint(1, E), intermediate_size=r.randint(1, 40),
                 vocab_size=r.randint(16, 300), max_position_embeddings=64, eos_token_id=0, pad_token_id=1,
                 norm_topk_prob=r.random() < 0.5, rope_theta=r.choice([100.0, 10000.0]),
                 rms_norm_eps=r.choice([1e-5, 1e-3]))
    print(f"PEER_SEED={SEED} {json.dumps(shape)}")
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    subprocess.run([sys.executable, os.path.join(ROOT, "scripts", "make_random_model.py"), "--out", tmp_path / "model",
                    "--config", tmp_path / "shape.json", "--shard-bytes", "50000"], check=True)
    path = tmp_path / "reference.safetensors"
    layerwise.main(["--model", str(tmp_path / "model"), "--out", str(path), "--batch", "2", "--seq", "33"])
    with peers.safe_open(str(path), "pt") as file:
        got, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()

    def whole(dtype, attention):
        model = peers.OlmoeForCausalLM.from_pretrained(
            tmp_path / "model", dtype=dtype, attn_implementation=attention, experts_implementation="eager",
            local_files_only=True)
        assert model.config.rope_parameters["rope_theta"] == shape["rope_theta"]
        assert model.config.rms_norm_eps == shape["rms_norm_eps"]
        with torch.no_grad():
            return peers.forward(model, got["inputs"].long())
    reference = logits, routers, choices = whole(torch.float32, "eager")
    assert torch.equal(got["logits"], logits)
    for l in range(shape["num_hidden_layers"]):
        assert torch.equal(got[f"router.{l}.logits"], routers[l])
        assert torch.equal(got[f"router.{l}.experts"], choices[l].int())
    for attention in ("eager", "sdpa"):
        for what, error in layerwise.errors(whole(torch.bfloat16, attention), reference).items():
            assert metadata[f"bf16_{attention}_{what}"] == f"{error:.3e}"
    print(olmoe("verify", "--model", tmp_path / "model", "--reference", path))


# ------------------------------------------------------------------------------------------------
# Fine-tuning: transformers' Trainer, TRL's DPOTrainer and KTOTrainer. They read the rows themselves, with a chat
# template, make tokens of them, cut them and drop what has no target.

TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'].strip() + eos_token }}{% endgeneration %}\
{% else %}{{ m['content'].strip() }}{% endif %}\
{% if not (loop.last and m['role'] == 'assistant') %}{{ '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
FINETUNE = os.path.join(ROOT, "tests", "fixtures", "finetune")
RATE, BETA, LENGTH = 1e-3, 0.2, 40


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


# No answer begins where the tokenizer would join it to what is before it: TRL then cuts elsewhere. And as a pair's
# prompt TRL takes all messages that both sides share, which moves both log-probabilities but no difference of them.
SFT_MESSAGES = [
    [system("Be good."), user("What is it?"), assistant("It is 42.")],
    [user("Hello world"), assistant("new  time"), user("\u3000 où\u0085"), assistant("naïve cafe\u0301 \n")],
    [user("日本語の文章"), assistant("東京は大きい。")],
    [user(""), assistant(""), assistant("This is first.")],
    [assistant("We have more now."), user("   ")],
    [user("Count"), assistant("1 2 3 10 100 1000 1984 2024 " * 6)],
    [user("Who?"), assistant("  \n")],
    [user("What  is 3.14?"), assistant("No.")],
]
DPO_MESSAGES = [
    {"chosen": [user("What is 3.14?"), assistant("It is a number.")],
     "rejected": [user("What is 3.14?"), assistant("No.")]},
    {"chosen": [user("1 2 3"), assistant("10"), user("100"), assistant("1000 is more")],
     "rejected": [user("1 2 3"), assistant("10"), user("100"), assistant("1")]},
    {"chosen": [user("生活"), assistant("生活的真谛是爱。")], "rejected": [user("生活"), assistant("\u3000naïve")]},
    {"chosen": [user("Which one?"), assistant("long " * 40)], "rejected": [user("Which one?"), assistant("")]},
]
DPO_TEXTS = [
    {"prompt": "Question: who is it?\nAnswer:", "chosen": "mister", "rejected": "their people<|endoftext|>"},
    {"prompt": "def f(x):\n", "chosen": "    return x", "rejected": "  print"},
    {"prompt": "if " * 60 + "if", "chosen": "lost", "rejected": "too"},
    {"prompt": "don't you", "chosen": "know", "rejected": "see how it is"},
    {"prompt": "1 2 3", "chosen": "10 " * 40, "rejected": "Привет мир"},
]
KTO_MESSAGES = [
    {"prompt": [user("What is your name?")], "completion": [assistant("We have no name.")], "label": True},
    {"prompt": [system("You are new here."), user("How long is it?")], "completion": [assistant(" 3.14 and more \n")],
     "label": True},
    {"prompt": [user("def return import " * 9)], "completion": [assistant("lost")], "label": False},
    {"prompt": [user("x")], "completion": [assistant("")], "label": False},
    {"prompt": [user("Hello"), assistant("world"), user("日本語")], "completion": [assistant("生活的真谛是爱。")],
     "label": False},
    {"prompt": [user("def f(x): return x " * 2)], "completion": [assistant("int int int int int int")], "label": True},
    {"prompt": [user("One")], "completion": [assistant("1 2 3 10 100 1000 1984 2024 " * 5)], "label": False},
]
KTO_TEXTS = [
    {"prompt": "Question: who are they?\nAnswer:", "completion": "people<|endoftext|>", "label": False},
    {"prompt": "1 2 3", "completion": "10 100", "label": True},
    {"prompt": "Привет", "completion": "мир " * 50, "label": False},
    {"prompt": "if " * 60 + "if", "completion": "lost", "label": True},
    {"prompt": "don't you see\n", "completion": "what it is", "label": False},
    {"prompt": "def return import " * 5 + "def", "completion": "some other words than these", "label": True},
    {"prompt": "because", "completion": "", "label": True},
]


@pytest.fixture(scope="module")
def trainers(peers):
    """What a trainer of theirs needs: a function that trains for one epoch in the order of the rows, and gives of every
    step the loss, unrounded, with what else the trainer logs."""
    import datasets
    import torch
    from transformers import PreTrainedTokenizerFast, get_linear_schedule_with_warmup
    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=os.path.join(ROOT, "tests", "fixtures", "tokenizer", "tokenizer.json"),
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|padding|>")
    tokenizer.chat_template = TEMPLATE

    def model(name):
        loaded = peers.OlmoeForCausalLM.from_pretrained(os.path.join(FINETUNE, name), dtype=torch.float32,
                                                        attn_implementation="eager", local_files_only=True)
        loaded.config.pad_token_id = tokenizer.pad_token_id
        return loaded

    def train(Trainer, Config, folder, rows, batch, accumulation=1, settings={}, **more):
        policy = model("model-words")
        losses, margins = [], []

        class Recording(Trainer):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                losses.append(loss.item())
                return loss
        optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, eps=1e-6, weight_decay=0.0)
        steps = len(rows) // (batch * accumulation)
        scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps)
        K = policy.config.num_experts_per_tok
        for layer in policy.model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, output: margins.append(output[0].detach()))
        trainer = Recording(
            model=policy, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows),
            optimizers=(optimizer, scheduler), args=Config(
                output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                max_steps=steps, train_sampling_strategy="sequential", logging_steps=1, report_to=[], use_cpu=True,
                bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", max_grad_norm=1.0,
                **settings), **more)
        trainer.train()
        log = [line for line in trainer.state.log_history if "grad_norm" in line]
        assert len(log) == steps and len(losses) == steps * accumulation
        for line, at in zip(log, range(0, len(losses), accumulation)):
            line["loss"] = sum(losses[at:at + accumulation])
        # No choice of an expert may hang on float32's rounding. Padding's tokens count, too.
        z = torch.cat([x.reshape(-1, x.shape[-1]) for x in margins]).sort(dim=-1, descending=True).values
        assert (z[:, K - 1] - z[:, K]).min() > 1e-5
        return log
    return argparse.Namespace(train=train, model=model, tokenizer=tokenizer)


def ours(folder, objective, rows, G, batch, reference=None):
    """log.jsonl of olmoe train with the same rows and options."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--reference", os.path.join(FINETUNE, reference)] if reference else []
    olmoe("train", "--objective", objective, "--model", os.path.join(FINETUNE, "model-words"), *words, "--tokenizer",
          os.path.join(ROOT, "tests", "fixtures", "tokenizer", "tokenizer.json"), "--data", folder / "rows.jsonl",
          "--out", folder / "run", "--seq", LENGTH, "--batch", batch, "--global-batch", G, "--order", "sequential",
          "--lr", RATE, "--eps", 1e-6, "--warmup", 0, "--decay-steps", len(rows) // G, "--beta", BETA,
          "--peak-tflops", 1)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line for line in log if "step" in line]


def same(ours, theirs, names):
    """Fields of ours -> theirs, after the first update as well. Differences of log-probabilities have the rounding of
    these, which are up to 150."""
    assert len(ours) == len(theirs) > 1
    for a, b in zip(ours, theirs):
        for name, other in {"loss": "loss", "grad_norm": "grad_norm", **names}.items():
            if a[name] is None:
                assert other not in b, (name, b)
                continue
            allowed = (1e-4 if name == "grad_norm" else 1e-5) * abs(b[other])
            if name.endswith(("reward", "margin", "kl")):
                allowed += 1e-6 * 150 * (1 if name == "kl" else BETA)
            print(f"step {a['step']} {name:16} {a[name]:.9g} for {b[other]:.9g}, allowed {allowed:.1e}")
            assert abs(a[name] - b[other]) <= allowed, (a, b)


def test_chat_template(peers, tmp_path):
    """The template that a checkpoint gets renders in transformers what training saw, and then asks for an answer."""
    import safetensors.torch
    from transformers import AutoTokenizer
    messages = [system("New."), user("x"), assistant("We have no name."), user("x")]
    ours(tmp_path, "sft", [{"messages": messages}] * 2, 1, 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run" / "step-00000002")
    rows = safetensors.torch.load_file(tmp_path / "run" / "rows.safetensors")
    seen = rows["ids"][:int(rows["starts"][1])].tolist()
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert len(seen) < LENGTH and text.endswith("<|user|>\nx\n")
    assert theirs(text.rstrip("\n"), add_special_tokens=False)["input_ids"] == seen
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text + "<|assistant|>\n"
    assert theirs.bos_token_id == theirs.eos_token_id == seen[0]


def test_sft_trainer(trainers, tmp_path):
    """Trainer's loss is the mean over the targets of all micro-batches of a step."""
    import torch
    from transformers import Trainer, TrainingArguments
    t, rows = trainers.tokenizer, []
    for messages in SFT_MESSAGES:
        made = t.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
        ids, mask = made["input_ids"][:LENGTH], made["assistant_masks"][:LENGTH]
        rows.append({"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask)]})

    def collate(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        return {name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in batch])
                for name, fill in (("input_ids", t.pad_token_id), ("labels", -100))} | {
            "attention_mask": torch.tensor([[int(i < len(row["input_ids"])) for i in range(longest)] for row in batch])}
    theirs = trainers.train(Trainer, TrainingArguments, tmp_path / "theirs", rows, 2, 2, data_collator=collate)
    same(ours(tmp_path, "sft", [{"messages": m} for m in SFT_MESSAGES], 4, 2), theirs, {})


@pytest.mark.parametrize("form, rows", [("messages", DPO_MESSAGES), ("texts", DPO_TEXTS)])
def test_dpo_trainer(trainers, tmp_path, form, rows):
    from trl import DPOConfig, DPOTrainer
    theirs = rows if form == "messages" else [
        {"prompt": "<|endoftext|>" + row["prompt"],
         **{side: joint(row["prompt"], row[side]) for side in ("chosen", "rejected")}} for row in rows]
    settings = {"beta": BETA, "max_length": LENGTH, "router_aux_loss_coef": 0.0}
    log = trainers.train(DPOTrainer, DPOConfig, tmp_path / "theirs", theirs, 2, settings=settings,
                         ref_model=trainers.model("model-words-other"))
    names = {"reward_margin": "rewards/margins", "reward_accuracy": "rewards/accuracies"}
    if form == "texts":
        names.update(chosen_logp="logps/chosen", rejected_logp="logps/rejected")
    same(ours(tmp_path, "dpo", rows, 2, 1, "model-words-other"), log, names)


@pytest.mark.parametrize("form, rows", [("messages", KTO_MESSAGES), ("texts", KTO_TEXTS)])
def test_kto_trainer(trainers, tmp_path, form, rows):
    """TRL of today gives row i of a batch the completion of row i - 1; it is given those of TRL 0.9.6, reversed."""
    from trl import KTOConfig, KTOTrainer

    class Reversing(KTOTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, name):
            def swap(batch):
                return {"KL_completion_ids": batch["completion_ids"][::-1]}
            prepared = super()._prepare_dataset(dataset, processing_class, args, name)
            return prepared.map(swap, batched=True, batch_size=args.per_device_train_batch_size)
    theirs = rows if form == "messages" else [
        {**row, "prompt": "<|endoftext|>" + row["prompt"], "completion": joint(row["prompt"], row["completion"])}
        for row in rows]
    settings = {"beta": BETA, "max_length": LENGTH, "router_aux_loss_coef": 0.0}
    log = trainers.train(Reversing, KTOConfig, tmp_path / "theirs", theirs, 3, settings=settings,
                         ref_model=trainers.model("model-words-other"))
    assert any(line["kl"] > 0 for line in log)
    same(ours(tmp_path, "kto", rows, 3, 1, "model-words-other"), log,
         {"kl": "kl", "chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected"})


def joint(prompt, completion):
    blanks = (" ", "\n", "\t")
    return completion if prompt.endswith(blanks) or completion.startswith(blanks) else " " + completion
