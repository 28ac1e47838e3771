"""Generate answers from a trained model in few steps, in the learned order or by a rule.

    python sample.py --steps 4
    python sample.py --steps 4 --order confidence --prompt "Max has 8 eggs, buys 1, splits 3. Ann has 4, sells 2, times 3. Together?"

Generation starts from a canvas of MASKs. Each step is one forward pass for all positions at once:

    gates    an order picks which masked positions to reveal now, at least one
    tokens   each revealed position takes its most probable token, independently of the others
             (or, with a temperature, a token drawn from p^(1/temperature))

and the last allowed step reveals whatever is left. The order is the only thing that differs between
the learned sampler and the rules it is compared with; they are the functions in ORDERS below.

Each row has its own noise, made from its own seed before the first step, so a row's sample depends
neither on the rows beside it nor on when they finish. Rows that are done leave the batch.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import UserError, build_tokenizer, cli, decode, encode_prompt, final_number, load_splits
from model import MDM, load_checkpoint, pick_device, trim

# --- orders: which of the masked positions to reveal ----------------------------------------------

@dataclass
class State:
    """What an order may look at before step t of T. B rows, L positions, V tokens."""
    log_p: torch.Tensor        # (B, L, V) log-probabilities of the token head, float32
    gate_logits: torch.Tensor  # (B, L) logits of alpha
    masked: torch.Tensor       # (B, L) True where still MASK
    t: int                     # this step, 1..T
    T: int                     # step budget, at most L
    u_gate: torch.Tensor       # (B, L) uniform noise, fresh every step
    u_first: torch.Tensor      # (B,) the same, for one more draw
    u_row: torch.Tensor        # (B, L) uniform noise that stays the same at every step
    greedy: bool               # learned order: open the gates that are likely to open, draw nothing


def learned(state: State):
    """Eq. 1: independent gates given that at least one opens, drawn exactly. The first open gate f
    has p(f = i) proportional to alpha^i prod_{j<i} (1 - alpha^j); gates before f are closed, gates
    after f are free. Greedy: every gate with alpha > 1/2, or else the most likely one."""
    logits = state.gate_logits.masked_fill(~state.masked, -torch.inf)
    if state.greedy:
        return (logits > 0) | top_k(logits, state.masked, 1)
    log_not = F.logsigmoid(-logits)                                          # log(1 - alpha), 0 where revealed
    log_first = F.logsigmoid(logits) + log_not.cumsum(-1) - log_not
    first = draw(log_first.log_softmax(-1), state.u_first)[:, None]          # (B, 1)
    position = torch.arange(logits.shape[1], device=logits.device)
    return (position == first) | ((position > first) & (state.u_gate < logits.sigmoid()))


def top_k(score, masked, k: int):
    """The k masked positions of highest score in each row; ties go to the leftmost."""
    ranking = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranking).scatter_(-1, ranking, torch.arange(score.shape[1], device=score.device).expand_as(ranking))
    return (rank < k) & masked


def even_split(state: State) -> int:
    """Step t's share of the L positions: the shares differ by at most one and none is empty."""
    L = state.masked.shape[1]
    return L * state.t // state.T - L * (state.t - 1) // state.T


def confidence(state: State):
    """The positions whose best token is most probable (MaskGIT, LLaDA)."""
    return top_k(state.log_p.amax(-1), state.masked, even_split(state))


def left_to_right(state: State):
    position = torch.arange(state.masked.shape[1], device=state.masked.device)
    return top_k(-position.expand(state.masked.shape).float(), state.masked, even_split(state))


def iid(state: State):
    """Each masked position opens with probability 1 / (T - t + 1) at step t: the same as one uniform
    reveal time in 1..T per position, drawn beforehand. Jumping to the earliest time at which anything
    opens skips the empty steps, and they are not counted."""
    time = (state.u_row * state.T).long().masked_fill(~state.masked, state.T)
    return time == time.amin(-1, keepdim=True)


ORDERS = {"learned": learned, "left_to_right": left_to_right, "confidence": confidence, "iid": iid}

# --- generation ------------------------------------------------------------------------------------

@dataclass
class Generation:
    tokens: torch.Tensor       # (B, L) finished answers, no MASK
    steps: torch.Tensor        # (B,) forward passes made while the row was unfinished
    reveal_step: torch.Tensor  # (B, L) the step, from 1, that revealed each position


def precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def draw(log_p, u):
    """One index per row from log-probabilities (..., V) by inverse CDF with uniforms u (...).
    In float64: float32 cuts off the tail and so lowers the temperature (Zheng et al., 2409.02908)."""
    cdf = log_p.to(precise(log_p.device)).exp().cumsum(-1)
    u = u.to(cdf.dtype)[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=log_p.shape[-1] - 1)


