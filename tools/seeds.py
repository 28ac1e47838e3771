"""Several training runs in one table: what a method that hangs on luck would not survive.

    for s in 0 1 2 3 4 5 6 7 8 9; do python train.py --seed $s --out_dir out_$s; done
    python -m tools.seeds --runs out_0,out_1,out_2,out_3,out_4,out_5,out_6,out_7,out_8,out_9

Each run of a toy is evaluated by eval_gsm8k.py, whose rows stay in the run's folder, and gets one
row in --json. Rows of other runs that were made with the same flags stay there. Everything but the
bound is of the items to report on, in %; budgets are keys, as text:

run, seed                     the folder NAME_SEED
val, val_se                   bound at 4 steps at the end of the order stage, nats, and its standard
                              error over items
coherent, accuracy            of sample.py's default order, learned:0.5, at 4 steps
steps_mean                    steps that it took on average
coherent_by_steps             the same order at every budget
accuracy_by_steps
same_step_by_steps            of the pairs of exchangeable operands, those that it reveals in one
                              step along the true answer
best_rule_by_steps            the rule of highest coherence, first_order too, each on the best of
                              denoiser.pt, ckpt.pt and, if it is there, control.pt
best_rule_coherent_by_steps   and its coherence
best_rule, best_rule_coherent the same at 4 steps
control_tokens_by_steps       where there is a control.pt: coherent of the gates of ckpt.pt with the
                              tokens of control.pt, which was not trained along the order
sequential                    left_to_right, one token a step, coherent
minutes                       of the order stage, as it ran
orders                        {order: {steps: [coherent, accuracy, mean steps]}}, all of them

A run takes 8 to 10 minutes on one core with two denoisers, half as long again with the control:
most of it for the rules at 8 and 16 steps, a quarter for the knobs that are tuned on validation
items. --learned_only takes one minute, shows what needs no rule and writes no --json.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import eval_gsm8k
from common import (UserError, load_state, path_of, path_to_write, read_json_lines, run_script, say,
                    versions, write_json)
from data import build_tokenizer
from eval_gsm8k import best_rules, load_items, locked, pairs_that_meet, run_evaluation
from model import MDM, load_checkpoint
from sample import parse_order, whole_number

DEFAULT = "learned:0.5"  # sample.py's
LEARNED = (DEFAULT, "learned")
RULES = ("first_order", "iid", "confidence", "margin", "left_to_right", "dilated", "threshold",
         "entropy_bound", "entropy_bound+eos_last")


# --- one run --------------------------------------------------------------------------------------

def order_records(out: Path) -> list[dict]:
    """The order stage's lines of a run's log."""
    try:
        records = read_json_lines(out / "log.jsonl")
    except OSError as e:
        raise UserError(f"cannot read {out / 'log.jsonl'}: {e}") from e
    return [record for record in records if record.get("stage") == "order"]


def check_run(out: Path, budgets: list[int]):
    """Before anything runs: is this the folder of a finished run of a toy?"""
    if not re.fullmatch(r".*_\d+", out.name):
        raise UserError(f"--runs {out}: want folders NAME_SEED, like out_0")
    load_state(out / "denoiser.pt")
    config = load_state(out / "ckpt.pt")["train_config"]
    if not config["dataset"].startswith("toy"):
        raise UserError(f"{out} was trained on {config['dataset']}: exchangeable operands are the "
                        "toys'")
    if max(budgets) > config["answer_len"]:
        raise UserError(f"--steps {max(budgets)}: the answers of {out} have {config['answer_len']} "
                        "tokens")
    records = order_records(out)
    if not records or "val_se" not in records[-1]:
        raise UserError(f"{out / 'log.jsonl'} has no end of an order stage")


def evaluate(args, checkpoints: list[Path], orders, steps: str, into: str) -> list[dict]:
    """Rows of eval_gsm8k.py, which stay in the run's folder: called again, only what is missing is
    measured. Learned orders run on the first checkpoint."""
    first, *others = map(str, checkpoints)
    path = checkpoints[0].with_name(into)
    asked, _, _ = run_evaluation(eval_args(args, [
        "--ckpt", first, "--control", ",".join(others), "--json", str(path), "--steps", steps,
        "--orders", ",".join(orders), "--metric", "coherent", "--batch_size", "32"]))
    return asked


def eval_args(args, words=()):
    """eval_gsm8k.py's, for the items to report on and those to tune on."""
    return eval_gsm8k.parse_args(["--split", args.split, "--limit", str(args.limit),
                                  "--tune_items", str(args.tune_items), *words])


