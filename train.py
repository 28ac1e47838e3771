"""Train a denoiser, then its generation order; then one table.

    python train.py                                    the toy task, 15 to 30 minutes of a CPU core
    python train.py --preset gsm8k --data_dir DIR      GSM8K's train.jsonl and test.jsonl
    python train.py --resume                           go on where a stopped run was saved
    python train.py --stages order                     the order stage alone, from out/denoiser.pt
    python train.py --stages control                   the rules' denoiser of a fair comparison
    torchrun --nproc_per_node 2 train.py --chunks 2    the same batches by two processes

Stages, one loop:
    denoiser  stage 1: the masked-diffusion bound, positions revealed in a random order
    order     stage 2: from those weights, the learned order, Eq. 1-7 (posterior.py)
    control   what a comparison needs, not trained unless asked for: from stage 1's weights,
              stage 1's loss on as many more network states as the order stage saw
Written to --out_dir: denoiser.pt, ckpt.pt (order), control.pt, log.jsonl; resume.pt as long as the
run is not finished.

The order stage takes the step budget T from --budgets, the next one for each batch. So one model
learns to write in few steps and in many. Its gates are told how many steps are left.

A batch is computed in --chunks parts, in turn or by that many processes. Every draw is seeded by
(seed, stage, step, part), and so is the place in the data. So a resume point needs no generator
state, resuming is bit for bit on a CPU with as many threads, and logging or validating more often
changes nothing.
README.md says what the log's columns are, and what healthy looks like.
"""

import argparse
import json
import shlex
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import (UserError, load_state, path_of, pick_device, process_rank, read_json_lines,
                    run_script, say, write_atomically)
from data import DATASETS, TOY_SIZES, build_tokenizer, encode, frequent_pieces, load_splits
from eval_gsm8k import closing_table
from model import MDM, ModelConfig, denoiser_elbo, load_checkpoint, save_checkpoint, trim
from optim import make_optimizers, set_rates
from posterior import OrderPosterior, draw_orders_and_steps, objective

STAGES = {"denoiser": "denoiser.pt", "order": "ckpt.pt", "control": "control.pt"}
REPORTED = (2, 4, 8)  # step budgets that validation reports the bound of
PATIENCE = timedelta(seconds=60)  # how long a process waits for the others


