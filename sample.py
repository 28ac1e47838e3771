r"""Generate answers in few steps, in the learned order or by a rule.

    python sample.py --steps 4
    python sample.py --steps 4 --compare learned:0.5,confidence,left_to_right
    python sample.py --steps 4 \
        --prompt "Max has 8 eggs, buys 1, sells 3. Ann has 4, times 2, sells 2. Together?"

Generation starts from a canvas of MASKs. Each step is one forward pass for all positions:

    gates    an order picks which masked positions to reveal now, at least one
    tokens   each takes its most probable token, independently of the others (or, with a
             temperature, one drawn from p^(1/temperature))

and the last allowed step reveals whatever is left. The learned sampler and the rules that it is
compared with differ in nothing but which positions a step takes, and how many. An order is named

    NAME[:KNOB][+eos_last]          learned:0.5, threshold:0.9+eos_last

KNOB       the number that an order is tuned by (ORDERS below has defaults and what is tried): a
           threshold, a bound, or how fast the shares of the steps grow
+eos_last  positions whose likeliest token is EOS or PAD wait until nothing else is left: confidence
           likes the end of the canvas, and may spend early steps on it

Two names stand for the learned order, here and everywhere else: `learned` draws the gates from p,
as the paper does; `learned:0.5`, the default, draws nothing and opens the gates with alpha > 0.5.

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

from common import UserError, pick_device, precise, run_script
from data import TOY_SIZES, build_tokenizer, decode, encode, final_number, load_splits
from model import MDM, first_order, load_checkpoint, step_share, trim


@dataclass
class State:
    """What an order may look at before step t of T. B rows, L positions, V tokens."""
    log_p: torch.Tensor         # (B, L, V) of the token head, float32
    gate_logits: torch.Tensor   # (B, L) logits of alpha
    masked: torch.Tensor        # (B, L) what the order may reveal: one or more a row
    t: int
    T: int
    gate_noise: torch.Tensor    # (B, L) uniform noise, fresh every step: one number a gate
    first_noise: torch.Tensor   # (B,) the same, one number a row
    order_noise: torch.Tensor   # (B, L) uniform noise that stays the same at every step
    knob: float | None = None   # what the order is tuned by


def sample_categorical(log_p, noise):
    """One index per row from log-probabilities (..., V), by inverse CDF with uniforms (...).

    In float64: float32 cuts off the tail, which lowers the temperature (Zheng et al., 2409.02908).
    """
    cdf = log_p.to(precise(log_p.device)).exp().cumsum(-1)
    threshold = noise.to(cdf.dtype)[..., None] * cdf[..., -1:]
    index = torch.searchsorted(cdf, threshold, right=True).squeeze(-1)
    return index.clamp(max=log_p.shape[-1] - 1)


def top_k(score, masked, k):
    """The k masked positions of highest score in each row, k a number or (B, 1)."""
    ranking = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = ranking.argsort(-1)
    return (rank < k) & masked


def best_share(score, state: State):
    """The masked positions of highest score, as many as are this step's share. With a knob of 1 all
    steps that are left have the same share. The larger the knob, the more the shares grow; those of
    the learned order have 1.5."""
    k = step_share(state.masked, state.T - state.t + 1, state.knob).clamp(min=1)
    return top_k(score, state.masked, k)


def confidence_of(state: State):
    return state.log_p.amax(-1)


def entropy_of(state: State):
    return -(state.log_p.exp() * state.log_p).sum(-1)


# --- the learned order ----------------------------------------------------------------------------

def learned(state: State):
    """The gates of p, Eq. 1. [NEW] With a knob nothing is drawn: gates with alpha > knob open, or
    the likeliest one. Without one they are drawn, as the paper does."""
    logits = state.gate_logits.masked_fill(~state.masked, -torch.inf)
    if state.knob is None:
        return draw_gates(logits, state)
    return (logits.sigmoid() > state.knob) | top_k(logits, state.masked, 1)


def draw_gates(logits, state: State):
    """Independent gates (B, L), given that at least one opens, exactly.

    Drawing them all until one is open might take long. So the first open gate is drawn, from left
    to right: it is i if i is open and all before it are closed, with probability
    alpha^i prod_{j<i} (1 - alpha^j), divided by the sum of these. Gates before it are then closed,
    and those after it are free to open.
    """
    log_not_alpha = F.logsigmoid(-logits)                    # log(1 - alpha), 0 where revealed
    log_none_before = log_not_alpha.cumsum(-1) - log_not_alpha
    log_first = F.logsigmoid(logits) + log_none_before
    first = sample_categorical(log_first.log_softmax(-1), state.first_noise)[:, None]    # (B, 1)
    position = torch.arange(logits.shape[1], device=logits.device)
    opens = state.gate_noise < logits.sigmoid()
    return (position == first) | ((position > first) & opens)


# --- rules: a share at every step -----------------------------------------------------------------

def left_to_right(state: State):
    position = torch.arange(state.masked.shape[1], device=state.masked.device)
    return best_share(-position.expand(state.masked.shape).float(), state)


def entropy(state: State):
    """Lowest H^i first (Dream, 2508.15487)."""
    return best_share(-entropy_of(state), state)


def confidence(state: State):
    """Highest c^i first (MaskGIT, 2202.04200; LLaDA, 2502.09992)."""
    return best_share(confidence_of(state), state)


def margin(state: State):
    """Largest gap between the two most probable tokens first (Kim et al., 2502.06768)."""
    best = state.log_p.exp().topk(2, dim=-1).values
    return best_share(best[..., 0] - best[..., 1], state)


def dilated(state: State):
    """Positions far apart first, 0, 32, 16, 48, 8, .. of 64: neighbours tell most about each other
    (after 2506.19037). [NEW] After step t a share (t / T)^knob is open: the shares grow."""
    L = state.masked.shape[1]
    position = torch.arange(L, device=state.masked.device)
    reversed_bits = torch.zeros(L, device=state.masked.device)     # 0.011 for 6 = 110, in binary
    for i in range(L.bit_length()):
        bit = (position >> i) % 2
        reversed_bits += bit / 2 ** (i + 1)
    open_before = (state.t - 1) ** state.knob
    open_after = state.t**state.knob
    open_in_the_end = state.T**state.knob
    share = (open_after - open_before) / (open_in_the_end - open_before)
    k = (state.masked.sum(-1, keepdim=True) * share).long().clamp(min=1)
    return top_k(-reversed_bits.expand(state.masked.shape), state.masked, k)


def in_first_order(state: State):
    """[NEW] The order that p's gates begin with, in shares as theirs: what learning starts from."""
    score = first_order(state.masked.shape[1]).to(state.masked.device)
    return best_share(score.expand(state.masked.shape), state)


