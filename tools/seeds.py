"""Ten training runs in one table: what a method that hangs on luck would not survive.

    for s in 0 1 2 3 4 5 6 7 8 9; do python train.py --seed $s --out_dir out_$s; done
    python -m tools.seeds --runs out_0,out_1,out_2,out_3,out_4,out_5,out_6,out_7,out_8,out_9

For each run: the evaluation of eval_gsm8k.py (rules on denoiser.pt and on ckpt.pt, the better of
both), written to its folder; then one row in --json:

val, val_se          bound at the end of the order stage, nats, and its standard error over items
tied                 share of the tied operands (+, *) whose scores lie within one tau
coherent, accuracy   of sample.py's default order at 4 steps, untuned, in %, and its mean steps
coherent_tuned       of the learned order tuned on validation items, within 4 steps on average
best_rule            the rule of highest score at 4 steps on average, tuned in the same way
sequential           the best of left_to_right and confidence, one token a step
budgets              {steps: [learned tuned, best rule]} in %
minutes              of the order stage, as it ran
"""

import argparse
import json
from pathlib import Path

import torch

import eval_gsm8k
from data import build_tokenizer, encode, load_splits, run_script
from model import load_checkpoint, trim
from posterior import OrderPosterior

RULES = "iid,margin,entropy_bound,entropy_bound+eos_last"


@torch.no_grad()
def tied(out: Path) -> float:
    """Share of the pairs that may stand in either order whose scores differ by less than tau."""
    model, state = load_checkpoint(out / "resume.pt")
    config, enc = state["train_config"], build_tokenizer(state["pieces"])
    q = OrderPosterior(model.config, config["T"])
    q.load_state_dict(state["states"][1])
    items = load_splits(config["dataset"], toy_sizes={"val": 300})["val"]
    prompt, x0, _ = encode(items, enc, config["prompt_len"], config["answer_len"])
    s, _ = q(trim(prompt, model.config.pad), x0)
    signs = torch.tensor([enc.encode_single_token(sign) for sign in "+*"])
    rows, at = torch.isin(x0, signs).nonzero().unbind(1)
    differ = x0[rows, at - 1] != x0[rows, at + 1]
    gap = (s[rows, at - 1] - s[rows, at + 1]).abs()[differ]
    return (gap < config["tau_end"]).float().mean().item()


def evaluate(out: Path, name: str, args, *flags) -> list[dict]:
    path = out / f"{name}.json"
    eval_gsm8k.main(["--ckpt", str(out / "ckpt.pt"), "--control", str(out / "denoiser.pt"),
                     "--json", str(path), "--split", args.split, "--limit", str(args.limit),
                     "--tune_items", str(args.tune_items), *flags])
    return json.loads(path.read_text())["rows"]


def row_of(out: Path, args) -> dict:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    order = [record for record in log if record["stage"] == "order"]
    rows = evaluate(out, args.split, args, "--steps", args.steps,
                    "--orders", f"learned,{args.default},{RULES}")
    slow = evaluate(out, f"{args.split}_L", args, "--steps", "L",
                    "--orders", "left_to_right,confidence")

    def best(asked, budget):
        found = [row for row in rows if row["budget"] == budget
                 and (row["asked"] == asked if asked else "learned" not in row["asked"])]
        return max(found, key=lambda row: row["score"])

    default, tuned, rule = best(args.default, 4), best("learned", 4), best("", 4)
    seconds = sum(record["seconds"] for record in order)
    return {"run": out.name, "val": order[-1]["val"], "val_se": order[-1]["val_se"],
            "tied": tied(out), "coherent": 100 * default["coherent"],
            "accuracy": 100 * default["accuracy"], "steps_mean": default["steps"][0],
            "coherent_tuned": 100 * tuned["coherent"], "steps_tuned": tuned["steps"][0],
            "tuned": tuned["order"], "best_rule": rule["order"],
            "best_rule_coherent": 100 * rule["coherent"],
            "sequential": 100 * max(row["coherent"] for row in slow),
            "budgets": {b: [100 * best("learned", b)["coherent"], 100 * best("", b)["coherent"]]
                        for b in map(int, args.steps.split(","))},
            "minutes": seconds / 60}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="out", help="folders of train.py, comma-separated")
    parser.add_argument("--default", default="learned:0.5", help="sample.py's default order")
    parser.add_argument("--steps", default="2,3,4,8", help="budgets; 4 must be one")
    parser.add_argument("--split", default="test", help="val or test")
    parser.add_argument("--limit", type=int, default=500, help="items to report on")
    parser.add_argument("--tune_items", type=int, default=64, help="validation items to tune on")
    parser.add_argument("--json", default="assets/toy_seeds.json")
    args = parser.parse_args(argv)
    rows = [row_of(Path(out), args) for out in args.runs.split(",")]
    eval_gsm8k.write_json(Path(args.json), {"args": vars(args), "rows": rows})
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()))


if __name__ == "__main__":
    run_script(main)