def arg(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    preset: str = arg("toy", "constants to start from: toy, toy2, gsm8k, gsm8k_aug")
    dataset: str = arg("toy", f"one of {', '.join(DATASETS)}")
    data_dir: str = arg("", "folder with train.jsonl and test.jsonl; empty: GSM8K from the hub")
    out_dir: str = arg("out", "where checkpoints and the log go")
    device: str = arg("auto", "auto (CUDA or CPU), cpu, cuda or mps")
    dtype: str = arg("auto", "float32 or bfloat16 (autocast); auto: bfloat16 on CUDA")
    seed: int = arg(0, "of weights, data order and every draw")
    stages: str = arg("denoiser,order", "which to train, of denoiser, order and control")
    chunks: int = arg(1, "parts of a batch: in turn, or by as many processes of torchrun")
    resume: bool = arg(False, "continue from out_dir/resume.pt")
    init: str = arg("", "checkpoint of equal sizes to start from; its tokenizer is taken as well")
    # model
    prompt_len: int = arg(36, "longest prompt, tokens")
    answer_len: int = arg(60, "L, the answer canvas, tokens")
    n_layer: int = arg(2, "blocks of the denoiser")
    n_layer_posterior: int = arg(2, "blocks of the posterior")
    n_head: int = arg(4, "attention heads")
    n_embd: int = arg(128, "width")
    n_pieces: int = arg(2048, "most frequent text pieces in the tokenizer")
    train_items: int = arg(50_000, "size of the toy's training pool")
    # stage 1
    max_steps_denoiser: int = arg(2000, "optimizer steps of stage 1")
    batch_size: int = arg(32, "examples per step of stage 1")
    lr_matrix: float = arg(0.01, "Muon, for the matrices of the blocks")
    lr_other: float = arg(3e-3, "AdamW, for everything else")
    # stage 2 and control
    max_steps_order: int = arg(2200, "optimizer steps of the order stage, and of the control")
    batch_size_order: int = arg(16, "examples per step of the order stage")
    K: int = arg(3, "orders per example, which then takes 1 + K network states")
    budgets: str = arg("2,3,4,6,8", "step budgets T that the order is learned for, one a batch")
    tau: float = arg(0.67, "temperature of Eq. 3 at the start of the order stage")
    tau_end: float = arg(0.05, "and at its end; it falls early, with the root of progress")
    # all stages
    log_every: int = arg(100, "steps between log lines")
    eval_every: int = arg(500, "steps between validation bounds and resume points")
    eval_items: int = arg(256, "validation items of such a bound, and of the final table")

    def __post_init__(self):
        # Numbers: a count is at least 1 and a rate at least 0, unless they stand here.
        least = {"K": 2, "n_pieces": 0, "tau": 1e-3, "tau_end": 1e-3, "seed": -(2**63)}
        most = {"seed": 2**63 - 1}
        for f in fields(self):
            if f.type in (int, float):
                low = least.get(f.name, 1 if f.type is int else 0)
                high = most.get(f.name, 10**9 if f.type is int else 1e30)
                if not low <= getattr(self, f.name) <= high:
                    raise UserError(f"--{f.name} must be {low} to {high}")

        # Names, and what has to fit together.
        if self.dataset not in DATASETS or not set(self.stages.split(",")) <= set(STAGES):
            raise UserError(f"no such data set or stage: {self.dataset}, {self.stages}")
        if self.batch_size % self.chunks or self.batch_size_order % self.chunks:
            raise UserError(f"--chunks {self.chunks} must divide both batch sizes")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: want auto, float32 or bfloat16")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"--n_embd {self.n_embd} must be a multiple of 2 x --n_head")
        for text in self.budgets.split(","):
            if not text.isdecimal() or not 1 <= int(text) <= self.answer_len:
                raise UserError(f"--budgets {self.budgets}: want numbers of steps, 1 to "
                                f"--answer_len {self.answer_len}, like 2,3,4")

    @property
    def budget_list(self) -> list[int]:
        return [int(text) for text in self.budgets.split(",")]


PRESETS = {
    "toy": {},
    "toy2": dict(dataset="toy2", max_steps_order=4400),  # stories told forwards or backwards
    "gsm8k": dict(dataset="gsm8k", prompt_len=192, answer_len=64, n_layer=4, n_pieces=3072,
                  batch_size=16, max_steps_denoiser=7000, batch_size_order=8, max_steps_order=2400,
                  eval_items=128),
    "gsm8k_aug": dict(  # the paper's recipe near its size, but from random weights; not been run
        # the paper's, as summaries report it: 170M parameters, 45,000 x 256, then 15,000 x 32 x 8
        dataset="gsm8k-aug", max_steps_denoiser=45_000, batch_size=256, max_steps_order=15_000,
        batch_size_order=32, K=8,
        # ours (131M parameters, 30M more for the posterior)
        prompt_len=256, answer_len=128, n_layer=18, n_head=12, n_embd=768, n_layer_posterior=4,
        # unknown, chosen by us without a run (tau and tau_end are the toy's)
        lr_matrix=0.005, lr_other=5e-4),
}
SIZES = ("prompt_len", "answer_len", "n_layer", "n_head", "n_embd")


def parse_config(argv=None) -> Config:
    """Every field of Config is a flag. Where none is given the preset's constant stands, or, with
    --resume, what the stopped run was started with."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        how = {"type": f.type, "help": f"{f.metadata['help']} ({f.default})"}
        if f.type is bool:
            how = {"action": "store_true", "help": f.metadata["help"]}
        if f.name == "preset":
            how["choices"] = PRESETS
        parser.add_argument(f"--{f.name}", **how)
    given = vars(parser.parse_args(argv))  # only what was typed
    for name in {"out_dir", "data_dir", "init"} & set(given):
        given[name] = str(path_of(given[name])) if given[name] else ""

    # What was not typed: the preset's constants, or those of the stopped run.
    base = PRESETS[given.get("preset", "toy")]
    if given.get("resume"):
        out = Path(given.get("out_dir", "out"))
        if out.is_dir() and not (out / "resume.pt").exists():
            raise UserError(f"there is no {out / 'resume.pt'}: no run was stopped there after its "
                            "first resume point")
        base = load_state(out / "resume.pt")["train_config"]
        changed = sorted(set(given) - {"resume", "out_dir", "data_dir", "device"})
        if changed:
            raise UserError(f"--resume continues the same run: leave out --{', --'.join(changed)}")
        if set(base) != {f.name for f in fields(Config)}:
            raise UserError("resume.pt is of another version of train.py: go on with that one")
    return Config(**{**base, **given})


# --- the run, its data ----------------------------------------------------------------------------

def seed_of(*parts) -> int:
    return zlib.crc32("-".join(map(str, parts)).encode())


@dataclass
class Run:
    """What the stages share."""
    config: Config
    device: torch.device
    pieces: list       # what the tokenizer is built from
    val_items: list    # validation questions and answers, as text
    train: tuple       # prompt (N, P), x0 (N, L)
    val: tuple
    log: list = field(default_factory=list)            # records of log.jsonl so far
    rank: int = 0                                      # which of torchrun's processes is this,
    world: int = 1                                     # and how many are they

    @property
    def sizes(self) -> ModelConfig:
        c = self.config
        vocab_size = 256 + len(self.pieces) + 2
        return ModelConfig(vocab_size, c.prompt_len, c.answer_len, c.n_layer, c.n_head, c.n_embd,
                           max_steps=max(c.budget_list))

    @property
    def half(self) -> bool:
        """Do networks run in bfloat16 (autocast)?"""
        dtype = self.config.dtype
        return dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda")


def prepare(config: Config) -> Run:
    """Data as tensors, and what else all stages need. UserError where something does not fit."""
    device = pick_device(config.device)
    splits = load_splits(config.dataset, config.data_dir, config.seed,
                         {**TOY_SIZES, "train": config.train_items})

    # The tokenizer is made from the training texts.
    pieces = frequent_pieces(splits["train"], config.n_pieces)
    start = start_of(stages_of(config)[0], config)
    if start is not None:
        _, state = load_checkpoint(start)
        # Weights belong to their tokenizer: its pieces are taken with --init (now or earlier), and
        # for a toy, whose texts differ by seed. Other files must be those it was made from, which
        # load_denoiser checks.
        toy = config.dataset.startswith("toy")
        if toy or config.init or state["train_config"].get("init"):
            pieces = state["pieces"]

    # Items that are too long are left out. If that is most of them, a constant is wrong.
    tokenizer = build_tokenizer(pieces)
    encoded = {}
    for name in ("train", "val"):
        items = splits[name]
        prompt, x0, fitting = encode(items, tokenizer, config.prompt_len, config.answer_len)
        say(f"{name}: {len(fitting)} of {len(items)} items fit --prompt_len {config.prompt_len} "
            f"and --answer_len {config.answer_len}")
        if len(fitting) < len(items) / 2:
            raise UserError(f"most {name} items do not fit: raise --prompt_len or --answer_len, "
                            "or take a --preset")
        encoded[name] = prompt, x0

    # Parts of a batch are shared out evenly, and none is empty.
    rank, world = process_rank()
    if config.chunks % world:
        raise UserError(f"--chunks {config.chunks} must be a multiple of {world} processes")
    if config.chunks > len(encoded["train"][0]):
        raise UserError(f"--chunks {config.chunks} is more than the training items that fit")
    return Run(config, device, pieces, splits["val"], encoded["train"], encoded["val"],
               rank=rank, world=world)


def batch_at(run: Run, stage: str, step: int, size: int):
    """The batch of this step, found from the step number alone: a fresh permutation each epoch."""
    prompt, x0 = run.train
    batches = max(len(x0) // size, 1)
    epoch = step // batches
    i = step % batches
    generator = torch.Generator().manual_seed(seed_of(run.config.seed, stage, "epoch", epoch))
    rows = torch.randperm(len(x0), generator=generator)[i * size : (i + 1) * size]
    return trim(prompt[rows], run.sizes.pad).to(run.device), x0[rows].to(run.device)


# --- what a stage maximises -----------------------------------------------------------------------

@dataclass
class Networks:
    """What a stage trains. The posterior only in the order stage."""
    model: MDM
    posterior: OrderPosterior | None = None

    def __iter__(self):
        return iter([self.model] if self.posterior is None else [self.model, self.posterior])

    def parameters(self):
        return [p for network in self for p in network.parameters()]


def stage_size(stage: str, config: Config) -> tuple[int, int]:
    """Optimizer steps, examples a step. The control sees as many network states as the order."""
    if stage == "denoiser":
        return config.max_steps_denoiser, config.batch_size
    if stage == "control":
        return config.max_steps_order, config.batch_size_order * (1 + config.K)
    return config.max_steps_order, config.batch_size_order


def budget_at(step: int, config: Config) -> int:
    """The budget T of this step's batch: each in turn."""
    return config.budget_list[step % len(config.budget_list)]


def stage_objective(run: Run, networks: Networks, prompt, x0, progress: float, T: int, generator):
    """What a stage maximises and its logs, each (B,). In the logs `elbo` is the bound alone, in
    nats per answer. T matters in the order stage only."""
    c = run.config
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.half):
        # Stage 1 and the control: a random order.
        if networks.posterior is None:
            elbo = denoiser_elbo(networks.model, prompt, x0, generator)
            return elbo, {"elbo": elbo.detach()}

        # [NEW] tau falls: at first many orders are tried, soon few.
        tau = c.tau * (c.tau_end / c.tau) ** progress**0.5

        # q reads the answers and scores their positions. K orders are drawn, and one later step.
        scores = networks.posterior(prompt, x0)
        reveal_step, t = draw_orders_and_steps(scores, c.K, T, tau, generator)

        # p reads the states on the way, and everything is put together: Eq. 4 to 7.
        return objective(networks.model, scores, prompt, x0, reveal_step, t, T, tau)


