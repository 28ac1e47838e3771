"""A tiny run that several test files look at, and how they start and compare such runs."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from common import run_script

ROOT = Path(__file__).parent.parent
FAST = ("--preset gsm8k --prompt_len 24 --answer_len 16 --n_layer 1 --n_embd 16 --n_head 2 "
        "--n_layer_posterior 1 --n_pieces 50 --max_steps_denoiser 20 --max_steps_order 20 "
        "--batch_size 4 --batch_size_order 4 --K 2 --log_every 5 --eval_every 10 --eval_items 2 "
        "--stages denoiser,order,control --device cpu").split()
# What a shell may have set that Python, pytest's own terminal or a script would listen to.
OF_A_SHELL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "COLUMNS", "LINES",
              "MPLBACKEND", "NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING", "PYTHONUTF8",
              "PYTHONUNBUFFERED", "PYTHONWARNINGS")


def pytest_configure():
    """The tests set what they rely on, before any of them is imported."""
    for name in OF_A_SHELL:
        os.environ.pop(name, None)
    os.environ |= {"LC_ALL": "C.UTF-8", "TZ": "UTC", "TERM": "xterm"}
    if hasattr(time, "tzset"):
        time.tzset()
    # What a script starts with & ignores Ctrl-C, and so would all that is started from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fast(tmp_path_factory):
    """Flags of a run of about a second, on 36 + 4 + 8 questions of its own."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for n in range(48):
        rows.append(json.dumps({"question": f"Jo has {n} pens, buys {n}.",
                                "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n}"}))
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
    records = []
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        del record["ktok/s"], record["seconds"]
        records.append(record)
    return records


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(a, b, close=0.0):
    """Of every stage, bit for bit or within rounding."""
    for name in train.STAGES.values():
        one = weights(a / name)
        two = weights(b / name)
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
    status = 0
    try:
        run_script(lambda: script.main(argv))
    except SystemExit as e:
        status = e.code
        if not isinstance(status, int):  # what Python does with it: the text is printed
            print(status, file=sys.stderr)
            status = 1
    out, err = capfd.readouterr()
    if "usage: " in err:  # of argparse
        err = err[err.find("error: ") :]
    return status, out, err
