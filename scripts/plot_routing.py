#!/usr/bin/env python3
"""Draws what `olmoe routing` and training with --routing-every found out about the experts: the figures of OLMoE's
paper (section 5), each as PNG and as SVG, for print at a page's width.

    plot_routing.py OUT.json... [--out PREFIX] [--layer L]

OUT.json is of `olmoe routing`, or a run's routing-STEP.json, whose choices (.npy) lie beside it:

PREFIX-saturation     how many choices of each layer are already those of the last model, over checkpoints: a run's
                      steps against its last step of the same text, and OUT.json with --later against that model
PREFIX-coactivation   how often the strongest pairs of experts are chosen together, in the first, the middle and the
                      last layer; above as the paper defines it, below as its released script counts (the
                      same where k is 2)
PREFIX-domains        the share of each domain's tokens that each expert takes, in the same layers; where the model is
                      of OLMoE-1B-7B's shape and the domain one of its authors' texts, their values beside ours
PREFIX-vocabulary     vocabulary specialisation by layer, and by expert of one layer
PREFIX-tokens         the favourite tokens of experts of that layer, as a table

All but the first are of one file: the last without a step, else that of the largest step. PREFIX: default is its name
without .json. L: default is the middle layer. Needs matplotlib (Debian: python3-matplotlib).
"""
import argparse
import io
import os
import sys
import textwrap
from collections import namedtuple

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager
    from matplotlib.ticker import MaxNLocator
except ImportError:
    sys.exit("plot_routing.py: matplotlib is missing; install python3-matplotlib (make setup does) and run it with "
             "that python3")

import check_routing
from routing_files import KINDS, Unreadable, read, run_saturation

WIDTH = 6.75                            # inches: a page's text in one column; figures are printed at their size
SMALLEST_FONT = 8                       # points
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 8,
         "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
         "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.spines.top": False,
         "axes.spines.right": False, "legend.frameon": False, "hatch.linewidth": 0.5, "svg.hashsalt": "olmoe"}

# Okabe and Ito's colours, which colour-blind readers can tell; without yellow, which is faint on paper. Where there are
# more than seven layers, viridis in their order. Markers and hatches say the same without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>*hp"
HATCHES = ("", "////", "....")
GREY = "#595959"

MOST_EXPERTS = 16                       # of a heat map, as in the paper
MOST_BARS = 32                          # experts of the vocabulary's figure, as in the paper
MOST_DOMAINS = 12
MOST_ROWS = 12                          # of the table
LINE, GAP = 0.175, 0.045                # inches: from a line of the table to the next, from a token to its share
BOX = {"boxstyle": "round,pad=0.12", "facecolor": "#DCEAF5", "edgecolor": "none"}

# Saturation of checkpoints: what they are compared with, what the x axis is, and [(step or name, top1, topk)]
Series = namedtuple("Series", "reference axis points layers experts k")


def note(text):
    print(f"plot_routing.py: {text}", file=sys.stderr)


