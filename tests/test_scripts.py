"""The scripts as a user runs them: a tiny run end to end, resuming, and what bad input says."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_gsm8k
import sample
import train
from data import UserError, build_tokenizer, decode, frequent_pieces, load_splits, to_target, toy_split
from model import load_checkpoint
from orders import parse_order
from posterior import sample_orders
from sample import generate

ROOT = Path(__file__).parent.parent
TINY = ("--train_items 64 --n_layer 1 --n_embd 16 --n_head 2 --max_steps_denoiser 12 --max_steps_order 12 --batch_size 4 "
        "--batch_size_order 4 --K 2 --log_every 4 --eval_every 8 --save_every 5 --eval_items 8 --table_items 8 --device cpu").split()


def run(script, *args):
    """Exit status, stdout and stderr of a script in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(tempfile.gettempdir()) / "empty-hub-cache")}
    done = subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


def weights(path):
    state = torch.load(path, weights_only=True)
    return [*state["model"].values(), *(v for part in state["posterior"] for v in part.values())]


def log(out_dir):
    return [{k: v for k, v in json.loads(line).items() if k != "ktok/s"} for line in (out_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    train.main([*TINY, "--out_dir", str(out)])
    return out


def test_train_writes_checkpoints_and_a_log(trained):
    assert {p.name for p in trained.iterdir()} == {"denoiser.pt", "ckpt.pt", "control.pt", "resume.pt", "log.jsonl"}
    records = log(trained)
    assert [(r["stage"], r["step"]) for r in records] == [(s, n) for s in train.STAGES for n in (4, 8, 12)]
    order = [r for r in records if r["stage"] == "order"][-1]
    assert set(order) >= {"elbo", "recon", "kl", "q_entropy", "q_steps", "p_steps", "val", "grad", "eos_share"}
    assert abs(order["elbo"] - (order["recon"] - order["kl"])) < 1e-2 and all(math.isfinite(v) for v in order.values() if isinstance(v, float))
    start, control, final = (weights(trained / name)[0] for name in ("denoiser.pt", "control.pt", "ckpt.pt"))
    assert not torch.equal(start, control) and not torch.equal(start, final)


def test_sample_prints_every_step_and_the_number(trained, capsys):
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--steps", "3", "--num_samples", "2", "--order", "confidence"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line] == ["question", "truth", "step", "step", "step", "number"] * 2
    assert "·" in lines[2] and "·" not in lines[4] and "\033" not in lines[2]
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--steps", "L", "--num_samples", "1", "--prompt", "Max has 8 eggs <|mask|> 🙂.", "--order", "learned:0.5"])
    assert "truth" not in capsys.readouterr().out


def test_sample_compares_orders_on_the_same_question(trained, capsys):
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--steps", "2", "--num_samples", "1", "--compare", "learned,confidence@8,left_to_right"])
    lines = capsys.readouterr().out.splitlines()[2:-1]
    assert [line.split()[0] for line in lines if line[0] != " "] == ["step", "step", "number"]
    assert [name for line in lines for name in ("learned", "confidence@8", "left_to_right") if f" {name} " in line] == ["learned", "confidence@8", "left_to_right"] * 3


def test_the_gif_has_a_frame_for_every_step(trained, tmp_path):
    path = tmp_path / "a" / "order.gif"
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--steps", "3", "--num_samples", "1", "--order", "confidence", "--gif", str(path)])
    with Image.open(path) as image:  # the empty canvas, 3 steps; the finished answer shown for longer may be merged into one frame
        assert image.is_animated and image.n_frames in (4, 6)


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "a" / "eval.json"
    eval_gsm8k.main(["--ckpt", str(trained / "ckpt.pt"), "--control", str(trained / "control.pt"), "--steps", "1,3,L", "--limit", "5", "--tune_items", "4",
                     "--seeds", "2", "--orders", "learned,learned:0.5,confidence,iid,threshold,threshold:0.8+eos_last,oracle", "--json", str(path)])
    return path


def test_evaluation_writes_a_row_for_every_order_budget_and_denoiser(evaluated):
    result = json.loads(evaluated.read_text())
    assert result["meta"]["train_config"]["dataset"] == "toy" and result["meta"]["title"] == "toy, test split, 5 items"
    assert set(result["meta"]) >= {"args", "commit", "torch", "python"} and [c["stage"] for c in result["meta"]["checkpoints"].values()] == ["order", "control"]
    # the learned order on one checkpoint, the others on two; a knob that is not given is chosen, and swept where there is no cap
    rows, sweep, gates = result["rows"], len(eval_gsm8k.ORDERS["threshold"].sweep), len(eval_gsm8k.ORDERS["learned"].sweep)
    assert len(rows) == 3 * (1 + 2 * 4) + (1 + 1 + gates) + 2 * (1 + 1 + sweep)
    for row in rows:
        assert row["n"] == 5 and 0 <= row["ci95"][0] <= row["score"] <= row["ci95"][1] <= 1
        assert row["steps_min"] <= row["steps_mean"] <= row["steps_max"] <= row["cap"] <= 2 * row["budget"] and row["steps_min"] >= 1
        assert row["coherent"] <= row["accuracy"] <= row["flexible"] and len(row["examples"]) == 5
        assert row["score"] == row["coherent"] == pytest.approx(np.mean(row["score_by_seed"])) and len(row["score_by_seed"]) == (2 if row["budget"] > 1 and row["order"] in ("learned", "iid") else 1)
        assert ("p" in row) == row["order"].startswith("learned")
        assert max(example["reveal_step"][0] for example in row["examples"]) <= row["steps_max"] and len(row["eos_share"]) == row["steps_max"]
    assert {row["accuracy"] for row in rows if row["budget"] == 1 and "ckpt" in row["checkpoint"]} == {rows[0]["accuracy"]}  # one step has no order


def test_a_budget_is_of_steps_on_average(trained):
    """The tuned knob and cap have the highest score of those that stay within the budget on average, by brute force."""
    model, state = eval_gsm8k.load_checkpoint(trained / "ckpt.pt")
    bench = eval_gsm8k.Bench(model, build_tokenizer(state["pieces"]), load_splits("toy", toy_sizes={"val": 12})["val"], "equations")
    for name, budget, by in (("threshold", 3, "score"), ("entropy_bound", 5, "nats"), ("learned", 2, "score")):
        knobs, caps = eval_gsm8k.ORDERS[name].sweep, (budget, budget + 1, 2 * budget)
        order, cap = eval_gsm8k.tune(bench, parse_order(name), knobs, budget, "accuracy", by)
        rows = [eval_gsm8k.evaluate(bench, replace(order, knob=knob), cap, likelihood=True) for knob in knobs for cap in caps]
        chosen, within = eval_gsm8k.evaluate(bench, order, cap, likelihood=True), [row for row in rows if row["steps_mean"] <= budget]
        assert chosen["steps_mean"] <= budget and cap in caps
        assert (chosen[by], -chosen["steps_mean"]) == max((row[by], -row["steps_mean"]) for row in within)


def test_the_table_has_every_order_that_was_asked_for(trained, tmp_path, capsys):
    eval_gsm8k.main(["--ckpt", str(trained / "ckpt.pt"), "--control", str(trained / "control.pt"), "--steps", "2,2", "--limit", "5", "--tune_items", "4",
                     "--seeds", "1", "--orders", "confidence, learned:0.5,threshold:0.5,threshold:0.9,confidence", "--json", str(tmp_path / "eval.json")])
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith(("conf", "learned", "thresh"))]
    assert sorted(name for name, _ in printed) == ["confidence", "learned:0.5", "threshold:0.5", "threshold:0.9"]
    assert ["learned:0.5", "ckpt"] in printed  # the control's gate head was never trained


def test_rules_can_run_on_the_control_alone(trained, tmp_path):
    eval_gsm8k.main(["--ckpt", str(trained / "ckpt.pt"), "--control", str(trained / "control.pt"), "--rules_on", "control", "--steps", "2", "--limit", "5",
                     "--tune_items", "4", "--seeds", "1", "--orders", "confidence,learned:0.5", "--json", str(tmp_path / "eval.json")])
    assert [(row["order"], Path(row["checkpoint"]).stem) for row in json.loads((tmp_path / "eval.json").read_text())["rows"]] == [("confidence", "control"), ("learned:0.5", "ckpt")]


def test_figures_are_drawn_from_the_json_alone(evaluated, tmp_path):
    (tmp_path / "eval.json").write_text(evaluated.read_text())
    eval_gsm8k.main(["--plot", "--json", str(tmp_path / "eval.json"), "--ckpt", "absent.pt"])
    for name in ("curve.png", "order.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 500 and np.asarray(image.convert("L")).std() > 10
        assert (evaluated.parent / name).exists()
    drawn = (tmp_path / "curve.png").read_bytes()
    eval_gsm8k.main(["--plot", "--json", f"{tmp_path / 'eval.json'},{evaluated}"])  # the same rows twice
    assert (tmp_path / "curve.png").read_bytes() == drawn


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    model, state = eval_gsm8k.load_checkpoint(trained / "ckpt.pt")
    items, enc = [*load_splits("toy", toy_sizes={"test": 7})["test"], {"question": "long " * 99, "answer": "#### 1"}], build_tokenizer(state["pieces"])
    for order in ("learned", "iid", "klass", "confidence@8+eos_last"):  # the last item does not fit: wrong, and counted
        rows = [eval_gsm8k.evaluate(eval_gsm8k.Bench(model, enc, items, "equations", n), parse_order(order), 4, seeds=(0, 1)) for n in (2, 100)]
        for row in rows:
            assert row["n"] == 8 and row["does_not_fit"] == 1
            for name in ("seconds", "answers_per_s", "tokens_per_s"):
                del row[name]
        assert rows[0] == rows[1]


def test_the_shared_first_step_changes_nothing(trained):
    model, _ = eval_gsm8k.load_checkpoint(trained / "ckpt.pt")
    prompt = torch.randint(9, (4, model.config.prompt_len))
    first = model(prompt, torch.full((4, model.config.answer_len), model.config.mask))
    a, b = (sample.generate(model, prompt, 3, "confidence", first=x) for x in (None, first))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.reveal_step, b.reveal_step)


def test_mcnemar_is_the_exact_sign_test_of_the_items_that_differ():
    a, b = np.array([True] * 9 + [False] * 3), np.array([True] * 4 + [False] * 5 + [True] + [False] * 2)
    assert eval_gsm8k.mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 2**6)  # 5 against 1
    assert eval_gsm8k.mcnemar(a, a) == 1 and eval_gsm8k.mcnemar(a, b) == eval_gsm8k.mcnemar(b, a)


