"""What does a run cost, and how fast is it here? Any flag of train.py will do too; no download.

    python -m tools.bench                                    the toy: training and sampling
    python -m tools.bench --preset gsm8k_aug --tflops 400    a run at this rate, nothing measured
    python -m tools.bench --preset gsm8k_aug                 and on this device, from one example
    python -m tools.bench --preset gsm8k_aug --batch 256 --sample 1,64   on a GPU: whole batches

First what a run costs by formula, then what was measured: medians of --steps rounds of everything
in turn, after a cold one, fewer of what takes long. Untrained weights;
the toy's own items, or random tokens that fill prompt and canvas of the other data sets.

gradient_gflop  of a step: matrix products of the networks, times 3 for backward
update_gflop    of a step: Muon's
state_gb        weights and their gradients, Muon's momentum, AdamW's two averages, float32
activations_gb  what backward keeps of one part of a batch
train, order    the two stages. A step is the gradient of --batch examples, measured, as often as a
                batch has it, and one update
memory_mb       the most so far, on a CPU of the whole process
sample          generate(), learned:0.5, which takes every step if its gates are untrained
causal          left to right by the same network: as many tokens as true answers have on average
"""

import argparse
import functools
import itertools
import math
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

import train
from common import path_to_write, pick_device, run_script, say, versions, write_json
from model import MDM, save_checkpoint, trim
from posterior import OrderPosterior
from sample import generate, parse_steps, whole_number

STEPS = ("1", "4", "16", "L")


# --- what is measured -----------------------------------------------------------------------------

