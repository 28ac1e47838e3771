"""Train everything: denoiser, generation order, control; then one table.

    python train.py                                        the toy task, minutes on 2 CPU cores
    python train.py --preset gsm8k --data_dir DIR          GSM8K's train.jsonl and test.jsonl
    python train.py --resume                               go on where a stopped run was saved
    python train.py --stages order --out_dir DIR           the order stage alone, from DIR/denoiser.pt
    python train.py --preset gsm8k_aug --dry_run           what a run would take, found in a minute or two; writes nothing
    torchrun --nproc_per_node 2 train.py --chunks 2        the same batches by two processes

Three stages, one loop:
    denoiser  stage 1: the masked-diffusion bound, positions revealed in a uniformly random order
    order     stage 2: from those weights, the learned order, Eq. 4-7 of posterior.py
    control   what a comparison needs: from the same stage-1 weights, stage 1's loss on as many more
              network states as the order stage saw
Written to --out_dir: denoiser.pt, ckpt.pt (after the order stage), control.pt, resume.pt, log.jsonl.

A batch is computed in --chunks parts, one after the other (gradient accumulation) or by as many processes
of torchrun: the result is that of --chunks, whoever computes them. Every random draw is seeded by (seed, stage,
step, part), never by what was drawn before, and so is the place in the data. So a resume point (networks, optimizers, stage, step, the counts below) needs no generator
state, resuming is bit for bit on a CPU with as many threads, and evaluating, logging or saving more often
changes nothing. Files are replaced, not overwritten: whenever a run is killed, --resume finds whole ones.

The log, and what healthy looks like (bounds and kl in nats per answer):
    val            bound on log p(x0 | c), validation items: rises, flattens; the order stage begins
                   far below where stage 1 ended, because q's gates are charged too, and climbs back
    elbo, recon, kl   the training batch's bound = recon - kl. kl falls from about ten to well below 1: p has
                   learned to predict q's order. kl near 0 at once, with q_steps near 1, is collapse;
                   q_entropy below 1 within some 200 steps, with recon low, is an order frozen too early
    q_entropy      of q's gates, nats per step; slowly falls
    q_steps        steps used under q, at most T. Falling to 1: collapse; try a smaller --tau, then a
                   longer --kl_ramp. A frozen order: a smaller --lr_scale_posterior, or a larger --tau
    p_steps        steps used by the sampler on validation items; approaches q_steps
    eos_share      share of EOS and PAD among the positions that q reveals at steps 1..T (log.jsonl)
    grad           gradient norm before clipping to 1; lr_factor: learning rates over their constants; ktok/s: thousand tokens of network input a second
    clipped        share of the steps since the last line whose gradient was clipped
    skipped        with --skip_nonfinite: updates left out in this stage because of NaN or inf; should not appear
"""

import argparse
import dataclasses
import json
import math
import os
import random
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DATASETS, TOY_SIZES, Split, UserError, augment, build_tokenizer, cli, encode_split, frequent_pieces, load_splits, replacing
from eval_gsm8k import HEADER, Bench, evaluate, format_row, score_of, versions
from model import MDM, ModelConfig, check_tensors, denoiser_elbo, load_checkpoint, pick_device, save_checkpoint, trim
from orders import bits_from_behind, parse_order
from posterior import OrderPosterior, order_objective
from sample import generate

STAGES = ("denoiser", "order", "control")