# --- rules: what is found safe, at least one position ---------------------------------------------

def iid(state: State):
    """The step of each position is drawn beforehand: it is t or an earlier one with probability
    (t / T)^knob. With a knob of 1 that is uniform. A step at which nothing opens is not taken."""
    time = state.order_noise ** (1 / state.knob) * state.T
    time = time.long().masked_fill(~state.masked, state.T)
    return time == time.amin(-1, keepdim=True)


def threshold(state: State):
    """All with c^i >= knob, and the best (Fast-dLLM, 2505.22618)."""
    score = confidence_of(state)
    sure = state.masked & (score.exp() >= state.knob)
    return sure | top_k(score, state.masked, 1)


def entropy_bound(state: State):
    """The longest prefix, by rising entropy, with sum H - max H <= knob nats (EB-Sampler,
    2505.24857): a bound on what the tokens of one step could tell about each other."""
    H = entropy_of(state)
    rising = H.to(precise(H.device)).masked_fill(~state.masked, torch.inf).sort(dim=-1).values
    k = (rising.cumsum(-1) - rising <= state.knob).sum(-1, keepdim=True)
    return top_k(-H, state.masked, k)


ORDERS = {  # name: (rule, its default knob, knobs that eval_gsm8k.py tries where none is given)
    "learned": (learned, None, []),
    "left_to_right": (left_to_right, 1.0, []),
    "confidence": (confidence, 1.0, []),
    "margin": (margin, 1.0, []),
    "entropy": (entropy, 1.0, []),
    "dilated": (dilated, 2.0, [1.0, 1.5, 2.0, 3.0]),
    "first_order": (in_first_order, 1.5, []),
    "iid": (iid, 1.0, []),
    "threshold": (threshold, 0.9, [0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99]),
    "entropy_bound": (entropy_bound, 0.01, [1e-3, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 20.0]),
}


