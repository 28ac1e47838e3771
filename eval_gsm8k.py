"""Accuracy against steps, for the learned order and every rule, on the checkpoint's own test split.

    python eval_gsm8k.py --steps 4 --limit 1000     every order at one budget, minutes
    python eval_gsm8k.py                            the whole curve

Every order uses the same generate(), the same canvas and the likeliest token.
The learned order runs on the order-trained checkpoint. Each rule runs on it and on every --control,
which is denoiser.pt or, fairer, control.pt: that is denoiser.pt, trained further by stage 1's
loss on as many network states as the order stage saw. A rule's number is its best of these, so no
rule suffers from a denoiser that was adapted to the learned order.

A *cap* is the most steps that one answer may take, a *budget* the most on average. An order for
which sample.py lists knobs to try is tuned, unless its knob is given: for each checkpoint and
budget, the knob and the cap (the budget, one more or twice as much) of highest score among those
that stay within the budget on average, all on validation items. Other orders have the budget for
their cap. The score is --metric:

accuracy  cut at the first EOS or PAD; the number right after the last `####` must equal the true
          one, as a decimal. In the data set "pairs" the whole texts must be equal, but for spaces
          at their ends. An item that does not fit prompt or canvas counts as wrong
coherent  accurate, and no <<a=b>> is false or broken: did the parallel steps agree with each other?
nats      mean log p(true answer) of the sampler that takes this order and draws its tokens from p,
          over the items that fit. Exact for an order that draws nothing. For `iid` and `learned` it
          is the log of the mean over --draws orders of each item: on average a lower bound, and the
          more orders the tighter (IWAE, 1509.00519)

Columns: steps, forward passes while a row was unfinished (mean, least - most); 95 %, the interval
of the score over items (Wilson; of nats 1.96 standard errors); true, the share of the generated
<<a=b>> that are. A learned order is compared with the best rule within its budget, paired over
items: p of the sign test (McNemar, exact), or with nats the mean difference and 1.96 of its
standard errors. That rule is picked on test, which favours it.

Each row is added to --json as soon as it is done, with what it depends on: the checkpoint's bytes,
the items, those it was tuned on, the metric. So the same command goes on with the rows that are
missing, and rows of another evaluation stay in the file beside them.
"""

import argparse
import ast
import contextlib
import functools
import json
import math
import operator
import os
import re
import shlex
import time
import zlib
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (UserError, path_of, path_to_write, pick_device, run_script, say, versions,
                    write_json)
from data import TOY_SIZES, build_tokenizer, decode, encode, final_number, load_splits
from model import MDM, load_checkpoint, trim
from sample import (ORDERS, Order, generate, need_trained_gates, parse_order, parse_orders,
                    parse_steps, whole_number)

EVERY_ORDER = ("learned:0.5,learned,first_order,left_to_right,dilated,confidence,margin,entropy,"
               "iid,threshold,entropy_bound,confidence+eos_last,iid+eos_last,threshold+eos_last,"
               "entropy_bound+eos_last")


# --- one answer -----------------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,  # 7//2 as calculators do
             ast.UAdd: operator.pos, ast.USub: operator.neg}


def value_of(expression: str) -> Fraction | None:
    """Exact value of an expression of numbers, + - * / ( ) and %, or None. Python's grammar reads
    it, nothing is executed. Models write strange things: never an exception."""
    text = re.sub(r"([\d.]+)%", r"(\1/100)", expression.replace(",", "").strip())
    if not re.fullmatch(r"[\d.+\-*/() ]{1,200}", text, re.ASCII):
        return None

    def walk(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](walk(node.operand))
        return Fraction(text[node.col_offset : node.end_col_offset])  # as written: no float rounds

    try:
        return walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def is_true(equation: str) -> bool:
    """Is a=b true? If b has decimals, it may be the value of a rounded to as many: 1/3=.33,
    1/3=33.3%. A whole b must be exact."""
    left, _, right = equation.rpartition("=")
    a = value_of(left)
    b = value_of(right)
    if a is None or b is None:
        return False
    slack = 0
    decimals = re.search(r"\.(\d+)", right)
    if decimals:
        slack = Fraction(1, 2 * 10 ** len(decimals[1]))  # half a unit of the last one
        if "%" in right:
            slack /= 100
    return abs(a - b) <= slack