def arg(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    preset: str = arg("toy", "constants to start from: toy, toy2, gsm8k, gsm8k_gpu, gsm8k_aug")
    dataset: str = arg("toy", "toy, toy2, gsm8k or gsm8k-aug")
    data_dir: str = arg("", "folder with train.jsonl and test.jsonl; empty: the hub")
    target: str = arg("equations", "what to generate: equations or full")
    out_dir: str = arg("out", "where checkpoints and the log go")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "float32 or bfloat16 (autocast); auto: bfloat16 on CUDA")
    seed: int = arg(0, "of weights, data order and every draw")
    stages: str = arg("denoiser,order,control", "which to train; what those left out have written is taken from out_dir")
    chunks: int = arg(1, "parts of a batch: computed in turn, or by as many processes of torchrun")
    resume: bool = arg(False, "continue from out_dir/resume.pt")
    # model
    prompt_len: int = arg(36, "longest prompt, tokens")
    answer_len: int = arg(60, "L, the answer canvas, tokens")
    n_layer: int = arg(2, "blocks of the denoiser")
    n_head: int = arg(4, "attention heads")
    n_embd: int = arg(128, "width")
    n_pieces: int = arg(2048, "most frequent text pieces in the tokenizer")
    train_items: int = arg(50_000, "size of the toy's training pool")
    augment: float = arg(0.0, "GSM8K: share of the training items that get other numbers, where they can, anew each epoch")
    sort_batches: int = arg(1, "batches among which the rows are dealt by prompt length, so that less is padding; 1: at random")
    # stage 1
    max_steps_denoiser: int = arg(2400, "optimizer steps of stage 1")
    batch_size: int = arg(32, "examples per step of stage 1")
    lr_matrix: float = arg(0.02, "Muon, for the matrices of the blocks")
    lr_other: float = arg(3e-3, "AdamW, for everything else")
    # stage 2 and control
    max_steps_order: int = arg(1400, "optimizer steps of the order stage, and of the control")
    batch_size_order: int = arg(16, "examples per step of the order stage")
    K: int = arg(3, "orders per example, which then takes 1 + K network states; the control's batch is as many rows")
    T: int = arg(4, "step budget that the order is learned for")
    tau: float = arg(0.1, "temperature of Eq. 3 at the start of the order stage")
    tau_end: float = arg(0.03, "and at its end")
    plateau: float = arg(0.0, "0 to 0.9999: how flat q's gates are near the best one; 0: Eq. 3 itself")
    start_gap: float = arg(0.0, "scores of `dilated`'s groups of places, with which q begins, lie this far apart; 0: q begins with noise")
    place_gates: bool = arg(False, "the gate head has a learned bias for each place, which hidden states need not tell")
    token_baseline: float = arg(0.0, "share of a token's nats at the all-MASK state that no step of the order is charged for")
    kl_ramp: float = arg(0.1, "share of the order stage in which the KL weight grows from 0.1 to 1")
    lr_scale_order: float = arg(1.0, "denoiser's learning rates after stage 1, over stage 1's")
    lr_scale_gates: float = arg(1.0, "gate head's learning rate, over stage 1's")
    lr_scale_posterior: float = arg(0.15, "posterior's learning rates, over stage 1's")
    n_layer_posterior: int = arg(2, "blocks of the posterior network")
    freeze_denoiser: bool = arg(False, "order stage: train gate head and posterior only")
    # all stages
    cooldown: float = arg(0.6, "last share of each stage in which the learning rates fall to 0")
    log_every: int = arg(100, "steps between log lines")
    eval_every: int = arg(500, "steps between validation bounds")
    save_every: int = arg(500, "steps between resume points")
    save_minutes: float = arg(1.0, "minutes between resume points, where that is sooner")
    skip_nonfinite: bool = arg(False, "leave out an update with NaN or inf and count it, instead of stopping")
    eval_items: int = arg(256, "validation items for the bounds in the log")
    table_items: int = arg(128, "validation items for the final table")

    def __post_init__(self):
        for f in dataclasses.fields(self):  # a resume point may say anything
            if not isinstance(getattr(self, f.name), (float, int) if f.type is float else f.type):
                raise UserError(f"--{f.name} {getattr(self, f.name)!r} is not of type {f.type.__name__}")
        choices = {"preset": PRESETS, "dataset": DATASETS, "target": ("equations", "full"),
                   "dtype": ("auto", "float32", "bfloat16"), "device": ("auto", "cpu", "cuda", "mps")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)}: choose from {', '.join(allowed)}")
        if self.stages.split(",") != [stage for stage in STAGES if stage in self.stages.split(",")]:
            raise UserError(f"--stages {self.stages}: want some of {','.join(STAGES)}, in this order")
        minimum = dict.fromkeys(("prompt_len", "answer_len", "n_layer", "n_head", "n_embd", "train_items", "batch_size", "T",
                                 "batch_size_order", "n_layer_posterior", "chunks", "sort_batches", "log_every", "eval_every", "save_every", "eval_items", "table_items"), 1)
        most = {"n_layer": 1000, "n_layer_posterior": 1000, "K": 1000, "T": 10_000, "n_embd": 10**5, "prompt_len": 10**5, "answer_len": 10**5,
                "train_items": 10**7, "n_pieces": 10**6, "chunks": min(self.batch_size, self.batch_size_order)}
        for name, least in {**minimum, "K": 2, "max_steps_denoiser": 0, "max_steps_order": 0, "n_pieces": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}")
            if getattr(self, name) > most.get(name, 10**9):
                raise UserError(f"--{name} must be at most {most.get(name, 10**9)}, got {getattr(self, name)}")
        for name in ("tau", "tau_end", "lr_matrix", "lr_other", "lr_scale_order", "lr_scale_gates", "lr_scale_posterior", "cooldown", "save_minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.kl_ramp <= 1 or self.cooldown > 1:
            raise UserError(f"--kl_ramp and --cooldown are shares of a stage, at most 1, got {self.kl_ramp} and {self.cooldown}")
        if not 0 <= self.plateau <= 0.9999 or not 0 <= self.start_gap < math.inf or not 0 <= self.token_baseline < math.inf:
            raise UserError(f"need --plateau from 0 to 0.9999, --start_gap and --token_baseline of at least 0, got {self.plateau}, {self.start_gap} and {self.token_baseline}")
        if not 0 <= self.augment <= 1:
            raise UserError(f"--augment must be from 0 to 1, got {self.augment}")
        if self.augment and (self.dataset.startswith("toy") or self.target == "full"):
            raise UserError(f"--augment {self.augment} makes equations of GSM8K: pass --augment 0 with a toy and with --target full")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"--n_embd {self.n_embd} must be a multiple of 2 * --n_head ({2 * self.n_head})")


