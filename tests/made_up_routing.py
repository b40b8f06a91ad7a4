"""Files as `olmoe routing` and training with --routing-every write them, made from choices of experts."""
import json


def analysis(choices, experts, domains, /, **more):
    """OUT.json of choices [token][layer][k], whose domains are stretches of tokens, {name: (begin, end)}. The
    vocabulary's lists are empty."""
    L, E, K = len(choices[0]), experts, len(choices[0][0])
    data = {"model": "made/up", "seq": 8, "tokens": len(choices), "text": "0123456789abcdef", "layers": L, "experts": E,
            "k": K, "domains": {}}
    for name, (begin, end) in domains.items():
        counts, top1 = ([[0] * E for _ in range(L)] for _ in range(2))
        for token in choices[begin:end]:
            for l, chosen in enumerate(token):
                top1[l][chosen[0]] += 1
                for expert in chosen:
                    counts[l][expert] += 1
        data["domains"][name] = {"tokens": end - begin, "load_balancing_loss": K, "counts": counts, "top1": top1}
    pairs, ranked = ([[[0] * E for _ in range(E)] for _ in range(L)] for _ in range(2))
    for token in choices:
        for l, chosen in enumerate(token):
            for a in chosen:
                for b in chosen:
                    pairs[l][a][b] += 1
            for a, b in zip(chosen, chosen[1:]):
                ranked[l][a][b] += 1
                ranked[l][b][a] += 1
    nothing = {"by_layer": [None] * L, "by_expert": [[None] * E for _ in range(L)],
               "top": [[[] for _ in range(E)] for _ in range(L)]}
    return {**data, "coactivation": pairs, "coactivation_ranked": ranked,
            "vocabulary": {kind: json.loads(json.dumps(nothing)) for kind in ("input", "target", "predicted")}, **more}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def write_npy(path, choices):
    shape = len(choices), len(choices[0]), len(choices[0][0])
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust((10 + len(header)) // 64 * 64 + 64 - 11) + "\n"
    whole = bytes(expert for token in choices for chosen in token for expert in chosen)
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + whole)


def write_step(folder, step, choices, experts, domains, **more):
    """routing-STEP.json and .npy of a training run."""
    name = f"routing-{step:08d}"
    write_npy(folder / f"{name}.npy", choices)
    return write(folder / f"{name}.json", analysis(choices, experts, domains, step=step, choices=f"{name}.npy", **more))


def agreeing(choices, experts, tokens):
    """The same choices, but of each token from number `tokens` on the third expert after each in its place."""
    return [token if t < tokens else [[(expert + 3) % experts for expert in chosen] for chosen in token]
            for t, token in enumerate(choices)]


DOMAINS = ("story", "arithmetic", "dialogue", "code")           # of the default corpus


def write_default_run(folder, run, apart=True, settled=(20, 40, 60), tokens=80):
    """The routing of a run on the default corpus. apart: each domain has experts of its own. settled: how many of the
    tokens choose at steps 1, 2 and 3 as at step 4."""
    size = tokens // 4
    choices = [[[2 * (t // size), 2 * (t // size) + 1 + 8 * l] if apart else [t % 16, (t + 5) % 16] for l in range(2)]
               for t in range(tokens)]
    domains = {name: (i * size, (i + 1) * size) for i, name in enumerate(DOMAINS)}
    write(folder / "routing.json", analysis(choices, 16, domains))
    for step, same in enumerate((*settled, tokens), 1):
        write_step(run, step, agreeing(choices, 16, same), 16, domains)
