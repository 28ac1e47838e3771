"""A tiny run that several test files look at, and how they start and compare such runs."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data import run_script

ROOT = Path(__file__).parent.parent
FAST = ("--preset gsm8k --prompt_len 24 --answer_len 16 --n_layer 1 --n_embd 16 --n_head 2 "
        "--n_layer_posterior 1 --n_pieces 50 --max_steps_denoiser 20 --max_steps_order 20 "
        "--batch_size 4 --batch_size_order 4 --K 2 --log_every 5 --eval_every 10 --eval_items 2 "
        "--stages denoiser,order,control --device cpu").split()


@pytest.fixture(scope="session")
def fast(tmp_path_factory):
    """Flags of a run of about a second, on 36 + 4 + 8 questions of its own."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"question": f"Jo has {n} pens, buys {n}.",
                        "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n}"}) for n in range(48)]
    (folder / "train.jsonl").write_text("\n".join(rows[:40]))
    (folder / "test.jsonl").write_text("\n".join(rows[40:]))
    return [*FAST, "--data_dir", str(folder)]


@pytest.fixture(scope="session")
def straight(fast, tmp_path_factory):
    """The folder of such a run that nothing stopped; what it printed stands in the file beside."""
    out = tmp_path_factory.mktemp("straight")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main([*fast, "--out_dir", str(out)])
    out.with_suffix(".txt").write_text(printed.getvalue())
    return out


def log(out):
    """The records of log.jsonl, without what depends on the clock."""
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in ("ktok/s", "seconds")}
            for record in records]


def assert_same_weights(a, b, close=0.0):
    """Of every stage, bit for bit or within rounding."""
    for name in train.STAGES.values():
        one, two = (torch.load(out / name, weights_only=True)["model"] for out in (a, b))
        assert one.keys() == two.keys() and one
        for key in one:
            assert torch.allclose(one[key], two[key], rtol=0, atol=close), (name, key)


def assert_same_run(a, b):
    """Weights bit for bit, and the log, in which each step of each stage stands once."""
    assert_same_weights(a, b)
    assert log(a) == log(b)
    steps = [(record["stage"], record["step"]) for record in log(a)]
    assert len(set(steps)) == len(steps)


def run(*words, stdout=subprocess.PIPE, **environment):
    """A script in a process of its own."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True, timeout=300,
                          stdout=stdout, stderr=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def outcome(script, argv, capfd):
    """Status, stdout and error of a script's main in this process, as of `python script.py`."""
    capfd.readouterr()
    try:
        run_script(lambda: script.main(argv))
        status = 0
    except SystemExit as e:  # what Python does with it: a text is printed, and the status is 1
        status = e.code if isinstance(e.code, int) else print(e.code, file=sys.stderr) or 1
    out, err = capfd.readouterr()
    return status, out, err[err.find("error: ") :] if "usage: " in err else err  # of argparse
