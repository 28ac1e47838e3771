"""Accuracy against steps, for the learned order and every rule, on the checkpoint's own test split.

    python eval_gsm8k.py --steps 4 --limit 1000     every order at one budget, minutes
    python eval_gsm8k.py                            the whole curve
    python eval_gsm8k.py --plot                     draw what was written, without running anything;
                                                    --json a.json,b.json draws the rows of both: more
                                                    orders of one run, or several runs and their mean
    torchrun --nproc_per_node 2 eval_gsm8k.py       the same rows, shared out among two processes

Every order uses the same generate(), the same canvas, the same EOS rule and the most probable token.
The learned order runs on the order-trained checkpoint; each rule runs on it and on the control (the
same denoiser trained on by stage 1's loss for as many network states), and the better of the two on
test is its number, so that a rule cannot lose because the denoiser was bent towards the learned
order. A budget is of steps on average. An order whose knob is not given, or that finishes early, is tuned: for each checkpoint
and budget, the knob and the cap (the budget, one more or twice as much) of highest score among those that stay within the budget on
average, all on validation items (ties: fewer steps); for the learned order the choice is between drawn gates and
thresholds. Any other is capped at the budget. Budget L is no cap for
adaptive rules, so there every knob of the sweep is reported. The score is --metric, accuracy or
coherent, averaged over seeds; its Wilson 95 % interval is over items.

accuracy    "strict": cut at the first EOS or PAD, last `####`, the number right after it, compared as a
            decimal. An item that does not fit prompt or canvas counts as wrong
coherent    accurate, and no <<a=b>> is false or broken: did the parallel steps agree with each other?
            (An accurate answer without any equation counts; the toy has none.)
steps       forward passes while a row was unfinished: mean (least - most) over rows
flexible    right if the last number anywhere is; harness: as lm-evaluation-harness' strict-match counts
format      share of answers without a number after `####`
nats        with --likelihood: mean log p(true answer) of the sampler that takes this order and draws its tokens from p, over the
            items that fit. Exact where the order draws nothing; else of one order an item, on average a lower bound. Not the
            oracle's, which sees the answer
equations   share of the generated <<a=b>> that are true, of those that can be read
answers/s   at --batch_size; tokens/s in the JSON count the answer up to EOS
p           of the learned order against the rule of highest score among those with no more mean steps,
            paired over items (McNemar, exact; orders that draw: their first seed). That rule is picked on
            test, which favours it.
JSON rows hold besides: the share of EOS and PAD among what each step reveals, the mean step at which
each kind of token is revealed, the first answers with their orders, and which items were right.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import textwrap
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (NUMBER, TOY_SIZES, UserError, build_tokenizer, cli, decode, encode_split, final_number, is_correct, load_splits,
                  replacing, value_of)
from model import MDM, load_checkpoint, pick_device, trim
from orders import ORDERS, Order, parse_order
from sample import generate, parse_steps, token_text

EVERY_ORDER = ("learned,learned+finish,left_to_right,random,dilated,confidence,margin,entropy,iid,threshold,factor,entropy_bound,"
               "low_entropy,klass,oracle,confidence@8,confidence+eos_last,iid+eos_last,threshold+eos_last,factor+eos_last,"
               "entropy_bound+eos_last,low_entropy+eos_last,entropy_bound+finish,random+finish,left_to_right+finish")


# --- statistics ------------------------------------------------------------------------------------

def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share of n (Wilson 1927); unlike p +- z*sigma it stays within 0..1."""
    zz = z * z / n
    center, half = share + zz / 2, z * math.sqrt(share * (1 - share) / n + zz / (4 * n))
    return (center - half) / (1 + zz), (center + half) / (1 + zz)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of paired results (N,) bool: are the items where only one is right split evenly?"""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n)


# --- ways to count one answer ------------------------------------------------------------------------

def last_number(text: str):
    """The last number anywhere ("flexible"), read as final_number reads one."""
    numbers = NUMBER.findall(text)
    return final_number(f"#### {numbers[-1]}") if numbers else None


def harness_match(text: str, answer: str) -> bool:
    """lm-evaluation-harness, gsm8k strict-match: the first `#### number`, compared as strings without
    "," and "$" and a final "."."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    strip = lambda number: re.sub(r"\.$", "", re.sub(r"[,$]", "", number)).lower()
    return bool(found) and strip(found[1]) == strip(answer.split("####")[-1].strip())


