"""eval_gsm8k.py: what counts as right and as true, statistics, tuning, pairs that meet, and results
that are never lost."""

import json
import math
import os
import re
import shutil
import threading
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
from common import UserError
from data import build_tokenizer, encode, frequent_pieces, load_splits, toy_split
from eval_gsm8k import (best_rules, closing_table, evaluate, exchangeable_pairs, failure_signs,
                        is_true, judge, locked, mcnemar, pairs_by_equation, pairs_that_meet,
                        read_results, rival_of, store, tune, value_of, wilson)
from model import MDM, ModelConfig, load_checkpoint, save_checkpoint
from sample import ORDERS, Generation, generate, parse_order

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
        verdict = judge(generated, "#### 1", "gsm8k")
        assert verdict["n_true"] <= verdict["n_equations"]
        assert verdict["accuracy"] >= verdict["coherent"]


@pytest.mark.parametrize("text, accurate, coherent", [
    ("<<9+9=18>> #### 18", True, True), ("#### 18.00", True, True), ("#### $18", True, True),
    ("####18 eggs", True, True), ("#### 1,8", False, False), ("#### 18. #### 7", False, False),
    ("18", False, False), ("", False, False), ("#### eighteen 18", False, False),
    ("<<9+9=18>> #### 18/5", False, False), ("<<9+9=18>> #### 18.5", False, False),
    ("<<9+9=18>> #### 17", False, False), ("<<9+8=18>> #### 18", True, False),
    ("9+9=18>> <<9+9=18>> #### 18", True, False), ("<<9+9=18 <<9+9=18>> #### 18", True, False),
    ("<<9+9=18>> <<9+9=1#### 18", True, False), ("<<>> #### 18", True, False)])
def test_right_and_coherent(text, accurate, coherent):
    for dataset in ("gsm8k", "toy"):
        verdict = judge(text, "<<9+9=18>> #### 18", dataset)
        assert (verdict["accuracy"], verdict["coherent"]) == (accurate, coherent)


@pytest.mark.parametrize("text, right", [
    ("Paris", True), (" Paris\n", True), ("paris", False), ("Paris.", False), ("", False),
    ("#### Paris", False)])
def test_pairs_are_right_where_the_whole_text_is(text, right):
    verdict = judge(text, "Paris", "pairs")
    assert verdict["accuracy"] == verdict["coherent"] == right and not verdict["no_number"]


def test_of_pairs_a_number_alone_is_not_enough():
    assert not judge("so #### 3", "then #### 3", "pairs")["accuracy"]
    assert judge("so #### 3", "then #### 3", "gsm8k")["accuracy"]


# --- statistics -----------------------------------------------------------------------------------

def test_mcnemar_is_the_exact_sign_test_of_the_items_that_differ():
    a = np.array([True] * 9 + [False] * 3)
    b = np.array([True] * 4 + [False] * 5 + [True] + [False] * 2)
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 2**6)  # 5 against 1
    assert mcnemar(a, a) == 1 and mcnemar(a, b) == mcnemar(b, a)


def test_wilson_interval():
    assert wilson(0.29, 100) == pytest.approx((0.2101, 0.3854), abs=1e-3)
    assert wilson(0, 10)[0] == 0 and wilson(1, 10)[1] == pytest.approx(1)


def test_a_rule_is_taken_on_its_best_denoiser_and_a_learned_order_met_by_the_best_of_its_budget():
    """Within a budget all count, also one that takes a little longer on average."""
    def row(order, checkpoint, score, budget, steps):
        return {"order": order, "asked": order, "checkpoint": checkpoint, "budget": budget,
                "score": score, "steps": [steps, 1, budget]}

    learned = row("learned:0.5", "ckpt", 0.5, 4, 3.9)
    worse = row("iid", "ckpt", 0.4, 4, 4.0)
    better = row("iid", "control", 0.6, 4, 4.0)
    fewer = row("margin", "ckpt", 0.55, 3, 3.0)
    more = row("margin", "ckpt", 0.9, 5, 3.5)
    for rows in ([learned, worse, better, fewer, more], [more, fewer, better, worse, learned]):
        before = [dict(row) for row in rows]
        assert best_rules(rows) == [fewer, better, learned, more]
        assert rival_of(learned, rows) is better and rows == before
    assert rival_of(learned, [learned, worse, fewer]) is fewer
    assert rival_of(learned, [learned, more]) is None


