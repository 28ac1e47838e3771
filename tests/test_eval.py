"""eval_gsm8k.py: what counts as right and as true, statistics, tuning, and results that are never
lost."""

import json
import os
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import outcome, run
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_gsm8k
from data import build_tokenizer, encode, load_splits
from eval_gsm8k import (best_rules, evaluate, is_true, judge, mcnemar, tune, value_of, wilson)
from model import load_checkpoint
from sample import ORDERS, generate, parse_order

# --- one answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, value", [
    ("1+2*3", 7), ("(1+2)*3", 9), ("-4/8", "-1/2"), ("2--3", 5), ("50%*20", 10), ("20*(5%)", 1),
    ("1,000/4", 250), (".5+0.25", "3/4"), (" 7 ", 7), ("560//10", 56), ("7//2", 3), ("5.", 5),
    ("12345678901234567.89", "1234567890123456789/100"),
    *[(text, None) for text in
      ("", "1/0", "1//0", "x+1", "2**9", "(2)(3)", "(1", "1e5", "9" * 300, "__import__('os')",
       "٣+1", "1_0", "1 2", "...", "()", "(" * 200, "-" * 200, "%" * 99, "\x00")]])
def test_expressions_are_valued_exactly_and_never_run(expression, value):
    assert value_of(expression) == (None if value is None else Fraction(value))


@pytest.mark.parametrize("equation, true", [
    *[(text, True) for text in
      ("1/3=0.33 ", "1/3=.33", "1/3=33.3%", "33/100=33.0%", "33.0%=.33", "560//10=56", "2/4=.5",
       "10/3=3.3", "7/2=3.5", "2/3=0.67", " 3 + 4 = 7 ", "1,000*2=2,000", "3=5-2")],
    *[(text, False) for text in
      ("1/3=33%", "1/3=33.0%", "10/3=3", "10/3=3.4", "7/2=4", "2/3=0.66", "1+1=1+1=2", "1+1=3", "=",
       "2=", "=2", "5", "", "1/0=1/0")]])
def test_true_equations(equation, true):
    assert is_true(equation) is true


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text("0123456789.,%$/-+*()<>=# \n", max_size=60) | st.text(max_size=20))
def test_no_text_makes_judging_fail(text):
    for generated in (text, f"<<{text}>> #### {text}", f"<<{text}={text}>>"):
        verdict = judge(generated, "#### 1")
        assert verdict["true"] <= verdict["all"] and verdict["accuracy"] >= verdict["coherent"]


@pytest.mark.parametrize("text, accurate, coherent", [
    ("<<9+9=18>> #### 18", True, True), ("#### 18.00", True, True), ("#### $18", True, True),
    ("####18 eggs", True, True), ("#### 1,8", True, True), ("#### 18. #### 7", False, False),
    ("18", False, False), ("", False, False), ("#### eighteen 18", False, False),
    ("<<9+9=18>> #### 17", False, False), ("<<9+8=18>> #### 18", True, False),
    ("9+9=18>> <<9+9=18>> #### 18", True, False), ("<<9+9=18 <<9+9=18>> #### 18", True, False),
    ("<<9+9=18>> <<9+9=1#### 18", True, False), ("<<>> #### 18", True, False)])
def test_right_and_coherent(text, accurate, coherent):
    verdict = judge(text, "<<9+9=18>> #### 18")
    assert (verdict["accuracy"], verdict["coherent"]) == (accurate, coherent)


# --- statistics -----------------------------------------------------------------------------------

def test_mcnemar_is_the_exact_sign_test_of_the_items_that_differ():
    a = np.array([True] * 9 + [False] * 3)
    b = np.array([True] * 4 + [False] * 5 + [True] + [False] * 2)
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 2**6)  # 5 against 1
    assert mcnemar(a, a) == 1 and mcnemar(a, b) == mcnemar(b, a)


def test_wilson_interval():
    assert wilson(0.29, 100) == pytest.approx((0.2101, 0.3854), abs=1e-3)
    assert wilson(0, 10)[0] == 0 and wilson(1, 10)[1] == pytest.approx(1)


def test_a_rule_is_taken_on_its_better_denoiser_and_a_learned_order_met_by_the_best_no_slower():
    def row(order, checkpoint, score, steps, right):
        return {"order": order, "asked": order, "checkpoint": checkpoint, "budget": 4,
                "score": score, "steps": [steps, 1, 4], "right": right}
    rows = [row("learned", "ckpt", 0.5, 3.0, [True, False]),
            row("iid", "ckpt", 0.4, 3.0, [True, False]),
            row("iid", "control", 0.6, 3.0, [False, True]),
            row("margin", "ckpt", 0.9, 3.5, [True, True])]
    assert best_rules(rows) == [rows[3], rows[2], rows[0]]
    assert rows[0]["rival"] == "iid (control)" and rows[0]["p"] == 1 and "p" not in rows[2]


