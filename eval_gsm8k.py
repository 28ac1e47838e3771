"""Accuracy against steps, for the learned order and every rule, on the checkpoint's own test split.

    python eval_gsm8k.py --steps 4 --limit 1000     every order at one budget, minutes
    python eval_gsm8k.py                            the whole curve

Every order uses the same generate(), the same canvas, the same EOS rule and the likeliest token.
The learned order runs on the order-trained checkpoint, each rule on it and on --control, which is
denoiser.pt or, fairer, control.pt: that trained on by stage 1's loss for as many network states.
The better of the two is its number: no rule loses as a denoiser was bent to the learned order.

A *cap* is the most steps that one answer may take, a *budget* the most on average. A knob that
is not given is tuned: for each checkpoint and budget, the knob and the cap (the budget, one
more or twice as much) of highest score among those that stay within the budget on average, all on
validation items. Other orders have the budget for their cap. The score is --metric:

accuracy  cut at the first EOS or PAD, last `####`, the number right after it, as a decimal. An item
          that does not fit prompt or canvas counts as wrong
coherent  accurate, and no <<a=b>> is false or broken: did the parallel steps agree with each other?
nats      mean log p(true answer) of the sampler that takes this order and draws its tokens from p,
          over the items that fit; of orders that draw, of one draw each: on average a lower bound

Columns: steps, forward passes while a row was unfinished (mean, least - most); 95 %, the interval
of the score over items (Wilson; of nats 1.96 standard errors); true, the share of the generated
<<a=b>> that are; p, of the learned order against the best rule with no more mean steps, paired over
items (McNemar, exact; with nats of accuracy). That rule is picked on test, which favours it.

Each row is written to --json as soon as it is done. The same command on the same checkpoints goes
on with the rows that are missing.
"""

import argparse
import ast
import json
import math
import operator
import re
import time
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (TOY_SIZES, UserError, build_tokenizer, decode, encode, final_number, load_splits,
                  run_script)
from model import load_checkpoint, pick_device, versions
from sample import ORDERS, Order, generate, parse_order, parse_steps

EVERY_ORDER = ("learned,left_to_right,dilated,confidence,margin,iid,threshold,entropy_bound,"
               "confidence+eos_last,iid+eos_last,threshold+eos_last,entropy_bound+eos_last")


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
    """Is a=b true? A b with decimals may be a rounded to as many as it shows: 1/3=.33, 1/3=33.3%;
    a whole number may not."""
    left, _, right = equation.rpartition("=")
    a, b = value_of(left), value_of(right)
    decimals = re.search(r"\.(\d+)", right)
    unit = Fraction(1, 10 ** len(decimals[1])) if decimals else 0
    slack = unit / 2 / (100 if "%" in right else 1)
    return a is not None and b is not None and abs(a - b) <= slack


def judge(text: str, answer: str) -> dict:
    """One generated answer against the true one."""
    equations = re.findall(r"<<([^<>]*)>>", text)
    true, number = sum(map(is_true, equations)), final_number(text)
    right = number is not None and number == final_number(answer)
    whole = text.count("<<") == text.count(">>") == len(equations) == true
    return {"accuracy": right, "coherent": right and whole, "true": true, "all": len(equations),
            "no number": number is None}


# --- statistics -----------------------------------------------------------------------------------

def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share of n (Wilson 1927); unlike p +- z sigma it stays in 0..1."""
    center, half = share + z * z / n / 2, z * math.sqrt(share * (1 - share) / n + (z / n / 2) ** 2)
    return max(0, center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of paired results (N,) bool: do those where one is right split evenly?"""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


# --- one row of the table -------------------------------------------------------------------------