def test_of_equal_denoisers_the_first_stands_for_a_rule():
    """The file that was named first: a tie is not news about the control."""
    rows = [{"budget": 4, "asked": "iid", "score": 0.5, "checkpoint": name}
            for name in ("ckpt", "control")]
    assert best_rules(rows) == rows[:1] and best_rules(rows[::-1]) == rows[1:]


# --- rows -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parts(fast, straight):
    """Model, tokenizer, and items of which the last does not fit."""
    model, state = load_checkpoint(straight / "ckpt.pt")
    items = load_splits("gsm8k", fast[-1])["test"]
    too_long = {"question": "long " * 99, "answer": "#### 1", "target": "#### 1"}
    return model, build_tokenizer(state["pieces"]), [*items, too_long]


@pytest.mark.parametrize("order", ["learned", "iid", "confidence+eos_last", "threshold:0.1"])
def test_a_row_does_not_depend_on_the_batch_size(parts, order):
    """And what does not fit is wrong, and counted."""
    rows = [evaluate(*parts, parse_order(order), 4, "accuracy", "gsm8k", n) for n in (2, 3, 100)]
    for row in rows:
        assert (row["n"], row["fit"]) == (9, 8) and row.pop("per_second") > 0
        assert row["right"][-1] is False and len(row["right"]) == 9
        assert row["score"] == row["accuracy"] == sum(row["right"]) / 9
    assert rows[0] == rows[1] == rows[2]


def test_nats_are_those_of_the_true_answers_with_1_96_standard_errors(parts):
    model, enc, items = parts
    prompt, x0, fitting = encode(items, enc, 24, 16)
    for order in map(parse_order, ("iid", "confidence+eos_last")):
        row = evaluate(*parts, order, 3, "nats", "gsm8k")
        log_p = generate(model, prompt, 3, order, seeds=fitting, x0=x0).log_p
        half = 1.96 * log_p.std(correction=0).item() / 8**0.5
        assert row["score"] == pytest.approx(log_p.mean().item(), rel=1e-4)
        assert row["ci95"] == pytest.approx((row["score"] - half, row["score"] + half), rel=1e-4)
        assert len(row["right"]) == 9


def test_verdicts_and_steps_are_of_their_items(parts, monkeypatch):
    """The first item does not fit, and every other answer is the true one."""
    model, enc, items = parts
    items = [items[-1], *items[:-1]]
    truth = iter(encode(items, enc, 24, 16)[1].split(3))

    def perfect(model, prompt, *_, seeds):
        x0 = next(truth)
        return Generation(x0, torch.tensor(seeds) ** 2, x0, None)

    monkeypatch.setattr(eval_gsm8k, "generate", perfect)
    row = evaluate(model, enc, items, parse_order("iid"), 9, "accuracy", "gsm8k", batch_size=3)
    assert row["right"] == [False] + [True] * (len(items) - 1)
    squares = [i**2 for i in range(1, len(items))]
    assert row["steps"] == [sum(squares) / len(squares), 1, squares[-1]]


def test_no_item_that_fits_is_one_line(parts):
    model, enc, items = parts
    with pytest.raises(UserError, match="none of 1 items fits"):
        evaluate(model, enc, items[-1:], parse_order("iid"), 3, "accuracy", "gsm8k")


def test_the_interval_of_a_share_is_of_all_items_those_that_do_not_fit_too(parts):
    row = evaluate(*parts, parse_order("iid"), 1, "accuracy", "gsm8k")
    assert row["fit"] < row["n"] == 9 and row["ci95"] == wilson(row["score"], 9)


def test_where_nats_are_the_score_right_means_accurate(parts, monkeypatch):
    """An answer whose number is right and whose equation is false."""
    model, enc, _ = parts
    item = {"question": "Jo has 1 pens.", "answer": "", "target": "<<1+1=2>> #### 2"}
    _, written, _ = encode([{**item, "target": "<<1+1=3>> #### 2"}], enc, 24, 16)
    done = Generation(written, torch.ones(1), written, torch.zeros(1))
    monkeypatch.setattr(eval_gsm8k, "generate", lambda *_, **__: done)
    row = evaluate(model, enc, [item], parse_order("iid"), 2, "nats", "gsm8k")
    assert row["right"] == [True] and (row["accuracy"], row["coherent"]) == (1, 0)


