"""Figures of results (eval_gsm8k.py, tools.seeds), checkpoints and training logs, into --out.

    python -m tools.plot curve out/eval.json   score against steps, each rule by the best of its
                                               variants and checkpoints; of several training runs
                                               median, least and most, of one the 95 % interval
    python -m tools.plot seeds assets/toy_seeds.json    the same of coherence, a band over the runs
    python -m tools.plot order out/eval.json   which step reveals what, at budget --steps
    python -m tools.plot gif                   an answer as it forms
    python -m tools.plot log old=a/log.jsonl,b/log.jsonl new=c/log.jsonl    the order stage's bound
"""

import argparse
import json
import math
import os
import zlib
from collections import defaultdict
from pathlib import Path
from statistics import median
from textwrap import fill

os.environ["MPLBACKEND"] = "agg"  # files only: a notebook's backend may not be installed here

from matplotlib import colormaps
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from common import UserError, path_of, path_to_write, read_json_lines, run_script
from data import TOY_SIZES, build_tokenizer, encode, load_splits
from eval_gsm8k import belongs, best_rules, read_results
from model import load_checkpoint
from sample import (ORDERS, generate, need_trained_gates, parse_order, parse_steps, printable,
                    whole_number)

# After Okabe and Ito: colour-blind readers tell them apart. The learned order is black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F", "#B8A800",
          "#661100")
MARKERS = "s^Dv<>PXp"
DASHES = ("-", "--", ":", "-.")
COLUMNS = 30  # of a canvas


# --- files ----------------------------------------------------------------------------------------

def rows_of(path: str) -> tuple[dict, list[dict]]:
    """What the last evaluation of a results file was of, and its rows."""
    results = read_results(path)
    if not results["rows"]:
        raise UserError(f"cannot read {path}: no results there")
    meta = results["meta"]
    return meta, [row for row in results["rows"] if belongs(row, meta)]


def save(figure, path: Path, dpi: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


# --- score against steps --------------------------------------------------------------------------

def look_of(name: str) -> dict:
    """Colour, marker and line of an order; one with +eos_last or drawn gates is dashed."""
    order = parse_order(name)
    rules = [rule for rule in ORDERS if rule != "learned"]
    dashed = order.eos_last or name == "learned"
    look = {"linestyle": "--" if dashed else "-", "markersize": 5}
    if order.name == "learned":
        return {**look, "color": "black", "marker": "o", "linewidth": 2.5}
    i = rules.index(order.name)
    return {**look, "color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 1.2}


def draw_curves(curves: dict, title: str, ylabel: str, out: Path):
    """curves {label: (look, points)}, a point (steps, value, low, high)."""
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, (look, points) in curves.items():
        x, y, low, high = zip(*sorted(points))
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.plot(x, y, label=label, **look)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="mean steps (forward passes) per answer", ylabel=ylabel)
    figure.legend(frameon=False, loc="outside right center")
    save(figure, out, dpi=150)


def curve(args):
    best = defaultdict(lambda: defaultdict(dict))  # best[rule][budget][training run] = row
    titles = set()
    for path in args.files:
        meta, rows = rows_of(path)
        reported = meta["reported"]
        titles.add((f"{reported['dataset']}, {reported['n']} {reported['split']} items",
                    reported["metric"]))
        run = next(iter(meta["checkpoints"].values()))  # of --ckpt
        for row in rows:
            runs = best[parse_order(row["order"]).name][row["budget"]]
            if run not in runs or row["score"] > runs[run]["score"]:
                runs[run] = row
    if len(titles) != 1:
        raise UserError(f"want results of one data set, split and metric, got {sorted(titles)}")
    [(title, metric)] = titles

    # Between runs the spread is least to most; a single run has its interval over items.
    unit = 1 if metric == "nats" else 100
    curves = {}
    n_runs = 0
    for name in sorted(best, key=list(ORDERS).index):
        points = []
        for runs in best[name].values():
            rows = list(runs.values())
            scores = [row["score"] for row in rows]
            low, high = rows[0]["ci95"]
            if len(rows) > 1:
                low, high = min(scores), max(scores)
            steps = median(row["steps"][0] for row in rows)
            points.append((steps, unit * median(scores), unit * low, unit * high))
            n_runs = max(n_runs, len(rows))
        label = "learned:0.5" if name == "learned" else name
        curves[name] = look_of(label), points
    ylabel = "log p(true answer), nats" if metric == "nats" else f"{metric} answers, %"
    draw_curves(curves, f"{title}, training runs: {n_runs}", ylabel, args.out)


def seeds(args):
    """Every order of tools.seeds, median and band over the runs."""
    values = defaultdict(lambda: defaultdict(list))  # [order][steps] = [(coherent, mean steps), ..]
    for path in args.files:
        try:
            content = json.loads(Path(path).read_text())
            title = f"{content['args']['limit']} {content['args']['split']} items"
            rows = content["rows"]
            for row in rows:
                for name, by_steps in row["orders"].items():
                    for steps, (coherent, _, mean_steps) in by_steps.items():
                        values[name][steps].append((coherent, mean_steps))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"cannot read {path}, want results of tools.seeds: {e}") from e
    if not values:
        raise UserError(f"no runs in {', '.join(args.files)}")
    curves = {}
    n_runs = 0
    for name, by_steps in values.items():
        points = []
        for numbers in by_steps.values():
            coherent = [number for number, _ in numbers]
            steps = median(mean_steps for _, mean_steps in numbers)
            points.append((steps, median(coherent), min(coherent), max(coherent)))
            n_runs = max(n_runs, len(numbers))
        curves[name] = look_of(name), points
    draw_curves(curves, f"{title}, training runs: {n_runs}", "coherent answers, %", args.out)