@torch.no_grad()
def validate(run: Run, networks: Networks, progress: float) -> dict:
    """The stage's bound on validation items, with the same draws each time: in the order stage at
    REPORTED budgets. At its end over all items, with the standard error of that mean."""
    n = None if progress == 1 else run.config.eval_items
    prompts, x0s = run.val[0][:n], run.val[1][:n]
    # A denoiser's bound knows no budget: one of them will do, and the name of that is `val`.
    budgets = REPORTED if networks.posterior is not None else [4]
    record = {}
    for reported in budgets:
        T = min(reported, run.config.answer_len)

        # The bound of each item, 64 at a time. Its place in the list seeds the noise, not the step.
        elbos = []
        for i in range(0, len(prompts), 64):
            prompt = trim(prompts[i : i + 64], run.sizes.pad).to(run.device)
            x0 = x0s[i : i + 64].to(run.device)
            generator = torch.Generator(run.device)
            generator.manual_seed(seed_of(run.config.seed, "validate", i))
            _, logs = stage_objective(run, networks, prompt, x0, progress, T, generator)
            elbos.append(logs["elbo"])

        # Their mean, and at the end of a stage how sure it is.
        elbo = torch.cat(elbos).cpu().double()
        name = "val" if reported == 4 else f"val_{reported}"
        record[name] = elbo.mean().item()
        if progress == 1 and len(elbo) > 1:
            record[name.replace("val", "val_se")] = (elbo.std() / len(elbo) ** 0.5).item()
    return record