def row_noise(seeds: list[int], T: int, L: int, device):
    """Uniform noise (B, T + 2, L + 1), row b from seeds[b] alone: per step L gates and one draw more,
    then one line that stays for the whole row, then one for the tokens."""
    rows = [torch.rand(T + 2, L + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).to(device, precise(device))


@torch.no_grad()
def generate(model: MDM, prompt, steps: int, order: str = "learned", *, temperature: float = 0.0,
             greedy_gates: bool = False, seeds: list[int] | None = None) -> Generation:
    """Answers for prompts (B, P') in at most `steps` forward passes per row, on the prompts' device.

    A budget above L counts as L, at which the rules with an even split reveal one token per step.
    `seeds`: one per row, 0..B-1 by default. With temperature 0 they only matter to learned and iid.
    Raises UserError for an unknown order, steps < 1 or a negative temperature."""
    if order not in ORDERS:
        raise UserError(f"unknown order {order!r}: choose from {', '.join(ORDERS)}")
    if steps < 1 or temperature < 0:
        raise UserError(f"need steps >= 1 and temperature >= 0, got {steps} and {temperature}")
    L, T = model.config.answer_len, min(steps, model.config.answer_len)
    seeds = list(range(len(prompt))) if seeds is None else seeds
    noise = row_noise(seeds, T, L, prompt.device)
    z = torch.full((len(prompt), L), model.config.mask, device=prompt.device)
    reveal_step = torch.zeros_like(z)
    for t in range(1, T + 1):
        rows = (z == model.config.mask).any(-1).nonzero().squeeze(-1)       # unfinished
        if len(rows) == 0:
            break
        h = model(trim(prompt[rows], model.config.pad), z[rows])
        log_p, masked = model.log_p(h), z[rows] == model.config.mask
        u = noise[rows]
        state = State(log_p, model.gate_logits(h), masked, t, T, u[:, t - 1, :L], u[:, t - 1, L], u[:, T, :L], greedy_gates)
        reveal = masked & ORDERS[order](state) if t < T else masked
        tokens = log_p.argmax(-1)
        if temperature > 0:
            tokens = draw((log_p / temperature).log_softmax(-1), u[:, T + 1, :L])
        z[rows] = torch.where(reveal, tokens, z[rows])
        reveal_step[rows] = torch.where(reveal, t, reveal_step[rows])
    return Generation(z, reveal_step.amax(-1), reveal_step)


# --- showing it ------------------------------------------------------------------------------------

COLORS = [196, 208, 226, 118, 51, 75, 141, 213]  # of the 256-colour terminal; step 1 is red


def render(tokens, reveal_step, t: int, enc, color: bool) -> str:
    """The canvas after step t: "·" still masked, "∎" EOS, "_" PAD; coloured by the revealing step."""
    parts = []
    for token, step in zip(tokens, reveal_step):
        names = {enc.n_vocab - 3: "∎", enc.n_vocab - 2: "_"}
        text = "·" if step > t else names.get(token) or enc.decode([token])
        parts.append(f"\033[38;5;{COLORS[(step - 1) % len(COLORS)]}m{text}\033[0m" if color and step <= t else text)
    return "".join(parts).replace("\n", " ")


def parse_steps(text: str) -> int:
    """A step budget: a whole number, or L for as many steps as the canvas has positions."""
    if text.upper() == "L":
        return 10**9
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"steps must be a whole number of at least 1, or L, got {text!r}")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Show answers as they form.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py")
    parser.add_argument("--steps", default="4", help="step budget, or L, the length of the canvas")
    parser.add_argument("--order", default="learned", help=f"one of {', '.join(ORDERS)}")
    parser.add_argument("--prompt", help="a question of your own; validation questions otherwise")
    parser.add_argument("--num_samples", type=int, default=3, help="validation questions, or samples of --prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the gates' and tokens' draws")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--greedy_gates", action="store_true", help="open gates with alpha > 1/2 instead of drawing them")
    parser.add_argument("--data_dir", help="where the GSM8K files are, if not where training found them")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    model, state = load_checkpoint(args.ckpt, device)
    enc, config = build_tokenizer(state["pieces"]), state["train_config"]
    if args.num_samples < 1:
        raise UserError(f"--num_samples must be at least 1, got {args.num_samples}")
    if args.prompt is None:
        items = load_splits(config["dataset"], args.data_dir or config["data_dir"], toy_sizes={"val": args.num_samples})["val"][: args.num_samples]
    else:
        items = [{"question": args.prompt.strip(), "answer": None}] * args.num_samples
    prompts = [encode_prompt(item["question"], enc, model.config.prompt_len) for item in items]
    if None in prompts or not items[0]["question"]:
        raise UserError(f"a prompt must have 1 to {model.config.prompt_len} tokens")

    sys.stdout.reconfigure(errors="replace")  # terminals that cannot show "∎"
    out = generate(model, torch.tensor(prompts, device=device), parse_steps(args.steps), args.order, temperature=args.temperature,
                   greedy_gates=args.greedy_gates, seeds=[args.seed + i for i in range(len(items))])
    for item, tokens, steps, reveal_step in zip(items, out.tokens.tolist(), out.steps.tolist(), out.reveal_step.tolist()):
        print(f"question  {item['question']}")
        for t in range(1, steps + 1):
            print(f"step {t:<4} {render(tokens, reveal_step, t, enc, sys.stdout.isatty())}")
        truth = f"   truth {final_number(item['answer'])}" if item["answer"] else ""
        print(f"number    {final_number(decode(tokens, enc))}{truth}   steps {steps}   order {args.order}\n")


if __name__ == "__main__":
    cli(main)