# --- the order stage's bound ----------------------------------------------------------------------

def log(args):
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    lows = []
    for i, group in enumerate(args.files):
        label, equals, paths = group.partition("=")
        if not equals:
            raise UserError(f"{group}: want LABEL=FILE,FILE")
        color = COLORS[i % len(COLORS)]
        values = defaultdict(list)
        for path in paths.split(","):
            try:
                lines = read_json_lines(path)
            except OSError as e:
                raise UserError(f"cannot read {path}: {e}") from e
            records = [record for record in lines
                       if record.get("stage") == "order" and {"step", "elbo"} <= set(record)]
            if not records:
                raise UserError(f"{path} has no bound of the order stage; want LABEL=FILE,FILE")
            steps = [record["step"] for record in records]
            axes.plot(steps, [record["elbo"] for record in records], color=color, linewidth=0.7,
                      alpha=0.6)
            for record in records:
                values[record["step"]].append(record["elbo"])

        # The median, at steps that all runs of the group have logged.
        n = len(paths.split(","))
        steps = [step for step in sorted(values) if len(values[step]) == n]
        if not steps:
            raise UserError(f"the runs of {label} have no logged step in common")
        axes.plot(steps, [median(values[step]) for step in steps], DASHES[i % len(DASHES)],
                  color=color, linewidth=2.8, label=f"{label}, median of {n}")
        lows.append(min(values[steps[len(steps) // 6]]))

    # Where p cannot yet predict q, the bound is far below: cut off.
    axes.set(xlabel="optimizer steps of the order stage", ylim=(min(lows) - 1, None),
             ylabel="bound on log p(answer), nats, training batches")
    axes.legend(frameon=False, loc="lower right")
    save(figure, args.out, dpi=150)


# --- canvases -------------------------------------------------------------------------------------

def color_of(step: int, last: int):
    return colormaps["viridis_r"](step / (last + 0.5))


def canvas_rows(L: int) -> int:
    return math.ceil(L / COLUMNS)


def draw_canvas(axes, tokens, reveal_step, t: int, last: int, enc):
    """The canvas after step t, a cell a position, in the colour of the step that reveals it."""
    marks = {enc.n_vocab - 3: "∎", enc.n_vocab - 2: "_"}  # EOS and PAD
    axes.set(xlim=(0, COLUMNS), ylim=(canvas_rows(len(tokens)), 0))
    axes.axis("off")
    for i, (token, step) in enumerate(zip(tokens, reveal_step)):
        x = i % COLUMNS
        y = i // COLUMNS
        color = (0.9, 0.9, 0.9)
        text = ""
        if step <= t:
            color = color_of(step, last)
            text = marks.get(token) or printable(enc.decode([token])).strip()
        dark = color[1] <= 0.5
        axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, color=color, linewidth=0))
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", parse_math=False,
                  color="white" if dark else "black", fontsize=28 / max(len(text), 2.8))


def order(args):
    enc = build_tokenizer(load_checkpoint(args.ckpt)[1]["pieces"])
    meta, rows = rows_of(args.file)
    if zlib.crc32(path_of(args.ckpt).read_bytes()) not in meta["checkpoints"].values():
        raise UserError(f"{args.file} is of other checkpoints than {args.ckpt}: give --ckpt")

    # Of each rule its best variant at this budget, on the same item.
    best = {}
    for row in sorted(rows, key=lambda row: row["score"]):
        if row["budget"] == args.steps:
            best[parse_order(row["order"]).name] = row
    names = [parse_order(name).name for name in args.orders.split(",")]
    shown = [best[name] for name in names if name in best]
    if not shown:
        raise UserError(f"no such orders at --steps {args.steps}, but "
                        f"{','.join(best) or 'none at all'}")
    answers = [row["shown"][args.item % len(row["shown"])] for row in shown]
    last = max(max(reveal_step) for _, reveal_step in answers)

    L = len(answers[0][0])
    height = 0.6 + len(shown) * (0.4 + 0.36 * canvas_rows(L))
    figure = Figure((10, height), layout="constrained")
    panels = figure.subplots(len(shown), squeeze=False).flat
    for row, (tokens, reveal_step), axes in zip(shown, answers, panels):
        draw_canvas(axes, tokens, reveal_step, last, last, enc)
        axes.set_title(f"{row['order']}, {max(reveal_step)} steps", loc="left", fontsize=11)
    steps = range(1, last + 1)
    figure.legend([Patch(color=color_of(t, last)) for t in steps], [f"step {t}" for t in steps],
                  ncols=8, frameon=False, loc="outside lower center")
    save(figure, args.out, dpi=120)


def gif(args):
    model, state = load_checkpoint(args.ckpt)
    chosen = parse_order(args.order)
    need_trained_gates(args.ckpt, state, [chosen])
    enc = build_tokenizer(state["pieces"])
    config = state["train_config"]
    items = load_splits(config["dataset"], config["data_dir"],
                        toy_sizes={"val": TOY_SIZES["val"]})["val"]
    prompt, _, fitting = encode(items, enc, model.config.prompt_len, model.config.answer_len)
    if not fitting:
        raise UserError(f"none of {len(items)} validation items fits this checkpoint's canvas")
    i = args.item % len(fitting)
    question = fill(items[fitting[i]]["question"], 110)
    out = generate(model, prompt[i : i + 1], args.steps, chosen)
    tokens = out.tokens[0].tolist()
    reveal_step = out.reveal_step[0].tolist()
    last = max(reveal_step)

    figure = Figure((10, 0.9 + 0.36 * canvas_rows(len(tokens))))
    writer = PillowWriter(fps=1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with writer.saving(figure, args.out, dpi=100):
        for t in [*range(last + 1), last, last]:  # the finished answer stays for a while
            figure.clear()
            draw_canvas(figure.add_axes((0.01, 0.02, 0.98, 0.65)), tokens, reveal_step, t, last,
                        enc)
            figure.text(0.01, 0.97, question, va="top", parse_math=False)
            figure.text(0.99, 0.97, f"step {t} of {last}", ha="right", va="top")
            writer.grab_frame()


# --- the script -----------------------------------------------------------------------------------

def check_kind(path: Path, kinds: set):
    """Before anything runs: is there such a kind of file?"""
    kind = path.suffix[1:].lower()
    if kind not in kinds:
        raise UserError(f"--out {path}: want a name that ends in .{', .'.join(sorted(kinds))}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for draw in (curve, seeds, log):
        command = commands.add_parser(draw.__name__)
        command.add_argument("files", nargs="+")
        command.set_defaults(draw=draw)
    command = commands.add_parser("order")
    command.add_argument("file", help="results of eval_gsm8k.py")
    command.add_argument("--ckpt", default="out/ckpt.pt", help="whose tokenizer it is")
    command.add_argument("--steps", type=whole_number, default=4, help="the budget")
    command.add_argument("--orders", default="learned,entropy_bound,left_to_right")
    command.set_defaults(draw=order)
    command = commands.add_parser("gif")
    command.add_argument("--ckpt", default="out/ckpt.pt")
    command.add_argument("--steps", type=parse_steps, default=4)
    command.add_argument("--order", default="learned:0.5")
    command.set_defaults(draw=gif)
    for name, command in commands.choices.items():
        if name in ("order", "gif"):
            command.add_argument("--item", type=int, default=0, help="which answer")
        command.add_argument("--out", type=path_to_write, help="out/NAME.png or .gif by default")
    args = parser.parse_args(argv)

    args.out = args.out or Path(f"out/{args.name}.{'gif' if args.draw is gif else 'png'}")
    kinds = {"gif"} if args.draw is gif else set(Figure().canvas.get_supported_filetypes())
    check_kind(args.out, kinds)
    args.draw(args)


if __name__ == "__main__":
    run_script(main)