# --- the stages -----------------------------------------------------------------------------------

def stages_of(config: Config) -> list[str]:
    """Which stages to train, in their order."""
    return [stage for stage in STAGES if stage in config.stages.split(",")]


def start_of(stage: str, config: Config) -> Path | None:
    """The checkpoint that a stage starts from; None: random weights. --init is a start for stage 1,
    or, where that is not trained, for what usually starts from stage 1's checkpoint."""
    trained_here = stage != "denoiser" and "denoiser" in stages_of(config)
    if config.init and not trained_here:
        return Path(config.init)
    return None if stage == "denoiser" else Path(config.out_dir) / "denoiser.pt"


def build_stage(stage: str, run: Run) -> tuple[Networks, list]:
    """The networks that a stage trains, as before its first step, and their optimizers."""
    config = run.config
    torch.manual_seed(seed_of(config.seed, stage, "weights"))

    # p, from random weights or from a checkpoint. The order stage adds q.
    start = start_of(stage, config)
    model = MDM(run.sizes).to(run.device) if start is None else load_denoiser(start, run)
    networks = Networks(model)
    if stage == "order":
        sizes = replace(run.sizes, n_layer=config.n_layer_posterior)
        networks.posterior = OrderPosterior(sizes).to(run.device)

    # Each has its own optimizers.
    optimizers = []
    for network in networks:
        optimizers += make_optimizers(network, config.lr_matrix, config.lr_other)
    return networks, optimizers


