"""The scripts as a user runs them: a tiny run end to end, resuming, and what bad input says."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import eval_gsm8k
import sample
import train
from data import UserError

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
    assert [line.split()[0] for line in lines if line] == ["question", "step", "step", "step", "number"] * 2
    assert "·" in lines[1] and "·" not in lines[3] and "\033" not in lines[1]
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--steps", "L", "--num_samples", "1", "--prompt", "Max has 8 eggs <|mask|> 🙂.", "--greedy_gates"])
    assert "truth" not in capsys.readouterr().out


def test_evaluation_writes_the_table(trained, tmp_path, capsys):
    arguments = ["--ckpt", trained / "ckpt.pt", "--control", trained / "control.pt", "--steps", "1,3,L", "--limit", "5", "--json", tmp_path / "a" / "eval.json"]
    eval_gsm8k.main([*map(str, arguments)])
    result = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert result["meta"]["train_config"]["dataset"] == "toy"
    rows = result["rows"]
    assert len(rows) == 3 + 3 * 3 * 2  # the learned order on one checkpoint, three rules on two
    for row in rows:
        assert set(row) >= {"order", "checkpoint", "budget", "accuracy", "ci95", "steps_mean", "steps_min", "steps_max", "n", "format_failures", "seconds"}
        assert row["n"] == 5 and 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1
        assert row["steps_min"] <= row["steps_mean"] <= row["steps_max"] <= row["budget"]
    assert len(re.findall(r"(?m)^(?:learned|left_to_right|confidence|iid) ", capsys.readouterr().out)) == len(rows)


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    model, state = eval_gsm8k.load_checkpoint(trained / "ckpt.pt")
    items, enc = eval_gsm8k.load_splits("toy", toy_sizes={"test": 7})["test"], eval_gsm8k.build_tokenizer(state["pieces"])
    items = [*items, {"question": "long " * 99, "answer": "#### 1"}]  # does not fit: wrong, and counted
    a, b = (eval_gsm8k.evaluate(model, enc, items, "equations", 4, "learned", batch_size=n) for n in (2, 100))
    assert {**a, "seconds": 0} == {**b, "seconds": 0} and a["n"] == 8 and a["does_not_fit"] == 1


def test_wilson_interval():
    low, high = eval_gsm8k.wilson(29, 100)
    assert abs(low - 0.2101) < 1e-3 and abs(high - 0.3854) < 1e-3
    assert eval_gsm8k.wilson(0, 10)[0] == 0 and eval_gsm8k.wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize("stop_after", [3, 12, 17, 30])
def test_a_stopped_run_resumes_bit_for_bit(trained, tmp_path, monkeypatch, stop_after):
    """Ctrl-C after some step of any stage, then --resume: same weights, same log."""
    calls, clip = [0], torch.nn.utils.clip_grad_norm_

    def interrupting_clip(*args):
        calls[0] += 1
        if calls[0] == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupting_clip)
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, "--out_dir", str(tmp_path)])
    assert stopped.value.code == 130
    monkeypatch.undo()
    train.main(["--resume", "--out_dir", str(tmp_path)])
    for name in ("denoiser.pt", "ckpt.pt", "control.pt"):
        assert all(torch.equal(a, b) for a, b in zip(weights(trained / name), weights(tmp_path / name), strict=True)), name
    assert log(tmp_path) == log(trained)


def test_evaluating_and_saving_more_often_changes_nothing(trained, tmp_path):
    train.main([*TINY, "--out_dir", str(tmp_path), "--eval_every", "4", "--save_every", "1", "--log_every", "4"])
    assert all(torch.equal(a, b) for a, b in zip(weights(trained / "control.pt"), weights(tmp_path / "control.pt"), strict=True))


def test_freezing_the_denoiser_trains_gate_head_and_posterior_only(tmp_path):
    train.main([*TINY, "--out_dir", str(tmp_path), "--freeze_denoiser"])
    before, after = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("denoiser.pt", "ckpt.pt"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"gate_head.weight", "gate_head.bias"}


def test_gsm8k_files_from_training_to_evaluation(tmp_path, capsys):
    rows = [json.dumps({"question": f"Jo has {n} pens and buys {n} more. How many?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}) for n in range(40)]
    rows.append(json.dumps({"question": "long " * 200, "answer": "#### 1"}))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    out = str(tmp_path / "out")
    train.main([*TINY, "--preset", "gsm8k", "--data_dir", str(tmp_path), "--out_dir", out, "--target", "full"])
    eval_gsm8k.main(["--ckpt", f"{out}/ckpt.pt", "--control", "", "--steps", "4", "--json", f"{out}/eval.json"])
    row = json.loads(Path(f"{out}/eval.json").read_text())["rows"][0]
    assert row["n"] == 41 and row["does_not_fit"] == 1
    assert "1 longer than prompt_len 192" in capsys.readouterr().out


@pytest.mark.parametrize("script, arguments, message", [
    ("sample.py", ["--ckpt", "absent.pt"], "absent.pt not found: run `python train.py` first"),
    ("eval_gsm8k.py", ["--ckpt", "absent.pt"], "not found"),
    ("train.py", ["--resume", "--out_dir", "absent"], "not found"),
    ("train.py", ["--T", "0"], "--T must be at least 1"),
    ("train.py", ["--tau", "0"], "--tau must be above 0"),
    ("train.py", ["--K", "1"], "--K must be at least 2"),
    ("train.py", ["--preset", "big"], "choose from toy, gsm8k, gsm8k_aug"),
    ("train.py", ["--n_embd", "30"], "multiple"),
    ("train.py", ["--stepz", "3"], "unrecognized arguments"),
    ("train.py", ["--preset", "gsm8k", "--data_dir", "absent"], "no train.jsonl or train.txt"),
    ("train.py", ["--preset", "gsm8k"], "check the network, or pass --data_dir"),
    ("train.py", ["--out_dir", "/dev/null/x", "--train_items", "10"], "cannot write"),
] + ([] if torch.cuda.is_available() else [("train.py", ["--device", "cuda", "--train_items", "10"], "--device cuda: not available")]))
def test_bad_input_is_one_line_and_status_2(script, arguments, message):
    status, _, err = run(script, *arguments)
    assert status == 2 and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1


@pytest.mark.parametrize("main, arguments, message", [
    (sample, ["--steps", "0"], "steps must be"), (sample, ["--steps", "four"], "steps must be"), (sample, ["--steps", "-1"], "steps must be"),
    (sample, ["--order", "best"], "unknown order 'best': choose from learned"), (sample, ["--prompt", ""], "1 to 36 tokens"),
    (sample, ["--prompt", "   "], "1 to 36 tokens"), (sample, ["--prompt", "word " * 999], "1 to 36 tokens"), (sample, ["--num_samples", "0"], "num_samples"),
    (sample, ["--temperature", "-1"], "temperature"),
    (eval_gsm8k, ["--orders", "learned,best"], "unknown order 'best'"), (eval_gsm8k, ["--steps", "1,,2"], "steps must be"),
    (eval_gsm8k, ["--limit", "-1"], "limit"), (eval_gsm8k, ["--limit", "1", "--steps", "1", "--control", "", "--json", "/dev/null/x.json"], "cannot write")])
def test_bad_arguments(trained, main, arguments, message):
    defaults = ["--ckpt", str(trained / "ckpt.pt")] + (["--control", str(trained / "control.pt")] if main is eval_gsm8k else [])
    with pytest.raises(UserError, match=message):
        main.main([*defaults, *arguments])


def test_changed_constants_cannot_be_resumed(trained):
    with pytest.raises(UserError, match="leave out --tau"):
        train.main(["--resume", "--out_dir", str(trained), "--tau", "0.3"])


def test_the_readme_quotes_the_notation_and_lists_the_departures():
    readme, notation = (ROOT / "README.md").read_text(), (ROOT / "posterior.py").read_text()
    assert notation.split("\nNOTATION\n")[1].split("\nEND NOTATION")[0] in readme
    marks = [line for script in ROOT.glob("*.py") for line in script.read_text().splitlines() if "# DEVIATION:" in line or "# [NEW]" in line]
    listed = readme.split("## Departures")[1].split("\n## ")[0].count("\n- ")
    assert len(marks) == listed