@pytest.mark.parametrize("text, counts", [
    ("<<1+2=3>> <<3=5-2>> <<2*2=5>> #### 5", (2, 3)), ("<<10/3=3.33>> <<10/3=3.3>> <<10/3=3>>", (2, 3)), ("<<2=>> <<=2>> <<5>> <<>>", (0, 4)),
    ("no equation", (0, 0)), ("<<1+1=2", (0, 0)), ("<<1+1=1+1=2>>", (0, 1))])
def test_true_equations_are_counted(text, counts):
    assert eval_gsm8k.count_equations(text) == counts


@pytest.mark.parametrize("text, strict, flexible, harness, format_failure", [
    ("so #### 18", True, True, True, False), ("#### 18.00", True, True, False, False), ("#### $18", True, True, False, False),
    ("#### 18. #### 7", False, False, True, False), ("the answer is 18", False, True, False, True), ("####18", True, True, False, False),
    ("#### eighteen 18", False, True, False, True), ("", False, False, False, True), ("#### 1,8", True, True, True, False), ("#### 17", False, False, False, False)])
def test_the_ways_to_count_an_answer(text, strict, flexible, harness, format_failure):
    verdict = eval_gsm8k.judge(text, "<<9+9=18>> #### 18")
    assert [verdict[name] for name in ("accuracy", "flexible", "harness", "format_failures")] == [strict, flexible, harness, format_failure]


