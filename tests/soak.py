"""Train, stop, resume and evaluate a tiny run again and again in one process. Not collected by pytest:

    python tests/soak.py --minutes 60

Each round prints the memory that the process holds (Linux), which must level off, and every round's weights must be
those of the first."""

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval_gsm8k  # noqa: E402
import train  # noqa: E402

TINY = ("--train_items 64 --n_layer 1 --n_embd 16 --n_head 2 --max_steps_denoiser 40 --max_steps_order 40 --batch_size 4 --batch_size_order 4 "
        "--K 2 --log_every 10 --eval_every 20 --save_every 10 --eval_items 8 --table_items 2 --device cpu").split()


def one_round(out: str, stop_after: float) -> list:
    """A run that gets Ctrl-C after so many seconds and goes on, its evaluation, and its weights."""
    timer = threading.Timer(stop_after, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        train.main([*TINY, "--out_dir", out])
    except (SystemExit, KeyboardInterrupt):  # the latter before the first step and in the table
        train.main(["--resume", "--out_dir", out] if Path(out, "resume.pt").exists() else [*TINY, "--out_dir", out])
    timer.cancel()
    eval_gsm8k.main(["--ckpt", f"{out}/ckpt.pt", "--control", f"{out}/control.pt", "--steps", "4", "--limit", "4", "--tune_items", "4", "--seeds", "1",
                     "--json", f"{out}/eval.json"])
    return [*torch.load(f"{out}/ckpt.pt")["model"].values(), *torch.load(f"{out}/control.pt")["model"].values()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    minutes, start, first, n = parser.parse_args().minutes, time.monotonic(), None, 0
    while n == 0 or time.monotonic() - start < 60 * minutes:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights = one_round(out, stop_after=1 + 0.37 * n % 3)
        first, n = first or weights, n + 1
        assert all(torch.equal(a, b) for a, b in zip(first, weights, strict=True)), "this round's weights differ from the first's"
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        print(f"round {n:>5}  {time.monotonic() - start:>7.0f} s  resident {resident:.0f} MB", flush=True)