def plain(text, glyphs=None):
    """Text as matplotlib draws it unchanged: no mathematics between dollars, and in the place of what the font does not
    have, or what can't be seen, its code."""
    glyphs = glyphs or plain.glyphs
    shown = (c if c.isprintable() and ord(c) in glyphs else {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(c) or
             f"<{ord(c):02X}>" for c in text)
    return "".join(shown).replace("$", r"\$")


plain.glyphs = frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def shortened(text, most):
    return text if len(text) <= most else text[:most - 1] + "…"


def token_text(data, word):
    """A token as the table shows it: spaces as an open box. Its id where it has no text, as the end of a text, or where
    there is no tokenizer."""
    text = data.get("texts", {}).get(str(word["id"]))
    return plain(shortened(text, 16).replace(" ", "␣")) if text else f"#{word['id']}"


def shown_layers(data):
    """The first, the middle and the last layer: of OLMoE's 16 layers 0, 7 and 15, as in the paper."""
    return sorted({0, (data["layers"] - 1) // 2, data["layers"] - 1})


def layer_style(l, layers):
    colour = COLOURS[l] if layers <= len(COLOURS) else matplotlib.colormaps["viridis"](0.92 * l / (layers - 1))
    return {"color": colour, "marker": MARKERS[l % len(MARKERS)], "markersize": 4, "linewidth": 1, "label": str(l),
            "markeredgewidth": 0.4, "markeredgecolor": "white"}


def with_legend(height):
    """A figure of two parts: one for panels, of this height in inches, and below it a line for their legend."""
    figure = plt.figure(figsize=(WIDTH, height + 0.25), constrained_layout=True)
    return figure, *figure.subfigures(2, 1, height_ratios=[height, 0.25])


def percent(x):
    """In %; null, which a number that was not finite is, as nan: matplotlib draws nothing there."""
    return float("nan") if x is None else 100 * x


# ------------------------------------------------------------------------------------------------
# Saturation

def saturations(files):
    """The series that the files hold. files: [(path, data)]. Of a run: its folder's files of one text; of models: the
    files with one text and one later model."""
    runs, models = {}, {}
    for path, data in files:
        if "choices" in data and "step" in data:
            runs.setdefault((os.path.dirname(path), data.get("text")), []).append((path, data))
        elif "saturation" in data:
            models.setdefault((data.get("later"), data.get("text")), []).append((path, data))
    for of_run in runs.values():
        last, points = run_saturation(of_run)
        if points:
            data = of_run[0][1]
            yield Series(f"step {last}", "step", points, data["layers"], data["experts"], data["k"])
    for (later, _), of_model in models.items():
        data = of_model[0][1]
        shape = [data[name] for name in ("layers", "experts", "k")]
        if any([other[name] for name in ("layers", "experts", "k")] != shape for _, other in of_model):
            raise Unreadable(f"{of_model[-1][0]}: of another shape than {of_model[0][0]}")
        points = [(base_name(other.get("model") or path), other["saturation"]["top1"], other["saturation"]["topk"])
                  for path, other in of_model]
        yield Series(base_name(later or "the later model"), "model", points, *shape)


def base_name(path):
    return os.path.basename(os.path.normpath(path)) or path


def draw_random(axis, value):
    axis.axhline(value, color=GREY, linestyle=(0, (4, 2)), linewidth=0.8, zorder=1)
    axis.annotate(f"random {value:.1f} %", (1, value), (-2, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", va="bottom", color=GREY)


def over_layers(axis, layers):
    axis.set(xlabel="layer", xlim=(-0.05 * layers, layers - 1 + 0.05 * layers))
    axis.set_xticks(range(0, layers, 1 + (layers - 1) // 6))


def draw_saturation_of(axis, series, values):
    """A line a layer over the checkpoints; of one checkpoint a line over the layers."""
    if len(series.points) == 1:
        axis.plot(range(series.layers), [percent(x) for x in values[0]], color=COLOURS[0], marker="o", markersize=4,
                  linewidth=1)
        over_layers(axis, series.layers)
        return
    names = [point[0] for point in series.points]
    for l in range(series.layers):
        x = names if series.axis == "step" else range(len(names))
        axis.plot(x, [percent(of_layers[l]) for of_layers in values], **layer_style(l, series.layers))
    if series.axis == "step":
        axis.set_xlabel("training step")
        if len(names) <= 6:
            axis.set_xticks(names, [str(name) if name < 10000 else f"{name / 1000:.4g}k" for name in names])
    else:
        slant = {"rotation": 30, "ha": "right"} if len(names) * max(map(len, names)) > 40 else {}
        axis.set_xticks(range(len(names)), [plain(shortened(name, 24)) for name in names], **slant)
        axis.set_xlabel("checkpoint")


def draw_saturation(all_series):
    figure, axes = plt.subplots(len(all_series), 2, figsize=(WIDTH, 2.6 * len(all_series)), sharey=True, squeeze=False,
                                constrained_layout=True)
    for series, row in zip(all_series, axes):
        panels = ((1, [top1 for _, top1, _ in series.points]), (series.k, [topk for *_, topk in series.points]))
        for axis, (k, values) in zip(row, panels):
            draw_saturation_of(axis, series, values)
            draw_random(axis, 100 * k / series.experts)
            axis.set_title("first choice (top 1)" if k == 1 else f"all choices (top {k})")
            axis.set_ylim(0, 100)
            axis.grid(axis="y", linewidth=0.3, alpha=0.6)
        lines = ["router saturation (%)", *([str(series.points[0][0])] if len(series.points) == 1 else []),
                 f"against {series.reference}"]
        row[0].set_ylabel("\n".join(plain(shortened(line, 36)) for line in lines))
        if series.k == 1:
            row[1].remove()
        if len(series.points) > 1:
            row[0 if series.k == 1 else 1].legend(title="layer", loc="center left", bbox_to_anchor=(1.01, 0.5),
                                                  ncol=1 + (series.layers > 9), columnspacing=0.8, handlelength=1.5)
    return figure


# ------------------------------------------------------------------------------------------------
# Co-activation

def pair_scores(pairs, counts):
    """pairs[i][j] / counts[i], in %: of the tokens of expert i, how many have j, too. counts: tokens of each expert.
    None on the diagonal, and where expert i has no token."""
    return [[None if i == j or n == 0 else 100 * pair / n for j, pair in enumerate(row)]
            for i, (row, n) in enumerate(zip(pairs, counts))]


def strongest(scores, most):
    """The experts of the highest scores, in the order in which the pairs, from the highest score down, name them."""
    pairs = sorted((-score, i, j) for i, row in enumerate(scores) for j, score in enumerate(row) if score)
    experts = list(dict.fromkeys(expert for _, i, j in pairs for expert in (i, j)))
    return experts[:most]


def draw_coactivation(data):
    """None where no token has two experts; one row where it has two, which are adjacent in rank."""
    layers, k, E = shown_layers(data), data["k"], data["experts"]
    if k == 1:
        return None
    # Of choices at random, each other expert is as likely to be among the other k - 1 choices of a token, or among
    # those before and after: 2 but for the first and the last of the k.
    rows = (("coactivation", r"co-activation $N_{ij}\,/\,N_i$ (%)" "\n", (k - 1) / (E - 1)),
            ("coactivation_ranked", "of adjacent ranks only (%), as\nthe released script; ", 2 * (k - 1) / k / (E - 1)))
    rows = rows[:k - 1]
    figure, axes = plt.subplots(len(rows), len(layers), figsize=(2.1 * len(layers) + 0.45, 2.25 * len(rows)),
                                squeeze=False, constrained_layout=True)
    colours = matplotlib.colormaps["Blues"].copy()
    colours.set_bad("#D9D9D9")
    for row, (name, label, chance) in zip(axes, rows):
        of_layers = [pair_scores(data[name][l], [data["coactivation"][l][i][i] for i in range(E)]) for l in layers]
        highest = max((s for scores in of_layers for line in scores for s in line if s), default=1)
        for axis, l, scores in zip(row, layers, of_layers):
            experts = strongest(scores, MOST_EXPERTS)
            shown = [[percent(None) if scores[i][j] is None else scores[i][j] for j in experts] for i in experts]
            image = axis.imshow(shown or [[percent(None)]], cmap=colours, vmin=0, vmax=highest, aspect="equal",
                                interpolation="nearest")
            axis.set_xticks(range(len(experts)), experts, rotation=90)
            axis.set_yticks(range(len(experts)), experts)
            axis.tick_params(length=0, pad=1.5)
            axis.set_title(f"layer {l}", pad=3)
            for spine in axis.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel("expert $i$")
        bar = figure.colorbar(image, ax=list(row), shrink=0.85, pad=0.015, aspect=20, label=f"{label}line: random")
        bar.outline.set_linewidth(0.4)
        bar.ax.axhline(100 * chance, color="black", linewidth=1)
    for axis in axes[-1]:
        axis.set_xlabel("expert $j$")
    return figure


# ------------------------------------------------------------------------------------------------
# Domains

def published_values(data, domain, layer):
    """{expert: %} that OLMoE's authors published, or {}."""
    if not check_routing.is_olmoe(data) or layer not in check_routing.LAYERS:
        return {}
    of_layers = check_routing.TOP8.get(check_routing.published_name(domain), ({}, {}, {}))
    return of_layers[check_routing.LAYERS.index(layer)]


def draw_domains(data):
    layers, E, uniform = shown_layers(data), data["experts"], 100 * data["k"] / data["experts"]
    names = sorted(data["domains"], key=lambda name: -data["domains"][name]["tokens"])[:MOST_DOMAINS]
    names = [name for name in data["domains"] if name in names]
    if len(names) < len(data["domains"]):
        note(f"the {len(names)} domains with the most tokens, of {len(data['domains'])}, are drawn")
    height = 1.05 * len(names) + 0.5
    figure, panels, below = with_legend(height)
    axes = panels.subplots(len(names), len(layers), sharex=True, sharey=True, squeeze=False)
    published = None
    for name, row in zip(names, axes):
        for axis, l in zip(row, layers):
            shares = [check_routing.percent(data["domains"][name], "counts", l, e) for e in range(E)]
            bars = axis.bar(range(E), shares, width=0.85, color=COLOURS[0], linewidth=0)
            line = axis.axhline(uniform, color="black", linestyle=(0, (4, 2)), linewidth=0.8)
            values = published_values(data, name, l)
            if values:
                published, = axis.plot(list(values), list(values.values()), linestyle="none", marker="D",
                                       markersize=3.5, markerfacecolor="none", markeredgecolor=COLOURS[1],
                                       markeredgewidth=0.9, clip_on=False, zorder=3)
            most = shares.index(max(shares))
            axis.annotate(str(most), (most, max(shares[most], values.get(most, 0))), (0, 2.5 if values else 1),
                          textcoords="offset points", ha="center", va="bottom")
            axis.grid(axis="y", linewidth=0.3, alpha=0.6)
            axis.set_axisbelow(True)
        row[0].set_ylabel(plain(shortened(name, 13)))
    axes[0][0].set_ylim(0, 1.22 * max(axis.dataLim.y1 for row in axes for axis in row))
    axes[0][0].set_xlim(-0.8, E - 0.2)
    for axis, l in zip(axes[0], layers):
        axis.set_title(f"layer {l}")
    for axis in axes[-1]:
        axis.set_xlabel("expert")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    label = f"share of the domain's tokens with the expert in their top {data['k']} (%)"
    panels.supylabel(textwrap.fill(label, int(14 * height)), fontsize=8, multialignment="center")
    handles = [bars, line] + ([published] if published else [])
    below.legend(handles, ["ours; the highest with its expert", f"uniform: {uniform:.1f} %", "published"],
                 loc="center", ncol=3, handlelength=2)
    return figure


# ------------------------------------------------------------------------------------------------
# Vocabulary

LABELS = {"input": "input id", "target": "next id in the text", "predicted": "predicted next id"}


def draw_vocabulary(data, layer):
    vocabulary = data["vocabulary"]
    figure, panels, below = with_legend(2.5)
    by_layer, by_expert = panels.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 2]})
    of_experts = vocabulary["input"]["by_expert"][layer]
    experts = sorted(range(data["experts"]), key=lambda e: (-1 if of_experts[e] is None else of_experts[e], -e))
    experts = experts[::-1][:MOST_BARS]
    for i, kind in enumerate(KINDS):
        style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "linewidth": 1}
        by_layer.plot(range(data["layers"]), [percent(x) for x in vocabulary[kind]["by_layer"]], label=LABELS[kind],
                      clip_on=False, zorder=3, **style)
        values = [percent(vocabulary[kind]["by_expert"][layer][e]) for e in experts]
        by_expert.plot(range(len(experts)), values, **{**style, "linewidth": 0}, clip_on=False, zorder=3)
        mean = percent(vocabulary[kind]["by_layer"][layer])
        by_expert.axhline(mean, color=COLOURS[i], linestyle=(0, (4, 2)), linewidth=0.8)
    by_layer.set(ylabel="vocabulary specialisation (%)", title="by layer", ylim=(0, 100))
    over_layers(by_layer, data["layers"])
    chosen = "" if len(experts) == data["experts"] else f", the {len(experts)} highest of {data['experts']}"
    by_expert.set(xlabel="expert", title=f"by expert of layer {layer}{chosen} (dashed: the layer)",
                  xlim=(-0.6, len(experts) - 0.4))
    by_expert.set_xticks(range(len(experts)), experts, rotation=90 if len(experts) > 20 else 0)
    for axis in (by_layer, by_expert):
        axis.grid(axis="y", linewidth=0.3, alpha=0.6)
    below.legend(*by_layer.get_legend_handles_labels(), loc="center", ncol=3)
    return figure


def table_rows(data, layer):
    """The experts with the clearest favourites, best first: (expert, words of the input, words predicted)."""
    tops = [data["vocabulary"][kind]["top"][layer] for kind in ("input", "predicted")]

    def mean_share(words):
        return sum(word["share"] or 0 for word in words) / len(words) if words else 0

    rows = [(e, *(top[e] for top in tops)) for e in range(data["experts"])]
    rows = [row for row in rows if row[1] or row[2]]
    return sorted(rows, key=lambda row: (-mean_share(row[1]) - mean_share(row[2]), row[0]))[:MOST_ROWS]


def word_lines(width_of, data, words, width, most):
    """The words with their shares, cut into lines: [[(x, token, x of its share, share)]], in inches. As many words as
    fit on so many lines of this width. width_of: text -> inches."""
    lines, x = [[]], 0
    for word in words:
        token, share = token_text(data, word), f"{percent(word['share']):.0f}"
        widths = width_of(token), width_of(share)
        if lines[-1] and x + sum(widths) + GAP > width:
            if len(lines) == most:
                break
            lines.append([])
            x = 0
        lines[-1].append((x, token, x + widths[0] + GAP, share))
        x += sum(widths) + 3 * GAP
    return lines


def draw_tokens(data, layer):
    """None where no expert has a favourite: the text is too short."""
    rows = table_rows(data, layer)
    if not rows:
        return None
    figure = plt.figure(figsize=(WIDTH, 1))
    probe, renderer = figure.text(0, 0, ""), figure.canvas.get_renderer()

    def width_of(text):
        probe.set_text(text)
        return probe.get_window_extent(renderer).width / figure.dpi

    columns = (0.06, 0.58, 3.72, WIDTH)                         # inches
    cells = [[word_lines(width_of, data, words, right - left - 0.1, 2)
              for words, left, right in zip(words_of, columns[1:], columns[2:])] for _, *words_of in rows]
    probe.remove()
    heights = [0.09 + LINE * max(map(len, cells_of)) for cells_of in cells]
    height = 0.4 + sum(heights)
    figure.set_size_inches(WIDTH, height)

    def write(x, y, text, **style):
        figure.text(x, height - y, text, transform=figure.dpi_scale_trans, **style)

    def rule(y, width):
        figure.add_artist(plt.Line2D([0.02, WIDTH - 0.02], [height - y] * 2, color="black", linewidth=width,
                                     transform=figure.dpi_scale_trans))

    titles = ("expert", f"input ids of layer {layer}: token, share (%)", "predicted next ids: token, share (%)")
    for x, title in zip(columns, titles):
        write(x, 0.2, title, weight="bold")
    rule(0.03, 0.9)
    rule(0.29, 0.5)
    y = 0.36
    for (expert, *_), cells_of, row_height in zip(rows, cells, heights):
        write(columns[0] + 0.2, y + 0.13, str(expert), ha="center")
        for left, lines in zip(columns[1:], cells_of):
            for i, line in enumerate(lines):
                for x, token, x_share, share in line:
                    write(left + x, y + 0.13 + LINE * i, token, bbox=BOX)
                    write(left + x_share, y + 0.13 + LINE * i, share, color=GREY)
        y += row_height
    rule(height - 0.03, 0.9)
    return figure


# ------------------------------------------------------------------------------------------------

def figures(files, layer):
    """(name, figure) of each, and on standard error why one is left out. files: [(path, data)]; the last is drawn."""
    data = files[-1][1]
    all_series = list(saturations(files))
    if all_series:
        yield "saturation", draw_saturation(all_series)
    else:
        note("no figure of saturation: it needs two steps of a run, or an OUT.json with --later")
    coactivation = draw_coactivation(data)
    if coactivation:
        yield "coactivation", coactivation
    else:
        note("no figure of co-activation: a token has one expert")
    yield "domains", draw_domains(data)
    layer = (data["layers"] - 1) // 2 if layer is None else layer
    yield "vocabulary", draw_vocabulary(data, layer)
    tokens = draw_tokens(data, layer)
    if tokens:
        yield "tokens", tokens
    else:
        note("no table of tokens: no id occurs often enough")


def write(prefix, pictures):
    """Writes all of them, or none. pictures: {ending: bytes}"""
    temporary = {f"{prefix}-{ending}": f"{prefix}-{ending}.tmp" for ending in pictures}
    for path in temporary:
        if os.path.isdir(path):
            raise Unreadable(f"{path}: Is a directory")
    made = []
    try:
        for (path, file), picture in zip(temporary.items(), pictures.values()):
            with open(file, "wb") as f:
                made.append(file)
                f.write(picture)
        for path, file in temporary.items():
            os.replace(file, path)
    except (OSError, ValueError) as error:
        for file in filter(os.path.exists, made):
            os.remove(file)
        raise Unreadable(f"{path}: {getattr(error, 'strerror', None) or error}")
    return list(temporary)


def in_order(files):
    """By step, then those without one as they were given: the last is the one to describe."""
    return sorted(files, key=lambda file: (not "step" in file[1], file[1].get("step", 0)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="OUT.json")
    parser.add_argument("--out", metavar="PREFIX", help="what the pictures' names begin with")
    parser.add_argument("--layer", type=int, metavar="L", help="of the vocabulary by expert and of the tokens")
    options = parser.parse_args()
    plt.rcParams.update(STYLE)
    try:
        paths = {os.path.realpath(path): path for path in options.files}.values()      # each file once
        files = in_order([(path, read(path, ("coactivation", "vocabulary", "saturation"))) for path in paths])
        path, data = files[-1]
        if options.layer is not None and not 0 <= options.layer < data["layers"]:
            raise Unreadable(f"--layer {options.layer}: {path} has layers 0 to {data['layers'] - 1}")
        pictures = {}
        for name, figure in figures(files, options.layer):
            for ending in ("png", "svg"):
                file = io.BytesIO()
                figure.savefig(file, format=ending, dpi=300,
                               metadata={"Date": None} if ending == "svg" else None)
                pictures[f"{name}.{ending}"] = file.getvalue()
            plt.close(figure)
        prefix = options.out or (path[:-len(".json")] if path.endswith(".json") else path)
        print("\n".join(write(prefix, pictures)))
    except Unreadable as error:
        sys.exit(f"plot_routing.py: {error}")


if __name__ == "__main__":
    main()