@dataclass(frozen=True)
class Order:
    """An order by its name, NAME[:KNOB][+eos_last]: a function of a State."""
    name: str
    knob: float | None = None  # as written; None: the rule's default
    eos_last: bool = False

    def __str__(self):
        text = self.name
        if self.knob is not None:
            knob = f"{self.knob:g}"
            if float(knob) != self.knob:  # :g has six digits, and results are kept by this name
                knob = str(self.knob)
            text += f":{knob}"
        if self.eos_last:
            text += "+eos_last"
        return text

    @property
    def is_random(self) -> bool:
        """Does it draw which positions to reveal?"""
        return self.name == "iid" or (self.name == "learned" and self.knob is None)

    def __call__(self, state: State):
        """(B, L) bool: what to reveal now, some of the masked positions of each row."""
        rule, default, _ = ORDERS[self.name]
        masked = state.masked
        if self.eos_last:  # EOS is token V-2, PAD V-1
            content = masked & (state.log_p.argmax(-1) < state.log_p.shape[-1] - 2)
            masked = torch.where(content.any(-1, keepdim=True), content, masked)
        knob = default if self.knob is None else self.knob
        return rule(replace(state, masked=masked, knob=knob))


def parse_order(text: str) -> Order:
    match = re.fullmatch(r"\s*(\w+)(?::([\d.e-]+))?(\+eos_last)?\s*", text)
    if not match or match[1] not in ORDERS:
        raise UserError(f"cannot read order {text!r}: want one of {', '.join(ORDERS)}, "
                        "like learned:0.5 or threshold:0.9+eos_last")
    name, number, eos_last = match.groups()
    if number is None:
        return Order(name, None, bool(eos_last))

    try:
        knob = float(number)
    except ValueError:
        raise UserError(f"the knob of order {text!r} is not a number") from None
    least = 0 if name in ("learned", "threshold", "entropy_bound") else 0.01
    if not least <= knob <= 100:
        raise UserError(f"order {text!r}: the knob of {name} is a number of {least} to 100")
    return Order(name, knob, bool(eos_last))


def parse_orders(text: str) -> list[Order]:
    return [parse_order(part) for part in text.split(",")]


def need_trained_gates(path, state: dict, orders: list[Order]):
    """Only the order stage trains the gates; what else opens them has no meaning."""
    asked = [str(order) for order in orders if order.name == "learned"]
    if asked and state["stage"] != "order":
        raise UserError(f"{asked[0]} wants trained gates, and those of {path} are not (stage "
                        f"{state['stage']!r}): take {Path(path).with_name('ckpt.pt')}, or a rule")


# --- generation -----------------------------------------------------------------------------------

@dataclass
class Generation:
    tokens: torch.Tensor       # (B, L) finished answers, no MASK
    steps: torch.Tensor        # (B,) forward passes made while the row was unfinished
    reveal_step: torch.Tensor  # (B, L) the step, from 1, that revealed each position
    log_p: torch.Tensor        # (B,) nats: sum of log p(token) at the steps that revealed them


def noise_of(seeds, T: int, L: int, device):
    """Uniform noise of each row from its own seed: for gates (B, T, L), for the first gate (B, T),
    for the order (B, L), for tokens (B, L)."""
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.rand(T + 2, L + 1, generator=generator, dtype=torch.float64))
    noise = torch.stack(drawn).to(device, precise(device))                # (B, T + 2, L + 1)
    return noise[:, :T, :L], noise[:, :T, L], noise[:, T, :L], noise[:, T + 1, :L]


def choose_tokens(log_p, temperature: float, noise):
    """The likeliest token of each position, or one drawn from p^(1/temperature): (B, L)."""
    if temperature == 0:
        return log_p.argmax(-1)
    return sample_categorical((log_p / temperature).log_softmax(-1), noise)