def count_equations(text: str) -> tuple[int, int]:
    """How many of the <<a=b>> are true, and how many there are. b may be rounded to the decimals it shows."""
    equations, true = re.findall(r"<<([^<>]*)>>", text), 0
    for equation in equations:
        left, _, right = equation.rpartition("=")
        a, b, decimals = value_of(left), value_of(right), len(right.partition(".")[2])
        true += a is not None and b is not None and abs(a - b) <= (Fraction(1, 2 * 10**decimals) if decimals else 0)
    return true, len(equations)


def score_of(dataset: str) -> str:
    """What counts by default. A toy's number can be found without a coherent solution, so there the whole solution counts."""
    return "coherent" if dataset.startswith("toy") else "accuracy"


def judge(text: str, answer: str) -> dict:
    """One generated answer against the true one, counted in every way."""
    true, equations = count_equations(text)
    strict, whole = is_correct(text, answer), text.count("<<") == text.count(">>") == equations
    return {"accuracy": strict, "coherent": strict and whole and true == equations, "true": true, "equations": equations,
            "flexible": last_number(text) == final_number(answer), "harness": harness_match(text, answer),
            "format_failures": final_number(text) is None}


@lru_cache(maxsize=10_000)
def role(text: str) -> tuple[bool, str | None]:
    """Is a token part of a number or word, or only a mark? And what stands after it, if it is a mark of places?"""
    places = {"=": "result", ">>": "structure", "<<": "operand", "####": "final"}
    after = max((mark for mark in places if mark in text), key=text.rfind, default=None)
    return bool(re.search(r"\w|[.$%]", text)), places.get(after)


def token_kinds(tokens: list[int], enc) -> list[str]:
    """What each token is for: operator, operand, result (after the =), final (after ####), structure, EOS or PAD."""
    kinds, place, end = [], "structure", enc.n_vocab - 3
    for token in tokens:
        text = token_text(token, enc)
        written, next_place = role(text)
        if token >= end:
            kinds.append("EOS" if token == end else "PAD")
        elif place == "operand" and text.strip() in ("+", "-", "*", "/"):
            kinds.append("operator")
        else:
            kinds.append(place if written else "structure")
        place = next_place or place
    return kinds


# --- one row of the table ------------------------------------------------------------------------------

@dataclass
class Bench:
    """A model and the items it is measured on, encoded and batched. The first step of every order starts
    from the all-MASK canvas, so its hidden states are computed once for all of them."""
    model: MDM
    enc: object
    items: list
    target: str
    batch_size: int = 64

    @torch.no_grad()
    def __post_init__(self):
        config, device = self.model.config, next(self.model.parameters()).device
        split = encode_split(self.items, self.enc, config.prompt_len, config.answer_len, self.target)
        start = time.perf_counter()
        self.fitting = [i for i, fits in enumerate(split.fits) if fits]
        self.batches = []  # (indices of items, prompt, x0, hidden states at the all-MASK canvas)
        for i in range(0, len(self.fitting), self.batch_size):
            prompt, x0 = (x[i : i + self.batch_size].to(device) for x in (split.prompt, split.x0))
            first = self.model(trim(prompt, config.pad), torch.full_like(x0, config.mask))
            first.sum().item()  # wait for the device
            self.batches.append((self.fitting[i : i + self.batch_size], prompt, x0, first))
        self.first_seconds = time.perf_counter() - start