def load_denoiser(path: Path, run: Run) -> MDM:
    """A model to go on from. Another run's will do if its sizes and pieces are those of this."""
    model, state = load_checkpoint(path, run.device)
    theirs = state["train_config"]
    same = SIZES if run.config.init else ("dataset", "n_pieces", *SIZES)
    other = [f"--{name} {theirs[name]}" for name in same
             if theirs[name] != getattr(run.config, name)]
    if other:
        raise UserError(f"{path} was trained with {', '.join(other)}: take the same, or train "
                        "--stages denoiser,order anew")
    if state["pieces"] != run.pieces:
        raise UserError(f"{path} was trained on other text: give it the same data, or train "
                        "--stages denoiser,order anew")
    if model.config.max_steps != run.sizes.max_steps:  # its gates are untrained: take new ones
        old = model
        model = MDM(run.sizes).to(run.device)
        weights = {name: value for name, value in old.state_dict().items()
                   if not name.startswith("gate_head.")}
        model.load_state_dict(weights, strict=False)
    return model


def train_step(stage: str, run: Run, networks: Networks, optimizers, step: int):
    """One batch, one update.

    Returns logs (mean over the batch, one tensor), their names, the gradient's norm before
    clipping, and how many tokens were read."""
    steps, size = stage_size(stage, run.config)
    prompt, x0 = batch_at(run, stage, step, size)

    # The gradient of the batch, whoever computed its parts.
    sums, names = compute_gradient(stage, run, networks, prompt, x0, step)
    if run.world > 1:
        sums = sum_over_processes(networks, sums)

    # The update.
    set_rates(optimizers, rate_factor(stage, step, steps))
    grad = update(networks, optimizers)
    if not grad.isfinite():
        raise UserError(f"stage {stage}, step {step + 1}: NaN or inf in the gradient: start "
                        "anew with smaller learning rates, in another --out_dir")

    # What was read: each prompt once, each canvas in one state, or in 1 + K.
    states = 1 + run.config.K if stage == "order" else 1
    return sums, names, grad, len(x0) * (prompt.shape[1] + states * x0.shape[1])