def judge(text: str, target: str, dataset: str) -> dict:
    """One generated answer against the true one."""
    if dataset == "pairs":  # free text: nothing in it that could be checked by itself
        right = text.strip() == target.strip()
        return {"accuracy": right, "coherent": right, "no_number": False,
                "n_true": 0, "n_equations": 0}
    number = final_number(text)
    right = number is not None and number == final_number(target)
    equations = re.findall(r"<<([^<>]*)>>", text)
    n_true = sum(is_true(equation) for equation in equations)
    n_whole = len(equations)
    none_broken = text.count("<<") == text.count(">>") == n_whole
    return {"accuracy": right, "coherent": right and none_broken and n_true == n_whole,
            "no_number": number is None, "n_true": n_true, "n_equations": n_whole}


# --- statistics -----------------------------------------------------------------------------------

def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share of n (Wilson 1927); unlike p +- z sigma it stays in 0..1."""
    center = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return max(0, center - half) / scale, (center + half) / scale


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of paired results (N,) bool: is one right as often as the other, among the
    items that only one of them gets right?"""
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    n = only_a + only_b
    one_sided = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * one_sided)


# --- one row of the table -------------------------------------------------------------------------

def batches(model: MDM, enc, items: list[dict], size: int):
    """The items that fit, `size` at a time, on the model's device: which of `items` they are,
    their prompts (B, P'), without the padding that all of them share, and true answers (B, L)."""
    device = next(model.parameters()).device
    prompt, x0, fitting = encode(items, enc, model.config.prompt_len, model.config.answer_len)
    if not fitting:
        raise UserError(f"none of {len(items)} items fits prompt and canvas of this checkpoint")
    for first in range(0, len(fitting), size):
        batch = slice(first, first + size)
        prompts = trim(prompt[batch], model.config.pad)
        yield fitting[batch], prompts.to(device), x0[batch].to(device)


def log_p_of_answers(model: MDM, prompt, x0, cap: int, order: Order, rows: list[int], draws: int):
    """log p(x0) of the sampler, (B,) in nats: exact if the order draws nothing, else the log of
    the mean over `draws` orders, on average a lower bound."""
    along_an_order = []
    for draw in range(draws if order.is_random else 1):
        seeds = [row + 10**6 * draw for row in rows]
        along_an_order.append(generate(model, prompt, cap, order, seeds=seeds, x0=x0).log_p)
    return torch.stack(along_an_order).logsumexp(0) - math.log(len(along_an_order))


def evaluate(model: MDM, enc, items: list[dict], order: Order, cap: int, metric: str, dataset: str,
             batch_size=64, draws=1) -> dict:
    """`order` on `items` with at most `cap` steps. Item i draws from seed i, whatever its batch."""
    start = time.perf_counter()
    verdicts = [judge("", item["target"], dataset) for item in items]  # of those that do not fit
    steps = []   # of each item that fits
    nats = []
    shown = []
    for rows, prompt, x0 in batches(model, enc, items, batch_size):
        out = generate(model, prompt, cap, order, seeds=rows)
        answers = out.tokens.tolist()
        for row, answer in zip(rows, answers):
            verdicts[row] = judge(decode(answer, enc), items[row]["target"], dataset)
        steps += out.steps.tolist()
        shown += zip(answers, out.reveal_step.tolist())
        if metric == "nats":
            log_p = log_p_of_answers(model, prompt, x0, cap, order, rows, draws)
            nats += [round(value, 4) for value in log_p.tolist()]

    # Shares are of all items, also of those that do not fit.
    total = {name: sum(verdict[name] for verdict in verdicts) for name in verdicts[0]}
    share = {name: total[name] / len(items) for name in ("accuracy", "coherent", "no_number")}
    judged_by = "accuracy" if metric == "nats" else metric
    score = share[judged_by]
    interval = wilson(score, len(items))
    if metric == "nats":
        score = np.mean(nats).item()
        half = 1.96 * np.std(nats).item() / len(nats) ** 0.5
        interval = score - half, score + half
    return {"order": str(order), "cap": cap, "n": len(items), "fit": len(steps), **share,
            "nats": nats, "score": score, "ci95": interval,
            "true_equations": total["n_true"] / max(total["n_equations"], 1),
            "steps": [np.mean(steps).item(), min(steps), max(steps)],
            "right": [verdict[judged_by] for verdict in verdicts], "shown": shown[:5],
            "per_second": len(steps) / (time.perf_counter() - start)}


