"""Speed on this machine, beside two yardsticks: its own matrix products, and a causal twin of the model.

    python bench.py                                     the toy's sizes, minutes on 2 CPU cores
    python bench.py --preset gsm8k --dtype bfloat16     any flag of train.py; random tokens where there is no data
    python bench.py --ckpt out/ckpt.pt --json out/bench.json

matmul    square matrix products in the run's dtype: what the machine can do
stage 1   whole training steps: batch, forward, backward, clipping, optimizers. Its share of matmul counts the matrix
          products alone: those of the forward pass as they run (prompts trimmed, token head at masked positions only,
          attention's scores and values), 2 FLOPs per multiply-add, times 3 for forward and backward. Embeddings, norms,
          softmax and Muon's products do no counted work, only take time
order     the order stage, in network states (batch_size_order * (1 + K) a step); `cost` is its seconds per state over those of
          stage 1's loss on as many rows a step
sample    answers by greedy gates, learned:0.5, in at most so many steps; finished rows leave the batch. Without
          --ckpt the gates are untrained, all closed, and every step but the last reveals a single token
twin      the same network read causally, with a key-value cache: one greedy token per forward pass. Its weights are
          random, so it is told where to stop: after as many tokens as the true answer has, EOS included

Answer tokens are those of the true answers. Each number is a median over --rounds, taken in turn, so that the first and
cold one does not count. Memory is the most that one call has allocated at a time, beyond the networks and what else stood
before it; on a CPU torch's profiler adds up what tensors take and give back.

costs     with --costs: seconds of a step of stage 1 and of the order stage where L, K, T or n_layer is half or double, on
          random tokens, so that the data cuts nothing off

`train.py --dry_run` is here too. Parameters, optimizer states and Muon's FLOPs are those of networks without memory
(torch's meta device). FLOPs of forward and backward, activations (what autograd keeps for backward, each storage once)
and seconds grow evenly with the examples and with the blocks of each network, so few examples and one and two blocks
tell the rest. Seconds of an update are taken in proportion to Muon's FLOPs.
"""

import argparse
import copy
import dataclasses
import datetime
import itertools
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Split, UserError, build_tokenizer, cli
from eval_gsm8k import versions, write_json
from model import MDM, denoiser_elbo, load_checkpoint, pick_device, trim
from sample import generate, parse_steps
from train import Config, Run, batch_at, build_stage, parse_config, prepare, seed_of, size_of, stage_objective

AT_LEAST = 0.3  # seconds that one measurement lasts, so that short jobs are called many times

# --- the causal twin -------------------------------------------------------------------------------------

