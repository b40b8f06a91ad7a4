#!/usr/bin/env python3
"""Compares the routing of the released OLMoE-1B-7B with what its authors published: check_routing.py OUT.json

OUT.json is of `olmoe routing` on the authors' texts: arxiv, b3g (or book), c4, github_oss_with_stack (or github),
wikipedia, and tulu. They are in allenai/OLMoE, scripts/routing_output/text. The authors' counts are of the first 102
sequences of 2,048 tokens of each, 208,896 tokens, so the command is

    olmoe routing --model OLMoE-1B-7B-0924 --data FOLDER/*.txt --seq 2048 --max-tokens 208896 --out OUT.json

For each published value it prints ours and the difference: in percentage points the share of a domain's tokens that
have the expert among their first 8, or as their first, and the load-balancing loss. The last line names the largest
difference. Ties and another precision move some tokens to another expert; no limit is set. --model sft or dpo compares
a fine-tuned release, of which fewer values are published. Exit 1 where OUT.json can't be compared. Standard library
only.
"""
import argparse
import sys

from routing_files import Unreadable, read

SHAPE = {"layers": 16, "experts": 64, "k": 8}           # of OLMoE-1B-7B
TOKENS = 208_896                                        # of each text but tulu: 102 x 2,048
LAYERS = (0, 7, 15)                                     # the published ones
NAMES = {"b3g": "book", "github_oss_with_stack": "github"}      # of a text -> its published name

# Share of a domain's tokens, in %, with an expert among their first 8, in LAYERS: the four highest, the two lowest.
# Source: allenai/OLMoE, scripts/routing_output/olmoe/expert_counts: count / tokens.
TOP8 = {
    "arxiv": ({0: 97.66, 40: 31.41, 54: 23.45, 17: 22.53, 28: 2.78, 12: 2.62},
              {17: 78.54, 4: 73.52, 2: 55.35, 35: 51.60, 25: 0.65, 44: 0.63},
              {17: 93.69, 34: 51.34, 30: 48.31, 58: 41.74, 39: 0.01, 14: 0.01}),
    "github": ({21: 62.58, 40: 30.26, 53: 25.16, 41: 22.65, 12: 2.23, 9: 2.09},
               {17: 76.96, 2: 75.56, 4: 65.68, 35: 57.39, 44: 0.39, 51: 0.16},
               {30: 56.36, 8: 56.17, 17: 54.98, 58: 47.20, 45: 0.14, 14: 0.09}),
    "wikipedia": ({11: 77.23, 17: 45.54, 3: 37.65, 51: 36.61, 38: 4.20, 9: 2.13},
                  {27: 84.76, 49: 44.15, 31: 43.80, 22: 29.81, 51: 1.60, 28: 0.80},
                  {36: 58.13, 57: 54.24, 0: 53.39, 6: 47.05, 51: 0.63, 4: 0.45}),
    "book": ({28: 45.40, 41: 31.52, 58: 31.27, 20: 26.24, 21: 0.92, 0: 0.58},
             {28: 50.71, 55: 49.77, 3: 42.49, 62: 33.69, 13: 1.49, 59: 1.37},
             {45: 36.60, 14: 36.54, 7: 33.10, 39: 30.72, 30: 0.71, 34: 0.36}),
    "c4": ({41: 37.71, 9: 18.96, 58: 18.77, 57: 16.94, 0: 7.35, 23: 3.75},
           {1: 33.22, 18: 26.78, 46: 20.95, 25: 20.91, 7: 5.23, 2: 2.50},
           {7: 31.24, 21: 27.00, 25: 26.64, 26: 23.63, 44: 2.85, 33: 2.38}),
    "tulu": ({21: 40.42, 41: 29.84, 23: 28.93, 0: 23.17},
             {17: 55.64, 4: 46.54, 2: 32.77, 35: 29.60},
             {30: 51.72, 17: 51.14, 8: 45.66, 58: 36.43}),
}
# The same of the fine-tuned releases: olmoe-sft and olmoe-dpo there
TUNED = {
    "sft": {"tulu": ({21: 36.91, 41: 29.85, 0: 21.59, 11: 18.55},
                     {17: 49.61, 4: 44.02, 2: 31.53, 35: 28.69},
                     {30: 43.98, 8: 42.65, 17: 42.05, 58: 31.19})},
    "dpo": {"tulu": ({21: 36.46, 41: 29.85, 0: 21.60, 11: 18.68},
                     {17: 49.63, 4: 43.62, 2: 31.15, 35: 28.34},
                     {30: 43.65, 8: 42.68, 17: 40.63, 58: 31.20})},
}
# The same of first choices, {domain: {(layer, expert): %}}: expert_counts_top1 there
TOP1 = {
    "arxiv": {(0, 0): 51.57, (15, 17): 57.26},
    "wikipedia": {(7, 27): 51.90, (15, 57): 32.62},
    "github": {(7, 2): 23.77, (7, 17): 23.30},
    "c4": {(7, 1): 5.19},
    "book": {(7, 28): 10.92},
}
# Load-balancing loss; 8 is ideal. Source: the paper's Table 6. It is the mean over sequences of the loss of each.
LOSS = {"base": {"github": 13.85, "wikipedia": 14.48, "c4": 9.09},
        "sft": {"github": 14.85, "wikipedia": 14.24, "c4": 9.13},
        "dpo": {}}