def compute_gradient(stage: str, run: Run, networks: Networks, prompt, x0, step: int):
    """Leaves the gradient in p.grad, summed over the parts of the batch that are this process's.
    Returns their share of the mean logs, as one tensor, and the names of these."""
    config = run.config
    for p in networks.parameters():
        p.grad = None

    # What all parts share: how far the stage is, and the budget.
    steps, _ = stage_size(stage, config)
    T = budget_at(step, config)
    prompts = prompt.tensor_split(config.chunks)
    x0s = x0.tensor_split(config.chunks)

    # Each part by itself. Its draws are its own, whichever process has it.
    sums = 0
    for i in range(run.rank, config.chunks, run.world):
        generator = torch.Generator(run.device)
        generator.manual_seed(seed_of(config.seed, stage, step * config.chunks + i))
        value, logs = stage_objective(run, networks, prompts[i], x0s[i], step / steps, T, generator)
        loss = -value.mean() / config.answer_len  # per token: the size of a cross-entropy
        (loss / config.chunks).backward()
        sums = sums + torch.stack([log.mean() for log in logs.values()]) / config.chunks
    return sums, list(logs)


def sum_over_processes(networks: Networks, sums):
    """Every process has the gradients of its parts; their sum is the batch's. Gradients and logs go
    as one tensor: a message for each parameter would have to wait for each in turn."""
    grads = [p.grad for p in networks.parameters() if p.grad is not None]
    whole = torch.cat([sums, *[grad.flatten() for grad in grads]])
    with_the_others(dist.all_reduce, whole)
    sums, *summed = whole.split([part.numel() for part in (sums, *grads)])
    for grad, of_all in zip(grads, summed):
        grad.copy_(of_all.view_as(grad))
    return sums


def with_the_others(exchange, *args):
    """One exchange between the processes."""
    try:
        exchange(*args)
    except RuntimeError as e:
        raise UserError("another process has ended, or has not answered for "
                        f"{PATIENCE.seconds} seconds; go on with --resume, by as many processes "
                        "or by one") from e


def update(networks: Networks, optimizers):
    """One step of all optimizers. Returns the gradient's norm before clipping."""
    grad = torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
    if grad.isfinite():
        for optimizer in optimizers:
            optimizer.step()
    return grad


def rate_factor(stage: str, step: int, steps: int) -> float:
    """20 steps of warm-up, then constant. Stage 1 stays there, for the order stage goes on from it;
    the others fall to 0 over their last 60 %."""
    warm_up = min(1.0, (step + 1) / 20)
    if stage == "denoiser":
        return warm_up
    return min(warm_up, (1 - step / steps) / 0.6)


def train_stage(stage: str, run: Run, resume: dict | None):
    """Train one stage to its end, from its start or from a resume point; write its checkpoint."""
    config = run.config
    out = Path(config.out_dir)
    steps, _ = stage_size(stage, config)
    networks, optimizers = build_stage(stage, run)

    # A resume point has the state of every network and of every optimizer.
    trained = [*networks, *optimizers]
    begin = 0
    if resume:
        begin = resume["step"]
        for part, state in zip(trained, resume["states"], strict=True):
            part.load_state_dict(state)

    def save(name: str, step: int, **extra):
        if run.rank == 0:
            save_checkpoint(out / name, networks.model, pieces=run.pieces, stage=stage, step=step,
                            train_config=asdict(config), log=run.log, **extra)

    # The loop. Sums are taken since the last line of the log.
    sums, tokens, last, since = 0, 0, begin, time.perf_counter()
    hidden = True if run.rank > 0 else None  # None: a bar where there is a terminal
    for step in tqdm(range(begin, steps), initial=begin, total=steps, desc=stage, disable=hidden):
        logs, names, grad, read = train_step(stage, run, networks, optimizers, step)
        sums = sums + logs
        tokens += read
        done = step + 1

        # Now and then a line of the log, a validation, a resume point.
        validating = done % config.eval_every == 0 or done == steps
        if done % config.log_every == 0 or validating:
            seconds = time.perf_counter() - since
            record = {"stage": stage, "step": done}
            record |= dict(zip(names, (sums / (done - last)).tolist()))
            record |= {"grad": grad.item(), "seconds": seconds, "ktok/s": tokens / seconds / 1e3}
            if validating:
                record |= validate(run, networks, done / steps)
            add_to_log(run, record)
            sums, tokens, last, since = 0, 0, done, time.perf_counter()
        if validating:
            save("resume.pt", done, states=[part.state_dict() for part in trained])

    # The stage's checkpoint.
    save(STAGES[stage], steps)
    if run.world > 1:
        with_the_others(dist.barrier)  # the next stage starts from that file