# --- rows -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parts(fast, straight):
    """Model, tokenizer, and items of which the last does not fit."""
    model, state = load_checkpoint(straight / "ckpt.pt")
    items = load_splits("gsm8k", fast[-1])["test"]
    return model, build_tokenizer(state["pieces"]), [
        *items, {"question": "long " * 99, "answer": "#### 1"}]


@pytest.mark.parametrize("order", ["learned", "iid", "confidence+eos_last", "threshold:0.1"])
def test_a_row_does_not_depend_on_the_batch_size(parts, order):
    """And what does not fit is wrong, and counted."""
    rows = [evaluate(*parts, parse_order(order), 4, "accuracy", n) for n in (2, 3, 100)]
    for row in rows:
        assert (row["n"], row["fit"]) == (9, 8) and row.pop("per s") > 0
        assert row["right"][-1] is False and len(row["right"]) == 9
        assert row["score"] == row["accuracy"] == sum(row["right"]) / 9
    assert rows[0] == rows[1] == rows[2]


def test_nats_are_those_of_the_true_answers(parts):
    model, enc, items = parts
    prompt, x0, fitting = encode(items, enc, 24, 16)
    for order in map(parse_order, ("iid", "confidence+eos_last")):
        row = evaluate(*parts, order, 3, "nats")
        log_p = generate(model, prompt, 3, order, seeds=fitting, x0=x0).log_p
        assert row["score"] == pytest.approx(log_p.mean().item(), rel=1e-4)
        assert row["ci95"][0] < row["score"] < row["ci95"][1] and len(row["right"]) == 9


@pytest.mark.parametrize("name, budget", [("threshold", 3), ("entropy_bound", 5), ("learned", 2)])
def test_a_budget_is_of_steps_on_average(parts, name, budget):
    """The tuned knob and cap have the highest score of those that stay within it, and of equal
    scores the fewest steps, by brute force."""
    def measure(order, cap):
        return evaluate(*parts, order, cap, "nats")

    knobs = ORDERS[name][2][::3]
    found, order = {}, parse_order(name)
    for cap in (budget, budget + 1, 2 * budget):
        for knob in knobs:
            row = measure(replace(order, knob=knob), cap)
            if row["steps"][0] <= budget:
                found[knob, cap] = row["score"], -row["steps"][0]
    chosen, cap = tune(measure, order, knobs, budget, 16)
    assert found[chosen.knob, cap] == max(found.values())


# --- the script -----------------------------------------------------------------------------------

ASKED = ["--steps", "1,3", "--limit", "5", "--tune_items", "2", "--orders",
         "learned:0.5,confidence,threshold"]


def flags(straight, path):
    return ["--ckpt", str(straight / "ckpt.pt"), "--control", str(straight / "control.pt"),
            *ASKED, "--json", str(path), "--device", "cpu"]


@pytest.fixture(scope="module")
def evaluated(straight, tmp_path_factory):
    """A script whose standard output is a full disk: how it ended, and its results."""
    path = tmp_path_factory.mktemp("eval") / "new" / "eval.json"
    with open("/dev/full", "w") as full:
        done = run("eval_gsm8k.py", *flags(straight, path), stdout=full, PYTHONUNBUFFERED="")
    return done, path, path.read_text()


def rows_of(text):
    """By name, without what depends on the clock."""
    rows = [{k: v for k, v in row.items() if k != "per s"} for row in json.loads(text)["rows"]]
    return {(row["budget"], row["asked"], row["checkpoint"]): row for row in rows}


def test_results_are_whole_where_nothing_can_be_printed(evaluated):
    done, path, text = evaluated
    assert done.returncode == 1 and done.stderr.startswith("stopped: ")
    assert done.stderr.count("\n") == 1 and [p.name for p in path.parent.iterdir()] == [path.name]
    rows, meta = rows_of(text), json.loads(text)["meta"]
    assert list(rows) == [(budget, order, name) for budget in (1, 3) for order, name in
                          [("learned:0.5", "ckpt"), ("confidence", "ckpt"),
                           ("confidence", "control"), ("threshold", "ckpt"),
                           ("threshold", "control")]]
    for row in rows.values():
        assert row["n"] == 5 and len(row["right"]) == len(row["shown"]) == 5
        assert -1e-9 < row["ci95"][0] <= row["score"] <= row["ci95"][1] <= 1
        mean, least, most = row["steps"]
        assert 1 <= least <= mean <= most <= row["cap"] <= 2 * row["budget"]
        assert mean <= row["budget"] or row["asked"] == "threshold"  # tuned on other items
        assert ("p" in row) == (row["asked"] == "learned:0.5")
    assert meta["args"]["limit"] == 5 and meta["train_config"]["dataset"] == "gsm8k"
    assert set(meta["checkpoints"]) == {"ckpt", "control"} and meta["torch"] == torch.__version__