def tune(measure, order: Order, knobs, budget: int, L: int) -> tuple[Order, int]:
    """The knob and the cap of highest score within `budget` steps on average; ties: fewer steps.
    measure(order, cap) is a row."""
    caps = sorted({min(cap, L) for cap in (budget, budget + 1, 2 * budget)})
    best = None
    for knob in knobs:
        candidate = replace(order, knob=knob)
        for cap in caps:
            row = measure(candidate, cap)
            mean_steps, _, most = row["steps"]
            quality = (row["score"], -mean_steps)
            if mean_steps <= budget and (best is None or quality > best[0]):
                best = quality, candidate, cap
            # With a larger cap an answer takes as many steps, or more if it had reached this one.
            if mean_steps >= budget or most < cap:
                break
    _, chosen, cap = best  # the cap that is the budget always stays within it
    return chosen, cap


# --- rows against each other ----------------------------------------------------------------------

def best_rules(rows: list[dict]) -> list[dict]:
    """Of the rows of one order and budget, one a checkpoint, the best: of equals the first."""
    best = {}
    for row in rows:
        key = row["budget"], row["asked"]
        if key not in best or row["score"] > best[key]["score"]:
            best[key] = row
    return sorted(best.values(), key=lambda row: (row["budget"], -row["score"]))


def is_learned(row: dict) -> bool:
    return parse_order(row["order"]).name == "learned"


def rival_of(row: dict, rows: list[dict]) -> dict | None:
    """The best rule within the budget of this row of a learned order."""
    rivals = [other for other in rows
              if not is_learned(other) and other["budget"] <= row["budget"]]
    return max(rivals, key=lambda other: other["score"], default=None)


def table(rows: list[dict], metric: str, rivals=()) -> str:
    """Lines to print; a learned order is compared with the best rule among `rivals`."""
    unit = 1 if metric == "nats" else 100
    head = (f"{'order':<25}{'denoiser':<11}{'budget':>6}{'cap':>4}{'steps':>7}{'min-max':>9}"
            f"{metric:>10}{'95 %':>15}{'accuracy':>10}{'coherent':>10}{'no number':>11}{'true':>7}")
    lines = [head]
    for row in rows:
        mean, least, most = row["steps"]
        low, high = row["ci95"]
        line = (f"{row['order']:<25}{row['checkpoint']:<11}{row['budget']:>6}{row['cap']:>4}"
                f"{mean:>7.2f}{least:>5}-{most:<3}"
                f"{unit * row['score']:>10.1f}{unit * low:>8.1f} -{unit * high:>5.1f}"
                f"{100 * row['accuracy']:>10.1f}{100 * row['coherent']:>10.1f}"
                f"{100 * row['no_number']:>11.1f}{100 * row['true_equations']:>7.1f}")
        rival = rival_of(row, rivals) if is_learned(row) else None
        if rival:
            line += f"   {against(row, rival, metric)} {rival['order']} ({rival['checkpoint']})"
        lines.append(line)
    return "\n".join(lines)


def against(row: dict, rival: dict, metric: str) -> str:
    """How a row compares with another of the same items, in words."""
    if metric == "nats":
        difference = np.array(row["nats"]) - np.array(rival["nats"])
        half = 1.96 * np.std(difference) / len(difference) ** 0.5
        return f"{np.mean(difference):+.2f} ± {half:.2f} nats against"
    p = mcnemar(np.array(row["right"]), np.array(rival["right"]))
    return f"p {p:.1e} against"


