"""Train a denoiser, then its generation order; then one table.

    python train.py                                    the toy task, minutes on 2 CPU cores
    python train.py --preset gsm8k --data_dir DIR      GSM8K's train.jsonl and test.jsonl
    python train.py --resume                           go on where a stopped run was saved
    python train.py --stages order                     the order stage alone, from out/denoiser.pt
    python train.py --stages control                   the rules' denoiser of a fair comparison
    torchrun --nproc_per_node 2 train.py --chunks 2    the same batches by two processes

Stages, one loop:
    denoiser  stage 1: the masked-diffusion bound, positions revealed in a random order
    order     stage 2: from those weights, the learned order, Eq. 3-8 of posterior.py
    control   what a comparison needs, not trained unless asked for: from stage 1's weights,
              stage 1's loss on as many more network states as the order stage saw
Written to --out_dir: denoiser.pt, ckpt.pt (order), control.pt, resume.pt, log.jsonl.

A batch is computed in --chunks parts, in turn or by that many processes, with one result.
Every draw is seeded by (seed, stage, step, part), and so is the place in the data. So a resume
point needs no generator state, resuming is bit for bit on a CPU with as many threads, and logging
or validating more often changes nothing.

The log, and what healthy looks like (bounds and kl in nats per answer):
    val          bound on log p(x0 | c), validation items: rises, flattens; the order stage begins
                 far below where stage 1 ended, since T steps stand for one token at a time and q's
                 gates are charged too, and climbs back.
                 At the end of a stage over all validation items, with its standard error, val_se
    elbo, recon, kl   means since the last line, elbo = recon - kl. kl falls from tens of nats to
                 well below 1: p has learned to predict q's order
    q_entropy    of q's gates, nats per step; falls slowly, to 5 to 9 on the toy. Below 1 early is
                 an order frozen too soon: larger --tau
    p_steps      steps that the sampler uses on validation items; goes to T
    explained    share of what the later steps' terms vary between the orders of an example that
                 the critic foretells: 0 at first, 0.1 to 0.5 later, wavering. Negative for long:
                 its error is larger than with no critic at all
    grad         gradient norm before clipping to 1; ktok/s: thousand input tokens a second
"""

import argparse
import json
import math
import os
import shlex
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (DATASETS, TOY_SIZES, UserError, build_tokenizer, encode, frequent_pieces,
                  load_splits, run_script)
from eval_gsm8k import evaluate, print_table
from model import (MDM, ModelConfig, denoiser_elbo, load_checkpoint, pick_device, save_checkpoint,
                   trim)
from posterior import OrderPosterior, draw_orders_and_steps, objective
from sample import generate, parse_order

STAGES = {"denoiser": "denoiser.pt", "order": "ckpt.pt", "control": "control.pt"}
TABLE = ("learned:0.5", "learned", "iid", "confidence", "margin", "left_to_right",
         "threshold:0.9", "entropy_bound:0.1")  # of the last lines; eval_gsm8k.py has more