def test_coherent_means_right_without_a_false_equation():
    assert eval_gsm8k.judge("<<9+9=18>> #### 18", "#### 18")["coherent"]
    for broken in ("9+9=18>> <<9+9=18>> #### 18", "<<9+9=18 <<9+9=18>> #### 18", "<<9+9=18>> <<9+9=1#### 18"):
        assert not eval_gsm8k.judge(broken, "#### 18")["coherent"] and eval_gsm8k.judge(broken, "#### 18")["accuracy"]
    assert not eval_gsm8k.judge("<<9+8=18>> #### 18", "#### 18")["coherent"] and not eval_gsm8k.judge("<<9+9=18>> #### 17", "#### 18")["coherent"]


def test_token_kinds():
    items = [{"question": "q", "answer": "<<3+4=7>> <<12/2=6>> #### 13"}]
    enc = build_tokenizer(frequent_pieces(items, "equations"))
    tokens = enc.encode_ordinary(to_target(items[0]["answer"], "equations")) + [enc.n_vocab - 3, enc.n_vocab - 2]
    equation = ["operand", "operator", "operand", "structure", "result"]
    assert eval_gsm8k.token_kinds(tokens, enc) == ["structure", *equation, "structure", "operand", *equation, "structure", "final", "final", "EOS", "PAD"]