# --- do exchangeable operands meet? ---------------------------------------------------------------

def exchangeable_pairs(x0, enc):
    """Different operands of + and *, which the toy writes in either order: for answers x0 (B, L)
    their row, the position of the left one (the sign is at + 1, the right one at + 2), and which
    equation of the answer it is, from 0: (N,) each."""
    signs = torch.tensor([enc.encode_single_token(sign) for sign in "+*"], device=x0.device)
    row, left = torch.isin(x0[:, 1:-1], signs).nonzero().unbind(1)
    differ = x0[row, left] != x0[row, left + 2]
    row = row[differ]
    left = left[differ]
    equals_so_far = (x0 == enc.encode_single_token("=")).cumsum(-1)       # (B, L)
    return row, left, equals_so_far[row, left]


def meetings(model: MDM, enc, items: list[dict], steps: int, order="learned:0.5"):
    """For each exchangeable pair of the toy's items: its equation (N,), and whether one and the
    same step reveals both (N,), when the true answers are written along the order."""
    equations = []
    meets = []
    for rows, prompt, x0 in batches(model, enc, items, 64):
        step = generate(model, prompt, steps, order, seeds=rows, x0=x0).reveal_step     # (B, L)
        row, left, equation = exchangeable_pairs(x0, enc)
        equations.append(equation)
        meets.append(step[row, left] == step[row, left + 2])
    return torch.cat(equations), torch.cat(meets)


def pairs_that_meet(model: MDM, enc, items: list[dict], steps: int, order="learned:0.5") -> float:
    """The share of exchangeable pairs whose operands one step reveals, blind to each other: each
    is then right half of the time."""
    _, meets = meetings(model, enc, items, steps, order)
    return meets.sum().item() / max(len(meets), 1)


def pairs_by_equation(model: MDM, enc, items: list[dict], steps: int, order="learned:0.5") -> dict:
    """The same, {equation of the answer, from 0: share}: where does an order fail?"""
    equation, meets = meetings(model, enc, items, steps, order)
    meets = meets.cpu().double()  # the CPU has float64, MPS has none
    equation = equation.cpu()
    return {i: meets[equation == i].mean().item() for i in equation.unique().tolist()}


# --- the table at the end of a training -----------------------------------------------------------

CLOSING_ORDERS = ("learned:0.5,learned,first_order,iid,confidence,margin,left_to_right,"
                  "threshold:0.9,entropy_bound:0.1")
CLOSING_STEPS = (2, 3, 4, 6, 8, 16)


def default_metric(dataset: str) -> str:
    return "coherent" if dataset.startswith("toy") else "accuracy"


