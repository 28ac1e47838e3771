"""A checkpoint to hand on: the denoiser alone, in float16.

    python -m tools.pack out/ckpt.pt assets/toy.pt
"""

import sys
from pathlib import Path

from data import run_script
from model import load_checkpoint, save_checkpoint


def main(argv=None):
    source, target = map(Path, argv or sys.argv[1:])
    model, state = load_checkpoint(source)
    kept = {name: state[name] for name in ("pieces", "train_config", "stage", "step", "log",
                                          "versions")}
    save_checkpoint(target, model.half(), **kept, states=[])
    print(f"{target}: {target.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    run_script(main)