@torch.no_grad()
def generate(model: MDM, prompt, steps: int, order: Order | str = "learned:0.5", *, seeds=None,
             temperature: float = 0.0, x0=None) -> Generation:
    """Answers for prompts (B, P) in at most `steps` forward passes a row. `seeds`: one a row.

    `x0` (B, L): write these tokens along the order instead of p's own. If the order draws nothing,
    log_p is then log p(x0) of the sampler that takes this order and draws each token from p.
    """
    if isinstance(order, str):
        order = parse_order(order)
    B = len(prompt)
    L = model.config.answer_len
    T = min(steps, L)
    device = prompt.device
    seeds = range(B) if seeds is None else seeds
    gate_noise, first_noise, order_noise, token_noise = noise_of(seeds, T, L, device)

    z = torch.full((B, L), model.config.mask, device=device)
    reveal_step = torch.zeros_like(z)
    total = torch.zeros(B, device=device, dtype=precise(device))
    cache = model.encode_prompt(prompt)                     # once for all steps
    rows = torch.arange(B, device=device)                   # of the answers not yet finished
    for t in range(1, T + 1):
        # One forward pass: which tokens, and which gates?
        h = model([part[rows] for part in cache], z[rows])
        log_p = model.log_p(h)
        masked = z[rows] == model.config.mask
        steps_left = torch.full((len(rows), 1), T - t + 1, device=device)
        gate_logits = model.gate_logits(h, masked, steps_left)

        # The order chooses positions; the last step takes what is left.
        reveal = masked
        if t < T:
            state = State(log_p, gate_logits, masked, t, T, gate_noise[rows, t - 1],
                          first_noise[rows, t - 1], order_noise[rows])
            reveal = masked & order(state)

        # Each chosen position takes a token, independently of the others.
        if x0 is None:
            tokens = choose_tokens(log_p, temperature, token_noise[rows])
        else:
            tokens = x0[rows]
        z[rows] = torch.where(reveal, tokens, z[rows])
        log_p_tokens = log_p.gather(-1, tokens[..., None]).squeeze(-1)
        total[rows] += (log_p_tokens * reveal).sum(-1)
        reveal_step[rows] = torch.where(reveal, t, reveal_step[rows])

        rows = rows[(masked & ~reveal).any(-1)]
        if len(rows) == 0:
            break
    return Generation(z, reveal_step.amax(-1), reveal_step, total)


# --- showing it -----------------------------------------------------------------------------------

COLORS = [196, 208, 226, 118, 51, 75, 141, 213]  # of the 256-colour terminal; step 1 is red


def terminal_takes_color() -> bool:
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Line breaks and control characters as spaces: a canvas stays on one line."""
    return "".join(char if char.isprintable() else " " for char in text)


def render(tokens, reveal_step, t: int, enc, color: bool) -> str:
    """The canvas after step t: "·" still masked, "∎" EOS, "_" PAD; coloured by the step."""
    marks = {enc.n_vocab - 3: "∎", enc.n_vocab - 2: "_"}
    parts = []
    for token, step in zip(tokens, reveal_step):
        if step > t:
            parts.append("·")
            continue
        text = marks.get(token) or printable(enc.decode([token]))
        if color:
            number = COLORS[(step - 1) % len(COLORS)]
            text = f"\033[38;5;{number}m{text}\033[0m"
        parts.append(text)
    return "".join(parts)


def result_of(text: str, dataset: str):
    """What an answer is judged by: its final number, or all of a text of the user's own pairs."""
    return printable(text) if dataset == "pairs" else final_number(text)


def show(item: dict, runs: list[tuple], enc, dataset: str):
    """One question under several orders, (name, tokens, reveal_step) each, step by step."""
    width = max(len(name) for name, _, _ in runs)
    last = max(max(reveal_step) for _, _, reveal_step in runs)
    color = terminal_takes_color()
    print(f"question  {printable(item['question'])}")
    if item["target"]:
        print(f"truth     {result_of(item['target'], dataset)}")

    # The same step of all orders under one another, then what each has come to.
    for t in range(1, last + 1):
        for name, tokens, reveal_step in runs:
            if t <= max(reveal_step):
                print(f"step {t:<5}{name:<{width}}  {render(tokens, reveal_step, t, enc, color)}")
    label = "answer" if dataset == "pairs" else "number"
    for name, tokens, reveal_step in runs:
        result = result_of(decode(tokens, enc), dataset)
        print(f"{label}    {name:<{width}}  {result} in {max(reveal_step)} steps")
    print()