@torch.no_grad()
def write_causally(model: MDM, prompt, n: int, dtype=torch.float32):
    """The twin: logits (B, n, V) of n tokens, likeliest first, after prompts (B, P) without padding
    where a token sees what is before it. Their keys and values are kept, in this dtype."""
    B, P = prompt.shape
    c = model.config
    caches = prompt.new_empty((c.n_layer, B, 2, c.n_head, P + n, c.n_embd // c.n_head), dtype=dtype)
    logits = []
    new = prompt                      # the tokens that are read now
    position = 0                      # of the first of them
    for S in range(P, P + n):         # all tokens so far
        old = S - new.shape[1]
        x, rotation = model.trunk.embed(new, position)
        attend = torch.ones(S - old, S, dtype=torch.bool, device=x.device).tril(old)
        for block, cache in zip(model.trunk.blocks, caches):
            cache[..., old:S, :] = block.keys_values(x, rotation)
            x = block(x, rotation, cache[..., :S, :], attend)
        logits.append(model.token_head(model.trunk.norm(x[:, -1])))
        new = logits[-1].argmax(-1, keepdim=True)
        position = c.prompt_len + S - P
    return torch.stack(logits, 1)


def make_run(c: train.Config) -> train.Run:
    """What train.py prepares, without a download."""
    if c.dataset.startswith("toy"):
        return train.prepare(replace(c, train_items=2000))
    prompt = torch.randint(256 + c.n_pieces, (512, c.prompt_len))
    x0 = torch.randint(256 + c.n_pieces, (512, c.answer_len))
    pieces = [f" {i}" for i in range(c.n_pieces)]
    return train.Run(c, pick_device(c.device), pieces, [], (prompt, x0), (prompt, x0))


def forward_flops(c, B: int, P: int, states=1, written=0.0) -> float:
    """Matrix products, 2 per multiply-add: B prompts of P tokens, `states` canvases each, token
    head at `written` positions in all. The matrices of a block have 12 D^2 weights."""
    D = c.n_embd
    L = c.answer_len
    read = (c.n_layer - 1) * (24 * D * D * P + 4 * P * P * D) + 4 * D * D * P  # last: only k and v
    write = c.n_layer * (24 * D * D * L + 4 * L * (P + L) * D)
    return B * (read + states * write) + 2 * D * c.vocab_size * written


def update_flops(network) -> float:
    """Matrix products of Muon's five Newton-Schulz steps: three for each matrix of a block."""
    total = 0
    for name, p in network.named_parameters():
        if ".blocks." in name and p.ndim == 2:
            short, long = sorted(p.shape)
            total += 5 * (4 * short**2 * long + 2 * short**3)
    return total


def activation_bytes(c, B: int, P: int, states: int, written: float, half: bool) -> float:
    """What backward keeps of one pass, within 10 %: 15.5 numbers a token, block and channel, the
    keys and values of prompt and canvas once a state, and the logits of `written` positions. With
    autocast to bfloat16 two thirds of it."""
    L = c.answer_len
    tokens = B * (P + states * L)
    attended = 2 * B * states * (P + L)
    kept = c.n_layer * c.n_embd * (15.5 * tokens + attended)
    return 4 * kept * (0.67 if half else 1) + 4 * c.vocab_size * written


def costs(stage: str, run: train.Run) -> dict:
    """What a stage costs by formula, without a weight in memory."""
    c = run.config
    steps, B = train.stage_size(stage, c)
    sizes = run.sizes
    of_posterior = replace(sizes, n_layer=c.n_layer_posterior)
    with torch.device("meta"):
        networks = [MDM(sizes)]
        if stage == "order":
            networks.append(OrderPosterior(of_posterior))
    state = 0
    for network in networks:
        for name, p in network.named_parameters():
            copies = 3 if ".blocks." in name and p.ndim == 2 else 4  # Muon has one state less
            state += 4 * copies * p.numel()

    prompt, _ = train.batch_at(run, stage, 0, B)
    P = prompt.shape[1]
    states = 1
    written = B * c.answer_len / 2             # half a canvas is masked on average
    if stage == "order":
        states = 1 + c.K
        written *= states + 1                  # but all of it for L_1
    flops = forward_flops(sizes, B, P, states, written)
    kept = activation_bytes(sizes, B, P, states, written, run.half)
    if stage == "order":
        flops += forward_flops(of_posterior, B, P)
        kept += activation_bytes(of_posterior, B, P, 1, 0, run.half)
    updates = sum(update_flops(network) for network in networks)
    return {"parameters": sum(p.numel() for network in networks for p in network.parameters()),
            "steps": steps, "examples": B, "tokens": B * (P + states * c.answer_len),
            "gradient_gflop": 3e-9 * flops, "update_gflop": 1e-9 * updates,
            "pflop_in_all": steps * (3 * flops + updates) / 1e15,
            "state_gb": state / 1e9, "activations_gb": kept / c.chunks / 1e9}


def training(stage: str, run: train.Run, batch: int, compiled=False) -> tuple[dict, int]:
    """Jobs, the gradient of a part of a step and the update; and the examples of a part."""
    c = run.config
    steps, B = train.stage_size(stage, c)
    part = min(batch, B)
    small = replace(run, config=replace(c, batch_size=part, batch_size_order=part, chunks=1))
    networks, optimizers = train.build_stage(stage, run)
    if compiled:
        for network in networks:
            network.compile()

    # Successive steps, for the order stage takes another budget T in each.
    step = itertools.count()

    def gradient():
        i = next(step) % steps
        prompt, x0 = train.batch_at(small, stage, i, part)
        train.compute_gradient(stage, small, networks, prompt, x0, i)

    def update():
        train.set_rates(optimizers, 0.01)
        train.update(networks, optimizers)

    return {f"{stage} gradient": gradient, f"{stage} update": update}, part


def sampling(run: train.Run, model: MDM, batches: list[int], autocast, dtype) -> tuple[dict, float]:
    """Jobs {(T or "causal", B): job} that write at least 8 answers each, so that they take their
    time; and how many tokens a true answer has on average."""
    device = run.device
    lengths = (run.val[1] < run.sizes.eos).sum(-1) + 1                    # with EOS
    tokens = lengths.clamp(max=run.config.answer_len).double().mean().item()

    def write_all(prompts, T):
        with autocast:
            for prompt in prompts:
                if T == "causal":
                    write_causally(model, prompt, round(tokens), dtype)
                else:
                    generate(model, prompt, parse_steps(T), "learned:0.5")

    jobs = {}
    for B in batches:
        rows = torch.arange(max(B, 8)) % len(run.val[0])
        prompts = trim(run.val[0][rows], run.sizes.pad).to(device).split(B)
        for T in (*STEPS, "causal"):
            jobs[T, B] = functools.partial(write_all, prompts, T)
    return jobs, tokens


# --- how it is measured ---------------------------------------------------------------------------

def clock(job, device) -> float:
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def peak_memory(device) -> float:
    """Bytes; nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has none
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(jobs: dict, rounds: int, device) -> dict:
    """Median seconds of each job: a cold round, then all in turn. Of what takes long there are as
    many rounds as fit into 10 seconds; if none does, the cold one counts."""
    cold = {name: clock(job, device) for name, job in jobs.items()}
    repeats = {name: min(rounds, int(10 / seconds)) for name, seconds in cold.items()}
    times = {name: [cold[name]] if repeats[name] == 0 else [] for name in jobs}
    for i in range(rounds):
        for name, job in jobs.items():
            if i < repeats[name]:
                times[name].append(clock(job, device))
    return {name: median(seconds) for name, seconds in times.items()}


def bench(run: train.Run, args) -> dict:
    c = run.config
    device = run.device
    dtype = torch.bfloat16 if run.half else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.half)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    result = {"train": costs("denoiser", run), "order": costs("order", run),
              "meta": {"device": name, "threads": torch.get_num_threads(), "dtype": str(dtype),
                       **versions(), "args": {**vars(args), "json": str(args.json)},
                       "config": asdict(c)}}
    stages = {"denoiser": result["train"], "order": result["order"]}
    if args.tflops:
        for facts in stages.values():
            facts["hours"] = facts["pflop_in_all"] / args.tflops / 3.6
        return result
    show_costs(result)

    # Jobs: steps of both stages, one large matrix product, answers.
    model = MDM(run.sizes).to(device)
    save_checkpoint(Path(c.out_dir) / "denoiser.pt", model, pieces=run.pieces,
                    train_config=asdict(c), stage="denoiser", step=0, log=[])
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    written, answer_tokens = sampling(run, model, args.sample, autocast, dtype)
    seconds = measure({"matmul": lambda: a @ b, **written}, args.steps, device)
    gflops = 2e-9 * side**3 / seconds["matmul"]
    for stage, facts in stages.items():
        jobs, part = training(stage, run, args.batch, args.compile)
        seconds |= measure(jobs, args.steps, device)
        parts = facts["examples"] / part
        step = parts * seconds[f"{stage} gradient"] + seconds[f"{stage} update"]
        work = facts["gradient_gflop"] + facts["update_gflop"]
        facts |= {"part": part, "seconds": step, "steps_per_s": 1 / step,
                  "tokens_per_s": facts["tokens"] / step, "share_of_matmul": work / step / gflops,
                  "hours": facts["steps"] * step / 3600, "memory_mb": peak_memory(device) / 1e6}
    rate = {}
    for T in (*STEPS, "causal"):
        rate[T] = {B: max(B, 8) / seconds[T, B] for B in args.sample}
    return result | {"matmul_gflops": gflops, "causal_twin": rate.pop("causal"), "sample": rate,
                     "answer_tokens": answer_tokens}


def show_costs(result: dict):
    """The table of both stages: a row for each fact that is known by now."""
    say(f"{'':<16}{'train':>14}{'order':>14}")
    for name in result["train"]:
        cells = []
        for stage in ("train", "order"):
            value = result[stage][name]
            cells.append(f"{value:>14,.6g}" if isinstance(value, float) else f"{value:>14,}")
        say(f"{name:<16}" + "".join(cells))
    say()


def show(result: dict):
    meta = {name: value for name, value in result["meta"].items() if name not in ("args", "config")}
    if "matmul_gflops" not in result:  # nothing was measured
        show_costs(result)
        return
    say(", ".join(f"{name} {value}" for name, value in meta.items()))
    say(f"matmul {result['matmul_gflops']:.1f} GFLOP/s")
    show_costs(result)
    for T, rates in {**result["sample"], "causal": result["causal_twin"]}.items():
        for B, rate in rates.items():
            say(f"sample, steps {T:<8}batch {B:<4}{rate:>9.2f} answers/s"
                f"{rate * result['answer_tokens']:>9.0f} tokens/s")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole_number, default=5, help="rounds")
    parser.add_argument("--batch", type=whole_number,
                        help="examples of a part: all of a toy's batch, 1 of another's")
    parser.add_argument("--sample",
                        help="answers written at once: 1,64 of a toy, none of another; empty: none")
    parser.add_argument("--tflops", type=float,
                        help="measure nothing: hours at this rate, 10^12 operations a second")
    parser.add_argument("--compile", action="store_true", help="torch.compile in training")
    parser.add_argument("--json", type=path_to_write, default="out/bench.json",
                        help="file to write")
    args, rest = parser.parse_known_args(argv)
    config = train.parse_config(rest)
    toy = config.dataset.startswith("toy")
    if args.batch is None:
        args.batch = max(config.batch_size, config.batch_size_order) if toy else 1
    if args.sample is None:
        args.sample = "1,64" if toy else ""
    try:
        args.sample = [whole_number(text) for text in args.sample.split(",") if text]
    except argparse.ArgumentTypeError as e:
        parser.error(f"--sample: {e}")
    if args.tflops is not None and not 0 < args.tflops < math.inf:
        parser.error(f"--tflops {args.tflops}: want a number above 0")
    with tempfile.TemporaryDirectory() as folder:
        result = bench(make_run(replace(config, out_dir=folder)), args)
    write_json(args.json, result)
    show(result)


if __name__ == "__main__":
    run_script(main)