def test_runs_are_averaged_after_the_best_of_each_is_taken():
    row = lambda budget, seed, score: {"budget": budget, "train_seed": seed, "score": score, "ci95": (0, 1)}
    rows = [row(4, 0, 0.5), row(4, 0, 0.7), row(4, 1, 0.9), row(2, 0, 0.1)]
    two, four = eval_gsm8k.by_budget(rows)
    assert two == [rows[3]] and four == [rows[1], rows[2]]
    assert eval_gsm8k.mean_of(four, "score") == 0.8 and eval_gsm8k.spread_of(four) == (0.7, 0.9) and eval_gsm8k.spread_of(two) == (0, 1)


def test_wilson_interval():
    low, high = eval_gsm8k.wilson(0.29, 100)
    assert abs(low - 0.2101) < 1e-3 and abs(high - 0.3854) < 1e-3
    assert eval_gsm8k.wilson(0, 10)[0] == 0 and eval_gsm8k.wilson(1, 10)[1] == pytest.approx(1)


def test_the_order_stage_starts_with_gates_that_differ(tmp_path):
    config = train.parse_config([*TINY, "--out_dir", str(tmp_path)])
    run = train.prepare(config)
    model = train.build_stage("denoiser", run)[0]
    assert model.gate_head.weight.abs().max() == 0
    weight = train.build_stage("order", run, model)[0].gate_head.weight
    assert 0.5 < weight.std() * 16 ** 0.5 < 1.4  # logits spread by about 0.9, whatever the width


def test_the_order_stage_can_start_at_dilated(tmp_path):
    run = train.prepare(train.parse_config([*TINY, "--out_dir", str(tmp_path), "--start_gap", "2", "--T", "3"]))
    model = train.build_stage("denoiser", run)[0]
    posterior = train.build_stage("order", run, model)[1]
    dilated = generate(model, run.train.prompt[:2], 3, "dilated").reveal_step
    drawn = sample_orders(posterior(run.train.prompt[:2], run.train.x0[:2]), 1, 3, 0.1, plateau=0.99)[:, 0]
    assert (drawn == dilated).float().mean() > 0.9 and posterior.start.tolist() == (-2 * dilated[0]).tolist()