# --- tuning ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, budget", [("threshold", 3), ("entropy_bound", 5), ("dilated", 2)])
def test_a_budget_is_of_steps_on_average(parts, name, budget):
    """The tuned knob and cap have the highest score of those that stay within it, and of equal
    scores the fewest steps, by brute force over all of them."""
    def measure(order, cap):
        return evaluate(*parts, order, cap, "nats", "gsm8k")

    knobs = ORDERS[name][2][::3]
    order = parse_order(name)
    found = {}
    for cap in (budget, budget + 1, 2 * budget):
        for knob in knobs:
            row = measure(replace(order, knob=knob), cap)
            if row["steps"][0] <= budget:
                found[knob, cap] = row["score"], -row["steps"][0]
    chosen, cap = tune(measure, order, knobs, budget, 16)
    assert measure(chosen, cap)["steps"][0] <= budget
    assert max(found.values()) == (measure(chosen, cap)["score"], -measure(chosen, cap)["steps"][0])


def test_of_equal_scores_the_fewest_steps_and_larger_caps_are_tried():
    """One step more and twice as many, unless answers stayed below the cap or needed it all."""
    asked = []
    steps = {0.3: [3.0, 3, 3], 0.5: [2.4, 1, 9], 0.7: [2.5, 1, 2]}

    def measure(order, cap):
        asked.append((order.knob, cap))
        mean, least, most = steps[order.knob]
        return {"score": 0.5, "steps": [mean, least, min(most, cap)]}

    chosen, cap = tune(measure, parse_order("threshold"), [0.3, 0.5, 0.7], 3, 16)
    assert (chosen.knob, cap) == (0.5, 3)
    assert asked == [(0.3, 3), (0.5, 3), (0.5, 4), (0.5, 6), (0.7, 3)]
    asked.clear()
    tune(measure, parse_order("threshold"), [0.5], 3, 4)  # no cap beyond the canvas
    assert asked == [(0.5, 3), (0.5, 4)]


# --- exchangeable operands ------------------------------------------------------------------------

def toy_item(target):
    return {"question": "Max has 1.", "answer": target, "target": target}


TOY = [toy_item("<<3-2=1>> <<2*4=8>> <<2+2=4>> <<1+8=9>> #### 9"),
       toy_item("<<9/3=3>> <<3-2=1>> #### 1"), toy_item("<<1+2=3>> <<3+3=6>> <<6-1=5>> #### 5")]


