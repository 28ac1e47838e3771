"""Figures of results (eval_gsm8k.py), checkpoints and training logs, into --out.

    python -m tools.plot curve out/eval.json   score against steps, each rule by the best of its
                                               variants and checkpoints; of several training runs
                                               mean, least and most, of one the 95 % interval
    python -m tools.plot order out/eval.json   which step reveals what, at budget --steps
    python -m tools.plot gif                   an answer as it forms
    python -m tools.plot log old=a/log.jsonl,b/log.jsonl new=c/log.jsonl    the order stage's bound
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from textwrap import fill

from matplotlib import colormaps
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from data import UserError, build_tokenizer, encode, load_splits, run_script
from model import load_checkpoint
from sample import ORDERS, generate, parse_order, parse_steps

COLORS = ("black", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F",
          "#B8A800")  # Okabe and Ito: colour-blind readers tell them apart


def read(path: str, *names: str) -> list[list]:
    """These fields of each line of a JSON file that has them all."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [[line[name] for name in names] for line in lines if {*names} <= {*line}]
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"cannot read {path}: {e}") from e


def curve(args):
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    titles, best = set(), defaultdict(dict)  # best[rule, budget][training run] = row
    for meta, rows in sum((read(path, "meta", "rows") for path in args.files), []):
        data, run = meta["train_config"]["dataset"], str(meta["checkpoints"])
        metric = meta["args"]["metric"] or ("coherent" if data.startswith("toy") else "accuracy")
        for row in rows:
            titles.add((metric, f"{data}, {row['n']} {meta['args']['split']} items"))
            runs = best[parse_order(row["order"]).name, row["budget"]]
            runs[run] = max(row, runs.get(run, row), key=lambda row: row["score"])
    if len(titles) != 1:
        raise UserError(f"want results of one data set, split and metric, got {titles or 'none'}")
    [(metric, title)], unit = titles, 100 - 99 * (metric == "nats")
    for name, color, marker in zip(ORDERS, COLORS, "os^Dv<>PX", strict=True):
        points = [[*best[key].values()] for key in sorted(best) if key[0] == name]  # runs of each
        x = [mean(row["steps"][0] for row in rows) for rows in points]
        y = [unit * mean(row["score"] for row in rows) for rows in points]
        low, high = ([unit * pick(row["score"] for row in rows) if len(rows) > 1 else
                      unit * pick(rows[0]["ci95"]) for rows in points] for pick in (min, max))
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        axes.plot(x, y, color=color, marker=marker, markersize=5, label=name if x else None,
                  lw=2.5 if name == "learned" else 1.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{title}, training runs: {max(map(len, best.values()))}", fontsize=10)
    axes.set(xlabel="mean steps (forward passes) per answer",
             ylabel="log p(true answer), nats" if unit == 1 else f"{metric} answers, %")
    figure.legend(frameon=False, loc="outside right center")
    figure.savefig(args.out, dpi=150)


def log(args):
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    for group, color, style in zip(args.files, COLORS[1:], ("-", "--", ":", "-.") * 2):
        (label, _, paths), values = group.partition("="), defaultdict(list)
        for path in paths.split(","):
            records = [r[1:] for r in read(path, "stage", "step", "elbo") if r[0] == "order"]
            if not records:
                raise UserError(f"{path} has no bound of the order stage; want LABEL=FILE,FILE")
            axes.plot(*zip(*records), color=color, lw=0.7, alpha=0.6)
            for step, elbo in records:
                values[step].append(elbo)
        n = len(paths.split(","))
        steps = [step for step in sorted(values) if len(values[step]) == n]  # that all runs have
        axes.plot(steps, [median(values[step]) for step in steps], style, color=color, lw=2.8,
                  label=f"{label}, median of {n}")
    low = min(values[steps[len(steps) // 6]])  # where p cannot yet predict q it is far below
    axes.set(xlabel="optimizer steps of the order stage", ylim=(low - 1, None),
             ylabel="bound on log p(answer), nats, training batches")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(args.out, dpi=150)


def color_of(step: int, last: int):
    return colormaps["viridis_r"](step / (last + 0.5))


def cells(axes, tokens, reveal_step, t: int, last: int, enc, columns=30):
    """The canvas after step t, a cell a position, in the colour of the step that reveals it."""
    marks = {enc.n_vocab - 3: "∎", enc.n_vocab - 2: "_"}  # EOS and PAD
    axes.set(xlim=(0, columns), ylim=(-(-len(tokens) // columns), 0))
    axes.axis("off")
    for i, (token, step) in enumerate(zip(tokens, reveal_step)):
        (y, x), color = divmod(i, columns), color_of(step, last) if step <= t else (0.9, 0.9, 0.9)
        axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, color=color, lw=0))
        text = (marks.get(token) or enc.decode([token]).strip()) * (step <= t)
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", parse_math=False,
                  color="black" if color[1] > 0.5 else "white", fontsize=28 / max(len(text), 2.8))


def order(args):
    enc = build_tokenizer(load_checkpoint(args.ckpt)[1]["pieces"])
    best = {parse_order(row["order"]).name:
            (row["order"], *row["shown"][args.item % len(row["shown"])])
            for [rows] in read(args.files[0], "rows")
            for row in sorted(rows, key=lambda row: row["score"]) if row["budget"] == args.steps}
    shown = [best[name] for name in args.orders.split(",") if name in best]
    if not shown:
        raise UserError(f"no such orders at --steps {args.steps}, but {','.join(best) or 'none'}")
    steps, L = range(1, 1 + max(max(reveal_step) for *_, reveal_step in shown)), len(shown[0][1])
    figure = Figure((10, 0.6 + len(shown) * (0.4 + 0.36 * -(-L // 30))), layout="constrained")
    for (name, *answer), axes in zip(shown, figure.subplots(len(shown), squeeze=False).flat):
        cells(axes, *answer, steps[-1], steps[-1], enc)
        axes.set_title(f"{name}, {max(answer[1])} steps", loc="left", fontsize=11)
    figure.legend([Patch(color=color_of(t, steps[-1])) for t in steps],
                  [f"step {t}" for t in steps], ncols=8, frameon=False, loc="outside lower center")
    figure.savefig(args.out, dpi=120)


def gif(args):
    model, state = load_checkpoint(args.ckpt)
    enc, config = build_tokenizer(state["pieces"]), state["train_config"]
    items = load_splits(config["dataset"], config["data_dir"])["val"]
    prompt, _, fitting = encode(items, enc, config["prompt_len"], config["answer_len"])
    i = args.item % len(fitting)
    question = fill(items[fitting[i]]["question"], 110)
    out = generate(model, prompt[i : i + 1], args.steps, args.order)
    answer, last = (out.tokens[0].tolist(), out.reveal_step[0].tolist()), out.steps.item()
    figure, writer = Figure((10, 0.9 + 0.36 * -(-config["answer_len"] // 30))), PillowWriter(fps=1)
    with writer.saving(figure, args.out, dpi=100):
        for t in [*range(last + 1), last, last]:  # the finished answer stays for a while
            figure.clear()
            cells(figure.add_axes((0.01, 0.02, 0.98, 0.65)), *answer, t, last, enc)
            figure.text(0.01, 0.97, question, va="top", parse_math=False)
            figure.text(0.99, 0.97, f"step {t} of {last}", ha="right", va="top")
            writer.grab_frame()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("files", nargs="*")
    shared.add_argument("--out", help="file to write; out/COMMAND.png or .gif by default")
    shared.add_argument("--ckpt", default="out/ckpt.pt", help="of order and gif")
    shared.add_argument("--steps", type=parse_steps, default=4, help="of order and gif")
    shared.add_argument("--item", type=int, default=0, help="which answer, of order and gif")
    shared.add_argument("--order", default="learned:0.5", help="of gif")
    shared.add_argument("--orders", default="learned,entropy_bound,left_to_right", help="of order")
    commands = parser.add_subparsers(dest="name", required=True)
    for draw in (curve, order, gif, log):
        commands.add_parser(draw.__name__, parents=[shared]).set_defaults(draw=draw)
    args = parser.parse_args(argv)
    if not args.files and args.draw is not gif:
        parser.error(f"{args.name} of which files?")
    args.out = Path(args.out or f"out/{args.name}.{'gif' if args.draw is gif else 'png'}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.draw(args)


if __name__ == "__main__":
    run_script(main)
