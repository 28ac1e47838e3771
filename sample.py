"""Generate answers in few steps, in the learned order or by a rule.

    python sample.py --steps 4
    python sample.py --steps 4 --compare learned:0.5,confidence,left_to_right
    python sample.py --steps 4 --prompt "Max has 8 eggs, buys 1. Ann has 4, sells 2. Together?"

Generation starts from a canvas of MASKs. Each step is one forward pass for all positions:

    gates    an order picks which masked positions to reveal now, at least one
    tokens   each takes its most probable token, independently of the others (or, with a
             temperature, one drawn from p^(1/temperature))

and the last allowed step reveals whatever is left. The order is the only thing that differs between
the learned sampler and the rules it is compared with. An order is named

    NAME[:KNOB][+eos_last]          learned:0.5, threshold:0.9+eos_last

KNOB       what an order is tuned by (ORDERS below: defaults, and what eval_gsm8k.py tries)
+eos_last  positions whose likeliest token is EOS or PAD wait until nothing else is left: confidence
           likes the end of the canvas, and may spend early steps on it

p^i is the token head's distribution at position i, c^i its largest probability, H^i its entropy in
nats, alpha^i the gate head's probability. Ties go to the leftmost. Each row has its own noise, from
its own seed, so its sample depends neither on the rows beside it nor on when they finish.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (UserError, build_tokenizer, decode, encode, final_number, load_splits,
                  run_script)
from model import MDM, load_checkpoint, pick_device, trim


@dataclass
class State:
    """What an order may look at before step t of T. B rows, L positions, V tokens."""
    log_p: torch.Tensor        # (B, L, V) of the token head, float32
    gate_logits: torch.Tensor  # (B, L) logits of alpha
    masked: torch.Tensor       # (B, L) True where the order may reveal: some in each row
    t: int
    T: int
    u: torch.Tensor            # (B, L + 1) uniform noise, fresh every step
    u_row: torch.Tensor        # (B, L) uniform noise that stays the same at every step
    knob: tuple = ()


def precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def draw(log_p, u):
    """One index per row from log-probabilities (..., V) by inverse CDF with uniforms u (...). In
    float64: float32 cuts off the tail, which lowers the temperature (Zheng et al., 2409.02908)."""
    cdf = log_p.to(precise(log_p.device)).exp().cumsum(-1)
    u = u.to(cdf.dtype)[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=log_p.shape[-1] - 1)


def top_k(score, masked, k):
    """The k masked positions of highest score in each row, k a number or (B, 1)."""
    ranking = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (ranking.argsort(-1) < k) & masked


def even_share(score, state: State):
    """The best of an even split of what is masked over the steps that are left, rounded up."""
    k = -(-state.masked.sum(-1, keepdim=True) // (state.T - state.t + 1))
    return top_k(score, state.masked, k)


def confidence_of(state: State):
    return state.log_p.amax(-1)


def entropy_of(state: State):
    return -(state.log_p.exp() * state.log_p).sum(-1)


# --- the learned order ----------------------------------------------------------------------------

def learned(state: State):
    """Eq. 1: independent gates given that at least one opens, drawn exactly. p(first open gate = i)
    is proportional to alpha^i prod_{j<i} (1 - alpha^j); those before it are closed, those after it
    free. With a knob nothing is drawn: [NEW] gates with alpha > knob, and an even share at least,
    the likeliest, so that a budget of fewer steps than p has learned is used evenly."""
    logits = state.gate_logits.masked_fill(~state.masked, -torch.inf)
    if state.knob:
        return (logits.sigmoid() > state.knob[0]) | even_share(logits, state)
    log_not = F.logsigmoid(-logits)                          # log(1 - alpha), 0 where revealed
    log_first = F.logsigmoid(logits) + log_not.cumsum(-1) - log_not
    first = draw(log_first.log_softmax(-1), state.u[:, -1])[:, None]                     # (B, 1)
    position = torch.arange(logits.shape[1], device=logits.device)
    return (position == first) | ((position > first) & (state.u[:, :-1] < logits.sigmoid()))


# --- rules: an even share at every step -----------------------------------------------------------

def left_to_right(state: State):
    place = torch.arange(state.masked.shape[1], device=state.masked.device)
    return even_share(-place.expand(state.masked.shape).float(), state)


def entropy(state: State):
    """Lowest H^i first (Dream, 2508.15487)."""
    return even_share(-entropy_of(state), state)


def confidence(state: State):
    """Highest c^i first (MaskGIT, 2202.04200; LLaDA, 2502.09992)."""
    return even_share(confidence_of(state), state)


def margin(state: State):
    """Largest gap between the two most probable tokens first (Kim et al., 2502.06768)."""
    best = state.log_p.exp().topk(2, dim=-1).values
    return even_share(best[..., 0] - best[..., 1], state)


def dilated(state: State):
    """Places far apart first, 0, 32, 16, 48, 8, .. of 64: neighbours tell most about each other
    (after 2506.19037). [NEW] After step t a share (t / T)^knob is open: the shares grow."""
    L, (knob,) = state.masked.shape[1], state.knob
    place = torch.arange(L, device=state.masked.device)
    bits_from_behind = sum((place >> i) % 2 / 2 ** (i + 1) for i in range(L.bit_length()))
    done, now, T = (t**knob for t in (state.t - 1, state.t, state.T))
    k = (state.masked.sum(-1, keepdim=True) * (now - done) / (T - done)).long().clamp(min=1)
    return top_k(-bits_from_behind.expand(state.masked.shape), state.masked, k)


# --- rules: what is found safe, at least one position ---------------------------------------------

def iid(state: State):
    """Each position has a time of its own, uniform in 1..T and drawn beforehand; steps at which
    nothing opens are not taken."""
    time = (state.u_row * state.T).long().masked_fill(~state.masked, state.T)
    return time == time.amin(-1, keepdim=True)


def threshold(state: State):
    """All with c^i >= knob, and the best (Fast-dLLM, 2505.22618)."""
    score = confidence_of(state)
    return (state.masked & (score.exp() >= state.knob[0])) | top_k(score, state.masked, 1)


def entropy_bound(state: State):
    """The longest prefix, by rising entropy, with sum H - max H <= knob nats (EB-Sampler,
    2505.24857): a bound on what the tokens of one step could tell about each other."""
    H = entropy_of(state)
    rising = H.to(precise(H.device)).masked_fill(~state.masked, torch.inf).sort(dim=-1).values
    k = (rising.cumsum(-1) - rising <= state.knob[0]).sum(-1, keepdim=True)
    return top_k(-H, state.masked, k)


ORDERS = {  # name: (rule, default knob, knobs that eval_gsm8k.py tries where none is given)
    "learned": (learned, (), [(), (0.5,)]),
    "left_to_right": (left_to_right, (), []),
    "confidence": (confidence, (), []),
    "margin": (margin, (), []),
    "entropy": (entropy, (), []),
    "dilated": (dilated, (2.0,), [(1.0,), (1.5,), (2.0,), (3.0,)]),
    "iid": (iid, (), []),
    "threshold": (threshold, (0.9,), [(c,) for c in (0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)]),
    "entropy_bound": (entropy_bound, (0.01,), [(h,) for h in (1e-3, 0.01, 0.1, 0.3, 1, 3, 10, 20)]),
}


@dataclass(frozen=True)
class Order:
    name: str
    knob: tuple = ()  # as written; empty: the rule's default
    eos_last: bool = False

    def __str__(self):
        knobs = "".join(f":{k:g}" for k in self.knob)
        return self.name + knobs + "+eos_last" * self.eos_last

    def __call__(self, state: State):
        """(B, L) bool: what to reveal now, some of the masked positions of each row."""
        (rule, default, _), masked = ORDERS[self.name], state.masked
        if self.eos_last:  # EOS is token V-2, PAD V-1
            content = masked & (state.log_p.argmax(-1) < state.log_p.shape[-1] - 2)
            masked = torch.where(content.any(-1, keepdim=True), content, masked)
        return rule(replace(state, masked=masked, knob=self.knob or default))


def parse_order(text: str) -> Order:
    match = re.fullmatch(r"\s*(\w+)((?::[\d.e-]+)?)(\+eos_last)?\s*", text)
    if not match or match[1] not in ORDERS:
        raise UserError(f"cannot read order {text!r}: want one of {', '.join(ORDERS)}, "
                        "like learned:0.5 or threshold:0.9+eos_last")
    _, default, sweep = ORDERS[match[1]]
    try:
        knob = tuple(float(k) for k in match[2].split(":")[1:])
    except ValueError:
        raise UserError(f"the knob of order {text!r} is not a number") from None
    if knob and not ((default or sweep) and 0 <= knob[0] <= 100):
        raise UserError(f"order {text!r} has no knob, or not one of 0 to 100")
    return Order(match[1], knob, bool(match[3]))


# --- generation -----------------------------------------------------------------------------------

@dataclass
class Generation:
    tokens: torch.Tensor       # (B, L) finished answers, no MASK
    steps: torch.Tensor        # (B,) forward passes made while the row was unfinished
    reveal_step: torch.Tensor  # (B, L) the step, from 1, that revealed each position
    log_p: torch.Tensor        # (B,) nats: sum of log p(token) at the steps that revealed them


@torch.no_grad()
def generate(model: MDM, prompt, steps: int, order: Order | str = "learned", *, seeds=None,
             temperature: float = 0.0, x0=None) -> Generation:
    """Answers for prompts (B, P) in at most `steps` forward passes a row. `seeds`: one a row.
    `x0` (B, L): write these tokens along the order instead of p's own. If the order draws nothing,
    log_p is then log p(x0) of the sampler that takes this order and draws each token from p."""
    order = parse_order(order) if isinstance(order, str) else order
    B, L, device = len(prompt), model.config.answer_len, prompt.device
    T = min(steps, L)
    generators = [torch.Generator().manual_seed(s) for s in (range(B) if seeds is None else seeds)]
    noise = torch.stack([torch.rand(T + 2, L + 1, generator=g, dtype=torch.float64)
                         for g in generators]).to(device, precise(device))    # (B, T + 2, L + 1)
    # noise[:, t-1] of step t, [:, T] the same at every step, [:, T+1] of the tokens
    z = torch.full((B, L), model.config.mask, device=device)
    reveal_step, total = torch.zeros_like(z), noise.new_zeros(B)
    cache = model.read(trim(prompt, model.config.pad))           # once for all steps
    rows = torch.arange(B, device=device)                        # of the answers not yet finished
    for t in range(1, T + 1):
        h = model([part[rows] for part in cache], z[rows])
        log_p, masked, u = model.log_p(h), z[rows] == model.config.mask, noise[rows]
        state = State(log_p=log_p, gate_logits=model.gate_logits(h), masked=masked, t=t, T=T,
                      u=u[:, t - 1], u_row=u[:, T, :L])
        reveal = masked & order(state) if t < T else masked
        tokens = log_p.argmax(-1)
        if x0 is not None:
            tokens = x0[rows]
        elif temperature > 0:  # one uniform a position: each is revealed once
            tokens = draw((log_p / temperature).log_softmax(-1), u[:, T + 1, :L])
        z[rows] = torch.where(reveal, tokens, z[rows])
        total[rows] += (log_p.gather(-1, tokens[..., None]).squeeze(-1) * reveal).sum(-1)
        reveal_step[rows] = torch.where(reveal, t, reveal_step[rows])
        rows = rows[(masked & ~reveal).any(-1)]
        if len(rows) == 0:
            break
    return Generation(z, reveal_step.amax(-1), reveal_step, total)


# --- showing it -----------------------------------------------------------------------------------

COLORS = [196, 208, 226, 118, 51, 75, 141, 213]  # of the 256-colour terminal; step 1 is red


def render(tokens, reveal_step, t: int, enc, color: bool) -> str:
    """The canvas after step t: "·" still masked, "∎" EOS, "_" PAD; coloured by the step."""
    marks, parts = {enc.n_vocab - 3: "∎", enc.n_vocab - 2: "_"}, []
    for token, step in zip(tokens, reveal_step):
        text = "·" if step > t else marks.get(token) or enc.decode([token]).replace("\n", " ")
        number = COLORS[(step - 1) % len(COLORS)]
        parts.append(f"\033[38;5;{number}m{text}\033[0m" if color and step <= t else text)
    return "".join(parts)


def show(item: dict, runs: list[tuple], enc):
    """One question under several orders, (name, tokens, reveal_step) each, step by step."""
    width = max(len(name) for name, *_ in runs)
    print(f"question  {item['question']}")
    print(f"truth     {final_number(item['answer'])}" if item["answer"] else "")
    for t in range(1, max(max(reveal_step) for *_, reveal_step in runs) + 1):
        for name, tokens, reveal_step in runs:
            if t <= max(reveal_step):
                canvas = render(tokens, reveal_step, t, enc, sys.stdout.isatty())
                print(f"step {t:<5}{name:<{width}}  {canvas}")
    for name, tokens, reveal_step in runs:
        number = final_number(decode(tokens, enc))
        print(f"number    {name:<{width}}  {number} in {max(reveal_step)} steps")
    print()


def parse_steps(text: str) -> int:
    """A number of steps or samples, or L for as many steps as the canvas has positions."""
    if text != "L" and not (text.isdecimal() and 0 < int(text) <= 10**9):
        raise argparse.ArgumentTypeError(f"want a whole number of at least 1, or L, not {text!r}")
    return 10**9 if text == "L" else int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Show answers as they form.")
    parser.add_argument("--ckpt", help="checkpoint of train.py; out/ckpt.pt, or where there is "
                        "none assets/toy.pt, by default")
    parser.add_argument("--steps", type=parse_steps, default=4, help="most of an answer, or L")
    parser.add_argument("--compare", "--order", default="learned:0.5",
                        help="one order, or several, comma-separated, to see side by side")
    parser.add_argument("--prompt", help="a question of your own; validation questions otherwise")
    parser.add_argument("--num_samples", type=parse_steps, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the gates' and tokens' draws")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--data_dir", help="GSM8K's files, if not where training found them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)

    device, orders = pick_device(args.device), [parse_order(o) for o in args.compare.split(",")]
    if not args.temperature >= 0:
        raise UserError("--temperature must be at least 0")
    path = args.ckpt or "out/ckpt.pt"
    if not args.ckpt and not os.path.exists(path):
        path = Path(__file__).parent / "assets" / "toy.pt"
        print("no out/ckpt.pt here: answers of assets/toy.pt, trained by `python train.py`\n")
    model, state = load_checkpoint(path, device)
    enc, config = build_tokenizer(state["pieces"]), state["train_config"]
    if args.prompt is None:
        items = load_splits(config["dataset"], args.data_dir or config["data_dir"])["val"]
    else:
        items = [{"question": args.prompt.strip(), "answer": ""}] * args.num_samples
    prompt, _, fitting = encode(items, enc, model.config.prompt_len, model.config.answer_len)
    if not fitting:
        n = len(enc.encode_ordinary(items[0]["question"]))
        raise UserError(f"the question has {n} tokens, not 1 to {model.config.prompt_len}")
    items = [items[i] for i in fitting[: args.num_samples]]
    prompt, seeds = prompt[: len(items)].to(device), range(args.seed, args.seed + len(items))
    outs = [generate(model, prompt, args.steps, order, seeds=seeds, temperature=args.temperature)
            for order in orders]
    for i, item in enumerate(items):
        show(item, [(str(order), out.tokens[i].tolist(), out.reveal_step[i].tolist())
                    for order, out in zip(orders, outs)], enc)


if __name__ == "__main__":
    run_script(main)