def arg(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    preset: str = arg("toy", "constants to start from: toy, toy2, gsm8k, gsm8k_aug")
    dataset: str = arg("toy", f"one of {', '.join(DATASETS)}")
    data_dir: str = arg("", "folder with GSM8K's train.jsonl and test.jsonl; empty: the hub")
    out_dir: str = arg("out", "where checkpoints and the log go")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "float32 or bfloat16 (autocast); auto: bfloat16 on CUDA")
    seed: int = arg(0, "of weights, data order and every draw")
    stages: str = arg("denoiser,order", "which to train, of denoiser, order and control")
    chunks: int = arg(1, "parts of a batch: in turn, or by as many processes of torchrun")
    resume: bool = arg(False, "continue from out_dir/resume.pt")
    # model
    prompt_len: int = arg(36, "longest prompt, tokens")
    answer_len: int = arg(60, "L, the answer canvas, tokens")
    n_layer: int = arg(2, "blocks of the denoiser")
    n_layer_posterior: int = arg(2, "blocks of the posterior")
    n_head: int = arg(4, "attention heads")
    n_embd: int = arg(128, "width")
    place_gates: bool = arg(False, "each place has a bias in p's gates; else one for all")
    n_pieces: int = arg(2048, "most frequent text pieces in the tokenizer")
    train_items: int = arg(50_000, "size of the toy's training pool")
    # stage 1
    max_steps_denoiser: int = arg(2000, "optimizer steps of stage 1")
    batch_size: int = arg(32, "examples per step of stage 1")
    lr_matrix: float = arg(0.01, "Muon, for the matrices of the blocks")
    lr_other: float = arg(3e-3, "AdamW, for everything else")
    # stage 2 and control
    max_steps_order: int = arg(1200, "optimizer steps of the order stage, and of the control")
    batch_size_order: int = arg(16, "examples per step of the order stage")
    K: int = arg(3, "orders per example, which then takes 1 + K network states")
    T: int = arg(4, "step budget that the order is learned for")
    tau: float = arg(0.67, "temperature of Eq. 3 at the start of the order stage")
    tau_end: float = arg(0.05, "and at its end; it falls late, with the square of progress")
    kl_ramp: float = arg(0.1, "share of the order stage in which the KL weight goes from 0.1 to 1")
    # all stages
    log_every: int = arg(100, "steps between log lines")
    eval_every: int = arg(500, "steps between validation bounds and resume points")
    eval_items: int = arg(256, "validation items of such a bound, and of the final table")

    def __post_init__(self):
        for f in fields(self):
            least = {"K": 2, "seed": -(2**63), "n_pieces": 0}.get(f.name, 1)
            if f.type is int and not least <= getattr(self, f.name) < 2**63:
                raise UserError(f"--{f.name} must be at least {least}")
            if f.type is float and not 0 <= getattr(self, f.name) < math.inf:
                raise UserError(f"--{f.name} must be at least 0")
        if self.dataset not in DATASETS or not set(self.stages.split(",")) <= set(STAGES):
            raise UserError(f"no such data set or stage: {self.dataset}, {self.stages}")
        if self.batch_size % self.chunks or self.batch_size_order % self.chunks:
            raise UserError(f"--chunks {self.chunks} must divide both batch sizes")
        if not (self.tau > 0 and self.tau_end > 0):
            raise UserError("--tau and --tau_end must be above 0")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: want auto, float32 or bfloat16")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"--n_embd {self.n_embd} must be a multiple of 2 x --n_head")


PRESETS = {
    "toy": {},
    "toy2": dict(dataset="toy2"),  # stories told forwards or backwards
    "gsm8k": dict(dataset="gsm8k", prompt_len=192, answer_len=64, n_layer=4, n_pieces=3072,
                  batch_size=16, max_steps_denoiser=7000, batch_size_order=8, max_steps_order=2400,
                  place_gates=True, eval_items=128),
    "gsm8k_aug": dict(  # the paper's recipe near its size, but from random weights; not been run
        # the paper's, as summaries report it: 170M parameters, 45,000 x 256, then 15,000 x 32 x 8
        dataset="gsm8k-aug", max_steps_denoiser=45_000, batch_size=256, max_steps_order=15_000,
        batch_size_order=32, K=8, T=5,
        # ours (131M parameters, 32M more for the posterior)
        prompt_len=256, answer_len=128, n_layer=18, n_head=12, n_embd=768, n_layer_posterior=4,
        place_gates=True,
        # unknown, chosen by us without a run; so are tau, its end and the KL ramp, the toy's
        lr_matrix=0.005, lr_other=5e-4),
}