def evaluate(bench: Bench, order: Order, cap: int, seeds=(0,), metric: str = "accuracy", likelihood: bool = False) -> dict:
    """`order` with at most `cap` steps; "score", "ci95" and "correct" are those of `metric`. Item i draws from
    seed * 1e6 + i, so that a row does not depend on the batch size. Seconds are those of one seed and include
    the shared first step."""
    start, generated = time.perf_counter(), []
    for seed in seeds:
        for rows, prompt, x0, first in bench.batches:
            out = generate(bench.model, prompt, cap, order, seeds=[seed * 10**6 + i for i in rows], x0=x0, first=first)
            generated += zip([seed] * len(rows), rows, out.tokens.tolist(), out.steps.tolist(), out.reveal_step.tolist())
    seconds = (time.perf_counter() - start) / len(seeds) + bench.first_seconds

    nats = [nats for rows, prompt, x0, first in bench.batches if likelihood for nats in
            generate(bench.model, prompt, cap, order, seeds=rows, x0=x0, forced=True, first=first).log_p.tolist()]
    n, right = len(bench.items), np.zeros((len(seeds), len(bench.items)), dtype=bool)
    counts, kind_steps, filler, n_tokens = defaultdict(int), defaultdict(list), defaultdict(list), 0
    for seed, i, tokens, _, reveal_step in generated:
        for name, value in judge(decode(tokens, bench.enc), bench.items[i]["answer"]).items():
            counts[name] += value
            if name == metric:
                right[seeds.index(seed), i] = value
        for kind, step in zip(token_kinds(tokens, bench.enc), reveal_step):
            kind_steps[kind].append(step)
            filler[step].append(kind in ("EOS", "PAD"))
        n_tokens += next((i for i, token in enumerate(tokens, 1) if token >= bench.enc.n_vocab - 3), len(tokens))
    steps, mean = [used for *_, used, _ in generated] or [0], lambda values: sum(values) / len(values)
    share = {name: counts[name] / (n * len(seeds)) for name in ("accuracy", "coherent", "flexible", "harness", "format_failures")}
    return {
        "order": str(order), "cap": cap, "n": n, "does_not_fit": n - len(bench.fitting), **share,
        "score": share[metric], "ci95": wilson(share[metric], n), "score_by_seed": right.mean(1).tolist(),
        "steps_mean": mean(steps), "steps_min": min(steps), "steps_max": max(steps),
        **({"nats": mean(nats)} if nats else {}), "equations_true": counts["true"] / max(counts["equations"], 1), "seconds": seconds,
        "answers_per_s": len(bench.fitting) / seconds, "tokens_per_s": n_tokens / len(seeds) / seconds,
        "eos_share": [round(mean(filler[t]), 4) for t in sorted(filler)],
        "kind_steps": {kind: round(mean(values), 3) for kind, values in sorted(kind_steps.items())},
        "examples": [{"question": bench.items[i]["question"], "tokens": [token_text(token, bench.enc) for token in tokens],
                      "reveal_step": reveal_step} for _, i, tokens, _, reveal_step in generated[:5]],
        "correct": np.packbits(right[0]).tobytes().hex(),
    }


def tune(bench: Bench, order: Order, knobs, budget: int, metric: str, by: str = "score") -> tuple[Order, int]:
    """The knob and the cap of highest score (or likelihood, `by` "nats") within `budget` steps on average; ties: fewer steps."""
    rows, L = {}, bench.model.config.answer_len
    for knob in knobs:
        for cap in dict.fromkeys(min(cap, L) for cap in (budget, budget + 1, 2 * budget)):
            row = evaluate(bench, replace(order, knob=knob), cap, metric=metric, likelihood=by == "nats")
            if row["steps_mean"] <= budget:
                rows[replace(order, knob=knob), cap] = row.get(by, 0), -row["steps_mean"]
            if row["steps_mean"] >= budget and not order.finish:
                break  # only what may finish early can take fewer steps under a higher cap
    return max(rows, key=rows.get)


# --- the table -----------------------------------------------------------------------------------------

HEADER = (f"{'order':<28}{'denoiser':<9}{'budget':>6}{'steps':>7}{'min-max':>9}{'score':>7}{'95 %':>14}{'accuracy':>10}{'coherent':>10}"
          f"{'flexible':>10}{'harness':>9}{'format':>8}{'equations':>11}{'nats':>8}{'answers/s':>11}")


def format_row(row: dict) -> str:
    low, high = row["ci95"]
    p = f"   p {row['p']:.1e} against {row['best_rule']}" if "p" in row else ""
    return (f"{row['order']:<28}{Path(row['checkpoint']).stem:<9}{row['budget']:>6}{row['steps_mean']:>7.2f}"
            f"{row['steps_min']:>5}-{row['steps_max']:<3}{100 * row['score']:>7.1f}{100 * low:>8.1f} -{100 * high:>5.1f}"
            f"{100 * row['accuracy']:>9.1f}{100 * row['coherent']:>10.1f}{100 * row['flexible']:>10.1f}{100 * row['harness']:>9.1f}"
            f"{100 * row['format_failures']:>8.1f}{100 * row['equations_true']:>11.1f}{format(row['nats'], '.2f') if 'nats' in row else '-':>8}{row['answers_per_s']:>11.0f}{p}")