def test_gates_learn_their_places_where_asked(tmp_path):
    train.main([*TINY, "--out_dir", str(tmp_path), "--freeze_denoiser", "--place_gates"])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]["gate_head.place"].abs().min() > 0
    assert torch.load(tmp_path / "control.pt", weights_only=True)["model"]["gate_head.place"].abs().max() == 0


def test_freezing_the_denoiser_trains_gate_head_and_posterior_only(tmp_path):
    train.main([*TINY, "--out_dir", str(tmp_path), "--freeze_denoiser"])
    before, after = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("denoiser.pt", "ckpt.pt"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"gate_head.weight", "gate_head.bias"}


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_is_torchs_but_for_its_rounding(shape):
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    ends = []
    for kind in (torch.optim.Muon, train.Muon):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p, torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, weight_decay=0.0)  # the second never has a gradient
        for gradient in gradients:
            p.grad = gradient
            optimizer.step()
        ends.append(p.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()


def test_batches_by_length_hold_less_padding_and_every_row_once(trained):
    run = train.prepare(train.parse_config([*TINY, "--out_dir", str(trained)]))
    dealt = replace(run, config=replace(run.config, sort_batches=5))
    width = lambda run, step: train.batch_at(run, "order", step, 4)[0].shape[1]
    for n in (4, 7, 62, 64):  # batches of 4: one; one and a rest; 15 and a rest, in groups of 5; 16, the last group has one
        some = replace(dealt, train=replace(run.train, x0=run.train.x0[:n], prompt=run.train.prompt[:n]))
        epochs = [torch.cat([train.rows_at(some, "order", step, 4) for step in range(e * (n // 4), (e + 1) * (n // 4))]) for e in (0, 1)]
        assert all(len(set(rows.tolist())) == len(rows) == n // 4 * 4 for rows in epochs)
        assert n == 4 or not torch.equal(*epochs)
    assert sum(width(dealt, step) for step in range(48)) < sum(width(run, step) for step in range(48))
    widths = [width(dealt, step) for step in range(5)]
    assert widths != sorted(widths) and widths != sorted(widths)[::-1]


def test_gsm8k_files_from_training_to_evaluation(tmp_path, capsys):
    rows = [json.dumps({"question": f"Jo has {n} pens and buys {n} more. How many?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}) for n in range(40)]
    rows.append(json.dumps({"question": "long " * 200, "answer": "#### 1"}))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    out = str(tmp_path / "out")
    train.main([*TINY, "--preset", "gsm8k", "--data_dir", str(tmp_path), "--out_dir", out, "--target", "full", "--augment", "0"])
    eval_gsm8k.main(["--ckpt", f"{out}/ckpt.pt", "--control", "", "--steps", "4", "--json", f"{out}/eval.json"])
    row = json.loads(Path(f"{out}/eval.json").read_text())["rows"][0]
    assert row["n"] == 41 and row["does_not_fit"] == 1
    assert "1 longer than prompt_len 192" in capsys.readouterr().out


def test_augmented_batches_depend_on_the_step_alone(tmp_path):
    """Other numbers each epoch, the same whenever a step is asked for, in batches only; the original where they do not fit."""
    rows = [json.dumps({"question": f"Jo has {n} pens and buys 997 more. How many?", "answer": f"<<{n}+997={n + 997}>>\n#### {n + 997}"}) for n in range(11, 37)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    run = train.prepare(train.parse_config([*TINY, "--preset", "gsm8k", "--data_dir", str(tmp_path), "--augment", "1"]))
    steps, before, texts = range(2 * len(run.train.x0) // 4), run.train.x0.clone(), lambda x0: [decode(row.tolist(), run.enc) for row in x0]
    forwards = {step: train.batch_at(run, "order", step, 4) for step in steps}
    for step in reversed(steps):
        assert all(torch.equal(a, b) for a, b in zip(forwards[step], train.batch_at(run, "order", step, 4)))
    answers = [text for _, x0 in forwards.values() for text in texts(x0)]
    assert not any("+997" in text for text in answers) and all(eval_gsm8k.count_equations(text) == (1, 1) for text in answers)
    assert len(set(answers)) > 0.8 * len(answers)  # anew in the second epoch
    assert torch.equal(run.train.x0, before) and all("+997" in text for text in texts(run.val.x0))
    for changes, least, most in (({"augment": 0.0}, 20, 20), ({"augment": 0.5}, 1, 19), ({"answer_len": 3}, 20, 20)):
        other = replace(run, config=replace(run.config, **changes))
        assert least <= sum("+997" in text for text in texts(train.batch_at(other, "order", 0, 20)[1])) <= most


@pytest.mark.parametrize("script, arguments, message", [
    ("sample.py", ["--ckpt", "absent.pt"], "absent.pt not found: run `python train.py` first"),
    ("eval_gsm8k.py", ["--ckpt", "absent.pt"], "not found"),
    ("train.py", ["--preset", "gsm8k"], "check the network, or pass --data_dir")])
def test_bad_input_is_one_line_and_status_2(script, arguments, message):
    status, _, err = run(script, *arguments)
    assert status == 2 and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1


def test_stages_trained_one_by_one_are_those_of_a_whole_run(trained, tmp_path, capsys):
    for stages in ("denoiser", "order", "control"):
        train.main([*TINY, "--out_dir", str(tmp_path), "--stages", stages])
    for name in ("denoiser.pt", "ckpt.pt", "control.pt"):
        assert all(map(torch.equal, weights(tmp_path / name), weights(trained / name)))
    assert log(tmp_path) == log(trained)
    with pytest.raises(UserError, match="denoiser.pt has other sizes"):
        train.main([*TINY, "--out_dir", str(tmp_path), "--stages", "order", "--n_embd", "32"])


def test_changed_constants_cannot_be_resumed(trained):
    with pytest.raises(UserError, match="leave out --tau"):
        train.main(["--resume", "--out_dir", str(trained), "--tau", "0.3"])


def torchrun(script: str, *flags: str):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29500 + os.getpid() % 1000), str(ROOT / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_evaluate_as_one(trained, tmp_path):
    """The same rows in the same sequence, whichever process made them."""
    flags = ["--ckpt", str(trained / "ckpt.pt"), "--control", str(trained / "control.pt"), "--limit", "5", "--tune_items", "4", "--steps", "1,3", "--seeds", "2",
             "--orders", "learned:0.5,confidence,iid", "--likelihood"]
    eval_gsm8k.main([*flags, "--json", str(tmp_path / "one.json")])
    torchrun("eval_gsm8k.py", *flags, "--json", str(tmp_path / "two.json"))
    one, two = ([{k: v for k, v in row.items() if k not in ("seconds", "answers_per_s", "tokens_per_s")} for row in json.loads((tmp_path / name).read_text())["rows"]]
                for name in ("one.json", "two.json"))
    assert len(one) == 10 and [row.pop("nats") for row in one] == pytest.approx([row.pop("nats") for row in two], rel=1e-4)
    assert one == two


def test_two_processes_train_as_one(tmp_path):
    """torchrun with 2 gloo processes against one process that computes both parts of each batch in turn: the same
    losses, bounds and weights within float error, in all three stages."""
    flags = [*TINY, "--chunks", "2", "--eval_items", "80"]
    train.main([*flags, "--out_dir", str(tmp_path / "one")])
    torchrun("train.py", *flags, "--out_dir", str(tmp_path / "two"))
    one, two = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        assert all(b[name] == pytest.approx(a[name], rel=1e-3) for name in ("elbo", "kl", "grad", "val") if name in a)
    for name in ("denoiser.pt", "ckpt.pt", "control.pt"):
        a, b = (load_checkpoint(tmp_path / folder / name)[0].state_dict() for folder in ("one", "two"))
        assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


def test_processes_must_divide_the_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="must be a multiple of torchrun's 3"):
        train.main([*TINY, "--chunks", "2", "--out_dir", str(tmp_path)])
