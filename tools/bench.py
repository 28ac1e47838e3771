"""How fast is it, against what the machine can do? Any flag of train.py will do too; no download.

    python -m tools.bench                                 the toy, training and sampling
    python -m tools.bench --preset gsm8k_aug --batch 1 --steps 1 --sample ""   a run on this CPU?

Medians of --steps rounds of everything in turn, after a cold one. Untrained weights; the toy's own
items, or random tokens that fill GSM8K's prompt and canvas.
train   stage 1 (and order), steps of train.py; with --batch a smaller step is measured, times the
        parts, which counts the update too often. gflop: matrix products of the networks by
        formula, times 3 for backward; critic and Muon only take time. memory_mb: the most so far,
        on a CPU of the whole process
sample  generate(), learned:0.5. Untrained gates are closed, so every step is taken
causal  left to right by the same network: as many tokens as true answers have on average
"""

import argparse
import resource
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

import train
from data import run_script
from eval_gsm8k import write_json
from model import MDM, pick_device, save_checkpoint, trim, versions
from sample import generate, parse_steps

STEPS = ("1", "4", "16", "L")


@torch.no_grad()
def write_causally(model: MDM, prompt, n: int, dtype=torch.float32):
    """The twin: logits (B, n, V) of n tokens, likeliest first, after prompts (B, P) without padding
    where a token sees what is before it. Their keys and values are kept, in this dtype."""
    (B, P), c, logits, new, start = prompt.shape, model.config, [], prompt, 0
    size = c.n_layer, B, 2, c.n_head, P + n, c.n_embd // c.n_head
    caches = prompt.new_empty(size, dtype=dtype)
    for S in range(P, P + n):  # the tokens so far
        (x, cos, sin), old = model.trunk.enter(new, start), S - new.shape[1]
        attend = torch.ones(S - old, S, dtype=torch.bool, device=x.device).tril(old)
        for block, cache in zip(model.trunk.blocks, caches):
            cache[..., old:S, :] = block.keys_values(x, cos, sin)
            x = block(x, cos, sin, cache[..., :S, :], attend)
        logits.append(model.token_head(model.trunk.norm(x[:, -1])))
        new, start = logits[-1].argmax(-1, keepdim=True), c.prompt_len + S - P
    return torch.stack(logits, 1)


def make_run(c: train.Config) -> train.Run:
    if c.dataset.startswith("toy"):
        return train.prepare(replace(c, train_items=2000))
    data = [torch.randint(256 + c.n_pieces, (512, n)) for n in (c.prompt_len, c.answer_len)]
    return train.Run(c, pick_device(c.device), [f" {i}" for i in range(c.n_pieces)], [], data, data)


def forward_flops(c, B: int, P: int, states=1, written=0.0) -> float:
    """Matrix products, 2 per multiply-add: B prompts of P tokens, `states` canvases each, token
    head at `written` positions in all. The matrices of a block have 12 D^2 weights."""
    D, L = c.n_embd, c.answer_len
    read = (c.n_layer - 1) * (24 * D * D * P + 4 * P * P * D) + 4 * D * D * P  # last: only k and v
    write = c.n_layer * (24 * D * D * L + 4 * L * (P + L) * D)
    return B * (read + states * write) + 2 * D * c.vocab_size * written


