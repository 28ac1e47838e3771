"""Several training runs in one table: what a method that hangs on luck would not survive.

    for s in 0 1 2 3 4 5 6 7 8 9; do python train.py --seed $s --out_dir out_$s; done
    python -m tools.seeds --runs out_0,out_1,out_2,out_3,out_4,out_5,out_6,out_7,out_8,out_9

Each run is evaluated (eval_gsm8k.py, rules on denoiser.pt and on ckpt.pt, the better of both
counts; JSON in its folder), then gets one row in --json:

val, val_se          bound at the end of the order stage, nats, and its standard error over items
tied                 share of pairs of different operands of + and * whose scores lie within tau
coherent, accuracy   of sample.py's default order, untuned, in %, and its mean steps: 4 at most
coherent_tuned       of the learned order tuned on validation items, within 4 steps on average
best_rule            of all rules below the best at 4 steps on average
sequential           left_to_right, one token a step
orders               {order: {steps: [coherent, accuracy, mean steps]}}, all of the above
minutes              of the order stage, as it ran
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

import eval_gsm8k
from data import build_tokenizer, encode, load_splits, run_script
from model import load_checkpoint, trim, versions
from posterior import OrderPosterior

DEFAULT = "learned:0.5"  # sample.py's
TUNED = f"learned,{DEFAULT},entropy_bound,entropy_bound+eos_last"
PLAIN = "iid,confidence,margin,left_to_right,entropy,dilated,threshold"


@torch.no_grad()
def tied(out: Path) -> float:
    """Share of the pairs that may stand in either order whose scores differ by less than tau."""
    model, state = load_checkpoint(out / "ckpt.pt")
    config, enc = state["train_config"], build_tokenizer(state["pieces"])
    q = OrderPosterior(replace(model.config, n_layer=config["n_layer_posterior"]), config["T"])
    q.load_state_dict(state["states"][0])
    items = load_splits(config["dataset"], config["data_dir"])["val"][:300]
    prompt, x0, _ = encode(items, enc, config["prompt_len"], config["answer_len"])
    s, _ = q(trim(prompt, model.config.pad), x0)
    signs = torch.tensor([enc.encode_single_token(sign) for sign in "+*"])
    rows, at = torch.isin(x0[:, 1:-1], signs).nonzero().unbind(1)       # the sign is at + 1
    differ = x0[rows, at] != x0[rows, at + 2]
    gap = (s[rows, at] - s[rows, at + 2]).abs()[differ]
    return (gap < config["tau_end"]).float().mean().item()


def evaluate(out: Path, args, name: str, steps: str, orders: str) -> dict:
    """{order: {steps: [coherent, accuracy, mean steps]}}, each on the better of its checkpoints."""
    path = out / f"{args.split}_{name}.json"
    eval_gsm8k.main(["--ckpt", str(out / "ckpt.pt"), "--control", str(out / "denoiser.pt"),
                     "--json", str(path), "--split", args.split, "--limit", str(args.limit),
                     "--tune_items", str(args.tune_items), "--steps", steps, "--orders", orders])
    found = {}
    for row in sorted(json.loads(path.read_text())["rows"], key=lambda row: row["score"]):
        numbers = [100 * row["coherent"], 100 * row["accuracy"], row["steps"][0]]
        found.setdefault(row["asked"], {})[str(row["budget"])] = numbers
    return found


def row_of(out: Path, args) -> dict:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    stage = [record for record in log if record["stage"] == "order"]
    orders = evaluate(out, args, "tuned", "2,3,4,8", TUNED)
    orders |= evaluate(out, args, "plain", "4", PLAIN)
    slow = evaluate(out, args, "slow", "L", "left_to_right")["left_to_right"].popitem()[1][0]
    rules = {name: by["4"][0] for name, by in orders.items() if "learned" not in name}
    best, (coherent, accuracy, steps) = max(rules, key=rules.get), orders[DEFAULT]["4"]
    return {"seed": int(out.name.rpartition("_")[2]), "val": stage[-1]["val"],
            "val_se": stage[-1]["val_se"], "tied": tied(out), "coherent": coherent,
            "accuracy": accuracy, "steps_mean": steps,
            "coherent_tuned": orders["learned"]["4"][0], "steps_tuned": orders["learned"]["4"][2],
            "best_rule": best, "best_rule_coherent": rules[best], "sequential": slow,
            "minutes": sum(record["seconds"] for record in stage) / 60, "orders": orders}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="out_0,out_1", help="folders NAME_SEED of train.py")
    parser.add_argument("--split", default="test", help="val or test")
    parser.add_argument("--limit", type=int, default=300, help="items to report on")
    parser.add_argument("--tune_items", type=int, default=32, help="validation items to tune on")
    parser.add_argument("--json", default="assets/toy_seeds.json")
    args = parser.parse_args(argv)
    rows = [row_of(Path(out), args) for out in args.runs.split(",")]
    eval_gsm8k.write_json(Path(args.json), {"args": vars(args), **versions(), "rows": rows})
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items() if k != "orders"))


if __name__ == "__main__":
    run_script(main)
