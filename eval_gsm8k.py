"""Accuracy against steps, on the test split that belongs to the checkpoint (toy or GSM8K).

    python eval_gsm8k.py --orders learned,left_to_right,confidence,iid --steps 1,2,3,4,8,L

Every order uses the same generate(), the same canvas, the same EOS rule and the most probable token.
The learned order runs on the order-trained checkpoint; each rule runs on it and on the control (the
same denoiser trained on by stage 1's loss for as many network states), so that a rule cannot lose
because the denoiser was bent towards the learned order.

accuracy    "strict": cut at the first EOS or PAD, last `####`, the number right after it, compared as
            a decimal. An item that does not fit prompt or canvas counts as wrong.
ci95        Wilson 95 % interval of it, over items
steps_*     forward passes while a row was unfinished: mean, least and most over rows
format      answers without a number after `####`
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import TOY_SIZES, UserError, build_tokenizer, cli, decode, encode_split, final_number, is_correct, load_splits
from model import load_checkpoint, pick_device
from sample import ORDERS, generate, parse_steps


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927); unlike p +- z*sigma it stays within 0..1."""
    p, zz = correct / n, z * z / n
    center, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (center - half) / (1 + zz), (center + half) / (1 + zz)


def evaluate(model, enc, items: list[dict], target: str, budget: int, order: str, *, seed: int = 0,
             greedy_gates: bool = False, batch_size: int = 256) -> dict:
    """One row of the table: `order` on `items` with at most `budget` steps. Items draw from seed + their
    index in `items`, so a row does not depend on the batch size."""
    device, start = next(model.parameters()).device, time.perf_counter()
    split = encode_split(items, enc, model.config.prompt_len, model.config.answer_len, target)
    fitting = [i for i, fits in enumerate(split.fits) if fits]
    texts, steps = [], []
    for i in range(0, len(fitting), batch_size):
        out = generate(model, split.prompt[i : i + batch_size].to(device), budget, order, greedy_gates=greedy_gates,
                       seeds=[seed + j for j in fitting[i : i + batch_size]])
        texts += [decode(tokens, enc) for tokens in out.tokens.tolist()]
        steps += out.steps.tolist()
    correct = sum(is_correct(text, items[i]["answer"]) for text, i in zip(texts, fitting))
    return {
        "order": order + "+greedy" * greedy_gates, "budget": budget, "accuracy": correct / len(items), "ci95": wilson(correct, len(items)),
        "steps_mean": sum(steps) / max(len(steps), 1), "steps_min": min(steps, default=0), "steps_max": max(steps, default=0),
        "n": len(items), "does_not_fit": len(items) - len(fitting),
        "format_failures": sum(final_number(text) is None for text in texts), "seconds": time.perf_counter() - start,
    }


HEADER = f"{'order':<15}{'checkpoint':<12}{'budget':>6}{'steps':>8}{'min-max':>9}{'accuracy':>10}{'95 % interval':>16}{'format':>8}{'s':>7}"


def format_row(row: dict) -> str:
    low, high = row["ci95"]
    return (f"{row['order']:<15}{Path(row['checkpoint']).stem:<12}{row['budget']:>6}{row['steps_mean']:>8.2f}"
            f"{row['steps_min']:>5}-{row['steps_max']:<3}{100 * row['accuracy']:>9.1f} %{100 * low:>8.1f} -{100 * high:>5.1f}"
            f"{row['format_failures']:>8}{row['seconds']:>7.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Accuracy against steps.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="order-trained checkpoint")
    parser.add_argument("--control", default="out/control.pt", help="the control's checkpoint; empty: none")
    parser.add_argument("--orders", default=",".join(ORDERS), help="comma-separated")
    parser.add_argument("--steps", default="1,2,3,4,8,L", help="comma-separated budgets; L is the canvas: one token per step for the rules with an even split")
    parser.add_argument("--limit", type=int, default=0, help="first N items of the split; 0: all")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="choose knobs on val, report test")
    parser.add_argument("--seed", type=int, default=0, help="of the gates' draws")
    parser.add_argument("--greedy_gates", action="store_true", help="open gates with alpha > 1/2 instead of drawing them")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--data_dir", help="where the GSM8K files are, if not where training found them")
    parser.add_argument("--json", default="out/eval.json", help="where to write the results")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    orders, budgets = args.orders.split(","), [parse_steps(s) for s in args.steps.split(",")]
    unknown = [order for order in orders if order not in ORDERS]
    if unknown or args.limit < 0 or args.batch_size < 1:
        raise UserError(f"unknown order {unknown[0]!r}: choose from {', '.join(ORDERS)}" if unknown else "need --limit >= 0 and --batch_size >= 1")
    model, state = load_checkpoint(args.ckpt, device)
    config, enc = state["train_config"], build_tokenizer(state["pieces"])
    models = {args.ckpt: model}
    if args.control:
        models[args.control], control_state = load_checkpoint(args.control, device)
        if control_state["pieces"] != state["pieces"]:
            raise UserError(f"{args.control} and {args.ckpt} are not from the same run: their tokenizers differ")
    items = load_splits(config["dataset"], args.data_dir or config["data_dir"], toy_sizes={args.split: TOY_SIZES[args.split]})[args.split]
    items = items[: args.limit or None]

    runs = [(path, order, min(budget, model.config.answer_len)) for order in orders for path in models for budget in budgets
            if order != "learned" or path == args.ckpt]  # the control's gate head was never trained
    rows, print_table = [], tqdm.write
    print_table(f"{config['dataset']}, {args.split} split, {len(items)} items, seed {args.seed}, {device}\n{HEADER}")
    for path, order, budget in tqdm(runs, disable=None, leave=False):
        row = evaluate(models[path], enc, items, config["target"], budget, order, seed=args.seed, batch_size=args.batch_size,
                       greedy_gates=args.greedy_gates and order == "learned")
        rows.append({"checkpoint": path, **row})
        print_table(format_row(rows[-1]))
    if rows and rows[0]["does_not_fit"]:
        print_table(f"{rows[0]['does_not_fit']} of {len(items)} items are longer than prompt or canvas and count as wrong")
    meta = {"args": vars(args), "train_config": config, "torch": torch.__version__, "device": str(device)}
    try:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps({"meta": meta, "rows": rows}, indent=1))
    except OSError as e:
        raise UserError(f"cannot write {args.json}: {e}") from e
    print_table(f"wrote {args.json}")


if __name__ == "__main__":
    cli(main)