# --- the script -----------------------------------------------------------------------------------

def whole_number(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) <= 10**9):
        raise argparse.ArgumentTypeError(f"want a whole number of at least 1, not {text!r}")
    return int(text)


def parse_steps(text: str) -> int:
    """A number of steps, or L for as many as the canvas has positions."""
    if text == "L":
        return 10**9
    try:
        return whole_number(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}, or L") from None


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Show answers as they form.")
    parser.add_argument("--ckpt", help="checkpoint of train.py; out/ckpt.pt, or where there is "
                        "none assets/toy.pt, by default")
    parser.add_argument("--steps", type=parse_steps, default=4, help="most of an answer, or L")
    parser.add_argument("--compare", "--order", default="learned:0.5",
                        help="one order, or several, comma-separated, to see side by side")
    parser.add_argument("--prompt", help="a question of your own; validation questions otherwise")
    parser.add_argument("--num_samples", type=whole_number,
                        help="answers to show: 3 by default, to --prompt 1")
    parser.add_argument("--seed", type=int, default=0, help="of the gates' and tokens' draws")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--data_dir", help="GSM8K's files, if not where training found them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)

    # Below 0.001, p^(1/temperature) leaves float32; what it would draw is the likeliest token.
    if args.temperature != 0 and not 0.001 <= args.temperature < float("inf"):
        raise UserError("--temperature must be 0, the likeliest token, or at least 0.001")
    if not 0 <= args.seed < 2**62:
        raise UserError("--seed must be a whole number of 0 to 2^62")
    if args.data_dir and args.prompt is not None:
        raise UserError("--prompt needs no --data_dir")
    return args


def items_to_show(args, config: dict, enc, model_config):
    """--num_samples items that fit, or the one question of --prompt, and their prompts (N, P)."""
    if args.prompt is not None:
        item = {"question": args.prompt.strip(), "answer": "", "target": ""}
        prompt, _, fitting = encode([item], enc, model_config.prompt_len, model_config.answer_len)
        if not fitting:
            n = len(enc.encode_ordinary(item["question"]))
            raise UserError(f"the question has {n} tokens, not 1 to {model_config.prompt_len}")
        return [item], prompt
    splits = load_splits(config["dataset"], args.data_dir or config["data_dir"],
                         toy_sizes={"val": TOY_SIZES["val"]})
    items = splits["val"]
    prompt, _, fitting = encode(items, enc, model_config.prompt_len, model_config.answer_len)
    if not fitting:
        raise UserError(f"none of {len(items)} validation items fits this checkpoint's canvas")
    fitting = fitting[: args.num_samples or 3]
    return [items[i] for i in fitting], prompt[: len(fitting)]


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    orders = parse_orders(args.compare)
    path = args.ckpt or "out/ckpt.pt"
    if not args.ckpt and not os.path.exists(path):
        path = Path(__file__).parent / "assets" / "toy.pt"
        print("no out/ckpt.pt here: answers of assets/toy.pt, trained by `python train.py`\n")
    model, state = load_checkpoint(path, device)
    need_trained_gates(path, state, orders)
    enc = build_tokenizer(state["pieces"])
    config = state["train_config"]
    items, prompt = items_to_show(args, config, enc, model.config)

    # A question of one's own may be repeated; each sample has its own seed. A few at a time: the
    # first are seen at once, and any number fits into memory.
    total = len(items) if args.prompt is None else args.num_samples or 1
    for first in range(0, total, 16):
        samples = range(first, min(first + 16, total))
        rows = [sample % len(items) for sample in samples]
        seeds = [args.seed + sample for sample in samples]
        prompts = trim(prompt[rows], model.config.pad).to(device)
        outs = [generate(model, prompts, args.steps, order, seeds=seeds,
                         temperature=args.temperature) for order in orders]
        for i, row in enumerate(rows):
            runs = []
            for order, out in zip(orders, outs):
                runs.append((str(order), out.tokens[i].tolist(), out.reveal_step[i].tolist()))
            show(items[row], runs, enc, config["dataset"])


if __name__ == "__main__":
    run_script(main)