@pytest.fixture(scope="module")
def toy_model():
    enc = build_tokenizer([">> <<", ">> #### "])
    torch.manual_seed(0)
    model = MDM(ModelConfig(enc.n_vocab - 1, prompt_len=12, answer_len=40, n_layer=1, n_head=2,
                            n_embd=8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval(), enc


def test_pairs_are_different_operands_of_plus_and_times(toy_model):
    model, enc = toy_model
    _, x0, _ = encode(TOY, enc, 12, 40)
    row, left, equation = exchangeable_pairs(x0, enc)
    read = [enc.decode(x0[r, i : i + 3].tolist()) for r, i in zip(row, left)]
    assert read == ["2*4", "1+8", "1+2"]
    assert row.tolist() == [0, 0, 2] and equation.tolist() == [1, 3, 0]


def test_pairs_meet_where_one_step_reveals_both(toy_model):
    """All in one step, none in as many as there are tokens, and in between as reveal_step says."""
    model, enc = toy_model
    assert pairs_that_meet(model, enc, TOY, 1) == 1
    assert pairs_that_meet(model, enc, TOY, 40, "left_to_right") == 0
    assert pairs_that_meet(model, enc, TOY[1:2], 1) == 0  # there is none
    assert pairs_by_equation(model, enc, TOY, 1) == {0: 1, 1: 1, 3: 1}
    prompt, x0, _ = encode(TOY, enc, 12, 40)
    step = generate(model, prompt, 3, "confidence", x0=x0).reveal_step
    meets = [step[r, x] == step[r, x + 2] for r, x in
             zip(*(part.tolist() for part in exchangeable_pairs(x0, enc)[:2]))]
    assert pairs_that_meet(model, enc, TOY, 3, "confidence") == sum(meets).item() / 3


def test_the_first_order_reveals_no_pair_in_one_step_from_3_steps_on():
    """On the toy's stories and its canvas: what p's gates begin with keeps all operands apart."""
    items = toy_split("val", 300)
    enc = build_tokenizer(frequent_pieces(items, 100))
    model = MDM(ModelConfig(enc.n_vocab - 1, 36, answer_len=60, n_layer=1, n_head=2, n_embd=8))
    shares = [pairs_that_meet(model, enc, items, steps, "first_order") for steps in (3, 4, 6, 8)]
    assert shares == [0, 0, 0, 0]
    assert 0 < pairs_that_meet(model, enc, items, 2, "first_order") < 0.3


@pytest.mark.parametrize("meet, bounds, signs", [
    ({2: 90.0, 3: 1.0, 4: 0.0}, {"denoiser": -4.0, "order": -3.0}, []),
    ({2: 0.0, 3: 1.2, 4: 50.0}, {"denoiser": -4.0, "order": -3.0}, ["is a .*in 3 steps 1.2 %"]),
    ({2: 0.0, 3: 0.9, 16: 2.0}, {"denoiser": -4.0, "order": -4.1},
     ["is a .*in 16 steps", r"may be a .*-4\.10, is below stage 1's, -4\.00"]),
    ({}, {"order": -3.0}, []), ({}, {"denoiser": -3.0}, [])])
def test_signs_of_a_failed_order(meet, bounds, signs):
    found = failure_signs(meet, bounds)
    assert len(found) == len(signs)
    assert all(re.search(sign, text) for sign, text in zip(signs, found))


@pytest.fixture(scope="module")
def toy_run(toy_model, tmp_path_factory):
    """The folder of a run on a toy that has been trained for no step."""
    model, enc = toy_model
    out = tmp_path_factory.mktemp("toy_run")
    log = [{"stage": "denoiser", "step": 1, "val": -3.0},
           {"stage": "order", "step": 1, "val": -9.0}, {"stage": "order", "step": 2, "elbo": -8.0}]
    config = {"dataset": "toy", "data_dir": "", "answer_len": 40}
    for name, stage in (("ckpt", "order"), ("denoiser", "denoiser")):
        save_checkpoint(out / f"{name}.pt", model, pieces=[">> <<", ">> #### "], stage=stage,
                        step=2, train_config=config, log=log)
    return out


def test_the_closing_table_returns_what_it_prints(toy_run, capsys):
    """Learned orders on the one file, rules on the other; of a toy also every budget, its pairs,
    and what to do about an order that has failed."""
    found = closing_table(toy_run / "ckpt.pt", toy_run / "denoiser.pt", TOY, limit=2)
    printed = capsys.readouterr().out
    on = {row["order"]: row["checkpoint"] for row in found["rows"]}
    assert on.pop("learned:0.5") == on.pop("learned") == "ckpt" and set(on.values()) == {"denoiser"}
    assert {"iid", "confidence", "margin", "left_to_right"} < set(on)
    assert all(row["n"] == 2 and row["cap"] == 4 for row in found["rows"])
    assert list(found["coherent"]) == list(found["meet"]) == [2, 3, 4, 6, 8, 16]
    assert "2 validation items, at most 4 steps" in printed
    for name, label in (("coherent", "coherent, % "), ("meet", "pairs that meet")):
        [line] = [line for line in printed.splitlines() if label in line]
        numbers = [float(x) for x in re.findall(r"[\d.]+", line)]
        assert numbers == pytest.approx(list(found[name].values()), abs=0.051)
    assert any("-9.00, is below stage 1's, -3.00" in sign for sign in found["signs"])
    for sign in found["signs"]:
        assert f"{sign}: try more --max_steps_order, or another --seed" in printed
    assert "in % of each equation" not in printed  # at most 1 % meet


def test_the_closing_table_says_in_which_equations_pairs_meet(toy_run, monkeypatch, capsys):
    """In the smallest budget of 3 or more with more than 1 %."""
    monkeypatch.setattr(eval_gsm8k, "pairs_that_meet",
                        lambda model, enc, items, steps: 0.5 * (steps in (2, 4, 8)))
    monkeypatch.setattr(eval_gsm8k, "pairs_by_equation",
                        lambda model, enc, items, steps: {0: 0.0, 8: steps / 100})
    closing_table(toy_run / "ckpt.pt", toy_run / "denoiser.pt", TOY, limit=1)
    printed = capsys.readouterr().out
    assert "There is a better order (in 4 steps 50.0 %" in printed
    assert "pairs that meet in 4 steps, in % of each equation: 9: 4.0\n" in printed


def test_the_closing_table_of_other_data_has_no_pairs(straight, fast, capsys):
    items = load_splits("gsm8k", fast[-1])["val"]
    found = closing_table(straight / "ckpt.pt", straight / "denoiser.pt", items)
    assert found["coherent"] == found["meet"] == {} and found["rows"][0]["cap"] == 4
    assert "exchangeable" not in capsys.readouterr().out


def test_the_closing_table_measures_each_order_on_the_network_it_names(toy_run, monkeypatch):
    def load(path, device):
        model, state = load_checkpoint(path, device)
        model.name = path.stem
        return model, state

    monkeypatch.setattr(eval_gsm8k, "load_checkpoint", load)
    monkeypatch.setattr(eval_gsm8k, "evaluate", lambda model, *rest:
                        evaluate(model, *rest) | {"network": model.name})
    found = closing_table(toy_run / "ckpt.pt", toy_run / "denoiser.pt", TOY, limit=1)
    assert {row["network"] for row in found["rows"]} == {"ckpt", "denoiser"}
    assert all(row["network"] == row["checkpoint"] for row in found["rows"])


def test_pairs_of_the_closing_table_meet_in_as_many_steps_as_stand_above(toy_run, monkeypatch):
    monkeypatch.setattr(eval_gsm8k, "pairs_that_meet",
                        lambda model, enc, items, steps: steps / 100)
    found = closing_table(toy_run / "ckpt.pt", toy_run / "denoiser.pt", TOY, limit=1)
    assert found["meet"] == pytest.approx({steps: steps for steps in (2, 3, 4, 6, 8, 16)})


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
    rows = {}
    for row in json.loads(text)["rows"]:
        del row["per_second"]
        rows[row["budget"], row["asked"], row["checkpoint"]] = row
    return rows


@pytest.fixture
def measured(monkeypatch):
    """The questions of every call of evaluate."""
    calls = []
    real = eval_gsm8k.evaluate

    def evaluate(model, enc, items, *rest):
        calls.append([item["question"] for item in items])
        return real(model, enc, items, *rest)

    monkeypatch.setattr(eval_gsm8k, "evaluate", evaluate)
    return calls


def test_results_are_whole_where_nothing_can_be_printed(evaluated):
    done, path, text = evaluated
    assert done.returncode == 1 and done.stderr.startswith("stopped: ")
    assert done.stderr.count("\n") == 1 and [p.name for p in path.parent.iterdir()] == [path.name]
    rows = rows_of(text)
    meta = json.loads(text)["meta"]
    on = [("learned:0.5", "ckpt"), ("confidence", "ckpt"), ("confidence", "control"),
          ("threshold", "ckpt"), ("threshold", "control")]
    assert list(rows) == [(1, *one) for one in on] + [(3, *one) for one in on]
    for row in rows.values():
        assert row["n"] == 5 and len(row["right"]) == len(row["shown"]) == 5
        assert -1e-9 < row["ci95"][0] <= row["score"] <= row["ci95"][1] <= 1
        mean, least, most = row["steps"]
        assert 1 <= least <= mean <= most <= row["cap"] <= 2 * row["budget"]
        assert mean <= row["budget"] or row["asked"] == "threshold"  # tuned on other items
        assert bool(row["knobs"]) == (row["asked"] == "threshold") == bool(row["of"]["tuned_on"])
    assert meta["reported"]["n"] == 5 and meta["reported"]["dataset"] == "gsm8k"
    assert set(meta["checkpoints"]) == {"ckpt", "control"} and meta["torch"] == torch.__version__


def test_the_same_command_into_a_closed_pipe_goes_on_with_missing_rows_only(
        evaluated, straight, tmp_path):
    """Unbuffered, so that the first thing that is printed fails. Another version of the code is no
    reason to throw rows away."""
    content = json.loads(evaluated[2])
    content["meta"]["commit"] = "0123456+"
    kept = [{**row, "per_second": -1, "commit": "0123456+"} for row in content["rows"]
            if row["asked"] != "confidence"]
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({**content, "rows": kept}))
    reading, closed = os.pipe()
    os.close(reading)
    done = run("eval_gsm8k.py", *flags(straight, path), stdout=closed, PYTHONUNBUFFERED="1")
    os.close(closed)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "stopped: " in done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert rows[: len(kept)] == kept and len(rows) == len(kept) + 4
    assert all(row["per_second"] > 0 for row in rows[len(kept) :])
    again = rows_of(path.read_text())
    once = rows_of(evaluated[2])
    for row in (*again.values(), *once.values()):
        del row["commit"]
    assert again == once


def test_the_best_denoiser_of_each_order_is_printed(evaluated, straight, tmp_path, capfd):
    path = tmp_path / "eval.json"
    path.write_text(evaluated[2])
    status, out, _ = outcome(eval_gsm8k, flags(straight, path), capfd)
    assert status == 0 and rows_of(path.read_text()) == rows_of(evaluated[2])
    assert f"10 rows of this evaluation are in {path}" in out
    assert "gsm8k, 5 test items, 5 of them fit; accuracy in %; each rule on the best of" in out
    names = [re.split("[: ]", line)[0] for line in out.splitlines()
             if line.startswith(("learned:", "confidence ", "threshold:"))]
    assert sorted(names) == sorted(["learned", "confidence", "threshold"] * 2)
    assert out.count("against") == 2 and " p 1.0e+00 against" in out

    # A part of what is there: no more than was asked for.
    status, out, _ = outcome(eval_gsm8k, [*flags(straight, path), "--steps", "3",
                                          "--orders", "confidence"], capfd)
    assert status == 0 and len(out.splitlines()) == 4


@pytest.mark.parametrize("changed", [
    ["--limit", "4"], ["--metric", "nats"], ["--split", "val"], ["--tune_items", "3"]])
def test_rows_of_another_evaluation_stay_beside(evaluated, straight, tmp_path, capfd, changed):
    """Called again as before, nothing has to be measured anew. What was not tuned does not depend
    on the items to tune on."""
    path = tmp_path / "eval.json"
    path.write_text(evaluated[2])
    argv = flags(straight, path)
    assert outcome(eval_gsm8k, [*argv, *changed], capfd)[0] == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[:10] == json.loads(evaluated[2])["rows"]
    assert len(rows) == (14 if changed[0] == "--tune_items" else 20)
    _, out, _ = outcome(eval_gsm8k, argv, capfd)
    assert json.loads(path.read_text())["rows"] == rows and "10 rows of this evaluation" in out


def test_knobs_are_tuned_on_validation_items_that_are_not_reported_on(
        fast, straight, tmp_path, measured):
    splits = load_splits("gsm8k", fast[-1])
    for split in ("test", "val"):
        measured.clear()
        eval_gsm8k.main([*flags(straight, tmp_path / "eval.json"), "--control", "", "--split",
                         split, "--orders", "threshold", "--steps", "2"])
        *tuning, reported = measured
        first_two = [item["question"] for item in splits["val"][:2]]
        reports = splits["test"][:5] if split == "test" else splits["val"][2:][:5]
        assert len(tuning) >= 8 and all(items == first_two for items in tuning)
        assert reported == [item["question"] for item in reports]
        assert not set(reported) & set(first_two)


def test_other_weights_other_items_and_other_knobs_are_other_results(
        straight, fast, tmp_path, measured, monkeypatch):
    """The bytes of the file count, not its name; the items, not their number."""
    for name in ("ckpt.pt", "denoiser.pt"):
        shutil.copy(straight / name, tmp_path / name)
    folder = tmp_path / "data"
    shutil.copytree(fast[-1], folder)
    argv = ["--ckpt", str(tmp_path / "ckpt.pt"), "--control", "", "--steps", "2", "--orders",
            "threshold", "--limit", "3", "--tune_items", "2", "--json",
            str(tmp_path / "eval.json"), "--data_dir", str(folder)]

    def is_measured_anew():
        measured.clear()
        eval_gsm8k.main(argv)
        return bool(measured)

    assert is_measured_anew() and not is_measured_anew()

    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state["model"]["token_head.weight"] += 1e-3
    torch.save(state, tmp_path / "ckpt.pt")
    assert is_measured_anew() and not is_measured_anew()

    lines = (folder / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join(lines[1:]))
    assert is_measured_anew() and not is_measured_anew()

    rule, default, knobs = ORDERS["threshold"]
    monkeypatch.setitem(ORDERS, "threshold", (rule, default, knobs[:3]))
    assert is_measured_anew() and not is_measured_anew()
    rows = read_results(tmp_path / "eval.json")["rows"]
    assert len(rows) == 3  # those of other knobs were replaced


def test_the_denoiser_beside_the_checkpoint_is_the_control_unless_one_is_named(
        straight, tmp_path, monkeypatch):
    """Not that of another run, in the folder of today's default."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(straight, "out")
    shutil.copytree(straight, "mine")

    def control(*argv):
        return eval_gsm8k.parse_args(argv).control

    assert control() == str(Path("out/denoiser.pt"))
    assert control("--ckpt", "mine/ckpt.pt") == str(Path("mine/denoiser.pt"))
    assert control("--ckpt", "mine/ckpt.pt", "--control", "") == ""
    assert control("--ckpt", "mine/ckpt.pt", "--control", "a.pt,b.pt") == "a.pt,b.pt"
    Path("mine/denoiser.pt").unlink()
    assert control("--ckpt", "mine/ckpt.pt") == ""


def some_row(asked, budget=4):
    of = {"checkpoint": 1, "reported": {"n": 1}, "tuned_on": None}
    return {"asked": asked, "budget": budget, "of": of, "knobs": []}


META = {"checkpoints": {"ckpt": 1}, "reported": {"n": 1}, "tuned_on": 2}


def test_rows_of_other_weights_do_not_belong():
    assert eval_gsm8k.belongs(some_row("iid"), META)
    assert not eval_gsm8k.belongs(some_row("iid"), {**META, "checkpoints": {"ckpt": 3}})


def test_p_is_of_both_rows():
    row = {"checkpoint": "c", "budget": 4, "cap": 4, "steps": [3, 1, 4], "ci95": (0, 1),
           "accuracy": 1, "coherent": 1, "no_number": 0, "true_equations": 1, "score": 1}
    ours = {**row, "order": "learned:0.5", "right": [True] * 8}
    rule = {**row, "order": "iid", "right": [False] * 8}
    assert "p 7.8e-03 against iid (c)" in eval_gsm8k.table([ours], "accuracy", [rule])


def test_nats_are_compared_item_by_item():
    """Items differ by 50 nats, and all the same one order is ahead for certain."""
    ours = {"nats": [-1.0, -51.0, -20.5, -30.5]}
    rule = {"nats": [-2.0, -53.0, -21.5, -32.5]}  # 1, 2, 1, 2 behind: 1.5, standard error 0.25
    assert eval_gsm8k.against(ours, rule, "nats") == "+1.50 ± 0.49 nats against"


def test_a_row_and_its_knobs_are_of_its_own_checkpoint(straight, tmp_path, monkeypatch):
    """Of two checkpoints, the rows of each are measured and tuned on one network alone."""
    used = []
    real = eval_gsm8k.evaluate
    monkeypatch.setattr(eval_gsm8k, "evaluate", lambda model, enc, items, *rest:
                        used.append((len(items), id(model))) or real(model, enc, items, *rest))
    eval_gsm8k.main([*flags(straight, tmp_path / "x.json"), "--orders", "threshold",
                     "--steps", "3"])
    end = [n for n, _ in used].index(5) + 1  # the first row of the 5 reported items
    one = used[:end]
    two = used[end:]
    assert len(two) > 1 and len({model for _, model in one}) == 1
    assert len({model for _, model in two}) == 1 and one[0][1] != two[0][1]


def test_two_evaluations_at_once_lose_nothing(tmp_path):
    """Each adds to what the other has written, one at a time; no lock is left."""
    path = tmp_path / "eval.json"

    def write(name):
        for budget in range(20):
            store(path, META, [some_row(name, budget)])

    writers = [threading.Thread(target=write, args=(name,)) for name in ("iid", "margin")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_results(path)["rows"]) == 40
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]
    store(path, META, [{**some_row("iid", 3), "score": 1}])  # in place of the one there
    rows = read_results(path)["rows"]
    assert len(rows) == 40 and sum("score" in row for row in rows) == 1


def test_a_lock_that_stays_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_gsm8k.time, "sleep", lambda seconds: None)
    path = tmp_path / "eval.json"
    with locked(path):
        with pytest.raises(UserError, match="eval.json.lock has been there .* remove it"):
            store(path, META)
    store(path, META)


@pytest.mark.parametrize("name", ["denoiser.pt", "control.pt"])
def test_untrained_gates_are_not_called_learned(straight, tmp_path, name, capfd):
    argv = [*flags(straight, tmp_path / "eval.json"), "--ckpt", str(straight / name)]
    status, out, err = outcome(eval_gsm8k, argv, capfd)
    assert status == 1 and not out and err.count("\n") == 1
    assert "trained gates" in err and str(straight / "ckpt.pt") in err
    assert not (tmp_path / "eval.json").exists()
    argv += ["--orders", "iid,confidence", "--steps", "2"]
    assert outcome(eval_gsm8k, argv, capfd)[0] == 0


def test_of_pairs_the_text_counts(straight, tmp_path, capfd, monkeypatch):
    """The metric is accuracy, by the whole text; what the model writes is `written`."""
    state = torch.load(straight / "ckpt.pt", weights_only=True)
    state["train_config"] |= {"dataset": "pairs", "data_dir": str(tmp_path)}
    torch.save(state, tmp_path / "ckpt.pt")
    capitals = {"France?": "Paris", "Italy?": "Rome", "Spain?": "Madrid"}
    lines = [json.dumps({"question": q, "answer": a}) for q, a in capitals.items()]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    written = iter(["Paris ", "rome", "#### Madrid"])
    monkeypatch.setattr(eval_gsm8k, "decode", lambda tokens, enc: next(written))

    argv = ["--ckpt", str(tmp_path / "ckpt.pt"), "--control", "", "--steps", "2", "--orders", "iid",
            "--json", str(tmp_path / "eval.json")]
    status, out, err = outcome(eval_gsm8k, argv, capfd)
    assert status == 0, err
    [row] = read_results(tmp_path / "eval.json")["rows"]
    assert "pairs, 3 test items, 3 of them fit; accuracy in %" in out
    assert row["of"]["reported"]["metric"] == "accuracy" and row["no_number"] == 0
    assert row["right"] == [True, False, False] and math.isclose(row["score"], 1 / 3)


@pytest.mark.parametrize("argv, message", [
    (["--ckpt", "absent.pt"], "absent.pt not found"), (["--control", "absent.pt"], "not found"),
    (["--control", "other.pt"], "are of different runs"), (["--limit", "-1"], "whole number"),
    (["--metric", "speed"], "invalid choice"), (["--orders", "iid,best"], "cannot read order"),
    (["--orders", ""], "order ''"), (["--steps", "1,,2"], "whole number"),
    (["--split", "val", "--tune_items", "99"], "leaves no validation items"),
    (["--tune_items", "L"], "whole number"), (["--batch_size", "0"], "whole number"),
    (["--data_dir", "absent"], "absent"), (["--ckpt", "folder"], "is a folder"),
    *[(["--json", name], "holds no results of this script") for name in
      ("text", "list.json", "dict.json", "config.json", "old.json", "other.pt")],
    (["--json", "text/x.json"], "text"), (["--json", "folder"], "is a folder"),
    (["--json", "."], "is a folder"), (["--ckpt", ""], "is a folder")])
def test_bad_input_ends_in_one_line(straight, tmp_path, monkeypatch, capfd, argv, message):
    """Before anything is measured, and no file is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_gsm8k, "evaluate", None)
    Path("folder").mkdir()
    files = {"text": "hello", "list.json": "[]", "dict.json": "{}", "config.json": '{"meta": 3}',
             "old.json": '{"meta": {}, "rows": [{"asked": "iid", "budget": 4}]}'}
    for name, content in files.items():
        Path(name).write_text(content)
    state = torch.load(straight / "control.pt")
    torch.save({**state, "pieces": [*state["pieces"][:-1], "other"]}, "other.pt")
    status, _, err = outcome(eval_gsm8k, [*flags(straight, "new.json"), *argv], capfd)
    assert status != 0 and message in err and err.count("\n") == 1 and err[:-1].isprintable()
    assert all(Path(name).read_text() == content for name, content in files.items())
    assert not list(Path().glob("**/*.tmp")) and not list(Path().glob("**/*.lock"))