class CausalTwin(MDM):
    """The same network, left to right: a token sees the prompt and the answer before it, and predicts the next."""

    def go_on(self, tokens, start: int, attend, caches):
        """Hidden states (B, n, D) of the n newest tokens, which stand at places from `start` on. attend (B, 1, 1 or n, S)
        bool: which of the S tokens so far, the newest included, each may see. caches: keys and values (B, 2, H, at
        least S, D/H) of each block."""
        n, S = tokens.shape[1], attend.shape[-1]
        x, cos, sin = self.trunk.enter(tokens, start)
        for block, cache in zip(self.trunk.blocks, caches):
            cache[..., S - n : S, :] = block.keys_values(x, cos, sin)
            x = block(x, cos, sin, cache[..., :S, :], attend)
        return self.trunk.norm(x)

    @torch.no_grad()
    def write(self, prompt, lengths, dtype=None):
        """Greedy answers (B, longest), row b for lengths[b] tokens and PAD after them. prompt (B, P'), padded at the end;
        dtype: of the cache."""
        (B, P), config, longest = prompt.shape, self.config, int(lengths.max())
        size = (B, 2, config.n_head, P + longest, config.n_embd // config.n_head)
        caches = [self.token_head.weight.new_empty(size, dtype=dtype) for _ in self.trunk.blocks]
        causal = torch.ones(P, P, dtype=torch.bool, device=prompt.device).tril()
        seen = torch.cat([prompt != config.pad, prompt.new_ones(B, longest, dtype=torch.bool)], 1)[:, None, None]  # (B, 1, 1, S)
        h = self.go_on(prompt, 0, seen[..., :P] & causal, caches)
        rows, answer = torch.arange(B, device=prompt.device), prompt.new_full((B, longest), config.pad)
        h = h[rows, (prompt != config.pad).sum(-1) - 1]                                        # of the last prompt token
        for i in range(longest):
            token = self.token_head(h).argmax(-1)
            answer[rows, i] = token
            unfinished = lengths[rows] > i + 1
            if not unfinished.all():
                rows, token, seen, caches = rows[unfinished], token[unfinished], seen[unfinished], [c[unfinished] for c in caches]
            if len(rows) == 0:
                break
            h = self.go_on(token[:, None], config.prompt_len + i, seen[..., : P + i + 1], caches)[:, 0]
        return answer


# --- what is measured ------------------------------------------------------------------------------------

def make_run(config: Config) -> Run:
    """The data that training would use; random tokens where it is not on disk: prompts and answers that fill half to all
    of their canvas."""
    if config.dataset.startswith("toy") or config.data_dir:
        return prepare(config)
    V, n, generator = 256 + config.n_pieces + 2, 2048, torch.Generator().manual_seed(config.seed)

    def draw(length):
        lengths = torch.randint((length + 1) // 2, length + 1, (n, 1), generator=generator)
        return torch.randint(V - 2, (n, length), generator=generator).masked_fill(torch.arange(length) >= lengths, V - 1), lengths

    (prompt, _), (x0, lengths) = draw(config.prompt_len), draw(config.answer_len)
    pieces = [f"piece {i}" for i in range(config.n_pieces)]
    split = Split(prompt, x0.scatter(1, lengths - 1, V - 2), [True] * n)
    return Run(dataclasses.replace(config, augment=0.0), pick_device(config.device), {}, pieces, build_tokenizer(pieces), split, split, 0)


def forward_size(run: Run, model: MDM, n: int = 8) -> tuple[float, float]:
    """FLOPs and tokens of stage 1's forward pass, mean of its first n batches. FLOPs are torch's count of the matrix
    products that run, two per multiply-add; plain attention stands in for the fused kernels, not all of which it knows."""
    config, tokens = run.config, 0
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for i in range(n):
            prompt, x0 = batch_at(run, "denoiser", i, config.batch_size)
            denoiser_elbo(model, prompt, x0, torch.Generator(run.device).manual_seed(seed_of(config.seed, "denoiser", i)))
            tokens += prompt.numel() + x0.numel()
    return counter.get_total_flops() / n, tokens / n


def fresh(stage: str, run: Run):
    """What a stage trains, its denoiser untrained."""
    return build_stage(stage, run, build_stage("denoiser", run)[0])


def training(stage: str, run: Run, built):
    """Three jobs on what build_stage gave: a whole step of train_stage; its gradients alone, of the first n examples of step i's batch; its
    clipping and optimizers alone, on the last gradients."""
    config, counter, batch_size = run.config, itertools.count(), size_of(stage, run.config)[1]
    model, posterior, optimizers = built
    params = [p for module in (model, posterior) if module for p in module.parameters() if p.requires_grad]

    def gradients(i: int, n: int | None = None):
        prompt, x0 = batch_at(run, stage, i, batch_size)
        generator = torch.Generator(run.device).manual_seed(seed_of(config.seed, stage, i))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.autocast):
            objective, _ = stage_objective(stage, run, model, posterior, prompt[:n], x0[:n], 1.0, generator)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (-objective / config.answer_len).backward()

    def step():
        gradients(next(counter))
        update()

    def update():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return step, gradients, update


def variants_of(run: Run) -> dict[str, Run]:
    """This run on random tokens, and with one size half and double, where that is allowed and another."""
    given = dataclasses.replace(run.config, dataset="gsm8k", data_dir="", augment=0.0, n_pieces=len(run.pieces))
    configs = {"as given": given}
    for name, least in (("answer_len", 1), ("K", 2), ("T", 1), ("n_layer", 1)):
        size = getattr(given, name)
        configs |= {f"{name} {n}": dataclasses.replace(given, **{name: n}) for n in (max(size // 2, least), 2 * size) if n != size}
    return {name: make_run(config) for name, config in configs.items()}


def answering(run: Run, batch: int, answer):
    """A job: `answer` to the next `batch` validation items, called with prompts (batch, P') and true answers (batch, L)."""
    counter = itertools.count()

    def job():
        rows = (torch.arange(batch) + batch * next(counter)) % len(run.val.x0)
        pad = run.enc.n_vocab - 2
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.autocast):
            answer(trim(run.val.prompt[rows], pad).to(run.device), run.val.x0[rows].to(run.device))

    return job


def answer_lengths(x0, eos: int):
    """Tokens of each answer up to EOS, which counts: (B, L) -> (B,)."""
    return (x0 < eos).sum(-1) + 1


# --- what a run will take ----------------------------------------------------------------------------------

def kept_bytes(job) -> int:
    """Bytes that autograd keeps for backward during a job, each storage once; no weights, nor autocast's copies of them."""
    storages = {}

    def pack(x):
        node = x.grad_fn
        while node and node.name() in ("TBackward0", "ToCopyBackward0"):
            node = node.next_functions[0][0]
        if not isinstance(x, torch.nn.Parameter) and not hasattr(node, "variable"):  # a leaf's node has its variable
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        job()
    return sum(storages.values())


def held(stage: str, run: Run) -> dict:
    """Parameters of a stage's networks; bytes of weights, gradients and optimizer states; FLOPs of an update (Muon's)."""
    run = dataclasses.replace(run, device=torch.device("meta"))
    with run.device:  # shapes without memory
        model, posterior, optimizers = fresh(stage, run)
    params = [list(module.parameters()) for module in (model, posterior) if module]
    trained = [p for p in sum(params, []) if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p)
    with FlopCounterMode(display=False) as counter:
        for optimizer in optimizers:
            optimizer.step()
    states = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    return {"parameters": [sum(p.numel() for p in module) for module in params], "update_flops": counter.get_total_flops(),
            "held_bytes": sum(x.nbytes for x in sum(params, []) + trained + states)}


def per_example(stage: str, run: Run, rows: int) -> dict:
    """FLOPs, bytes kept for backward and seconds of the gradients of one example, from as few of `rows` as take
    AT_LEAST seconds (`measured`), and seconds of an update; see the top of this file."""
    config, n, seconds = run.config, 0, 0.0
    small = {depth: dataclasses.replace(run, config=dataclasses.replace(config, n_layer=depth[0], n_layer_posterior=depth[1]))
             for depth in ((1, 1), (2, 1), (1, 2)) if stage == "order" or depth[1] == 1}
    built = {depth: fresh(stage, s) for depth, s in small.items()}
    if stage == "order":  # new blocks are the identity: with the rest the same, so are the orders, and the work they make
        for _, posterior, _ in built.values():
            posterior.load_state_dict(built[1, 1][1].state_dict(), strict=False)
    jobs = {depth: training(stage, s, built[depth]) for depth, s in small.items()}
    jobs[1, 1][1](0, 1)  # cold, does not count
    while n == 0 or seconds < AT_LEAST and n < rows:
        n, start = min(max(2 * n, 1), rows), time.perf_counter()
        jobs[1, 1][1](0, n)
        synchronize(run.device)
        seconds = time.perf_counter() - start
    update, jobs = jobs[1, 1][2], {depth: lambda gradients=gradients: gradients(0, n) for depth, (_, gradients, _) in jobs.items()}
    flops, kept = {}, {depth: kept_bytes(job) for depth, job in jobs.items()}
    for depth, job in jobs.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            job()
        flops[depth] = counter.get_total_flops()
    seconds = measure(jobs, 1, run.device)
    update()  # makes the optimizers' states
    update_seconds = measure({"update": update}, 1, run.device)["update"]

    def whole(at):  # from one and two blocks of each network to all
        one = at[1, 1]
        more = [max(at.get(depth, one) - one, 0) for depth in ((2, 1), (1, 2))]  # noise may say that a block takes less than nothing
        return (one + (config.n_layer - 1) * more[0] + (config.n_layer_posterior - 1) * more[1]) / n

    return {"flops": whole(flops), "kept_bytes": whole(kept), "seconds": whole(seconds), "measured": n,
            "update_seconds": update_seconds * held(stage, run)["update_flops"] / held(stage, small[1, 1])["update_flops"]}


def dry_run(config: Config):
    """Print what training would take, without training and without writing anything."""
    run, start, found, total = make_run(config), time.perf_counter(), {}, [0.0, 0.0]
    if not run.items:
        print("no data on disk: random tokens")
    for kind, rows in (("denoiser", config.batch_size), ("order", config.batch_size_order)):
        found[kind] = held(kind, run) | per_example(kind, run, -(-rows // config.chunks))
    found["control"] = found["denoiser"]  # the same loss, networks and optimizers
    denoiser, posterior = found["order"]["parameters"]
    print(f"denoiser {denoiser:,} parameters, posterior {posterior:,}; {run.device}, {torch.get_num_threads()} threads, one process\n\n"
          f"{'stage':<9}{'steps':>7}{'examples':>10}{'states':>8}{'tokens':>9}{'GFLOP':>10}{'update':>9}{'seconds':>9}{'state MB':>10}{'activ. MB':>11}{'PFLOP':>9}  time")
    for stage in config.stages.split(","):
        of, (steps, batch) = found[stage], size_of(stage, config)
        prompt, x0 = batch_at(run, stage, 0, batch)
        states, flops = batch * (1 + config.K if stage == "order" else 1), batch * of["flops"]
        seconds, part = batch * of["seconds"] + of["update_seconds"], -(-batch // config.chunks)
        sums = steps * (flops + of["update_flops"]), steps * seconds
        total = [total[0] + sums[0], total[1] + sums[1]]
        print(f"{stage:<9}{steps:>7}{batch:>10}{states:>8}{prompt.numel() + states * x0.shape[1]:>9}{flops / 1e9:>10.2f}{of['update_flops'] / 1e9:>9.2f}{seconds:>9.3g}"
              f"{of['held_bytes'] / 1e6:>10.1f}{part * of['kept_bytes'] / 1e6:>11.1f}{sums[0] / 1e15:>9.3g}  {datetime.timedelta(seconds=round(sums[1]))}")
    print(f"{'total':<82}{'':>10}{total[0] / 1e15:>9.3g}  {datetime.timedelta(seconds=round(total[1]))}\n\n"
          "a step      examples to seconds. GFLOP: matrix products of forward and backward, counted; update: Muon's\n"
          "memory      state: weights, gradients, optimizer states. activ.: what autograd keeps for backward, measured; of a batch or, with\n"
          "            --chunks, of a part. What backward needs while it runs comes on top\n"
          f"time        measured: {found['denoiser']['measured']} of {config.batch_size} examples of stage 1, {found['order']['measured']} of {config.batch_size_order} of the order stage, through 1 and 2 blocks of each\n"
          "            network, and updates of 1 block; the rest in proportion. Validation, saving and the final table come on top\n"
          f"nothing was trained or written; found in {time.perf_counter() - start:.0f} s")


# --- measuring -------------------------------------------------------------------------------------------

def synchronize(device: torch.device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory(job, device: torch.device) -> float | None:
    """MB that one call of a job holds at most beyond what stood before it; None where nothing tells (MPS)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((size for _, size in sorted(events)), initial=0)) / 1e6


def measure(jobs: dict, rounds: int, device: torch.device) -> dict:
    """Seconds of one call of each job, the median over rounds. In every round each job in turn is called until AT_LEAST
    seconds are over."""
    seconds = {name: [] for name in jobs}
    for _ in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        for name, job in jobs.items():
            start, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - start < AT_LEAST:
                job()
                synchronize(device)
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def parse_args(argv) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description="Measure speed. Every other flag goes to train.py: see python train.py --help.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each number; their median counts, so 3 or more")
    parser.add_argument("--batches", default="1,64,512", help="answers generated at once, comma-separated")
    parser.add_argument("--steps", default="1,2,4,8,L", help="step budgets, comma-separated; L is the length of the canvas")
    parser.add_argument("--costs", action="store_true", help="also how a step's cost grows with L, K, T and n_layer")
    parser.add_argument("--ckpt", help="checkpoint to sample from, and to start the order stage from; random weights otherwise")
    parser.add_argument("--json", help="where to write the results")
    args, rest = parser.parse_known_args(argv)
    if args.rounds < 1 or not all(batch.isascii() and batch.isdigit() and int(batch) for batch in args.batches.split(",")):
        raise UserError(f"--rounds and --batches must be whole numbers of at least 1, got {args.rounds} and {args.batches}")
    for text in args.steps.split(","):
        parse_steps(text)
    return args, parse_config(rest)


def show(result: dict):
    """Print the results as a table."""
    meta, train, memory = result["meta"], result["train"], {name: f"{mb:.1f}" if mb else "" for name, mb in result["memory_mb"].items()}
    in_mb = lambda job: f"; {memory[job]} MB" if memory[job] else ""
    print(f"{meta['device']}, {meta['threads']} threads, {meta['dtype']}, torch {meta['torch']}, commit {meta['commit']}")
    print(f"matmul    {result['matmul_gflops']:.1f} GFLOP/s at {meta['matmul']}")
    print(f"stage 1   {train['sequences_per_s']:.1f} sequences/s, {train['tokens_per_s']:.0f} tokens/s: {100 * result['train_share']:.1f} % of matmul "
          f"({train['gflop_per_step']:.2f} GFLOP a step); clipping and optimizers {100 * train['optimizer_share']:.1f} % of the time" + in_mb("stage 1"))
    print(f"order     {result['order_states_per_s']:.1f} states/s, cost {result['order_cost_ratio']:.2f}" + in_mb("order"))
    print(f"\n{'answers':<10}{'batch':>6}{'steps':>8}{'answers/s':>11}{'tokens/s':>10}{'MB':>8}")
    tokens = result["answer_tokens"]
    rows = [(f"sample {T}", batch, result["sample_steps"][T][batch], rate) for T in result["sample"] for batch, rate in result["sample"][T].items()]
    rows += [("twin", batch, tokens, rate) for batch, rate in result["causal_twin"].items()]
    for name, batch, steps, rate in rows:
        print(f"{name:<10}{batch:>6}{steps:>8.2f}{rate:>11.1f}{rate * tokens:>10.0f}{memory[f'{name} {batch}']:>8}")
    if result["costs"]:
        print(f"\n{'costs':<18}{'stage 1, s':>11}{'ratio':>7}{'order, s':>11}{'ratio':>7}")
    for name, row in result["costs"].items():
        print(f"{name:<18}" + "".join(f"{row[stage]:>11.4f}{row[stage] / result['costs']['as given'][stage]:>7.2f}" for stage in row))


def main(argv=None):
    (args, config), start = parse_args(argv), time.perf_counter()
    if args.json:
        write_json(Path(args.json).with_suffix(".tmp"), {})  # fails now rather than after minutes
    run = make_run(config)
    device, model = run.device, build_stage("denoiser", run)[0]
    if args.ckpt:
        expected, (model, _) = model.config, load_checkpoint(args.ckpt, device)
        if model.config != expected:
            raise UserError(f"--ckpt {args.ckpt} has other sizes than this run: pass the flags that it was trained with")
    states, (flops, tokens) = size_of("control", config)[1], forward_size(run, model)
    step, _, update = training("denoiser", run, build_stage("denoiser", run))
    order, control = (training(stage, run, build_stage(stage, run, copy.deepcopy(model)))[0] for stage in ("order", "control"))

    side, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if run.autocast else torch.float32
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    jobs = {"matmul": lambda: a @ b, "stage 1": step, "optimizers": update, "order": order, "control": control}
    steps, batches = list(dict.fromkeys(args.steps.split(","))), list(dict.fromkeys(args.batches.split(",")))
    used, twin = defaultdict(list), CausalTwin(model.config).to(device)
    for T, batch in itertools.product(steps, batches):
        def sample(prompt, x0, T=T, batch=batch):
            used[T, batch].append(generate(model, prompt, parse_steps(T), "learned:0.5").steps.float().mean().item())
        jobs[f"sample {T} {batch}"] = answering(run, int(batch), sample)
    for batch in batches:
        jobs[f"twin {batch}"] = answering(run, int(batch), lambda prompt, x0: twin.write(prompt, answer_lengths(x0, model.config.eos), dtype))

    variants = variants_of(run) if args.costs else {}
    for name, variant in variants.items():
        jobs |= {f"{stage} {name}": training(stage, variant, fresh(stage, variant))[0] for stage in ("denoiser", "order")}

    seconds = measure(jobs, args.rounds, device)
    memory = {name: peak_memory(job, device) for name, job in jobs.items()}
    matmul = 2 * side**3 / seconds["matmul"]
    result = {
        "matmul_gflops": matmul / 1e9, "train_share": 3 * flops / seconds["stage 1"] / matmul,
        "train": {"sequences_per_s": config.batch_size / seconds["stage 1"], "tokens_per_s": tokens / seconds["stage 1"],
                  "gflop_per_step": 3 * flops / 1e9, "optimizer_share": seconds["optimizers"] / seconds["stage 1"]},
        "order_cost_ratio": seconds["order"] / seconds["control"], "order_states_per_s": states / seconds["order"],
        "sample": {T: {batch: int(batch) / seconds[f"sample {T} {batch}"] for batch in batches} for T in steps},
        "sample_steps": {T: {batch: statistics.mean(used[T, batch]) for batch in batches} for T in steps},
        "causal_twin": {batch: int(batch) / seconds[f"twin {batch}"] for batch in batches},
        "answer_tokens": answer_lengths(run.val.x0, model.config.eos).float().mean().item(), "memory_mb": memory, "seconds_per_call": seconds,
        "costs": {name: {stage: seconds[f"{stage} {name}"] for stage in ("denoiser", "order")} for name in variants},
        "meta": {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
                 "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."), "matmul": f"{side} x {side}", **versions(),
                 "args": vars(args), "config": dataclasses.asdict(config), "seconds": time.perf_counter() - start},
    }
    show(result)
    if args.json:
        write_json(Path(args.json), result)


if __name__ == "__main__":
    cli(main)