PRESETS = {
    "toy": {},
    "toy2": dict(dataset="toy2"),  # stories told forwards or backwards: no fixed direction is right
    # 1.7M parameters: an hour and a half on one of two CPU cores. q begins as a rule by place (README, GSM8K).
    "gsm8k": dict(dataset="gsm8k", prompt_len=192, answer_len=64, n_layer=4, n_pieces=3072, batch_size=16, sort_batches=8, augment=0.5,
                  max_steps_denoiser=7000, max_steps_order=1200, batch_size_order=8, tau_end=0.1, kl_ramp=0.2, lr_scale_order=0.5,
                  lr_scale_posterior=0.01, lr_scale_gates=5.0, plateau=0.99, start_gap=1.0, place_gates=True, token_baseline=0.55,
                  log_every=50, eval_every=250, eval_items=128),
    # 16M parameters, for minutes of a GPU.
    "gsm8k_gpu": dict(dataset="gsm8k", prompt_len=192, answer_len=96, n_layer=8, n_head=6, n_embd=384, n_pieces=3072, batch_size=128,
                      sort_batches=8, augment=0.5, max_steps_denoiser=6000, max_steps_order=3000, batch_size_order=32, tau_end=0.1, kl_ramp=0.2,
                      lr_matrix=0.01, lr_other=1e-3, lr_scale_order=0.5, lr_scale_posterior=0.01, lr_scale_gates=5.0, plateau=0.99, start_gap=1.0,
                      place_gates=True, token_baseline=0.55),
    # The paper's recipe and its size (it says 170M; this is 131M, and 30M for the posterior), from random weights.
    # Its optimizer settings are unknown to us.
    "gsm8k_aug": dict(dataset="gsm8k-aug", prompt_len=256, answer_len=128, n_layer=18, n_head=12, n_embd=768, batch_size=256,
                      max_steps_denoiser=45_000, max_steps_order=15_000, batch_size_order=32, K=8, T=5, lr_matrix=0.005,
                      lr_other=5e-4, n_layer_posterior=4, eval_every=2500, save_every=1000, save_minutes=10),
}


