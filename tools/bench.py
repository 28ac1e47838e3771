"""How fast is it, against what the machine can do? Any flag of train.py will do too; no download.

    python -m tools.bench                                 the toy, training and sampling
    python -m tools.bench --preset gsm8k_aug --batch 1 --steps 1 --sample ""   a run on this CPU?

Medians of --steps rounds of everything in turn, after a cold one. Untrained weights; the toy's own
items, or random tokens that fill prompt and canvas of the other data sets.

train   stage 1 (and order), steps of train.py. With --batch a smaller step is measured, times the
        parts, which counts the update too often. gflop: matrix products of the networks by
        formula, times 3 for backward; critic and Muon only take time. memory_mb: the most so far,
        on a CPU of the whole process
sample  generate(), learned:0.5. Untrained gates are closed, so every step is taken
causal  left to right by the same network: as many tokens as true answers have on average
"""

import argparse
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
from common import UserError, path_of, pick_device, run_script, versions, write_json
from model import MDM, save_checkpoint, trim
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


def training(stage: str, run: train.Run, batch: int, compiled=False):
    """A job, train.py's step on at most `batch` of its examples, and facts of a whole step."""
    c = run.config
    steps, B = train.stage_size(stage, c)
    networks, optimizers = train.build_stage(stage, run)
    if compiled:
        for network in networks:
            network.compile()

    # How much work is a whole step?
    prompt, _ = train.batch_at(run, stage, 0, B)
    P = prompt.shape[1]
    states = 1
    written = B * c.answer_len / 2             # half a canvas is masked on average
    if stage == "order":
        states = 1 + c.K
        written *= states + 1                  # but all of it for L_1
    flops = forward_flops(run.sizes, B, P, states, written)
    if stage == "order":
        flops += forward_flops(replace(run.sizes, n_layer=c.n_layer_posterior), B, P)
    parameters = [p.numel() for network in networks for p in network.parameters()]
    facts = {"parameters": sum(parameters), "steps": steps,
             "tokens": B * (P + states * c.answer_len), "gflop": 3e-9 * flops,
             "parts": math.ceil(B / batch)}

    # Successive steps, for the order stage takes another budget T in each.
    part = min(batch, B)
    small = replace(run, config=replace(c, batch_size=part, batch_size_order=part))
    step = itertools.count()

    def job():
        train.train_step(stage, small, networks, optimizers, step=next(step) % steps)

    return job, facts


def sampling(run: train.Run, model: MDM, batches: list[int], autocast, dtype) -> tuple[dict, float]:
    """Jobs {(T or "causal", B): job} that write at least 8 answers each, so that they take their
    time; and how many tokens a true answer has on average."""
    device = run.device
    lengths = (run.val[1] < run.sizes.eos).sum(-1) + 1                    # with EOS
    tokens = lengths.clamp(max=run.config.answer_len).double().mean().item()
    jobs = {}
    for B in batches:
        rows = torch.arange(max(B, 8)) % len(run.val[0])
        prompts = trim(run.val[0][rows], run.sizes.pad).to(device).split(B)

        def write_by(write):
            def job():
                with autocast:
                    for prompt in prompts:
                        write(prompt)
            return job

        for T in STEPS:
            steps = parse_steps(T)
            jobs[T, B] = write_by(
                lambda prompt, steps=steps: generate(model, prompt, steps, "learned:0.5"))
        jobs["causal", B] = write_by(
            lambda prompt: write_causally(model, prompt, round(tokens), dtype))
    return jobs, tokens


# --- how it is measured ---------------------------------------------------------------------------

def clock(job, device) -> float:
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
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


def bench(run: train.Run, args) -> dict:
    c = run.config
    device = run.device
    half = c.dtype == "bfloat16" or (c.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
    model = MDM(run.sizes).to(device)
    save_checkpoint(Path(c.out_dir) / "denoiser.pt", model, pieces=run.pieces,
                    train_config=asdict(c), stage="denoiser", step=0, log=[])

    # Jobs: steps of both stages, one large matrix product, answers.
    jobs = {}
    result = {}
    for stage in ("denoiser", "order"):
        jobs[stage], result[stage] = training(stage, run, args.batch, args.compile)
        jobs[stage]()
        result[stage]["memory_mb"] = peak_memory(device) / 1e6
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    jobs["matmul"] = lambda: a @ b
    written, answer_tokens = sampling(run, model, args.sample, autocast, dtype)
    jobs |= written

    # A cold round, then rounds of everything in turn.
    for name, job in jobs.items():
        if name not in result:  # the two stages have had their step
            clock(job, device)
    rounds = []
    for _ in range(args.steps):
        rounds.append({name: clock(job, device) for name, job in jobs.items()})
    seconds = {name: median(times[name] for times in rounds) for name in jobs}

    gflops = 2e-9 * side**3 / seconds["matmul"]
    for stage, facts in result.items():
        whole = facts["parts"] * seconds[stage]
        facts |= {"seconds": whole, "steps_per_s": 1 / whole,
                  "tokens_per_s": facts["tokens"] / whole,
                  "share_of_matmul": facts["gflop"] / whole / gflops,
                  "hours": facts["steps"] * whole / 3600}
    rate = {}
    for T in (*STEPS, "causal"):
        rate[T] = {B: max(B, 8) / seconds[T, B] for B in args.sample}
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return {"matmul_gflops": gflops, "train": result["denoiser"], "order": result["order"],
            "causal_twin": rate.pop("causal"), "sample": rate, "answer_tokens": answer_tokens,
            "meta": {"device": name, "threads": torch.get_num_threads(), "dtype": str(dtype),
                     **versions(), "args": {**vars(args), "json": str(args.json)},
                     "config": asdict(c)}}


def show(result: dict):
    meta = {name: value for name, value in result["meta"].items() if name not in ("args", "config")}
    print(", ".join(f"{name} {value}" for name, value in meta.items()))
    print(f"matmul {result['matmul_gflops']:.1f} GFLOP/s")
    print(f"{'a step':<18}{'train':>14}{'order':>14}")
    for name in result["train"]:
        cells = []
        for stage in ("train", "order"):
            value = result[stage][name]
            cells.append(f"{value:>14,.6g}" if isinstance(value, float) else f"{value:>14,}")
        print(f"{name:<18}" + "".join(cells))
    for T, rates in {**result["sample"], "causal": result["causal_twin"]}.items():
        for B, rate in rates.items():
            print(f"sample, steps {T:<8}batch {B:<4}{rate:>9.2f} answers/s"
                  f"{rate * result['answer_tokens']:>9.0f} tokens/s")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole_number, default=5, help="rounds")
    parser.add_argument("--batch", type=whole_number, default=10**9, help="examples of a part")
    parser.add_argument("--sample", default="1,64", help="answers written at once; empty: none")
    parser.add_argument("--compile", action="store_true", help="torch.compile in training")
    parser.add_argument("--json", type=path_of, default="out/bench.json", help="file to write")
    args, rest = parser.parse_known_args(argv)
    try:
        args.sample = [whole_number(text) for text in args.sample.split(",") if text]
    except argparse.ArgumentTypeError as e:
        parser.error(f"--sample: {e}")
    if args.json.is_dir():
        raise UserError(f"--json {args.json} is a folder: name a file")
    config = train.parse_config(rest)
    with tempfile.TemporaryDirectory() as folder:
        result = bench(make_run(replace(config, out_dir=folder)), args)
    write_json(args.json, result)
    show(result)


if __name__ == "__main__":
    run_script(main)