def test_the_same_command_into_a_closed_pipe_goes_on_with_missing_rows_only(
        evaluated, straight, tmp_path):
    """Unbuffered, so that the first thing that is printed fails."""
    content, path = json.loads(evaluated[2]), tmp_path / "eval.json"
    content["meta"]["args"]["json"] = str(path)
    kept = [{**row, "per s": -1} for row in content["rows"] if row["asked"] != "confidence"]
    path.write_text(json.dumps({**content, "rows": kept}))
    reading, closed = os.pipe()
    os.close(reading)
    done = run("eval_gsm8k.py", *flags(straight, path), stdout=closed, PYTHONUNBUFFERED="1")
    os.close(closed)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "stopped: " in done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["per s"] for row in rows[: len(kept)]] == [-1] * len(kept)
    assert all(row["per s"] > 0 for row in rows[len(kept) :])
    again, once = rows_of(path.read_text()), rows_of(evaluated[2])
    for row in (*again.values(), *once.values()):
        row.pop("rival", None)  # of equals the first in the file
        row.pop("p", None)
    assert again == once


def test_other_results_are_replaced_and_the_best_denoiser_of_each_order_is_printed(
        evaluated, straight, tmp_path, capfd):
    path = tmp_path / "eval.json"
    path.write_text(evaluated[2])  # whose command named another --json
    status, first, _ = outcome(eval_gsm8k, flags(straight, path), capfd)
    assert status == 0 and rows_of(path.read_text()) == rows_of(evaluated[2])
    status, again, _ = outcome(eval_gsm8k, flags(straight, path), capfd)
    assert status == 0 and f"replacing {path}" in first
    assert f"10 rows of this evaluation are in {path}" in again
    for printed in (first, again):
        assert "gsm8k, 5 test items, 5 of them fit; each rule on the better of" in printed
        names = [line.split(":")[0].split()[0] for line in printed.splitlines()
                 if line.startswith(("learned:", "confidence ", "threshold:"))]
        assert sorted(names) == sorted(["learned", "confidence", "threshold"] * 2)


@pytest.mark.parametrize("argv, message", [
    (["--ckpt", "absent.pt"], "absent.pt not found"), (["--control", "absent.pt"], "not found"),
    (["--control", "other.pt"], "are of different runs"), (["--limit", "-1"], "whole number"),
    (["--metric", "speed"], "invalid choice"), (["--orders", "iid,best"], "cannot read order"),
    (["--orders", ""], "order ''"), (["--steps", "1,,2"], "whole number"),
    (["--split", "val", "--tune_items", "99"], "leaves no validation items"),
    *[(["--json", name], "holds no results of this script") for name in
      ("text", "list.json", "dict.json", "config.json", "other.pt")],
    (["--json", "text/x.json"], "'text'"), (["--json", "folder"], "Is a directory")])
def test_bad_input_ends_in_one_line(straight, tmp_path, monkeypatch, capfd, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    files = {"text": "hello", "list.json": "[]", "dict.json": "{}", "config.json": '{"meta": 3}'}
    for name, content in files.items():
        Path(name).write_text(content)
    state = torch.load(straight / "control.pt")
    torch.save({**state, "pieces": [*state["pieces"][:-1], "other"]}, "other.pt")
    status, _, err = outcome(eval_gsm8k, [*flags(straight, "new.json"), *argv], capfd)
    assert status != 0 and message in err and err.count("\n") == 1 and err[:-1].isprintable()
    assert all(Path(name).read_text() == content for name, content in files.items())


def test_two_checkpoints_of_one_name_are_two(straight, tmp_path):
    """--control may be another run's ckpt.pt."""
    shutil.copy(straight / "control.pt", tmp_path / "ckpt.pt")
    eval_gsm8k.main([*flags(straight, tmp_path / "x.json"), "--control", str(tmp_path / "ckpt.pt"),
                     "--orders", "iid", "--steps", "2"])
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 2