def closing_table(ckpt_path, denoiser_path, items: list[dict], *, limit: int | None = None,
                  device="cpu") -> dict:
    """Print, and return, how a trained order does on the first `limit` validation items: learned
    orders on ckpt.pt and rules on denoiser.pt in 4 steps; of a toy also the learned order in 2 to
    16 steps, with the pairs that meet. Then what shows that the order has failed."""
    items = items[:limit]
    checkpoints = {"ckpt": load_checkpoint(ckpt_path, device),
                   "denoiser": load_checkpoint(denoiser_path, device)}
    model, state = checkpoints["ckpt"]
    dataset = state["train_config"]["dataset"]
    enc = build_tokenizer(state["pieces"])
    metric = default_metric(dataset)
    steps = 4

    # The table: learned orders on the one checkpoint, rules on the other.
    rows = []
    for order in parse_orders(CLOSING_ORDERS):
        name = "ckpt" if order.name == "learned" else "denoiser"
        row = evaluate(checkpoints[name][0], enc, items, order, steps, metric, dataset)
        rows.append({"budget": steps, "checkpoint": name, **row})
    compare = shlex.join(["--ckpt", str(ckpt_path), "--control",
                          str(Path(ckpt_path).with_name("control.pt"))])
    say(f"\n{len(items)} validation items, at most {steps} steps an answer, in %. The order stage "
        "trained ckpt's denoiser further:\n`train.py --stages control` makes up for that, and then "
        f"`eval_gsm8k.py {compare}` compares")
    say(table(rows, metric))

    # Other budgets, by the same checkpoint: one order for all of them was learned.
    coherent = {}
    meet = {}
    if dataset.startswith("toy"):
        for budget in CLOSING_STEPS:
            row = evaluate(model, enc, items, parse_order("learned:0.5"), budget, metric, dataset)
            coherent[budget] = 100 * row["coherent"]
            meet[budget] = 100 * pairs_that_meet(model, enc, items, budget)
        say("\nlearned:0.5 in steps         " + "".join(f"{n:>7}" for n in CLOSING_STEPS))
        say("coherent, %                  " + "".join(f"{x:>7.1f}" for x in coherent.values()))
        say("exchangeable pairs that meet " + "".join(f"{x:>7.1f}" for x in meet.values()))

    # Has the order failed? If pairs meet, in which equation of the answer?
    signs = failure_signs(meet, bounds_of(state["log"]))
    for sign in signs:
        say(f"{sign}: try more --max_steps_order, or another --seed")
    budget = first_budget_of_meetings(meet)
    if budget:
        shares = pairs_by_equation(model, enc, items, budget)
        words = [f"{i + 1}: {100 * share:.1f}" for i, share in shares.items() if share > 0]
        say(f"pairs that meet in {budget} steps, in % of each equation: {', '.join(words)}")
    return {"rows": rows, "coherent": coherent, "meet": meet, "signs": signs}


def bounds_of(log: list[dict]) -> dict:
    """The last validation bound of each stage, nats."""
    return {record["stage"]: record["val"] for record in log if "val" in record}


def failure_signs(meet: dict, bounds: dict) -> list[str]:
    """What shows that an order has failed; `meet` in % by steps. From three steps on an order can
    keep all pairs apart. Whether 4 steps can do what one token at a time does, nobody knows."""
    signs = []
    budget = first_budget_of_meetings(meet)
    if budget:
        signs.append(f"There is a better order (in {budget} steps {meet[budget]:.1f} % of the "
                     "exchangeable pairs meet)")
    if {"denoiser", "order"} <= set(bounds) and bounds["order"] < bounds["denoiser"]:
        signs.append(f"There may be a better order (its bound in 4 steps, {bounds['order']:.2f}, "
                     f"is below stage 1's, {bounds['denoiser']:.2f}, of one random token a step)")
    return signs


def first_budget_of_meetings(meet: dict) -> int | None:
    """The smallest of at least 3 steps in which more than 1 % of the pairs meet."""
    return next((steps for steps, share in meet.items() if steps >= 3 and share > 1), None)


# --- the file of results --------------------------------------------------------------------------

