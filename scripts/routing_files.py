"""Reads what `olmoe routing` writes (OUT.json) and what a training run with --routing-every leaves (routing-STEP.json
and the choices beside it), for learned.py, check_routing.py and plot_routing.py. Standard library only."""
import ast
import json
import os

KINDS = ("input", "target", "predicted")        # of vocabulary specialisation: which id of a position


class Unreadable(Exception):
    """What of the files is not as the program writes it."""


def is_count(x):
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def is_number(x):
    """A finite number, or null in the place of one that was not."""
    return x is None or isinstance(x, (int, float)) and not isinstance(x, bool)


def is_word(x):
    """An id in the list of an expert's favourites."""
    return isinstance(x, dict) and is_count(x.get("id")) and is_count(x.get("count")) and is_number(x.get("share"))


def is_words(x):
    return isinstance(x, list) and all(map(is_word, x))


def shaped(value, shape, is_leaf):
    """Are these lists of lists of this shape, with such values in them?"""
    if not shape:
        return is_leaf(value)
    return isinstance(value, list) and len(value) == shape[0] and all(shaped(v, shape[1:], is_leaf) for v in value)


def fields(data):
    """(name, value, shape, is_leaf) of what OUT.json holds, by the part that it belongs to."""
    L, E = data["layers"], data["experts"]
    for name in ("coactivation", "coactivation_ranked"):
        yield "coactivation", name, data.get(name), (L, E, E), is_count
    vocabulary = data.get("vocabulary")
    for kind in KINDS:
        of = vocabulary.get(kind) if isinstance(vocabulary, dict) else None
        for name, shape, is_leaf in (("by_layer", (L,), is_number), ("by_expert", (L, E), is_number),
                                     ("top", (L, E), is_words)):
            value = of.get(name) if isinstance(of, dict) else None
            yield "vocabulary", f"vocabulary/{kind}/{name}", value, shape, is_leaf
    if "saturation" in data:
        for name in ("top1", "topk"):
            value = data["saturation"].get(name) if isinstance(data["saturation"], dict) else None
            yield "saturation", f"saturation/{name}", value, (L,), is_number


def check(data, parts):
    """Raises where the parts asked for are missing or have another shape."""
    if not isinstance(data, dict):
        raise Unreadable("this is no object")
    for name in ("layers", "experts", "k"):
        if not is_count(data.get(name)) or data[name] == 0:
            raise Unreadable(f"{name} is no number of 1 or more")
    if data["k"] > data["experts"]:
        raise Unreadable(f"k is {data['k']}, more than the {data['experts']} experts")
    shape = (data["layers"], data["experts"])
    domains = data.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise Unreadable("it has no domains")
    for name, domain in domains.items():
        if not isinstance(domain, dict) or not is_count(domain.get("tokens")):
            raise Unreadable(f"domain {json.dumps(name)} has no number of tokens")
        if not is_number(domain.get("load_balancing_loss")):
            raise Unreadable(f"domain {json.dumps(name)}: load_balancing_loss is no number")
        for of in ("counts", "top1"):
            if not shaped(domain.get(of), shape, is_count):
                raise Unreadable(f"domain {json.dumps(name)}: {of} is not {shape[0]} x {shape[1]} counts")
    for part, name, value, shape, is_leaf in fields(data):
        if part in parts and not shaped(value, shape, is_leaf):
            raise Unreadable(f"{name} is not {' x '.join(map(str, shape))}")
    for name in ("step", "choices", "text", "model", "later"):
        if name in data and not (is_count if name == "step" else lambda x: isinstance(x, str))(data[name]):
            raise Unreadable(f"{name} is not what it should be")
    texts = data.get("texts", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise Unreadable("texts has what is no text")


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def read(path, parts=()):
    """OUT.json, or routing-STEP.json of a run. parts: which of "coactivation", "vocabulary" and "saturation" it has to
    have, whole; domains it always has. Those of which no token was analysed, as --max-tokens leaves them, are left
    out."""
    try:
        with open(path, encoding="utf-8") as f:
            data = json.load(f, parse_constant=no_constant)
        check(data, parts)
        data["domains"] = {name: domain for name, domain in data["domains"].items() if domain["tokens"]}
        if not data["domains"]:
            raise Unreadable("no domain has a token")
    except (OSError, ValueError, RecursionError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or (error if isinstance(error, Unreadable) else "no JSON")
        raise Unreadable(f"{path}: {reason}" + ("" if isinstance(error, OSError) else "; is it from olmoe routing?"))
    return data


def read_choices(path, data):
    """The experts of each token of routing-STEP.json at path: bytes (tokens, layers, k), the first choice first."""
    file = os.path.join(os.path.dirname(path), os.path.basename(data["choices"]))
    try:
        with open(file, "rb") as f:
            whole = f.read()
        length = int.from_bytes(whole[8:10], "little")
        header, choices = whole[10:10 + length], whole[10 + length:]
        if whole[:8] != b"\x93NUMPY\x01\x00" or len(header) != length:
            raise ValueError
        header = ast.literal_eval(header.decode("latin-1").strip())
        described = header["descr"], header["fortran_order"], header["shape"][1:], header["shape"][0]
    except (OSError, ValueError, SyntaxError, LookupError, TypeError) as error:
        raise Unreadable(f"{file}: {getattr(error, 'strerror', None) or 'no .npy file of version 1'}")
    L, E, k = data["layers"], data["experts"], data["k"]
    if described[:3] != ("|u1", False, (L, k)) or len(choices) != described[3] * L * k:
        raise Unreadable(f"{file}: not tokens x {L} x {k} bytes, as {path} says")
    if not choices or max(choices) >= E:
        raise Unreadable(f"{file}: no tokens, or a choice that is none of {E} experts")
    return choices


def saturation(early, late, layers, k):
    """Shares of the choices that two models agree on, of the same tokens: (first choices, all k), of each layer. early,
    late: bytes (tokens, layers, k). (OLMoE's paper, section 5.1.)"""
    tokens = len(early) // (layers * k)
    top1, topk = [0] * layers, [0] * layers
    for l in range(layers):
        for at in range(l * k, len(early), layers * k):
            top1[l] += early[at] == late[at]
            topk[l] += len(set(early[at:at + k]) & set(late[at:at + k]))
    return [n / tokens for n in top1], [n / (tokens * k) for n in topk]


def run_saturation(files):
    """The saturation of a run's steps against its last. files: (path, data) with choices of one text. Returns the last
    step and [(step, top1, topk)] of those before it, in order."""
    files = sorted(files, key=lambda file: file[1]["step"])
    (path, data), before = files[-1], files[:-1]
    if not before:
        return data["step"], []
    late, points = read_choices(path, data), []
    for early_path, early_data in before:
        early = read_choices(early_path, early_data)
        shape = [of[name] for of in (data, early_data) for name in ("layers", "experts", "k")]
        if shape[:3] != shape[3:] or len(early) != len(late):
            raise Unreadable(f"{early_path}: of another shape than {path}")
        points.append((early_data["step"], *saturation(early, late, data["layers"], data["k"])))
    return data["step"], points