def evaluate(model, enc, items: list[dict], order: Order, cap: int, metric: str, batch_size=64):
    """`order` on `items` with at most `cap` steps. Item i draws from seed i, whatever its batch."""
    config, device = model.config, next(model.parameters()).device
    prompt, x0, fitting = encode(items, enc, config.prompt_len, config.answer_len)
    judged = [judge("", item["answer"]) for item in items]  # for those that do not fit
    steps, nats, shown, start = [], [], [], time.perf_counter()
    for i in range(0, len(fitting), batch_size):
        rows = fitting[i : i + batch_size]
        c, x = prompt[i : i + batch_size].to(device), x0[i : i + batch_size].to(device)
        out = generate(model, c, cap, order, seeds=rows)
        for row, tokens in zip(rows, out.tokens.tolist()):
            judged[row] = judge(decode(tokens, enc), items[row]["answer"])
        steps += out.steps.tolist()
        shown += list(zip(out.tokens.tolist(), out.reveal_step.tolist()))[: 5 - len(shown)]
        if metric == "nats":
            nats += generate(model, c, cap, order, seeds=rows, x0=x).log_p.tolist()
    if not steps:
        raise UserError(f"none of {len(items)} items fits prompt and canvas of this checkpoint")
    total = {name: sum(one[name] for one in judged) for name in judged[0]}
    share = {name: total[name] / len(items) for name in ("accuracy", "coherent", "no number")}
    if metric == "nats":
        score, half = np.mean(nats).item(), 1.96 * (np.std(nats) / len(nats) ** 0.5).item()
        interval = score - half, score + half
    else:
        score, interval = share[metric], wilson(share[metric], len(items))
    return {"order": str(order), "cap": cap, "n": len(items), "fit": len(fitting), **share,
            "score": score, "ci95": interval, "true": total["true"] / max(total["all"], 1),
            "steps": [np.mean(steps).item(), min(steps), max(steps)],
            "per s": len(fitting) / (time.perf_counter() - start), "shown": shown,
            "right": [one["accuracy" if metric == "nats" else metric] for one in judged]}


def tune(measure, order: Order, knobs, budget: int, L: int) -> tuple[Order, int]:
    """The knob and the cap of highest score within `budget` steps on average; ties: fewer steps."""
    found = {}
    for knob in knobs:
        for cap in dict.fromkeys(min(cap, L) for cap in (budget, budget + 1, 2 * budget)):
            row = measure(replace(order, knob=knob), cap)
            if row["steps"][0] <= budget:
                found[replace(order, knob=knob), cap] = row["score"], -row["steps"][0]
    return max(found, key=found.get)


def best_rules(rows: list[dict]) -> list[dict]:
    """Of the rows of one order and budget, one a denoiser, the best; p of the learned order's."""
    best = {}
    for row in sorted(rows, key=lambda row: row["score"]):
        best[row["budget"], row["asked"]] = row
    for row in rows:
        rivals = [r for r in rows if not r["order"].startswith("learned")
                  and r["steps"][0] <= row["steps"][0]]
        if row["order"].startswith("learned") and rivals:
            rival = max(rivals, key=lambda r: r["score"])
            row["rival"] = f"{rival['order']} ({rival['checkpoint']})"
            row["p"] = mcnemar(np.array(row["right"]), np.array(rival["right"]))
    return sorted(best.values(), key=lambda row: (row["budget"], -row["score"]))


def print_table(rows: list[dict], metric: str):
    print(f"{'order':<25}{'denoiser':<9}{'budget':>6}{'cap':>4}{'steps':>7}{'min-max':>9}"
          f"{metric:>10}{'95 %':>15}{'accuracy':>10}{'coherent':>10}{'no number':>11}{'true':>7}")
    for row in rows:
        (mean, least, most), unit = row["steps"], 1 if metric == "nats" else 100
        score, low, high = (unit * value for value in (row["score"], *row["ci95"]))
        p = f"   p {row['p']:.1e} against {row['rival']}" if "p" in row else ""
        print(f"{row['order']:<25}{row['checkpoint']:<9}{row['budget']:>6}{row['cap']:>4}"
              f"{mean:>7.2f}{least:>5}-{most:<3}{score:>10.1f}{low:>8.1f} -{high:>5.1f}"
              f"{100 * row['accuracy']:>10.1f}{100 * row['coherent']:>10.1f}"
              f"{100 * row['no number']:>11.1f}{100 * row['true']:>7.1f}{p}")