def what_is_reported_on(out: Path, args) -> tuple:
    """ckpt.pt's model, its tokenizer, and the items to report on."""
    model, state = load_checkpoint(out / "ckpt.pt")
    _, items = load_items(eval_args(args), state["train_config"])
    return model, build_tokenizer(state["pieces"]), items


def pairs_by_steps(out: Path, args) -> dict:
    """Of learned:0.5, in %: the exchangeable pairs that meet, on the items that are reported on."""
    model, enc, items = what_is_reported_on(out, args)
    shares = {}
    for steps in args.steps.split(","):
        shares[steps] = 100 * pairs_that_meet(model, enc, items, int(steps), DEFAULT)
    return shares


class TokensOf(torch.nn.Module):
    """A model with the gates of one and the tokens of another. Each step is a pass of both."""

    def __init__(self, gates: MDM, tokens: MDM):
        super().__init__()
        self.gates = gates
        self.tokens = tokens
        self.config = gates.config

    def encode_prompt(self, prompt):
        return [*self.gates.encode_prompt(prompt), *self.tokens.encode_prompt(prompt)]

    def forward(self, cache, z):
        half = len(cache) // 2
        return self.gates(cache[:half], z), self.tokens(cache[half:], z)

    def log_p(self, h):
        _, of_tokens = h
        return self.tokens.log_p(of_tokens)

    def gate_logits(self, h, masked, steps_left):
        of_gates, _ = h
        return self.gates.gate_logits(of_gates, masked, steps_left)


def control_tokens_by_steps(out: Path, args) -> dict:
    """Coherent answers of the learned order, in %, if control.pt finds the tokens."""
    model, enc, items = what_is_reported_on(out, args)
    control, _ = load_checkpoint(out / "control.pt")
    both = TokensOf(model, control)
    order = parse_order(DEFAULT)
    shares = {}
    for steps in args.steps.split(","):
        row = eval_gsm8k.evaluate(both, enc, items, order, int(steps), "coherent", "toy")
        shares[steps] = 100 * row["coherent"]
    return shares


def by_order(rows: list[dict]) -> dict:
    """{order: {steps: [coherent, accuracy, mean steps]}}."""
    orders = {}
    for row in rows:
        numbers = [100 * row["coherent"], 100 * row["accuracy"], row["steps"][0]]
        orders.setdefault(row["asked"], {})[str(row["budget"])] = numbers
    return orders


def column(by_steps: dict, i: int) -> dict:
    """The i-th of the numbers at every budget."""
    return {steps: numbers[i] for steps, numbers in by_steps.items()}


def row_of(out: Path, args) -> dict:
    """The row of one run, without what is of rules if those are left out."""
    names = [name for name in ("ckpt", "denoiser", "control") if (out / f"{name}.pt").is_file()]
    checkpoints = [out / f"{name}.pt" for name in names]
    records = order_records(out)
    rows = evaluate(args, checkpoints, LEARNED, args.steps, f"{args.split}.json")
    orders = by_order(rows)
    default = orders[DEFAULT]
    coherent, accuracy, mean_steps = default["4"]
    row = {"run": out.name, "seed": int(out.name.rpartition("_")[2]),
           "val": records[-1]["val"], "val_se": records[-1]["val_se"],
           "coherent": coherent, "accuracy": accuracy, "steps_mean": mean_steps,
           "coherent_by_steps": column(default, 0), "accuracy_by_steps": column(default, 1),
           "same_step_by_steps": pairs_by_steps(out, args),
           "minutes": sum(record["seconds"] for record in records) / 60, "orders": orders}
    if "control" in names:
        row["control_tokens_by_steps"] = control_tokens_by_steps(out, args)
    if args.learned_only:
        return row

    # Each rule on its best checkpoint, then the best of the rules at every budget.
    rows = best_rules(evaluate(args, checkpoints, RULES, args.steps, f"{args.split}.json"))
    rules = by_order(rows)
    best = {}
    for steps in args.steps.split(","):
        best[steps] = max(RULES, key=lambda rule: rules[rule][steps][0])
    row["orders"] = orders | rules
    row["best_rule_by_steps"] = best
    row["best_rule_coherent_by_steps"] = {steps: rules[rule][steps][0]
                                          for steps, rule in best.items()}
    row["best_rule"] = best["4"]
    row["best_rule_coherent"] = row["best_rule_coherent_by_steps"]["4"]

    # One token a step, on the denoiser that was best at this rule's longest budget.
    left_to_right = [one for one in rows if one["asked"] == "left_to_right"]
    best_denoiser = out / f"{left_to_right[-1]['checkpoint']}.pt"
    [one_a_step] = evaluate(args, [best_denoiser], ["left_to_right"], "L",
                            f"{args.split}_one_a_step.json")
    row["sequential"] = 100 * one_a_step["coherent"]
    return row