def parse_config(argv=None) -> Config:
    """Every field of Config is a flag. Where none is given the preset's constant stands, or, with
    --resume, what the stopped run was started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} ({f.default})", **kind)
    given = vars(parser.parse_args(argv))
    base = PRESETS.get(given.get("preset", "toy"), {})
    if given.get("resume"):
        path = Path(given.get("out_dir", "out")) / "resume.pt"
        state = load_checkpoint(path)[1]
        base = state["train_config"]
        if set(base) != {f.name for f in dataclasses.fields(Config)}:
            raise UserError(f"{path} was written by other code (commit {state['versions'].get('commit')}): go on with that, or start anew without --resume")
        free = {"resume", "out_dir", "data_dir", "device", "log_every", "eval_every", "save_every", "save_minutes", "skip_nonfinite"}
        changed = [name for name in given if name not in free and given[name] != base[name]]
        if changed:
            raise UserError(f"--resume continues the same run: leave out --{', --'.join(changed)}, or start anew without --resume")
    return Config(**{**base, **given})


# --- seeds, optimizers --------------------------------------------------------------------------------

def seed_of(*parts) -> int:
    return zlib.crc32("-".join(map(str, parts)).encode())


@lru_cache(maxsize=2)
def permutation(n: int, seed: int):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class Muon(torch.optim.Muon):
    """Muon (Jordan 2024). The step is torch's, without weight decay, but off CUDA in float32: torch's bfloat16 takes a CPU that
    has no instructions for it several times as long as the rest of a training step."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        a, b, c = group["ns_coefficients"]
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum, tall = self.state[p]["momentum_buffer"], p.shape[0] > p.shape[1]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            x = p.grad.lerp(momentum, group["momentum"])
            x = (x.T if tall else x).to(torch.bfloat16 if p.is_cuda else torch.float32)
            x = x / x.norm().clamp(min=group["eps"])
            for _ in range(group["ns_steps"]):  # Newton-Schulz: the singular values of x go to about 1
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            p.add_(x.T if tall else x, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimizers(modules: list[torch.nn.Module], config: Config, scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    # DEVIATION: Muon; the paper's optimizer is not known to us.
    matrices = [p for name, p in named if "blocks." in name and p.ndim == 2]
    others = [p for name, p in named if not ("blocks." in name and p.ndim == 2)]
    adamw = [torch.optim.AdamW(others, lr=config.lr_other * scale, betas=(0.9, 0.98), weight_decay=0.0)] if others else []
    return adamw + ([Muon(matrices, lr=config.lr_matrix * scale, weight_decay=0.0)] if matrices else [])


def lr_factor(step: int, steps: int, cooldown: float) -> float:
    """20 steps of warm-up, constant, then linear to 0 over the last share `cooldown` of the stage."""
    return min(1.0, (step + 1) / 20, (1 - step / steps) / cooldown)


# --- the run -------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What the three stages share."""
    config: Config
    device: torch.device
    items: dict      # lists of {"question", "answer"}; those of "train" are the rows of `train`
    pieces: list     # what the tokenizer is built from
    enc: tiktoken.Encoding  # the tokenizer
    train: Split
    val: Split
    data: int        # checksum of train: a resumed run must see the same rows
    rank: int = 0    # which of the processes that torchrun started is this,
    world: int = 1   # and how many are they
    stop: bool = False                                         # set by Ctrl-C: finish the step, save, leave
    saved: str = "none yet"                                    # the last resume point, for messages
    saved_at: float = field(default_factory=time.monotonic)    # seconds

    @property
    def autocast(self) -> bool:
        return self.config.dtype == "bfloat16" or (self.config.dtype == "auto" and self.device.type == "cuda")

    def path(self, name: str) -> Path:
        return Path(self.config.out_dir) / name

    def log(self, record: dict):
        """One JSON line to log.jsonl, one line of columns to the screen."""
        if self.rank > 0:
            return
        try:
            with open(self.path("log.jsonl"), "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.path('log.jsonl')}: {e}; last resume point: {self.saved}") from e
        columns = [f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float)]
        tqdm.write(f"{record['stage']:<9}{record['step']:>7}  " + "  ".join(columns))


def prepare(config: Config) -> Run:
    device = pick_device(config.device)
    items = load_splits(config.dataset, config.data_dir or None, config.seed, {"train": config.train_items, "val": TOY_SIZES["val"]})
    pieces = frequent_pieces(items["train"], config.target, config.n_pieces)
    enc = build_tokenizer(pieces)
    splits = {name: encode_split(items[name], enc, config.prompt_len, config.answer_len, config.target) for name in items}
    for name, split in splits.items():
        print(f"{name}: {len(split.fits)} items, {split.fits.count(False)} longer than prompt_len {config.prompt_len} or answer_len {config.answer_len}")
        if not any(split.fits):
            raise UserError(f"no item of {name} fits: raise --prompt_len and --answer_len")
    items["train"] = [item for item, fits in zip(items["train"], splits["train"].fits) if fits]
    data = zlib.crc32(splits["train"].x0.numpy(), zlib.crc32(splits["train"].prompt.numpy()))
    return Run(config, device, items, pieces, enc, splits["train"], splits["val"], data,
               int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def rows_at(run: Run, stage: str, step: int, size: int):
    """Which training rows make this step's batch: a fresh permutation each epoch, found from the step number alone. With
    --sort_batches N the rows of N batches are dealt to them by prompt length, and less of what is computed is padding."""
    n, N = len(run.train.x0), run.config.sort_batches
    epoch, i = divmod(step, max(n // size, 1))
    seed = seed_of(run.config.seed, stage, "epoch", epoch)
    rows, first = permutation(n, seed), i // N * N
    if N == 1:
        return rows[i * size : (i + 1) * size]
    rows = rows[first * size : max(min(first + N, n // size), 1) * size]
    batches = rows[(run.train.prompt[rows] != run.enc.n_vocab - 2).sum(-1).argsort(stable=True)].split(size)
    return batches[permutation(len(batches), seed + first)[i - first]]


def batch_at(run: Run, stage: str, step: int, size: int):
    """The batch of this step, (size, P) and (size, L), some items with other numbers. All is found from the step number alone."""
    config = run.config
    rows = rows_at(run, stage, step, size)
    prompt, x0 = run.train.prompt[rows], run.train.x0[rows]  # copies
    for k, row in enumerate(rows.tolist()):
        rng = random.Random(seed_of(config.seed, stage, "augment", step, row))
        other = augment(run.items["train"][row], rng) if rng.random() < config.augment else None
        if other:
            new = encode_split([other], run.enc, config.prompt_len, config.answer_len, config.target)
            if new.fits[0]:
                prompt[k], x0[k] = new.prompt[0], new.x0[0]
    return trim(prompt, run.enc.n_vocab - 2).to(run.device), x0.to(run.device)


def readable(logs: dict, eos: int) -> dict:
    """Logged tensors as numbers. The orders of the answers "x0" become the share of EOS and PAD among the positions that
    q reveals at each step it uses."""
    record = {name: value.item() for name, value in logs.items() if value.ndim == 0}
    if "reveal_step" in logs:
        steps, filler = logs["reveal_step"], (logs["x0"] >= eos)[:, None].expand_as(logs["reveal_step"])
        record["eos_share"] = [round(filler[steps == t].float().mean().item(), 3) for t in range(1, int(steps.max()) + 1)]
    return record


def stage_objective(stage: str, run: Run, model: MDM, posterior: OrderPosterior | None, prompt, x0, progress: float, generator):
    """What a stage maximises, and its logs. The value is a bound on log p(x0 | c); in the order stage plus
    the surrogate of Eq. 7, and with the KL weighted while it ramps up (the logged elbo never is)."""
    config = run.config
    if stage != "order":
        elbo = denoiser_elbo(model, prompt, x0, generator).mean()
        return elbo, {"elbo": elbo.detach()}
    # [NEW] the KL weight grows over the first kl_ramp of the stage: q looks around before it has to be predictable.
    kl_weight = min(1.0, 0.1 + 0.9 * progress / config.kl_ramp) if config.kl_ramp > 0 else 1.0
    # [NEW] tau falls: at first many orders are tried, in the end nearly one. While gates are soft, chance leaves some of step
    # t's positions to step t+1, among those that were meant to wait for them.
    tau = config.tau * (config.tau_end / config.tau) ** progress
    objective, logs = order_objective(model, posterior, prompt, x0, T=config.T, K=config.K, tau=tau,
                                      kl_weight=kl_weight, plateau=config.plateau, token_baseline=config.token_baseline, generator=generator)
    return objective, logs


class Objective(torch.nn.Module):
    """stage_objective as a module, so that DistributedDataParallel averages its gradients over the processes."""

    def __init__(self, stage: str, run: Run, model: MDM, posterior: OrderPosterior | None):
        super().__init__()
        self.stage, self.run, self.model, self.posterior = stage, run, model, posterior

    def forward(self, *batch):
        return stage_objective(self.stage, self.run, self.model, self.posterior, *batch)


def mean_over_parts(parts: list[dict], run: Run) -> dict:
    """Means of the scalars in the logs of a batch's parts, over all processes; of what is no scalar, the last."""
    names = [name for name, value in parts[0].items() if value.ndim == 0]
    means = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).mean(0)
    if run.world > 1:
        dist.all_reduce(means)
    return {**parts[-1], **dict(zip(names, means / run.world))}


@torch.no_grad()
def validate(stage: str, run: Run, model: MDM, posterior: OrderPosterior | None, progress: float) -> dict:
    """The stage's bound on the same validation items with the same draws each time, at the present tau."""
    n, bound = min(run.config.eval_items, len(run.val.x0)), torch.zeros((), device=run.device)
    for i in range(64 * run.rank, n, 64 * run.world):
        generator = torch.Generator(run.device).manual_seed(seed_of(run.config.seed, "validate", i))
        prompt, x0 = run.val.prompt[i : min(i + 64, n)].to(run.device), run.val.x0[i : min(i + 64, n)].to(run.device)
        _, logs = stage_objective(stage, run, model, posterior, trim(prompt, model.config.pad), x0, progress, generator)
        bound += logs["elbo"] * len(x0) / n
    if run.world > 1:
        dist.all_reduce(bound)
    if stage != "order":
        return {"val": bound.item()}
    steps = generate(model, run.val.prompt[: min(64, n)].to(run.device), run.config.T).steps
    return {"val": bound.item(), "p_steps": steps.float().mean().item()}


def size_of(stage: str, config: Config) -> tuple[int, int]:
    """Optimizer steps of a stage, and examples per step."""
    if stage == "denoiser":
        return config.max_steps_denoiser, config.batch_size
    return config.max_steps_order, config.batch_size_order * (1 if stage == "order" else 1 + config.K)


def build_stage(stage: str, run: Run, model: MDM | None = None) -> tuple[MDM, OrderPosterior | None, list[torch.optim.Optimizer]]:
    """The networks that a stage trains, as they are before its first step, and their optimizers. `model`: what stage 1
    has left, where it is at hand; otherwise denoiser.pt."""
    config = run.config
    sizes = ModelConfig(256 + len(run.pieces) + 2, config.prompt_len, config.answer_len, config.n_layer, config.n_head, config.n_embd)
    torch.manual_seed(seed_of(config.seed, stage, "weights"))
    if stage == "denoiser":
        model = MDM(sizes).to(run.device)
        return model, None, make_optimizers([model], config)
    if model is None:
        model, state = load_checkpoint(run.path("denoiser.pt"), run.device)
        if (model.config, state["pieces"]) != (sizes, run.pieces):
            raise UserError(f"{run.path('denoiser.pt')} has other sizes or another tokenizer: pass the flags that it was trained with, or train it too")
    if stage == "control":
        return model, None, make_optimizers([model], config, config.lr_scale_order)
    start = None
    if config.start_gap:  # [NEW] q begins as `dilated`, up to rounding: after step t, (t / T)^2 of the places. No network runs: a dry run has none
        rank = bits_from_behind(config.answer_len).argsort().argsort() + 1
        start = -config.start_gap * torch.ceil(config.T * (rank / config.answer_len) ** 0.5)
    posterior = OrderPosterior(dataclasses.replace(model.config, n_layer=config.n_layer_posterior), start).to(run.device)
    # [NEW] Gates that differ at random from place to place, their logits spread by 0.9: a rule for q to lean to (posterior.py, "Ties").
    torch.nn.init.normal_(model.gate_head.weight, std=0.08 * (128 / config.n_embd) ** 0.5)
    for name, p in model.named_parameters():
        p.requires_grad = config.place_gates if name == "gate_head.place" else name.startswith("gate_head") or not config.freeze_denoiser
    return model, posterior, make_optimizers([model.trunk, model.token_head], config, config.lr_scale_order) + \
        make_optimizers([model.gate_head], config, config.lr_scale_gates) + make_optimizers([posterior], config, config.lr_scale_posterior)


# --- numbers that go wrong, and resume points ------------------------------------------------------------

COUNTS = {"steps": 0, "clipped": 0,  # since the last log line
          "skipped": 0,              # in this stage
          "collapsed": 0}            # steps in a row in which q used hardly more than one step; stays once it is COLLAPSE
COLLAPSE = 200


def fit_to_apply(stage: str, run: Run, step: int, batch_size: int, counts: dict, objective, grad, logs: dict) -> bool:
    """Is this step's update finite? If not, raises UserError, or says False with --skip_nonfinite. Keeps the
    counts, and warns once when the order collapses. One transfer from the device."""
    objective, grad, q_steps = torch.stack([objective.detach(), grad, logs.get("q_steps", grad)]).tolist()
    finite = math.isfinite(objective) and math.isfinite(grad)
    if not finite and not run.config.skip_nonfinite:
        rows = rows_at(run, stage, step, batch_size).tolist()
        raise UserError(f"stage {stage}, step {step + 1}: objective {objective:g}, gradient norm {grad:g}, training rows {rows}; last resume "
                        f"point: {run.saved}; start anew with smaller --lr_matrix and --lr_other, or --resume --skip_nonfinite")
    counts["steps"] += 1
    counts["clipped"] += finite and grad > 1
    counts["skipped"] += not finite
    if stage == "order" and run.config.T > 1 and counts["collapsed"] < COLLAPSE:
        counts["collapsed"] = counts["collapsed"] + 1 if q_steps < 1.05 else 0
        if counts["collapsed"] == COLLAPSE:
            tqdm.write(f"warning: q reveals everything in one step for {COLLAPSE} steps now: the order has collapsed; "
                       "start anew with a smaller --tau, then a longer --kl_ramp")
    return finite


def report(counts: dict) -> dict:
    """The counts as the log has them; the next line's begin anew."""
    record = {"clipped": counts["clipped"] / counts["steps"], **({"skipped": float(counts["skipped"])} if counts["skipped"] else {})}
    counts["steps"] = counts["clipped"] = 0
    return record


def restore(resume: dict, run: Run, steps: int, modules: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]) -> dict:
    """Put a resume point into a stage's networks and optimizers: its counts. The file is not trusted; the
    optimizers' constants come from the Config. Raises UserError where something does not fit."""
    try:
        if resume["step"] > steps or resume["counts"].keys() != COUNTS.keys() or \
                not all(type(n) is int and n >= 0 for n in resume["counts"].values()):
            raise ValueError("step or counts")
        for module, state in zip(modules, [resume["model"], *resume["posterior"]], strict=True):
            check_tensors(state, module.state_dict())
            module.load_state_dict(state)
        for optimizer, state in zip(optimizers, resume["optimizers"], strict=True):
            for i, tensors in state.items():  # of the i-th parameter, if it ever had a gradient
                p = optimizer.param_groups[0]["params"][i]
                check_tensors(tensors, {"momentum_buffer": p} if isinstance(optimizer, Muon) else
                              {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p})
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise UserError(f"{run.path('resume.pt')} does not fit its own constants ({e}): start anew without --resume") from e
    run.saved = f"{run.path('resume.pt')} (stage {resume['stage']}, step {resume['step']})"
    return resume["counts"]


# --- the stages --------------------------------------------------------------------------------------------

def backward(stage: str, run: Run, objective_of, step: int, steps: int, prompt, x0) -> dict:
    """Gradients of a batch, part by part; its logs."""
    config, mine, parts = run.config, range(run.rank, run.config.chunks, run.world), []
    for i in mine:
        generator = torch.Generator(run.device).manual_seed(seed_of(config.seed, stage, step * config.chunks + i))
        part = prompt.tensor_split(config.chunks)[i], x0.tensor_split(config.chunks)[i]
        with objective_of.no_sync() if run.world > 1 and i < mine[-1] else nullcontext():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.autocast):
                objective, logs = objective_of(*part, step / steps, generator)
            loss = -objective / config.answer_len  # per token: the size of a cross-entropy
            (loss / len(mine)).backward()
        parts.append({**logs, "x0": part[1], "objective": objective.detach(), "stop": torch.tensor(float(run.stop), device=run.device)})
    return mean_over_parts(parts, run)


def train_stage(stage: str, run: Run, resume: dict | None):
    """Train one stage to its end, from its start or from a resume point, and write its checkpoint."""
    config, device, (steps, batch_size) = run.config, run.device, size_of(stage, run.config)
    model, posterior, optimizers = build_stage(stage, run)
    modules = [model, posterior] if posterior else [model]
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    objective_of = Objective(stage, run, model, posterior)
    if run.world > 1:
        objective_of = DistributedDataParallel(objective_of, find_unused_parameters=True)  # stage 1 has no use for the gates
    base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    counts = restore(resume, run, steps, modules, optimizers) if resume else dict(COUNTS)

    def save(name: str, step: int, with_optimizers: bool = False):
        if run.rank > 0:
            return
        if not all(p.isfinite().all() for p in params):
            raise UserError(f"stage {stage}, step {step}: NaN or inf in the weights, not saved; last resume point: {run.saved}")
        save_checkpoint(run.path(name), model, run.pieces, train_config=asdict(config), versions=versions(), data=run.data,
                        stage=stage, step=step, counts=counts, posterior=[posterior.state_dict()] if posterior else [],
                        optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers] if with_optimizers else [])
        if with_optimizers:
            run.saved, run.saved_at = f"{run.path(name)} (stage {stage}, step {step})", time.monotonic()

    start, tokens, since = resume["step"] if resume else 0, 0, time.perf_counter()
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=stage, disable=run.rank > 0 or None):
        factor = lr_factor(step, steps, config.cooldown)
        for optimizer, lr in zip(optimizers, base_lrs):
            optimizer.param_groups[0]["lr"] = lr * factor
        prompt, x0 = batch_at(run, stage, step, batch_size)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        logs = backward(stage, run, objective_of, step, steps, prompt, x0)
        objective, stop = logs.pop("objective"), logs.pop("stop")
        grad = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if fit_to_apply(stage, run, step, batch_size, counts, objective, grad, logs):
            for optimizer in optimizers:
                optimizer.step()

        done, tokens = step + 1, tokens + len(x0) * (prompt.shape[1] + x0.shape[1] * (1 + config.K if posterior else 1))
        if done % config.log_every == 0 or done == steps:
            speed = {"grad": grad.item(), **report(counts), "lr_factor": factor, "ktok/s": tokens / (time.perf_counter() - since) / 1e3}
            evaluated = validate(stage, run, model, posterior, done / steps) if done % config.eval_every == 0 or done == steps else {}
            run.log({"stage": stage, "step": done, **readable(logs, model.config.eos), **speed, **evaluated})
            tokens, since = 0, time.perf_counter()
        due = done % config.save_every == 0 or time.monotonic() - run.saved_at > 60 * config.save_minutes
        if due or done == steps or stop:
            save("resume.pt", done, with_optimizers=True)
        if stop:
            print(f"stopped after step {done} of stage {stage}; go on with: python train.py --resume --out_dir {config.out_dir}")
            sys.exit(130)
    save({"denoiser": "denoiser.pt", "order": "ckpt.pt", "control": "control.pt"}[stage], steps)
    if run.world > 1:
        dist.barrier()  # the next stage starts from that file


def summary(run: Run):
    """Scores on validation items: the learned order on its checkpoint, the rules on the control."""
    items = run.items["val"][: run.config.table_items]
    benches = {name: Bench(load_checkpoint(run.path(name), run.device)[0], run.enc, items, run.config.target)
               for name in ("ckpt.pt", "control.pt") if os.path.isfile(run.path(name))}
    print(f"\n{len(items)} validation items; the learned order runs on ckpt.pt, the rules on control.pt\n{HEADER}")
    for name in ("learned", "learned:0.5", "learned:0.5:1+finish", "left_to_right", "confidence", "iid", "entropy_bound:0.1"):
        checkpoint = "ckpt.pt" if name.startswith("learned") else "control.pt"
        for budget in (1, 2, 3, 4, 8) if checkpoint in benches else ():
            row = evaluate(benches[checkpoint], parse_order(name), budget, metric=score_of(run.config.dataset))
            print(format_row({"checkpoint": checkpoint, "budget": budget, **row}), flush=True)


def before(line: str, stage: str, step: int) -> bool:
    """Was this line of the log written by then? No, if a kill left only half of it."""
    try:
        record = json.loads(line)
        return (STAGES.index(record["stage"]), record["step"]) <= (STAGES.index(stage), step)
    except (ValueError, KeyError, TypeError):
        return False


def start_log(run: Run, resume: dict | None):
    """The old log up to the resume point, or to the first stage that is trained: what came after it will be written again."""
    path, old, lines = run.path("log.jsonl"), run.path("resume.pt"), []
    begin = (resume["stage"], resume["step"]) if resume else (run.config.stages.split(",")[0], 0)
    try:
        if os.path.isfile(path):
            lines = [line for line in path.read_text(errors="replace").split("\n") if before(line, *begin)]
        if not resume and os.path.isfile(old):  # a later --resume must not take it for this run's
            old.replace(run.path("resume.old.pt"))
            print("the resume point of an earlier run is now resume.old.pt")
    except OSError as e:
        raise UserError(f"cannot write to --out_dir {run.config.out_dir}: {e}") from e
    with replacing(path) as file:
        file.write("".join(line + "\n" for line in lines))


def main(argv=None):
    switch = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    switch.add_argument("--dry_run", action="store_true")  # no field of Config, which checkpoints hold
    args, flags = switch.parse_known_args(argv)
    config, start = parse_config(flags), time.perf_counter()
    if args.dry_run:
        from bench import dry_run  # which imports this file
        return dry_run(config)
    run, resume = prepare(config), None
    if run.world > 1:
        if config.chunks % run.world:
            raise UserError(f"--chunks {config.chunks} must be a multiple of torchrun's {run.world} processes")
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    if config.resume:
        resume = load_checkpoint(run.path("resume.pt"))[1]  # on the CPU: optimizers count their steps there
        if resume["stage"] not in STAGES or (resume["pieces"], resume["data"]) != (run.pieces, run.data):
            raise UserError(f"{run.path('resume.pt')} was trained on other data: bring back what --data_dir held, or start anew without --resume")
    if run.rank == 0:
        start_log(run, resume)
    signal.signal(signal.SIGINT, lambda *_: setattr(run, "stop", True))
    try:
        for stage in config.stages.split(","):
            if not resume or STAGES.index(stage) >= STAGES.index(resume["stage"]):
                train_stage(stage, run, resume if resume and resume["stage"] == stage else None)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if run.world > 1:
            dist.destroy_process_group()
    if run.rank > 0:
        return
    summary(run)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes on {run.device}; next: python sample.py --steps {config.T} --ckpt {run.path('ckpt.pt')}")


if __name__ == "__main__":
    cli(main)