def training(stage: str, run: train.Run, batch: int, compiled=False):
    """A job, train.py's step on at most `batch` of its examples, and facts of a whole step."""
    c, order = run.config, stage == "order"
    steps, B = train.stage_size(stage, c)
    *networks, optimizers = train.build_stage(stage, run)
    [network.compile() for network in networks if network and compiled]
    part = min(batch, B)
    small = replace(run, config=replace(c, batch_size=part, batch_size_order=part))
    P, states = train.batch_at(run, stage, 0, B)[0].shape[1], 1 + c.K * order
    written = B * c.answer_len * (states + order) / 2  # half a canvas on average, but all for L_1
    flops = forward_flops(run.sizes, B, P, states, written) + \
        order * forward_flops(replace(run.sizes, n_layer=c.n_layer_posterior), B, P)
    return lambda: train.train_step(stage, small, *networks, optimizers, step=0), {
        "parameters": sum(p.numel() for network in networks if network
                          for p in network.parameters()),
        "steps": steps, "tokens": B * (P + states * c.answer_len), "gflop": 3e-9 * flops,
        "parts": -(-B // part)}


def clock(job, device) -> float:
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench(run: train.Run, args) -> dict:
    c, device, jobs, result = run.config, run.device, {}, {}
    model, batches = MDM(run.sizes).to(device), [int(B) for B in args.sample.split(",") if B]
    save_checkpoint(Path(c.out_dir) / "denoiser.pt", model, pieces=run.pieces,
                    train_config=asdict(c), stage="", step=0, log=[], states=[])
    for stage in ("denoiser", "order"):
        jobs[stage], result[stage] = training(stage, run, args.batch, args.compile)
        jobs[stage]()
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result[stage]["memory_mb"] = peak / 1e6
    bfloat16 = c.dtype == "bfloat16" or c.dtype == "auto" and device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    side, dtype = (8192, 2048)[device.type == "cpu"], (torch.float32, torch.bfloat16)[bfloat16]
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    jobs["matmul"] = lambda: a @ b
    tokens = (run.val[1] < run.sizes.eos).sum(-1).add(1).clamp(max=c.answer_len).float().mean()
    for B in batches:  # at least 8 answers, so that it takes its time
        rows = torch.arange(max(B, 8)) % len(run.val[0])
        prompts = trim(run.val[0][rows], run.sizes.pad).to(device).split(B)
        for T in STEPS:
            jobs[T, B] = lambda prompts=prompts, T=parse_steps(T): [
                autocast(generate)(model, prompt, T, "learned:0.5") for prompt in prompts]
        jobs["causal", B] = lambda prompts=prompts: [
            autocast(write_causally)(model, p, round(tokens.item()), dtype) for p in prompts]
    for job in [*jobs.values()][2:]:  # cold; the two stages have had their step
        clock(job, device)
    rounds = [{name: clock(job, device) for name, job in jobs.items()} for _ in range(args.steps)]
    seconds = {name: median(times[name] for times in rounds) for name in jobs}
    gflops = 2e-9 * side**3 / seconds["matmul"]
    for stage, facts in result.items():
        s = facts["parts"] * seconds[stage]
        facts |= {"seconds": s, "steps_per_s": 1 / s, "tokens_per_s": facts["tokens"] / s,
                  "share_of_matmul": facts["gflop"] / s / gflops,
                  "hours": facts["steps"] * s / 3600}
    rate = {T: {B: max(B, 8) / seconds[T, B] for B in batches} for T in (*STEPS, "causal")}
    return {"matmul_gflops": gflops, "train": result["denoiser"], "order": result["order"],
            "causal_twin": rate.pop("causal"), "sample": rate, "answer_tokens": tokens.item(),
            "meta": {"device": torch.cuda.get_device_name() if device.type == "cuda" else
                     device.type, "threads": torch.get_num_threads(), "dtype": str(dtype),
                     **versions(), "args": vars(args), "config": asdict(c)}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=parse_steps, default=5, help="rounds")
    parser.add_argument("--batch", type=parse_steps, default=10**9, help="examples of a part")
    parser.add_argument("--sample", default="1,64", help="answers written at once; empty: none")
    parser.add_argument("--compile", action="store_true", help="torch.compile in training")
    parser.add_argument("--json", default="out/bench.json", help="where to write the results")
    args, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = bench(make_run(replace(train.parse_config(rest), out_dir=folder)), args)
    write_json(Path(args.json), result)
    print(*(f"{k} {v}," for k, v in result["meta"].items() if k not in ("args", "config")),
          f"matmul {result['matmul_gflops']:.1f} GFLOP/s\n{'a step':<18}{'train':>14}{'order':>14}")
    for name in result["train"]:
        values = result["train"][name], result["order"][name]
        print(f"{name:<18}" + "".join(f"{v:>14,.6g}" if isinstance(v, float) else f"{v:>14,}"
                                      for v in values))
    for T, rates in {**result["sample"], "causal": result["causal_twin"]}.items():
        for B, rate in rates.items():
            print(f"sample, steps {T:<8}batch {B:<4}{rate:>9.2f} answers/s"
                  f"{rate * result['answer_tokens']:>9.0f} tokens/s")


if __name__ == "__main__":
    run_script(main)
