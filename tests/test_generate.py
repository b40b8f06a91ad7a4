"""olmoe generate: its output depends on the prompt, the options and the seed alone; every form of input and output.

The program is ./olmoe, or what the variable OLMOE names.
"""
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
ODD = ROOT / "tests" / "fixtures" / "odd"               # V 211, no tokenizer
TOKENIZER = ROOT / "tests" / "fixtures" / "tokenizer" / "tokenizer.json"


def run(*args, **kwargs):
    return subprocess.run([OLMOE, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


def ok(*args, **kwargs):
    result = run(*args, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(*args, words=(), **kwargs):
    result = run(*args, **kwargs)
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == 1 and lines[0].startswith("olmoe: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def samples(*args, **kwargs):
    return [json.loads(line) for line in ok("generate", *args, "--json", **kwargs).splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model of bytes that has learned a little, and its directory."""
    d = tmp_path_factory.mktemp("model")
    config = {"model_type": "olmoe", "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
              "num_attention_heads": 3, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 320,
              "max_position_embeddings": 64, "eos_token_id": 256, "pad_token_id": None}
    (d / "config.json").write_text(json.dumps(config))
    text = json.dumps({"text": "the cat sat on the mat, and the dog ran. "}) + "\n"
    (d / "text.jsonl").write_text(text * 200)
    ok("tokenize", "--tokenizer", "bytes", "--out", d / "text.npy", d / "text.jsonl")
    ok("train", "--config", d / "config.json", "--data", d / "text.npy", "--out", d / "out", "--steps", 60,
       "--batch", 8, "--lr", "1e-2", "--warmup", 5, "--peak-tflops", 1)
    return d / "out" / "step-00000060"


def test_the_same_alone_and_together(tmp_path):
    """Greedy continuations of prompts of several lengths: one by one, and in batches of any size."""
    prompts = [[1], [5, 6, 7, 8, 9], [1, 2, 3], [200, 100, 3, 3, 3, 3, 9, 1], [17, 4]]
    lines = [json.dumps({"ids": ids, "id": f"p{i}"}) + "\n" for i, ids in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    options = ["--model", ODD, "--temperature", 0, "--max-tokens", 9, "--logprobs"]
    alone = [samples(*options, "--ids", ",".join(map(str, ids)))[0] for ids in prompts]
    for batch in (1, 2, 3, 8):
        together = samples(*options, "--input", tmp_path / "in.jsonl", "--batch", batch)
        assert [s["id"] for s in together] == ["p0", "p1", "p2", "p3", "p4"]
        assert [s["prompt_tokens"] for s in together] == [len(p) for p in prompts]
        for a, b in zip(alone, together):
            assert a["ids"] == b["ids"] and a["finish"] == b["finish"] == "length" and len(a["ids"]) == 9
            assert all(abs(x - y) < 1e-4 for x, y in zip(a["logprobs"], b["logprobs"]))


def test_greedy_follows_the_logits_of_verify(model):
    """Every greedy token is the likeliest of the whole sequence's logits: a longer prompt of the tokens so far gives
    the same next one."""
    options = ["--model", model, "--tokenizer", "bytes", "--temperature", 0]
    whole = samples(*options, "--prompt", "the c", "--max-tokens", 12)[0]
    ids = list(b"the c")
    for token in whole["ids"]:
        assert samples(*options, "--ids", ",".join(map(str, ids)), "--max-tokens", 1)[0]["ids"] == [token]
        ids.append(token)


def test_it_learned(model):
    text = samples("--model", model, "--tokenizer", "bytes", "--prompt", "the cat sat", "--temperature", 0,
                   "--max-tokens", 20)[0]["text"]
    assert " " in text and "th" in text, text


def test_seeds_and_samples(model):
    options = ["--model", model, "--tokenizer", "bytes", "--prompt", "the ", "--max-tokens", 12]
    three = samples(*options, "--n", 3, "--seed", 5)
    assert len({s["text"] for s in three}) > 1
    assert three == samples(*options, "--n", 3, "--seed", 5)
    assert [s["ids"] for s in samples(*options, "--n", 5, "--seed", 5, "--batch", 2)[:3]] == [s["ids"] for s in three]
    assert [s["ids"] for s in three] != [s["ids"] for s in samples(*options, "--n", 3, "--seed", 6)]
    greedy = samples(*options, "--temperature", 0)[0]["text"]
    assert {s["text"] for s in samples(*options, "--n", 4, "--top-k", 1)} == {greedy}
    likeliest = {s["text"] for s in samples(*options, "--n", 4, "--min-p", 1)}
    assert {s["text"] for s in samples(*options, "--n", 4, "--top-p", "1e-6")} == likeliest


def test_logprobs(model):
    """Those of the model as it is, whatever the temperature; they are probabilities."""
    options = ["--model", model, "--tokenizer", "bytes", "--logprobs"]
    a = samples(*options, "--prompt", "the ", "--max-tokens", 6, "--seed", 3, "--temperature", 2)[0]
    ids = list(b"the ")
    for token, logprob in zip(a["ids"], a["logprobs"]):
        assert logprob <= 0
        prompt = ",".join(map(str, ids))
        greedy = samples(*options, "--ids", prompt, "--max-tokens", 1, "--temperature", 0)[0]
        assert greedy["logprobs"][0] >= logprob - 1e-5
        assert greedy["ids"] != [token] or abs(greedy["logprobs"][0] - logprob) < 1e-4
        ids.append(token)


def test_streamed_text_is_the_same(model):
    options = ["--model", model, "--tokenizer", "bytes", "--prompt", "the ", "--max-tokens", 40, "--seed", 4]
    text = samples(*options)[0]["text"]
    assert ok("generate", *options) == text + "\n"
    assert ok("generate", *options, "--n", 2).startswith(f"--- prompt 0, sample 0\n{text}\n\n--- prompt 0, sample 1\n")


def test_every_byte_is_printed(model):
    """Also a NUL, which ends no text."""
    options = ["--model", model, "--tokenizer", "bytes", "--prompt", "a", "--n", 30, "--max-tokens", 50,
               "--temperature", 50, "--seed", 1]
    printed = subprocess.run([OLMOE, *map(str, ["generate", *options])], capture_output=True, timeout=300).stdout
    texts = [s["text"].encode() for s in samples(*options)]
    assert any(b"\0" in text for text in texts)
    assert printed == b"\n".join(b"--- prompt 0, sample %d\n%s\n" % (i, text) for i, text in enumerate(texts))


def test_stop_strings(model):
    options = ["--model", model, "--tokenizer", "bytes", "--prompt", "the ", "--max-tokens", 40, "--seed", 4]
    text = samples(*options)[0]["text"]
    stop = text[10:13]
    cut = samples(*options, "--stop", "never", stop)[0]
    assert cut["finish"] == "stop" and cut["text"] == text[:text.index(stop)]
    # streamed, nothing of it is shown
    assert ok("generate", *options, "--stop", "never", stop) == cut["text"] + "\n"
    refused("generate", *options, "--stop", "", words=["--stop"])


def test_texts_that_begin_with_dashes(model):
    """A value is what is no option's name; after = it may be that also."""
    options = ["--model", model, "--tokenizer", "bytes", "--max-tokens", 40, "--seed", 4]
    for text in ("-- SELECT", "--", "--bogus", "-h", "--x=1"):
        (by_json,) = samples(*options, "--input", "-", input=json.dumps({"prompt": text}))
        for given in (["--prompt", text], [f"--prompt={text}"]):
            assert samples(*options, *given) == [by_json]
    assert samples(*options, "--prompt=--json")[0]["prompt_tokens"] == len("--json")
    two = samples(*options, "--prompt", "a", "-- b", "--prompt=--seed")
    assert [s["prompt_tokens"] for s in two] == [1, 4, 6]
    refused("generate", *options, "--prompt", "--json", words=["--prompt needs", "--prompt=--json"])
    # as what ends a text
    text = samples(*options, "--prompt", "the ")[0]["text"]
    stop = text[10:13]
    for given in (["--stop", "---", stop], [f"--stop={stop}", "--stop=---"], ["--stop", "never", "---", stop]):
        assert samples(*options, "--prompt", "the ", *given)[0]["text"] == text[:text.index(stop)]


def test_end_of_text_and_of_the_window(model):
    """A sequence ends at eos, which is no text, or where its positions end."""
    many = samples("--model", model, "--tokenizer", "bytes", "--prompt", "and the dog ran. ", "--n", 20,
                   "--max-tokens", 1000, "--temperature", 1)
    assert {s["finish"] for s in many} >= {"eos"}
    for s in many:
        assert (s["finish"] == "eos") == (s["ids"][-1] == 256) and s["prompt_tokens"] + len(s["ids"]) <= 64
        assert s["finish"] == "eos" or s["prompt_tokens"] + len(s["ids"]) == 64
    refused("generate", "--model", model, "--tokenizer", "bytes", "--prompt", "x" * 64,
            words=["64 tokens", "max_position_embeddings"])


def test_several_ends(model, tmp_path):
    """Any id of a list of eos ends a sequence, and is no text: of generation_config.json, as in transformers, else of
    config.json."""
    shutil.copytree(model, tmp_path / "model")

    def end(name, key, value):
        path = tmp_path / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    common = ["--model", tmp_path / "model", "--max-tokens", 40, "--seed", 4]
    options = [*common, "--tokenizer", "bytes", "--prompt", "the "]
    ids = samples(*options)[0]["ids"]
    other = ids[9]
    end("config.json", "eos_token_id", [256, other, other])
    assert samples(*options)[0]["ids"] == ids           # generation_config.json still has 256 alone
    cut = ids[:ids.index(other) + 1]
    for where, value in (("generation_config.json", [256, other]), ("generation_config.json", None)):
        end(where, "eos_token_id", value)
        sample = samples(*options)[0]
        assert sample["ids"] == cut and sample["finish"] == "eos" and sample["text"].encode() == bytes(cut[:-1])
        assert samples(*common, "--ids", ",".join(map(str, b"the ")))[0]["ids"] == cut
    (tmp_path / "model" / "generation_config.json").unlink()
    assert samples(*options)[0]["ids"] == cut
    for bad in ("x", [1.5], [-2], {}):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        refused("generate", *options, words=["generation_config.json", "eos_token_id"])
    (tmp_path / "model" / "generation_config.json").write_text("[]")
    refused("generate", *options, words=["generation_config.json", "not a JSON object"])


def test_the_ends_of_ranges(model):
    """A probability of 0 leaves the likeliest token; 0 tokens are none."""
    options = ["--model", model, "--tokenizer", "bytes", "--prompt", "the ", "--max-tokens", 12]
    greedy = samples(*options, "--temperature", 0)[0]["ids"]
    assert samples(*options, "--top-p", 0)[0]["ids"] == greedy
    none = samples(*options, "--max-tokens", 0, "--n", 3)
    assert [(s["ids"], s["text"], s["finish"]) for s in none] == 3 * [([], "", "length")]
    assert ok("generate", *options, "--max-tokens", 0) == "\n"
    assert "generated: 0 tokens, 0.0 a second" in run("generate", *options, "--max-tokens", 0, "--stats").stderr


def test_experts_in_two_tensors(tmp_path):
    """As transformers 5 has them in memory, and writes them where it is asked to: the same logits to the bit."""
    raw = (ODD / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:8 + length]), raw[8 + length:]
    groups = {}                             # tensor -> its parts, in order
    for name, t in header.items():
        if name != "__metadata__":
            found = re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name)
            whole = found[1] + ("down_proj" if found[3] == "down" else "gate_up_proj") if found else name
            order = (int(found[2]), found[3] == "up") if found else 0
            groups.setdefault(whole, []).append((order, t["dtype"], t["shape"], data[slice(*t["data_offsets"])]))
    header, data = {}, b""
    for name, parts in groups.items():
        parts.sort(key=lambda part: part[0])
        _, dtype, shape, _ = parts[0]
        if len(parts) > 1:
            experts = 1 + parts[-1][0][0]
            shape = [experts, len(parts) // experts * shape[0], shape[1]]
        begin = len(data)
        data += b"".join(part[3] for part in parts)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    assert any(name.endswith("gate_up_proj") for name in header)
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    shutil.copy(ODD / "config.json", tmp_path)
    options = ["--ids", "1,2,3", "--temperature", 0, "--max-tokens", 9, "--logprobs"]
    assert samples("--model", tmp_path, *options) == samples("--model", ODD, *options)
    assert "all there" in ok("info", "--model", tmp_path)


def test_repetition_penalty():
    options = ["--model", ODD, "--ids", "1,2,3", "--temperature", 0, "--max-tokens", 20]
    plain = samples(*options)[0]["ids"]
    other = samples(*options, "--repetition-penalty", 1000)[0]["ids"]
    assert len(set(plain)) < len(plain) and len(set(other)) == len(other)


def test_chat(model):
    """The template's text is the prompt, with EOS before all and after answers; messages by JSON, by --prompt, and line
    by line."""
    options = ["--model", model, "--tokenizer", "bytes", "--temperature", 0, "--max-tokens", 5]

    def answer(*texts):
        """To texts, each after EOS"""
        ids = [i for text in texts for i in (256, *text.encode())]
        return samples(*options, "--ids", ",".join(map(str, ids)))[0]

    text = "<|user|>\nHi\n<|assistant|>\n"
    expected = answer(text)["text"]
    assert samples(*options, "--chat", "--prompt", "Hi")[0]["text"] == expected
    messages = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n"
    assert samples(*options, "--input", "-", input=messages)[0]["text"] == expected
    assert ok("generate", *options, "--chat", input="Hi\n") == expected + "\n"
    with_system = answer("<|system|>\nS\n" + text)["text"]
    assert samples(*options, "--chat", "--system", "S", "--prompt", "Hi")[0]["text"] == with_system
    messages = [("user", "a"), ("assistant", "\u00ff"), ("user", "b")]
    line = json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}) + "\n"
    several = answer("<|user|>\na\n<|assistant|>\n\u00ff", "\n<|user|>\nb\n<|assistant|>\n")
    same = samples(*options, "--input", "-", input=line)[0]
    assert (same["ids"], same["prompt_tokens"]) == (several["ids"], several["prompt_tokens"])


def test_content_in_parts(model):
    """The text parts of a message are one text; others are refused by type, other values by what they are."""
    options = ["generate", "--model", model, "--tokenizer", "bytes", "--temperature", 0, "--max-tokens", 5,
               "--input", "-"]

    def line(content, role="user"):
        return json.dumps({"messages": [{"role": role, "content": content}]}) + "\n"

    expected = ok(*options, "--json", input=line("Hi you"))
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you", "cache_control": None}]
    assert ok(*options, "--json", input=line(parts)) == expected
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    for content, word in (([parts[0], image], '"image_url"'), ([{"text": "Hi"}], '{"text":"Hi"}'), (["Hi"], '"Hi"'),
                          (["text"], '"text"'), ([{"type": "text"}], 'no "text"'),
                          ([{"type": "text", "text": 3}], "no text: 3"), (None, "null"), (3, "3"), ({}, "{}")):
        refused(*options, input=line("Hi") + line(content), words=["-:2: ", word])
    for messages, word in (([3], "3"), ([{"content": "Hi"}], '"role"'), ([{"role": "user"}], '"content"'),
                           ([{"role": 3, "content": "Hi"}], "role"), ([{"role": "tool", "content": "Hi"}], '"tool"')):
        refused(*options, input=json.dumps({"messages": messages}), words=["-:1: ", word])
    refused(*options, input='{"prompt": ["a"]}', words=["-:1: ", "prompt", '["a"]'])


def test_prompts_that_are_too_long(model, tmp_path):
    """All of them are named, before the weights are read."""
    shutil.copy(model / "config.json", tmp_path)
    options = ["generate", "--model", tmp_path, "--tokenizer", "bytes"]
    path, long = tmp_path / "in.jsonl", {"prompt": "x" * 64}
    messages = {"messages": [{"role": "user", "content": "x" * 60}]}
    lines = [{"prompt": "a"}, long, {"prompt": "x" * 63}, {"ids": [1] * 70}, messages]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = run(*options, "--input", path, "--n", 2).stderr
    assert said == ("olmoe: too long a prompt, max_position_embeddings is 64: "
                    f"{path}:2 (64 tokens), {path}:4 (70 tokens), {path}:5 (85 tokens)\n")
    refused(*options, "--prompt", "a", "x" * 99, words=["prompt 1 (99 tokens)"])
    refused(*options, "--ids", ",".join(["1"] * 64), words=["--ids (64 tokens)"])
    refused(*options, "--chat", "--system", "x" * 60, words=["--system"], input="")
    path.write_text((json.dumps(long) + "\n") * 500)
    *each, last = run(*options, "--input", path).stderr.splitlines()
    assert each == [f"{path}:{i} (64 tokens)" for i in range(1, 501)] and "500 prompts" in last


def test_chat_that_grows(model):
    """Where its tokens are more than the model's positions, the person is told, and it goes on."""
    options = ["generate", "--model", model, "--tokenizer", "bytes", "--temperature", 0, "--max-tokens", 5, "--chat"]

    def answers(*texts, more=()):
        result = run(*options, *more, input="".join(text + "\n" for text in texts))
        assert result.returncode == 0
        return result.stdout, result.stderr.splitlines()

    first, said = answers("Hi")
    assert said == []
    out, said = answers("Hi", "x" * 50, "y" * 20)
    assert len(said) == 2 and "75 tokens" in said[0] and "left out" in said[0] and "2 messages are forgotten" in said[1]
    assert out == first + answers("y" * 20)[0]      # the long message is no part of it, and then both are too much
    system = answers("Hi", more=["--system", "SSSSSS"])[0]
    out, said = answers("Hi", "Hi", "Hi", more=["--system", "SSSSSS"])
    assert out == system * 3 and len(said) == 2
    with open("/dev/full", "w") as full:
        result = subprocess.run([OLMOE, *map(str, options)], input="Hi\nHi\n", stdout=full, stderr=subprocess.PIPE,
                                text=True)
    assert result.returncode == 1 and result.stderr.endswith("standard output: No space left on device\n")


def test_round_trip(tmp_path):
    """Text, a tokenizer.json, a token file, 30 steps, a checkpoint that holds the tokenizer, and text again."""
    vocabulary = json.loads(TOKENIZER.read_text())
    ids = [*vocabulary["model"]["vocab"].values(), *(t["id"] for t in vocabulary["added_tokens"])]
    size = -(-(1 + max(ids)) // 64) * 64
    eos = next(t["id"] for t in vocabulary["added_tokens"] if t["content"] == "<|endoftext|>")
    config = {"model_type": "olmoe", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": size,
              "max_position_embeddings": 64, "eos_token_id": eos, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    texts = [f"the naïve café number {i}\n    opens at {i % 12}" for i in range(300)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ok("tokenize", "--tokenizer", TOKENIZER, "--out", tmp_path / "text.npy", tmp_path / "text.jsonl")
    ok("train", "--config", tmp_path / "config.json", "--tokenizer", TOKENIZER, "--data", tmp_path / "text.npy",
       "--out", tmp_path / "out", "--steps", 30, "--batch", 4, "--lr", "1e-2", "--warmup", 2, "--peak-tflops", 1,
       "--sample-tokens", 5)
    saved = tmp_path / "out" / "step-00000030"
    assert (saved / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()
    continued = samples("--model", saved, "--prompt", "the naïve", "--temperature", 0, "--max-tokens", 10)[0]
    assert continued["text"] and all(0 <= id < size for id in continued["ids"])
    first = samples("--model", saved, "--ids", "5,6", "--temperature", 0, "--max-tokens", 3)[0]
    assert first["prompt_tokens"] == 2 and "text" in first


def test_weights_that_are_not_finite(tmp_path):
    """No token is drawn from a NaN."""
    shutil.copytree(ODD, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    for temperature in (0, 1):
        refused("generate", "--model", tmp_path / "model", "--ids", "1,2", "--temperature", temperature, "--top-p", 0.5,
                words=["not finite"])


def test_stats():
    """On standard error, and only if asked for: the prompt's tokens once for all its samples, and rates."""
    options = ["--model", ODD, "--ids", "1,2,3", "--max-tokens", 6, "--n", 2, "--json"]
    done = run("generate", *options, "--stats")
    generated = sum(len(json.loads(line)["ids"]) for line in done.stdout.splitlines())
    rates = re.fullmatch(rf"prompts: 3 tokens, ([0-9.]+) a second; generated: {generated} tokens, ([0-9.]+) a second "
                         "after the first of each\n", done.stderr)
    assert rates and all(float(rate) > 0 for rate in rates.groups()), done.stderr
    plain = run("generate", *options)
    assert plain.stdout == done.stdout and plain.stderr == ""


def test_bad_input(model, tmp_path):
    refused("generate", words=["--model"])
    refused("generate", "--model", ODD, words=["--prompt"])
    refused("generate", "--model", ODD, "--prompt", "a", words=["no tokenizer"])
    refused("generate", "--model", ODD, "--prompt", "a", "--ids", "1", words=["one of"])
    refused("generate", "--model", ODD, "--ids", "1,,2", words=["--ids"])
    refused("generate", "--model", ODD, "--ids", "1,211", words=["210"])
    refused("generate", "--model", ODD, "--ids", "1", "--logprobs", words=["--logprobs", "--json"])
    refused("generate", "--model", ODD, "--ids", "1", "--chat", words=["--chat", "--ids"])
    refused("generate", "--model", ODD, "--ids", "1", "--system", "a", words=["--system", "--chat"])
    for more in (["--json"], ["--n", 2]):
        refused("generate", "--model", model, "--tokenizer", "bytes", "--chat", *more, words=[more[0]])
    for messages in ("[]", "{}", "null"):
        (tmp_path / "in.jsonl").write_text('{"messages": ' + messages + "}\n")
        refused("generate", "--model", model, "--tokenizer", "bytes", "--input", tmp_path / "in.jsonl",
                words=[":1:", "messages"])
    refused("generate", "--model", ODD, "--input", tmp_path / "missing", words=["missing", "No such file"])
    bad_lines = [('{"ids": [1, 2]}\nnonsense\n', [":2:", "not a JSON object"]),
                 ('{"ids": [-1]}\n', [":1:", "-1"]),
                 ('{"ids": []}\n', ["no list of token ids"]),
                 ('{"ids": [1.7]}\n', ["1.7"]),
                 ('{"ids": [true]}\n', ["true"]),
                 ('{"ids": [4294967301]}\n', ["4294967301"]),
                 ('{"ids": [1], "id": ' + "[" * 300000 + "\n", [":1:", "not a JSON"]),
                 ('{"ids": "a"}\n', [":1:"]),
                 ("\n\n", ["no prompt"]),
                 ('{"prompt": "a"}\n', ["no tokenizer"])]
    for text, words in bad_lines:
        (tmp_path / "in.jsonl").write_text(text)
        refused("generate", "--model", ODD, "--input", tmp_path / "in.jsonl", words=words)
    options = ["--model", ODD, "--ids", "1", "--max-tokens", 1, "--temperature", 0]
    assert math.isclose(float(ok("generate", *options).strip()), samples(*options)[0]["ids"][0])