def parse_config(argv=None) -> Config:
    """Every field of Config is a flag; where none is given the preset's constant stands, or, with
    --resume, what the stopped run was started with."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        choices = {"choices": PRESETS} if f.name == "preset" else {}
        parser.add_argument(f"--{f.name}", **kind, **choices,
                            help=f"{f.metadata['help']} ({f.default})")
    given = vars(parser.parse_args(argv))
    base = PRESETS[given.get("preset", "toy")]
    if given.get("resume"):
        base = load_checkpoint(Path(given.get("out_dir", "out")) / "resume.pt")[1]["train_config"]
        changed = sorted(set(given) - {"resume", "out_dir", "data_dir", "device"})
        if changed:
            raise UserError(f"--resume continues the same run: leave out --{', --'.join(changed)}")
    return Config(**{**base, **given})


# --- seeds, optimizers ----------------------------------------------------------------------------

def seed_of(*parts) -> int:
    return zlib.crc32("-".join(map(str, parts)).encode())


class Muon(torch.optim.Muon):
    """Muon (Jordan 2024). The step is torch's, without weight decay, but off CUDA in float32: a CPU
    without bfloat16 instructions takes several times as long for torch's as for all the rest."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        a, b, c = group["ns_coefficients"]
        for p in group["params"]:
            state = self.state[p]
            momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            x, tall = p.grad.lerp(momentum, group["momentum"]), p.shape[0] > p.shape[1]
            x = (x.T if tall else x).to(torch.bfloat16 if p.is_cuda else torch.float32)
            x = x / x.norm().clamp(min=group["eps"])
            for _ in range(group["ns_steps"]):  # Newton-Schulz: singular values go to about 1
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            p.add_(x.T if tall else x, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimizers(module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest. [NEW] theirs is unknown."""
    matrices, critic, others = [], [], []
    for name, p in module.named_parameters():
        matrix = ".blocks." in name and p.ndim == 2
        (matrices if matrix else critic if name.startswith("critic.") else others).append(p)
    groups = [{"params": others, "lr": config.lr_other}]
    if critic:
        groups.append({"params": critic, "lr": 1e-3})
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0),
                  Muon(matrices, lr=config.lr_matrix, weight_decay=0)]
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(progress: float, step: int) -> float:
    """20 steps of warm-up, constant, then linear to 0 over the last 60 % of the stage."""
    return min(1.0, (step + 1) / 20, (1 - progress) / 0.6)


# --- data, objective, validation ------------------------------------------------------------------

@dataclass
class Run:
    """What the stages share."""
    config: Config
    device: torch.device
    pieces: list       # what the tokenizer is built from
    items: list        # validation questions and answers, as text
    train: tuple       # prompt (N, P), x0 (N, L)
    val: tuple
    log: list = field(default_factory=list)            # lines of log.jsonl so far
    rank: int = int(os.environ.get("RANK", 0))         # which of torchrun's processes is this,
    world: int = int(os.environ.get("WORLD_SIZE", 1))  # and how many are they

    @property
    def sizes(self) -> ModelConfig:
        c = self.config
        vocab_size = 256 + len(self.pieces) + 2
        return ModelConfig(vocab_size, c.prompt_len, c.answer_len, c.n_layer, c.n_head, c.n_embd,
                           c.place_gates)


def prepare(config: Config) -> Run:
    splits = load_splits(config.dataset, config.data_dir, config.seed,
                         {**TOY_SIZES, "train": config.train_items})
    pieces = frequent_pieces(splits["train"], config.n_pieces)
    encoded = {}
    for name in ("train", "val"):
        items = splits[name]
        *encoded[name], fitting = encode(items, build_tokenizer(pieces), config.prompt_len,
                                         config.answer_len)
        bare = sum("<<" not in item["answer"] for item in items)
        print(f"{name}: {len(fitting)} of {len(items)} items fit, {bare} have no <<equation>>")
        if not fitting:
            raise UserError("nothing to train on: raise --prompt_len or --answer_len")
    return Run(config, pick_device(config.device), pieces, splits["val"], **encoded)


def batch_at(run: Run, stage: str, step: int, size: int):
    """The batch of this step, found from the step number alone: a fresh permutation each epoch."""
    prompt, x0 = run.train
    epoch, i = divmod(step, max(len(x0) // size, 1))
    generator = torch.Generator().manual_seed(seed_of(run.config.seed, stage, "epoch", epoch))
    rows = torch.randperm(len(x0), generator=generator)[i * size : (i + 1) * size]
    return trim(prompt[rows], run.sizes.pad).to(run.device), x0[rows].to(run.device)


def stage_objective(run: Run, model: MDM, posterior: OrderPosterior | None, prompt, x0, progress,
                    generator):
    """What a stage maximises and its logs, each (B,): a bound on log p(x0 | c); in the order stage
    with the surrogate of Eq. 7, the KL's weight and the critic's error; the logged elbo is the
    bound alone."""
    c = run.config
    with torch.autocast(run.device.type, torch.bfloat16, enabled=c.dtype == "bfloat16" or
                        (c.dtype == "auto" and run.device.type == "cuda")):
        if posterior is None:
            elbo = denoiser_elbo(model, prompt, x0, generator)
            return elbo, {"elbo": elbo.detach()}
        # [NEW] the KL weight grows: q looks around before it has to be predictable. tau falls: at
        # first many orders are tried, in the end few.
        kl_weight = min(1.0, 0.1 + 0.9 * progress / max(c.kl_ramp, 1e-9))
        tau = c.tau * (c.tau_end / c.tau) ** progress**2
        s, w = posterior(prompt, x0)
        reveal_step, t = draw_orders_and_steps(s, c.K, c.T, tau, generator)
        return objective(model, s, w, prompt, x0, reveal_step, t, c.T, tau, kl_weight)


@torch.no_grad()
def validate(run: Run, model: MDM, posterior: OrderPosterior | None, progress: float) -> dict:
    """The stage's bound on validation items with the same draws each time; at its end of all items,
    four draws each, with the standard error of that mean over items."""
    n, draws = (None, 4) if progress == 1 else (run.config.eval_items, 1)
    prompts, x0s = (part[:n] for part in run.val)
    elbos = []
    for i, (prompt, x0) in enumerate(zip(prompts.split(64), x0s.split(64))):
        prompt, x0 = trim(prompt, model.config.pad).to(run.device), x0.to(run.device)
        generator = torch.Generator(run.device)
        generator.manual_seed(seed_of(run.config.seed, "validate", 64 * i))
        elbos.append(sum(stage_objective(run, model, posterior, prompt, x0, progress,
                                         generator)[1]["elbo"] for _ in range(draws)) / draws)
    elbo = torch.cat(elbos).double()
    record = {"val": elbo.mean().item()}
    if progress == 1:
        record["val_se"] = (elbo.std(correction=0) / len(elbo) ** 0.5).item()
    if posterior is not None:
        steps = generate(model, prompts[:64].to(run.device), run.config.T).steps
        record["p_steps"] = steps.float().mean().item()
    return record


# --- the stages -----------------------------------------------------------------------------------

def stage_size(stage: str, config: Config) -> tuple[int, int]:
    """Optimizer steps, examples a step. The control sees as many network states as the order."""
    if stage == "denoiser":
        return config.max_steps_denoiser, config.batch_size
    states = 1 + config.K if stage == "control" else 1
    return config.max_steps_order, config.batch_size_order * states


def build_stage(stage: str, run: Run):
    """The networks that a stage trains, as before its first step, and their optimizers."""
    config = run.config
    torch.manual_seed(seed_of(config.seed, stage, "weights"))
    if stage == "denoiser":
        model = MDM(run.sizes).to(run.device)
    else:
        path = Path(config.out_dir) / "denoiser.pt"
        model, state = load_checkpoint(path, run.device)
        names = [f.name for f in fields(Config)]
        names = names[names.index("prompt_len") : names.index("max_steps_order")]
        names.remove("n_layer_posterior")
        other = [name for name in ("dataset", "seed", *names)
                 if state["train_config"][name] != getattr(config, name)]
        if other or state["pieces"] != run.pieces:
            raise UserError(f"{path} is another run's ({', '.join(other or ['data'])}): train "
                            "--stages denoiser too, or give it the same constants")
    if stage != "order":
        return model, None, make_optimizers(model, config)
    posterior = OrderPosterior(replace(run.sizes, n_layer=config.n_layer_posterior), config.T)
    posterior = posterior.to(run.device)
    # [NEW] p's gates start as an arbitrary rule for q to lean to (README.md, "How an order fails"):
    # by random weights, which spread logits by 5 to 8 between places, or, where hidden states tell
    # little of places (GSM8K), by biases: -6 to 4, a random walk in a ring of length 10. Its steps
    # of 2 to 4.5 part next places by 2 at least, those two apart by 1.
    if config.place_gates:
        walk = (0.2 + 0.25 * torch.rand(config.answer_len)).cumsum(0)
        model.gate_head.bias.data.copy_(10 * (walk % 1) - 6)
    else:
        torch.nn.init.normal_(model.gate_head.weight, std=0.6 * (128 / config.n_embd) ** 0.5)
    return model, posterior, [*make_optimizers(model, config), *make_optimizers(posterior, config)]


def train_step(stage: str, run: Run, model: MDM, posterior: OrderPosterior | None, optimizers,
               step: int):
    """One batch, one update: logs (mean over the batch, one tensor), their names, the gradient's
    norm, tokens read. Parts of the batch are computed in turn, or by as many processes."""
    config = run.config
    steps, size = stage_size(stage, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    params = [p for group in groups for p in group["params"]]
    for group in groups:
        group["lr"] = group["peak_lr"] * lr_factor(step / steps, step)
    for p in params:
        p.grad = None
    prompt, x0 = batch_at(run, stage, step, size)
    parts = [*zip(prompt.tensor_split(config.chunks), x0.tensor_split(config.chunks))]
    sums = 0
    for i in range(run.rank, config.chunks, run.world):
        generator = torch.Generator(run.device)
        generator.manual_seed(seed_of(config.seed, stage, step * config.chunks + i))
        value, logs = stage_objective(run, model, posterior, *parts[i], step / steps, generator)
        loss = -value.mean() / config.answer_len  # per token: the size of a cross-entropy
        (loss / config.chunks).backward()
        sums = sums + torch.stack([log.mean() for log in logs.values()]) / config.chunks
    if run.world > 1:  # every process has the gradients of its parts; their sum is the batch's
        for part in [sums, *[p.grad for p in params if p.grad is not None]]:
            dist.all_reduce(part)
    # The critic's squared error is no likelihood, and would fill the norm.
    clipped = [p for network in (model, posterior) if network
               for name, p in network.named_parameters() if not name.startswith("critic.")]
    grad = torch.nn.utils.clip_grad_norm_(clipped, 1.0)
    if not grad.isfinite():
        raise UserError(f"stage {stage}, step {step + 1}: NaN or inf in the gradient; start anew "
                        "with smaller learning rates")
    for optimizer in optimizers:
        optimizer.step()
    states = 1 + config.K if stage == "order" else 1
    return sums, [*logs], grad, len(x0) * (prompt.shape[1] + states * x0.shape[1])


def train_stage(stage: str, run: Run, resume: dict | None):
    """Train one stage to its end, from its start or from a resume point; write its checkpoint."""
    config, out = run.config, Path(run.config.out_dir)
    steps, _ = stage_size(stage, config)
    model, posterior, optimizers = build_stage(stage, run)
    trained = [part for part in (model, posterior, *optimizers) if part]
    begin = resume["step"] if resume else 0
    if resume:
        for part, state in zip(trained, resume["states"], strict=True):
            part.load_state_dict(state)

    def save(name: str, step: int, parts=()):
        if run.rank == 0:
            save_checkpoint(out / name, model, pieces=run.pieces, train_config=asdict(config),
                            stage=stage, step=step, log=run.log,
                            states=[part.state_dict() for part in parts])

    sums, tokens, since, last = 0, 0, time.perf_counter(), begin
    bar = tqdm(range(begin, steps), initial=begin, total=steps, desc=stage, disable=run.rank > 0)
    for step in bar:
        logs, names, grad, read = train_step(stage, run, model, posterior, optimizers, step)
        sums, tokens, done = sums + logs, tokens + read, step + 1
        validating = done % config.eval_every == 0 or done == steps
        if done % config.log_every == 0 or validating:
            means = dict(zip(names, (sums / (done - last)).tolist()))
            if posterior:
                means["explained"] = 1 - means.pop("error") / max(means.pop("spread"), 1e-9)
            record = {"stage": stage, "step": done, **means, "grad": grad.item(),
                      "seconds": time.perf_counter() - since,
                      "ktok/s": tokens / (time.perf_counter() - since) / 1e3}
            if validating:
                record |= validate(run, model, posterior, done / steps)
            run.log.append(json.dumps(record) + "\n")
            if run.rank == 0:
                (out / "log.jsonl").write_text("".join(run.log))
                tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v:>8}"
                                     for k, v in record.items()))
            sums, tokens, since, last = 0, 0, time.perf_counter(), done
        if validating:
            save("resume.pt", done, trained)
    save(STAGES[stage], steps, [posterior] if posterior else [])
    if run.world > 1:
        dist.barrier()  # the next stage starts from that file


def final_table(run: Run):
    """Orders at T steps on validation items: the learned one on ckpt.pt, rules on denoiser.pt."""
    config, out, rows = run.config, Path(run.config.out_dir), []
    models = {name: load_checkpoint(out / f"{name}.pt", run.device)[0]
              for name in ("ckpt", "denoiser")}
    metric = "coherent" if config.dataset.startswith("toy") else "accuracy"
    for text in TABLE:
        name = "ckpt" if text.startswith("learned") else "denoiser"
        row = evaluate(models[name], build_tokenizer(run.pieces), run.items[: config.eval_items],
                       parse_order(text), config.T, metric)
        rows.append({"budget": config.T, "checkpoint": name, **row})
    print(f"\n{rows[0]['n']} validation items, at most {config.T} steps an answer, in %. The order "
          "stage trained ckpt's denoiser on;\nfor the rules `--stages control` makes up for that, "
          f"then `eval_gsm8k.py --control {out / 'control.pt'}` compares")
    print_table(rows, metric)
    records = [json.loads(line) for line in run.log]
    val = {record["stage"]: record["val"] for record in records if "val" in record}
    signs = {  # no toy run of results.md has one; the failed one of experiments.md has the first
        "right numbers behind false equations: what must agree came out together":
            metric == "coherent" and rows[0]["coherent"] < 0.8 * rows[0]["accuracy"],
        f"the bound is below stage 1's, {val.get('denoiser', 0):.2f}, which is of random orders":
            val["order"] < val.get("denoiser", -math.inf)}
    for sign in (sign for sign, seen in signs.items() if seen):
        print(f"There is a better order ({sign}): try more --max_steps_order, or another --seed")


def main(argv=None):
    config, start = parse_config(argv), time.perf_counter()
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    run, resume = prepare(config), None
    if config.chunks % run.world:
        raise UserError(f"--chunks {config.chunks} must be a multiple of {run.world} processes")
    if run.world > 1:
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    if config.resume:
        resume = load_checkpoint(out / "resume.pt")[1]
        if len(resume["states"]) < 3:
            raise UserError(f"{out / 'resume.pt'} is no resume point")
        if resume["pieces"] != run.pieces:
            raise UserError("resume.pt was trained on other data: bring back what --data_dir held")
        run.log = resume["log"]
    stages = [stage for stage in STAGES if stage in config.stages.split(",")]
    if not config.resume and run.rank == 0:  # what an earlier run has left must not be taken up
        (out / "resume.pt").unlink(missing_ok=True)
        if "denoiser" not in stages and (out / "log.jsonl").is_file():
            run.log = [line for line in (out / "log.jsonl").read_text().splitlines(keepends=True)
                       if json.loads(line)["stage"] not in stages]
    try:
        for stage in stages[stages.index(resume["stage"]) if resume else 0 :]:
            train_stage(stage, run, resume if resume and resume["stage"] == stage else None)
    except KeyboardInterrupt:
        again = shlex.join(["python", "train.py", "--resume", "--out_dir", config.out_dir])
        raise UserError(f"stopped; go on with: {again}" if (out / "resume.pt").is_file() else
                        "stopped before the first resume point") from None
    if run.world > 1:
        dist.destroy_process_group()
    if run.rank == 0:
        if "order" in stages:
            final_table(run)
        ckpt = shlex.quote(str(out / "ckpt.pt"))
        print(f"{(time.perf_counter() - start) / 60:.1f} minutes on {run.device}; next: "
              f"python sample.py --steps {config.T} --ckpt {ckpt}")


if __name__ == "__main__":
    run_script(main)