def test_several_controls_and_two_checkpoints_of_one_name(straight, tmp_path, capfd):
    """Separated by commas. One may be another file of the name ckpt.pt; the same file twice counts
    once."""
    shutil.copy(straight / "control.pt", tmp_path / "ckpt.pt")
    controls = [straight / "denoiser.pt", tmp_path / "ckpt.pt", straight / "ckpt.pt"]
    path = tmp_path / "x.json"
    status, out, _ = outcome(eval_gsm8k, [
        *flags(straight, path), "--control", ",".join(map(str, controls)), "--orders",
        "iid,learned:0.5", "--steps", "2"], capfd)
    assert status == 0 and "on the best of ckpt, denoiser, ckpt_3" in out
    names = [(row["asked"], row["checkpoint"]) for row in read_results(path)["rows"]]
    assert names == [("iid", "ckpt"), ("iid", "denoiser"), ("iid", "ckpt_3"),
                     ("learned:0.5", "ckpt")]


def test_a_rival_may_be_a_row_that_was_measured_before(evaluated, straight, tmp_path, capfd):
    """A learned order alone is asked for; the file has rules of the same evaluation."""
    path = tmp_path / "eval.json"
    path.write_text(evaluated[2])
    argv = [*flags(straight, path), "--orders", "learned:0.5"]
    assert outcome(eval_gsm8k, argv, capfd)[1].count("against") == 2


def test_items_are_told_apart_by_their_targets_too():
    assert eval_gsm8k.crc_of(TOY) == eval_gsm8k.crc_of([dict(item) for item in TOY])
    for name in ("question", "target"):
        other = [TOY[0], {**TOY[1], name: "x"}, TOY[2]]
        assert eval_gsm8k.crc_of(other) != eval_gsm8k.crc_of(TOY)