# --- all of them ----------------------------------------------------------------------------------

def read_rows(path: Path, flags: dict) -> list[dict]:
    """The rows that are there, if they were made with the same flags."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        theirs = {name: content["args"][name] for name in flags}
        rows = [dict(row) for row in content["rows"]]
        names = [row["run"] for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"--json {path} holds no results of this tool: name another") from e
    if names and theirs != flags:
        raise UserError(f"--json {path} holds rows made with {theirs}: give the same flags, or "
                        "name another")
    return rows


def store(path: Path, flags: dict, row: dict):
    with locked(path):
        rows = [other for other in read_rows(path, flags) if other["run"] != row["run"]]
        rows = sorted([*rows, row], key=lambda row: (row["seed"], row["run"]))
        write_json(path, {"args": flags, **versions(), "rows": rows})


def show(row: dict):
    say(f"\n{row['run']}: bound {row['val']:.2f} ± {row['val_se']:.2f} nats, order stage "
        f"{row['minutes']:.1f} minutes")
    say(f"{'steps, at most':<26}" + "".join(f"{n:>8}" for n in row["coherent_by_steps"]))
    for label, name in (("coherent, %", "coherent_by_steps"), ("accurate, %", "accuracy_by_steps"),
                        ("pairs that meet, %", "same_step_by_steps"),
                        ("with control's tokens, %", "control_tokens_by_steps"),
                        ("best rule, coherent, %", "best_rule_coherent_by_steps")):
        if name in row:
            cells = [f"{value:>8.1f}" for value in row[name].values()]
            say(f"{label:<26}" + "".join(cells))
    if "best_rule_by_steps" in row:
        rules = [f"{steps} {rule}" for steps, rule in row["best_rule_by_steps"].items()]
        say(f"best rule by steps: {', '.join(rules)}\n"
            f"left to right, one token a step: {row['sequential']:.1f} % coherent")


def best_published(row: dict, steps: str) -> float:
    """The highest coherence of a rule. first_order, a rule of ours, is left out."""
    return max(row["orders"][rule][steps][0] for rule in RULES if rule != "first_order")


def show_medians(rows: list[dict]):
    say(f"\nmedian of {len(rows)} runs (least - most), %")
    say(f"{'steps':<7}" + "".join(f"{name:>23}" for name in (
        "learned:0.5", "best published rule", "first_order", "pairs that meet")))
    for steps in rows[0]["coherent_by_steps"]:
        columns = [
            [row["coherent_by_steps"][steps] for row in rows],
            [best_published(row, steps) for row in rows],
            [row["orders"]["first_order"][steps][0] for row in rows],
            [row["same_step_by_steps"][steps] for row in rows],
        ]
        cells = [f"{median(column):.1f} ({min(column):.1f} - {max(column):.1f})"
                 for column in columns]
        say(f"{steps:<7}" + "".join(f"{cell:>23}" for cell in cells))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="out_0,out_1", help="folders NAME_SEED of train.py")
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--limit", type=whole_number, default=300, help="items to report on")
    parser.add_argument("--tune_items", type=whole_number, default=32,
                        help="validation items to tune on")
    parser.add_argument("--steps", default="2,3,4,6,8,16", help="budgets, 4 among them")
    parser.add_argument("--json", type=path_to_write, default="assets/toy_seeds.json")
    parser.add_argument("--learned_only", action="store_true",
                        help="show what needs no rule, and write nothing")
    args = parser.parse_args(argv)
    try:
        budgets = [str(whole_number(text)) for text in args.steps.split(",")]
    except argparse.ArgumentTypeError as e:
        parser.error(f"--steps: {e}")
    if "4" not in budgets:
        parser.error("--steps must have 4 among them")
    args.steps = ",".join(budgets)
    return args


def main(argv=None):
    args = parse_args(argv)
    runs = [path_of(run) for run in args.runs.split(",")]
    flags = {name: getattr(args, name) for name in ("split", "limit", "tune_items", "steps")}
    for out in runs:
        check_run(out, [int(steps) for steps in args.steps.split(",")])
    if not args.learned_only:
        read_rows(args.json, flags)  # it is refused before anything runs
    for out in tqdm(runs, disable=None):
        row = row_of(out, args)
        if not args.learned_only:
            store(args.json, flags, row)
        show(row)
    if not args.learned_only:
        show_medians(read_rows(args.json, flags))


if __name__ == "__main__":
    run_script(main)
