"""A checkpoint to hand on: the denoiser alone, without posterior and optimizers.

    python -m tools.pack out/ckpt.pt assets/toy.pt
"""

import argparse
from pathlib import Path

from data import run_script
from model import load_checkpoint, save_checkpoint


def main(argv=None):
    parser = argparse.ArgumentParser(description="The denoiser of a checkpoint, alone.")
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    args = parser.parse_args(argv)
    model, state = load_checkpoint(args.source)
    kept = {name: state[name] for name in ("pieces", "train_config", "stage", "step", "log",
                                          "versions")}
    save_checkpoint(args.target, model, **kept, states=[])
    print(f"{args.target}: {args.target.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    run_script(main)