@contextlib.contextmanager
def locked(path: Path):
    """One process at a time between reading and replacing `path`, so none loses another's rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    for _ in range(300):
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            time.sleep(0.1)
    else:
        raise UserError(f"{lock} has been there for half a minute: if nothing else writes to "
                        f"{path}, remove it")
    try:
        yield
    finally:
        lock.unlink()


def read_results(path: Path) -> dict:
    """{"meta": what the last evaluation was of, "rows": its rows and others'} of such a file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file of results")
    if not path.is_file():
        return {"meta": None, "rows": []}
    try:
        results = json.loads(path.read_text())
        for row in results["rows"]:
            belongs(row, results["meta"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} holds no results of this script: name another file") from e
    return results


def key_of(row: dict) -> tuple:
    """What a row is of, but for the code's version."""
    return row["asked"], row["budget"], row["of"]


def belongs(row: dict, meta: dict) -> bool:
    """Is this a row of the evaluation that `meta` describes? Its checkpoint is one of those, and it
    was tuned on those items or not at all."""
    of = row["of"]
    one_of_these = of["checkpoint"] in meta["checkpoints"].values()
    not_tuned_on_others = of["tuned_on"] in (None, meta["tuned_on"])
    return one_of_these and not_tuned_on_others and of["reported"] == meta["reported"]


def store(path: Path, meta: dict, new_rows=()) -> list[dict]:
    """Add rows to a results file, in place of those of the same key. Other rows stay: the file is
    read anew, for another evaluation may have written to it. The rows it then has."""
    with locked(path):
        keys = [key_of(row) for row in new_rows]
        rows = [row for row in read_results(path)["rows"] if key_of(row) not in keys]
        rows += new_rows
        write_json(path, {"meta": meta, "rows": rows})
    return rows


# --- the script -----------------------------------------------------------------------------------

@dataclass(eq=False)
class Checkpoint:
    name: str    # in the table
    model: MDM
    state: dict
    crc32: int   # of the file's bytes


def load_checkpoints(paths: list[str], device) -> list[Checkpoint]:
    """Checkpoints of one run, under their files' names; what is the same file twice counts once."""
    found = {}  # by name
    known = set()
    for path in paths:
        model, state = load_checkpoint(path, device)
        crc32 = zlib.crc32(path_of(path).read_bytes())
        if crc32 in known:
            continue
        known.add(crc32)
        name = path_of(path).stem
        if name in found:
            name = f"{name}_{len(found) + 1}"
        found[name] = Checkpoint(name, model, state, crc32)
        first = next(iter(found.values()))
        if run_of(found[name]) != run_of(first):
            raise UserError(f"{paths[0]} and {path} are of different runs: other sizes or pieces")
    return list(found.values())


def run_of(checkpoint: Checkpoint) -> tuple:
    """What checkpoints of one run share. Its stages may differ in the budgets that gates know."""
    return replace(checkpoint.model.config, max_steps=1), checkpoint.state["pieces"]


def crc_of(items: list[dict]) -> int:
    texts = [[item["question"], item["target"]] for item in items]
    return zlib.crc32(json.dumps(texts).encode())


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Accuracy against steps.")
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="order-trained checkpoint")
    parser.add_argument("--control", help="other denoisers for the rules, comma-separated: fairer "
                        "is control.pt of train.py --stages control; denoiser.pt beside --ckpt by "
                        "default; empty: none")
    parser.add_argument("--orders", default=EVERY_ORDER, help="NAME[:KNOB][+eos_last],..")
    parser.add_argument("--steps", default="1,2,3,4,5,8,16,L", help="budgets, L: no cap")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="to report on")
    parser.add_argument("--limit", type=whole_number, help="first N items of it; all by default")
    parser.add_argument("--tune_items", type=whole_number, default=128, help="of val, to tune on")
    parser.add_argument("--metric", choices=["accuracy", "coherent", "nats"],
                        help="coherent for a toy, else accuracy by default")
    parser.add_argument("--draws", type=whole_number, default=1,
                        help="orders drawn for each item, for the nats of iid and learned")
    parser.add_argument("--batch_size", type=whole_number, default=64)
    parser.add_argument("--data_dir", help="GSM8K's files, if not where training found them")
    parser.add_argument("--json", type=path_to_write, default="out/eval.json",
                        help="file of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    beside = path_of(args.ckpt).parent / "denoiser.pt"
    if args.control is None:
        args.control = str(beside) if beside.is_file() else ""
    args.orders = list(dict.fromkeys(parse_orders(args.orders)))
    try:
        args.steps = [parse_steps(text) for text in args.steps.split(",")]
    except argparse.ArgumentTypeError as e:
        parser.error(str(e))
    return args


def load_items(args, config: dict) -> tuple[list[dict], list[dict]]:
    """Validation items to tune on, and the items to report on: never the same."""
    splits = load_splits(config["dataset"], args.data_dir or config["data_dir"],
                         toy_sizes={name: TOY_SIZES[name] for name in ("val", "test")})
    tuning = splits["val"][: args.tune_items]
    if args.split == "test":
        items = splits["test"]
    else:
        items = splits["val"][args.tune_items :]
    if not items:
        raise UserError(f"--tune_items {args.tune_items} leaves no validation items to report on")
    return tuning, items[: args.limit]


@dataclass
class Job:
    """A row to measure."""
    order: Order
    checkpoint: Checkpoint
    begin: dict   # the fields that are known before


def jobs_of(args, checkpoints: list[Checkpoint], meta: dict) -> list[Job]:
    """One for each budget, order and, for rules, checkpoint."""
    L = checkpoints[0].model.config.answer_len
    jobs = []
    for budget in sorted({min(budget, L) for budget in args.steps}):
        for order in args.orders:
            knobs = ORDERS[order.name][2] if order.knob is None else []
            tuned_on = meta["tuned_on"] if knobs else None
            for checkpoint in checkpoints[:1] if order.name == "learned" else checkpoints:
                of = {"checkpoint": checkpoint.crc32, "reported": meta["reported"],
                      "tuned_on": tuned_on}
                begin = {"asked": str(order), "budget": budget, "checkpoint": checkpoint.name,
                         "of": of, "knobs": knobs, "commit": versions()["commit"]}
                jobs.append(Job(order, checkpoint, begin))
    return jobs


def run_evaluation(args) -> tuple[list[dict], list[dict], dict]:
    """Measure the rows that are not yet in args.json. The rows asked for, all rows of this
    evaluation, and its description."""
    device = pick_device(args.device)
    paths = [args.ckpt, *[path for path in args.control.split(",") if path]]
    checkpoints = load_checkpoints(paths, device)
    state = checkpoints[0].state
    need_trained_gates(args.ckpt, state, args.orders)
    dataset = state["train_config"]["dataset"]
    metric = args.metric or default_metric(dataset)
    enc = build_tokenizer(state["pieces"])
    tuning, items = load_items(args, state["train_config"])

    # Written before anything runs: a file that cannot be written is no surprise at the end.
    meta = {"checkpoints": {checkpoint.name: checkpoint.crc32 for checkpoint in checkpoints},
            "reported": {"dataset": dataset, "split": args.split, "n": len(items),
                         "items": crc_of(items), "metric": metric},
            "tuned_on": crc_of(tuning), "train_config": state["train_config"],
            "trained_by": state["versions"], "device": str(device), **versions()}
    if metric == "nats":
        meta["reported"]["draws"] = args.draws
    rows = store(args.json, meta)

    def evaluate_on(items, checkpoint, order, cap):
        return evaluate(checkpoint.model, enc, items, order, cap, metric, dataset,
                        args.batch_size, args.draws)

    @functools.cache  # budgets share caps
    def on_validation(checkpoint, order, cap):
        return evaluate_on(tuning, checkpoint, order, cap)

    # Rows that are there stay, unless an order is now tuned by other knobs.
    known = [(key_of(row), row["knobs"]) for row in rows]
    jobs = jobs_of(args, checkpoints, meta)
    missing = [job for job in jobs if (key_of(job.begin), job.begin["knobs"]) not in known]
    for job in tqdm(missing, disable=None):
        order = job.order
        cap = job.begin["budget"]
        if job.begin["knobs"]:
            L = job.checkpoint.model.config.answer_len
            measure = functools.partial(on_validation, job.checkpoint)
            order, cap = tune(measure, order, job.begin["knobs"], cap, L)
        row = evaluate_on(items, job.checkpoint, order, cap)
        rows = store(args.json, meta, [{**job.begin, **row}])

    mine = [row for row in rows if belongs(row, meta)]
    keys = [key_of(job.begin) for job in jobs]
    asked = [row for row in mine if key_of(row) in keys]
    return asked, mine, meta


def main(argv=None):
    args = parse_args(argv)
    asked, mine, meta = run_evaluation(args)
    of = meta["reported"]
    score = "log p in nats" if of["metric"] == "nats" else f"{of['metric']} in %"
    print(f"{len(mine)} rows of this evaluation are in {args.json}")
    print(f"{of['dataset']}, {of['n']} {of['split']} items, {asked[0]['fit']} of them fit; "
          f"{score}; each rule on the best of {', '.join(meta['checkpoints'])}")
    print(table(best_rules(asked), of["metric"], rivals=mine))


if __name__ == "__main__":
    run_script(main)