def write_json(path: Path, content: dict):
    """Atomically: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(content))
    path.with_suffix(".tmp").replace(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Accuracy against steps.")
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="order-trained checkpoint")
    parser.add_argument("--control", default="out/denoiser.pt", help="the rules' denoiser: fairer "
                        "is control.pt of train.py --stages control; empty: none")
    parser.add_argument("--orders", default=EVERY_ORDER, help="NAME[:KNOB][+eos_last],..")
    parser.add_argument("--steps", default="1,2,3,4,5,8,16,L", help="budgets, L: no cap")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="to report on")
    parser.add_argument("--limit", type=parse_steps, help="first N items of it; all by default")
    parser.add_argument("--tune_items", type=parse_steps, default=128, help="of val, to tune on")
    parser.add_argument("--metric", choices=["accuracy", "coherent", "nats"],
                        help="coherent for a toy, accuracy for GSM8K by default")
    parser.add_argument("--batch_size", type=parse_steps, default=64)
    parser.add_argument("--data_dir", help="GSM8K's files, if not where training found them")
    parser.add_argument("--json", default="out/eval.json", help="where to write the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    device, orders = pick_device(args.device), [parse_order(o) for o in args.orders.split(",")]
    try:
        budgets = [parse_steps(text) for text in args.steps.split(",")]
    except argparse.ArgumentTypeError as e:
        parser.error(str(e))

    models, files = {}, {}
    for path in filter(None, (args.ckpt, args.control)):
        name = Path(path).stem if Path(path).stem not in models else "control"
        models[name], state = load_checkpoint(path, device)
        files[name] = {"crc32": zlib.crc32(Path(path).read_bytes()), "step": state["step"],
                       "pieces": zlib.crc32(str(state["pieces"]).encode()), **state["versions"]}
    if len({(file["pieces"], models[name].config) for name, file in files.items()}) > 1:
        raise UserError(f"{args.ckpt} and {args.control} are of different runs: other tokenizers")
    enc, config = build_tokenizer(state["pieces"]), state["train_config"]
    L = config["answer_len"]
    metric = "coherent" if config["dataset"].startswith("toy") else "accuracy"
    metric = args.metric = args.metric or metric
    splits = load_splits(config["dataset"], args.data_dir or config["data_dir"],
                         toy_sizes={name: TOY_SIZES[name] for name in ("val", "test")})
    tuning, splits["val"] = splits["val"][: args.tune_items], splits["val"][args.tune_items :]
    items = splits[args.split][: args.limit]
    if not items:
        raise UserError(f"--tune_items {args.tune_items} leaves no validation items to report on")

    path, rows, kept = Path(args.json), [], ""
    meta = {"args": vars(args), "train_config": config, "checkpoints": files, "device": str(device),
            "threads": torch.get_num_threads(), **versions()}
    if path.is_file():
        try:
            old = json.loads(path.read_text())
            rows, same = old["rows"], old["meta"] == meta
            rows = rows if same else []
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"--json {path} holds no results of this script: name another") from e
        kept = f"{len(rows)} rows of this evaluation are in" if rows else "replacing"
    done = {(row["budget"], row["asked"], row["checkpoint"]) for row in rows}
    jobs = [(budget, order, name) for budget in dict.fromkeys(min(b, L) for b in budgets)
            for order in orders for name in ([*models][:1] if order.name == "learned" else models)]
    jobs = [job for job in jobs if (job[0], str(job[1]), job[2]) not in done]
    for budget, order, name in tqdm(jobs, disable=None):
        def measure(order, cap, on=tuning):
            return evaluate(models[name], enc, on, order, cap, metric, args.batch_size)
        sweep, choice, cap = ORDERS[order.name][2], order, budget
        if sweep and not order.knob:
            choice, cap = tune(measure, order, sweep, budget, L)
        row = measure(choice, cap, on=items)
        rows.append({"asked": str(order), "budget": budget, "checkpoint": name, **row})
        write_json(path, {"meta": meta, "rows": rows})
    best = best_rules(rows)
    write_json(path, {"meta": meta, "rows": rows})  # with p; before anything is printed
    print(f"{kept or 'writing'} {path}\n{config['dataset']}, {len(items)} {args.split} items, "
          f"{rows[0]['fit']} of them fit; each rule on the better of {' and '.join(models)}, in %")
    print_table(best, metric)


if __name__ == "__main__":
    run_script(main)