def add_to_log(run: Run, record: dict):
    """One more line in log.jsonl, which is written whole, and on the screen."""
    run.log.append(record)
    if run.rank > 0:
        return

    # The file: whole, so that it is never cut in the middle of a line. Before the first resume
    # point it is still the log of the checkpoints that are there.
    out = Path(run.config.out_dir)
    if "val" in record or (out / "resume.pt").exists():
        text = "".join(json.dumps(record) + "\n" for record in run.log)
        write_atomically(out / "log.jsonl", text.encode())

    # The screen.
    words = []
    for name, value in record.items():
        words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{value:>8}")
    say("  ".join(words))


def read_log(path: Path, without: list[str]) -> list[dict]:
    """The records that an earlier run has left of other stages."""
    records = read_json_lines(path) if path.is_file() else []
    return [record for record in records if record.get("stage") not in without]


def main(argv=None):
    start = time.perf_counter()
    config = parse_config(argv)
    out = Path(config.out_dir)
    stages = stages_of(config)
    resume = None
    if config.resume:
        resume = load_state(out / "resume.pt")
    elif (out / "resume.pt").is_file():
        raise UserError(f"{out / 'resume.pt'} is of a run that was stopped: go on with "
                        f"`{again(config)}`, or delete it, or take another --out_dir")

    # Everything is checked before anything is replaced.
    run = prepare(config)
    if resume:
        if "states" not in resume:
            raise UserError(f"{out / 'resume.pt'} is no resume point")
        if resume["pieces"] != run.pieces:
            raise UserError("resume.pt was trained on other data: bring back what --data_dir held")
        run.log = resume["log"]
        stages = stages[stages.index(resume["stage"]) :]
    else:
        start_from = start_of(stages[0], config)
        if start_from is not None:
            load_denoiser(start_from, run)
        run.log = read_log(out / "log.jsonl", without=stages)
    if run.world > 1:
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo", timeout=PATIENCE)

    # Train. Whatever stops it, the user reads how to go on.
    try:
        for stage in stages:
            train_stage(stage, run, resume)
            resume = None
    except (KeyboardInterrupt, OSError) as e:  # Ctrl-C or a full disk, whose text names the file
        reason = f": {e}" if isinstance(e, OSError) else ""
        if (out / "resume.pt").is_file():
            raise UserError(f"stopped{reason}; go on with: {again(config)}") from None
        raise UserError(f"stopped before the first resume point{reason}") from None
    finally:
        if run.world > 1:  # its threads must have ended when Python does, or they abort the process
            dist.destroy_process_group()

    # Done: no resume point is needed any more, and the new order is put to the test.
    if run.rank > 0:
        return
    (out / "resume.pt").unlink(missing_ok=True)
    if "order" in stages:
        closing_table(out / "ckpt.pt", start_of("order", config), run.val_items,
                      limit=config.eval_items, device=run.device)
    minutes = (time.perf_counter() - start) / 60
    say(f"{minutes:.1f} minutes on {run.device}; {next_command(out, stages)}")


def again(config: Config) -> str:
    return shlex.join(["python", "train.py", "--resume", "--out_dir", config.out_dir])


def next_command(out: Path, stages: list[str]) -> str:
    """What to do with what was trained."""
    if stages != ["denoiser"] and (out / "ckpt.pt").is_file():
        return "next: " + shlex.join(["python", "sample.py", "--steps", "4", "--ckpt",
                                      str(out / "ckpt.pt")])
    return "next: " + shlex.join(["python", "train.py", "--stages", "order", "--out_dir",
                                  str(out)]) + " and the constants of this run"


if __name__ == "__main__":
    run_script(main)