def is_rule(row: dict) -> bool:
    return not row["order"].startswith(("learned", "oracle"))


def compare(rows: list[dict]):
    """Set p and best_rule of the learned order's rows."""
    bits = lambda row: np.unpackbits(np.frombuffer(bytes.fromhex(row["correct"]), np.uint8), count=row["n"]).astype(bool)
    for row in rows:
        rivals = [r for r in rows if is_rule(r) and r["steps_mean"] <= row["steps_mean"]]
        if row["order"].startswith("learned") and rivals:
            best = max(rivals, key=lambda r: r["score"])
            row["best_rule"] = (f"{best['order']} ({Path(best['checkpoint']).stem}, "
                                f"{100 * best['score']:.1f} in {best['steps_mean']:.2f})")
            row["p"] = mcnemar(bits(row), bits(best))


def better_denoiser(rows: list[dict]) -> list[dict]:
    """Of the rows that were asked for by the same name, one for each denoiser, the one of higher score."""
    best = {}
    for row in rows:
        key = (row["budget"], row["asked"])
        if key not in best or row["score"] > best[key]["score"]:
            best[key] = row
    return sorted(best.values(), key=lambda row: (row["budget"], -row["score"]))


# --- figures -------------------------------------------------------------------------------------------

def by_budget(rows: list[dict], by: str = "score") -> list[list[dict]]:
    """For each budget, rising, the row of highest score (or whatever `by` says) of each training run."""
    best = {}
    for row in rows:
        key = (row["budget"], row["train_seed"])
        if key not in best or row[by] > best[key][by]:
            best[key] = row
    return [[row for (b, _), row in sorted(best.items()) if b == budget] for budget in sorted({b for b, _ in best})]