def published_name(name):
    """The published name of a domain of OUT.json: b3g and b3g_texts are book."""
    name = name[:-len("_texts")] if name.endswith("_texts") else name
    return NAMES.get(name, name)


def is_olmoe(data):
    return all(data[name] == size for name, size in SHAPE.items())


def top8(model="base"):
    return TOP8 if model == "base" else TUNED[model]


def percent(domain, of, layer, expert):
    return 100 * domain[of][layer][expert] / domain["tokens"]


def compared(domains, model):
    """(domain, what, published, ours, is it a loss?) of each value that both have. domains: by their published name."""
    for name, domain in domains.items():
        for layer, experts in zip(LAYERS, top8(model).get(name, ())):
            for expert, value in experts.items():
                what = f"layer {layer:2}, expert {expert:2}"
                yield name, what, value, percent(domain, "counts", layer, expert), False
        for (layer, expert), value in (TOP1.get(name, {}) if model == "base" else {}).items():
            what = f"layer {layer:2}, expert {expert:2}, first choice"
            yield name, what, value, percent(domain, "top1", layer, expert), False
        ours = domain.get("load_balancing_loss")
        if name in LOSS[model] and ours is not None:
            yield name, "load-balancing loss", LOSS[model][name], ours, True


def orders(domains, model):
    """In how many of the published layers do the four experts with the most tokens have the published order?"""
    same, all_of_them = 0, 0
    for name, domain in domains.items():
        for layer, experts in zip(LAYERS, top8(model).get(name, ())):
            counts = domain["counts"][layer]
            ours = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))[:4]
            same, all_of_them = same + (ours == list(experts)[:4]), all_of_them + 1
    return same, all_of_them


def published_domains(path, model):
    """The domains of OUT.json that something is published of, by their published name."""
    data = read(path)
    if not is_olmoe(data):
        raise Unreadable(f"{path}: {data['layers']} layers, {data['experts']} experts, k {data['k']}; OLMoE-1B-7B has "
                         f"16, 64 and 8")
    domains = {}
    for name, domain in data["domains"].items():
        known = published_name(name)
        if known in domains:
            raise Unreadable(f"{path}: two domains are {known}")
        if known in top8(model) or known in LOSS[model]:
            domains[known] = domain
    if not domains:
        names = ", ".join(dict.fromkeys([*top8(model), *LOSS[model]]))
        raise Unreadable(f"{path}: none of its domains is a published one: {names}")
    return domains


def report(path, model):
    domains = published_domains(path, model)
    rows = list(compared(domains, model))
    print(f"{'domain':10} {'':36} published     ours  difference")
    for name, what, value, ours, _ in rows:
        print(f"{name:10} {what:36} {value:9.2f} {ours:8.2f} {abs(ours - value):11.2f}")
    for name, domain in domains.items():
        if name != "tulu" and domain["tokens"] != TOKENS:
            print(f"{name}: of {domain['tokens']:,} tokens; the published values are of {TOKENS:,}")
    missing = [name for name in top8(model) if name not in domains]
    if missing:
        print(f"not in it: {', '.join(missing)}")
    same, layers = orders(domains, model)
    if layers:
        print(f"the four experts with the most tokens are the published ones, in order, in {same} of {layers} layers")
    for is_loss, unit in ((True, "load-balancing loss"), (False, "percentage points")):
        differences = [(abs(ours - value), name, what) for name, what, value, ours, loss in rows if loss == is_loss]
        if differences:
            most, name, what = max(differences, key=lambda row: row[0])
            where = name if is_loss else f"{name}, {' '.join(what.split())}"
            print(f"{unit}: {len(differences)} values, largest difference {most:.2f} ({where})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="OUT.json")
    parser.add_argument("--model", choices=LOSS, default="base", help="which release OUT.json is of (default: base)")
    options = parser.parse_args()
    try:
        report(options.file, options.model)
    except Unreadable as error:
        sys.exit(f"check_routing.py: {error}")


if __name__ == "__main__":
    main()