def mean_of(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def spread_of(rows: list[dict]) -> tuple[float, float]:
    """Least and largest score of several training runs; the Wilson interval of one."""
    return rows[0]["ci95"] if len(rows) == 1 else (min(row["score"] for row in rows), max(row["score"] for row in rows))


def plot_curve(result: dict, path: Path):
    """Score against mean steps, mean over training runs, and beside it the likelihood where rows have it. A rule's point is
    the best that its variants, knobs and denoisers reach at a budget, on the items that are shown: a choice that favours it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, metric = result["rows"], result["meta"]["args"]["metric"]
    panels = {"score": (rows, 100, f"{metric}, %"), "nats": ([row for row in rows if "nats" in row and row["order"] != "oracle"], 1, "log p(true answer), nats")}
    panels = {by: panel for by, panel in panels.items() if panel[0]}
    figure = Figure(figsize=(9 * len(panels), 6), layout="constrained")
    names = sorted({parse_order(row["order"]).name for row in rows}, key=lambda name: (name != "learned", name))
    for axes, (by, (shown, unit, label)) in zip(figure.subplots(1, len(panels), squeeze=False, sharex=True)[0], panels.items()):
        axes.set(xlabel="mean steps per answer", ylabel=label, title=result["meta"]["title"])
        for i, name in enumerate(names):
            points = by_budget([row for row in shown if parse_order(row["order"]).name == name], by)
            if not points:
                continue
            x, y = [mean_of(runs, "steps_mean") for runs in points], [unit * mean_of(runs, by) for runs in points]
            style = dict(color="black", linewidth=2.5, zorder=3) if name == "learned" else \
                dict(color=colormaps["tab20"]((i - 1) % 20), linewidth=1.2, linestyle=":" if name == "oracle" else "-")
            error = np.abs(100 * np.array([spread_of(runs) for runs in points]).T - y) if by == "score" else None                # (2, points)
            axes.errorbar(x, y, error, label=name + " (sees the answer)" * (name == "oracle"), marker="o", markersize=4, capsize=2, **style)
        *_, longest = by_budget([row for row in shown if is_rule(row)] or shown, by)
        axes.axhline(unit * mean_of(longest, by), color="0.6", linewidth=1, linestyle="--", label=f"best rule in up to {longest[0]['budget']} steps")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=150 if len(panels) == 1 else 110)


def print_means(rows: list[dict]):
    """A table over training runs: each order on the denoiser that is better for it."""
    print(f"{'order':<28}{'budget':>6}{'steps':>7}{'score':>7}{'over runs':>15}{'accuracy':>10}{'coherent':>10}{'runs':>6}")
    table = [runs for asked in dict.fromkeys(row["asked"] for row in rows) for runs in by_budget([row for row in rows if row["asked"] == asked])]
    for runs in sorted(table, key=lambda runs: (runs[0]["budget"], -mean_of(runs, "score"))):
        low, high = spread_of(runs)
        print(f"{runs[0]['asked']:<28}{runs[0]['budget']:>6}{mean_of(runs, 'steps_mean'):>7.2f}{100 * mean_of(runs, 'score'):>7.1f}{100 * low:>8.1f} -{100 * high:>5.1f}"
              f"{100 * mean_of(runs, 'accuracy'):>10.1f}{100 * mean_of(runs, 'coherent'):>10.1f}{len(runs):>6}")


def plot_order(result: dict, path: Path):
    """Position x step, for the same answers in the learned order and by the best rule: a token stands where it
    is revealed. Below, the mean step of each kind of token."""
    from matplotlib.figure import Figure

    budgets = {row["budget"] for row in result["rows"]}
    budget = min(budgets, key=lambda budget: (abs(budget - 4), budget))
    at_budget = sorted((row for row in result["rows"] if row["budget"] == budget), key=lambda row: -row["score"])
    shown = [row for row in at_budget if row["order"].startswith("learned")][:1] + [row for row in at_budget if is_rule(row)][:1]
    if not shown:
        return
    n, last = len(shown[0]["examples"]) * len(shown), max(max(example["reveal_step"]) for row in shown for example in row["examples"])
    figure = Figure(figsize=(16, 1.5 * n + 3), layout="constrained")
    *panels, bars = figure.subplots(n + 1, 1, height_ratios=[1.2] * n + [2])
    for panel, (example, row) in enumerate((i, row) for i in range(len(shown[0]["examples"])) for row in shown):
        axes, question, tokens = panels[panel], row["examples"][example]["question"], row["examples"][example]["tokens"]
        step = np.array(row["examples"][example]["reveal_step"])
        known = np.where(step <= np.arange(1, last + 1)[:, None], step, np.nan)                    # (T, L)
        axes.imshow(known, cmap="viridis_r", vmin=0.5, vmax=last + 1, aspect="auto", alpha=0.6)
        for position, (text, t) in enumerate(zip(tokens, step)):
            axes.text(position, t - 1, text.strip(), ha="center", va="center", fontsize=min(7, 32 / len(text)), parse_math=False)
        axes.set(yticks=range(last), yticklabels=range(1, last + 1), xticks=[])
        axes.set_ylabel(row["order"].replace("+", "\n+"), fontsize=7)
        if row is shown[0]:
            axes.set_title(textwrap.shorten(question, 170), fontsize=9, loc="left", parse_math=False)
    kinds = [kind for kind in ("structure", "result", "operand", "operator", "final", "EOS", "PAD") if kind in shown[0]["kind_steps"]]
    for i, row in enumerate(shown):
        place = np.arange(len(kinds)) + (i - (len(shown) - 1) / 2) * 0.4
        bars.bar(place, [row["kind_steps"].get(kind, np.nan) for kind in kinds], 0.38, label=row["order"], color=["black", "0.6"][i])
    bars.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="mean step")
    bars.legend()
    figure.savefig(path, dpi=110)


# --- the run -------------------------------------------------------------------------------------------

def parse_args(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy against steps.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="order-trained checkpoint")
    parser.add_argument("--control", default="out/control.pt", help="the control's checkpoint; empty: none")
    parser.add_argument("--orders", default=EVERY_ORDER, help="comma-separated NAME[:KNOB][@BLOCK][+eos_last][+finish]")
    parser.add_argument("--rules_on", default="both", choices=["both", "control"], help="which of them the rules run on; control: half the time")
    parser.add_argument("--steps", default="1,2,3,4,5,8,16,L", help="comma-separated budgets; L is the length of the canvas")
    parser.add_argument("--limit", type=int, default=0, help="first N items of the split; 0: all")
    parser.add_argument("--tune_items", type=int, default=128, help="validation items that knobs are chosen on")
    parser.add_argument("--metric", choices=["accuracy", "coherent"],
                        help="the score: what knobs are chosen for and figures show (coherent for the toy, accuracy for GSM8K)")
    parser.add_argument("--tune_by", default="score", choices=["score", "nats"],
                        help="what knobs are chosen by: the score, or the true answers' likelihood, which a weak model's few hits say less about")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="what is reported; knobs are chosen on val")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds of the orders that draw")
    parser.add_argument("--likelihood", action="store_true", help="also the true answers' likelihood along each order; twice the time")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--data_dir", help="where the GSM8K files are, if not where training found them")
    parser.add_argument("--json", default="out/eval.json", help="where to write the results; figures go beside it")
    parser.add_argument("--plot", action="store_true", help="only draw curve.png and order.png from --json, here a comma-separated list")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)
    if args.limit < 0 or min(args.batch_size, args.tune_items, args.seeds) < 1:
        raise UserError("need --limit >= 0 and --batch_size, --tune_items, --seeds >= 1")
    if max(args.tune_items, args.seeds) > 10_000:
        raise UserError("need --tune_items and --seeds <= 10000")
    if not args.plot and (not args.json.endswith(".json") or os.path.isdir(args.json)):
        raise UserError(f"--json {args.json}: want a file whose name ends in .json")
    for text in args.orders.split(","):
        parse_order(text)
    for text in args.steps.split(","):
        parse_steps(text)
    return args


def draw_figures(paths: list[Path]) -> list[dict]:
    """curve.png and order.png beside the first of the JSON files whose rows they show; the rows."""
    rows, kinds = [], set()
    for path in paths:
        try:
            result = json.loads(path.read_text())
            meta = result["meta"]
            rows += [{**row, "train_seed": meta["train_config"]["seed"]} for row in result["rows"]]
            kinds.add((meta["train_config"]["dataset"], meta["args"]["split"], meta["args"]["metric"]))
        except FileNotFoundError:
            raise UserError(f"{path} not found: run `python eval_gsm8k.py` first, or pass --json") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{path} is not a result of this script ({type(e).__name__}: {e})") from e
    if len(kinds) > 1 or not rows:
        raise UserError("one figure shows one data set, split and metric, and at least one row")
    dataset, split, _ = kinds.pop()
    try:
        runs = len({row["train_seed"] for row in rows})
        meta["title"] = f"{dataset}, {split} split, {' and '.join(map(str, sorted({row['n'] for row in rows})))} items" + \
            f", mean, least and most of {runs} training runs" * (runs > 1)
        plot_curve({"rows": rows, "meta": meta}, paths[0].parent / "curve.png")
        plot_order({"rows": rows, "meta": meta}, paths[0].parent / "order.png")
    except OSError as e:
        raise UserError(f"cannot write figures to {paths[0].parent}: {e}") from e
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"rows in {', '.join(map(str, paths))} are not results of this script ({type(e).__name__}: {e})") from e
    return rows


def commit() -> str:
    """The code's git commit, "+" if files differ from it; empty where there is none."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


@lru_cache
def versions() -> dict:
    """What made a checkpoint or a result: code as it was when the run asked first, torch and Python."""
    return {"commit": commit(), "torch": str(torch.__version__), "python": platform.python_version()}


def write_json(path: Path, content: dict):
    with replacing(path) as file:
        file.write(json.dumps(content))


def rows_of(args, bench: Bench, tuning: Bench, name: str, budget: int) -> list[dict]:
    """The rows of one order at one budget on one denoiser: one, or at budget L one for each knob."""
    order, longest = parse_order(name), bench.model.config.answer_len
    knobs = ORDERS[order.name].sweep if ":" not in name and ORDERS[order.name].sweep else (order.knob,)
    if budget == longest:
        choices = {str(replace(order, knob=knob)): (replace(order, knob=knob), longest) for knob in knobs}
    elif len(knobs) > 1 or order.finish:
        choices = {name: tune(tuning, order, knobs, budget, args.metric, args.tune_by)}
    else:
        choices = {name: (order, budget)}
    rows = []
    for asked, (choice, cap) in choices.items():
        draws = choice.name in ("iid", "random") or (choice.name == "learned" and not choice.knob)
        seeds = range(args.seeds if draws and budget > 1 else 1)
        rows.append({"asked": asked, "budget": budget, **evaluate(bench, choice, cap, seeds, args.metric, args.likelihood)})
    return rows


def run_all(args, benches: dict[str, Bench], tuning: dict[str, Bench]) -> list[dict]:
    """A row for every order, budget and denoiser. The control's gate head was never trained. Each process of torchrun
    takes every world-th of these jobs, and all end up with all rows."""
    longest, rank, world = benches[args.ckpt].model.config.answer_len, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    budgets = dict.fromkeys(min(parse_steps(text), longest) for text in args.steps.split(","))
    names = dict.fromkeys(text.strip() for text in args.orders.split(","))
    of_rules = list(benches) if args.rules_on == "both" else list(benches)[-1:]
    jobs = [(name, budget, path) for budget in budgets for name in names
            for path in ([args.ckpt] if parse_order(name).name == "learned" else of_rules)]
    found = {}
    for i in tqdm(range(rank, len(jobs), world), disable=rank > 0 or None, leave=False):
        name, budget, path = jobs[i]
        found[i] = [{"checkpoint": path, **row} for row in rows_of(args, benches[path], tuning[path], name, budget)]
    if world > 1:
        parts = [None] * world
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # only rows travel, and the last may be long in coming
        dist.all_gather_object(parts, found)
        dist.destroy_process_group()
        found = {i: rows for part in parts for i, rows in part.items()}
    rows = [row for i in range(len(jobs)) for row in found[i]]
    compare(rows)
    return rows


def main(argv=None):
    args = parse_args(argv)
    if args.plot:
        paths = [Path(path) for path in args.json.split(",")]
        print_means(draw_figures(paths))
        print(f"drew curve.png and order.png in {paths[0].parent}")
        return
    device, start, code = pick_device(args.device), time.perf_counter(), versions()
    paths = [path for path in (args.ckpt, args.control) if path]
    models, states = zip(*[load_checkpoint(path, device) for path in paths])
    config, enc = states[0]["train_config"], build_tokenizer(states[0]["pieces"])
    args.metric = args.metric or score_of(config["dataset"])
    if any(states[-1][part] != states[0][part] for part in ("pieces", "model_config")):
        raise UserError(f"{args.control} and {args.ckpt} are not from the same run: their tokenizers or sizes differ")
    sizes = {"val": TOY_SIZES["val"] + args.tune_items, "test": TOY_SIZES["test"]}
    splits = load_splits(config["dataset"], args.data_dir or config["data_dir"], toy_sizes=sizes)
    tune_items, splits["val"] = splits["val"][: args.tune_items], splits["val"][args.tune_items :]
    items = splits[args.split][: args.limit or None]
    if not items:
        raise UserError(f"--tune_items {args.tune_items} leaves no validation items to report")
    benches = {path: Bench(model, enc, items, config["target"], args.batch_size) for path, model in zip(paths, models)}
    tuning = {path: Bench(model, enc, tune_items, config["target"], args.batch_size) for path, model in zip(paths, models)}

    write_json(Path(args.json).with_suffix(".tmp"), {})  # fails now rather than after an hour
    rows = run_all(args, benches, tuning)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    title = f"{config['dataset']}, {args.split} split, {len(items)} items"
    print(f"{title}, {device}; each rule on {'the better of ' + ' and '.join(paths) if args.rules_on == 'both' else paths[-1]}, in %\n{HEADER}")
    for row in better_denoiser(rows):
        print(format_row(row))
    if rows[0]["does_not_fit"]:
        print(f"{rows[0]['does_not_fit']} of {len(items)} items are longer than prompt or canvas and count as wrong")
    made_by = {path: {key: state[key] for key in ("stage", "step", "versions")} for path, state in zip(paths, states)}
    meta = {"title": title, "args": vars(args), "train_config": config, **code, "checkpoints": made_by,
            "device": str(device), "threads": torch.get_num_threads(), "seconds": time.perf_counter() - start}
    write_json(Path(args.json), {"meta": meta, "rows": rows})
    draw_figures([Path(args.json)])
    print(f"wrote {args.json}, curve.png and order.png beside it, in {meta['seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    cli(main)
