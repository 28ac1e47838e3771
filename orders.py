"""Orders: which of the masked positions to reveal now. The learned one and the rules it competes with.

sample.py asks an order at every step but the last, which reveals whatever is left. An order is named by

    NAME[:KNOB][@BLOCK][+eos_last][+finish]     learned, learned:0.5:1+finish, confidence@8, threshold:0.9+eos_last

KNOB      what an adaptive order is tuned by; two knobs are written learned:0.5:1
@BLOCK    positions in the leftmost unfinished block of this size come first (semi-autoregressive)
+eos_last positions whose proposed token is EOS or PAD wait until nothing else is left: confidence
          likes the end of the canvas, and would spend its first steps on it
+finish   [NEW] reveals everything as soon as all that the order would leave is certain, c^i >= 0.99: certain tokens clash
          with nothing, so an answer needs only as many steps as its uncertain ones

Some rules reveal an even share of what is left and differ in their score; without +finish they need all T steps. `iid`
draws when each position is revealed. The others are adaptive: they reveal what they find safe, at
least one position, and are done when they are done. For every rule: it reveals some of the positions it may choose from and never
none; ties go to the leftmost; a row's choice depends on nothing but the row.

Here p^i is the token head's distribution at position i, c^i its largest probability, H^i its entropy
in nats. alpha^i is the gate head's.
"""

import re
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import UserError


@dataclass
class State:
    """What an order may look at before step t of T. B rows, L positions, V tokens."""
    log_p: torch.Tensor        # (B, L, V) log-probabilities of the token head, float32
    tokens: torch.Tensor       # (B, L) the token that a position takes if it is revealed now
    gate_logits: torch.Tensor  # (B, L) logits of alpha
    masked: torch.Tensor       # (B, L) True where the order may reveal, at least one in every row
    t: int                     # this step, 1..T
    T: int                     # step budget, at most L
    u_gate: torch.Tensor       # (B, L) uniform noise, fresh every step
    u_first: torch.Tensor      # (B,) the same, for one more draw
    u_row: torch.Tensor        # (B, L) uniform noise that stays the same at every step
    past: list                 # log_p of the two steps before, the latest first; fewer at the start
    x0: torch.Tensor | None    # (B, L) true answers, for the oracle only
    knob: tuple = ()
    block: int = 10**9

    @property
    def front(self):
        """(B, L) the positions to choose from that lie in the leftmost block which has any."""
        index = self.block_index.expand(self.masked.shape).masked_fill(~self.masked, self.masked.shape[1])
        return self.masked & (index == index.amin(-1, keepdim=True))

    @property
    def block_index(self):
        return torch.arange(self.masked.shape[1], device=self.masked.device) // self.block


# --- shared by the rules --------------------------------------------------------------------------------

def top_k(score, masked, k, block_index=None):
    """The k masked positions of highest score in each row, k a number or (B, 1); ties go to the leftmost.
    With a block_index (L,), earlier blocks come first whatever the score."""
    ranking = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    if block_index is not None:
        block = block_index.expand(masked.shape).masked_fill(~masked, masked.shape[1])
        ranking = ranking.gather(-1, block.gather(-1, ranking).argsort(dim=-1, stable=True))
    rank = torch.empty_like(ranking).scatter_(-1, ranking, torch.arange(score.shape[1], device=score.device).expand_as(ranking))
    return (rank < k) & masked


def even_share(score, state: State):
    """The best of an even split of what is left over the steps that are left: never none, and all at T."""
    k = (state.masked.sum(-1, keepdim=True) // (state.T - state.t + 1)).clamp(min=1)
    return top_k(score, state.masked, k, state.block_index)


def or_best(chosen, score, state: State):
    """The chosen positions of the front block, or its single best where none is chosen."""
    chosen = chosen & state.front
    return torch.where(chosen.any(-1, keepdim=True), chosen, top_k(score, state.front, 1))


def bits_from_behind(L: int, device=None):
    """(L,) in 0..1: 0, 1/2, 1/4, 3/4, 1/8, ..; in rising order, places that are far apart stand together."""
    place = torch.arange(L, device=device)
    return sum((place >> bit) % 2 / 2 ** (bit + 1) for bit in range(L.bit_length()))


def entropy_of(log_p):
    return -(log_p.exp() * log_p).sum(-1)


# --- the learned order ------------------------------------------------------------------------------------

def learned(state: State):
    """Eq. 1: independent gates given that at least one opens, drawn exactly. The first open gate f
    has p(f = i) proportional to alpha^i prod_{j<i} (1 - alpha^j); gates before f are closed, gates
    after f are free. With a knob nothing is drawn: every gate with alpha > knob, or else the most likely.
    With a second one an open gate waits while its token's H^i is above that many nats: alpha says what may go together,
    H what p can say by now. If all would wait, the one of lowest H does not."""
    logits = state.gate_logits.masked_fill(~state.front, -torch.inf)
    if state.knob:
        alpha, *nats = state.knob
        opened = or_best(logits.sigmoid() > alpha, logits, state)
        if nats:  # [NEW] an open gate waits while its token is in doubt
            H = entropy_of(state.log_p)
            opened = or_best(H <= nats[0], -H, replace(state, masked=opened))
        return opened
    log_not = F.logsigmoid(-logits)                                          # log(1 - alpha), 0 where revealed
    log_first = F.logsigmoid(logits) + log_not.cumsum(-1) - log_not
    first = draw(log_first.log_softmax(-1), state.u_first)[:, None]          # (B, 1)
    position = torch.arange(logits.shape[1], device=logits.device)
    return (position == first) | ((position > first) & (state.u_gate < logits.sigmoid()))


# --- an even share at every step ----------------------------------------------------------------------------

def left_to_right(state: State):
    return even_share(-torch.arange(state.masked.shape[1], device=state.masked.device).expand(state.masked.shape).float(), state)


def random(state: State):
    return even_share(state.u_row, state)


def confidence(state: State):
    """Highest c^i first (MaskGIT, 2202.04200; LLaDA, 2502.09992)."""
    return even_share(state.log_p.amax(-1), state)


def margin(state: State):
    """Largest gap between the two most probable tokens first (Kim et al., 2502.06768)."""
    best = state.log_p.exp().topk(2, dim=-1).values
    return even_share(best[..., 0] - best[..., 1], state)


def entropy(state: State):
    """Lowest entropy first (Dream, 2508.15487)."""
    return even_share(-entropy_of(state.log_p), state)


def dilated(state: State):
    """Places far apart first, 0, 32, 16, 48, 8, .. of 64: neighbours tell most about each other, so they should not go together
    (after dilated unmasking, 2506.19037). [NEW] After step t, (t / T)^knob of them are open: with a knob above 1 the shares grow."""
    L, knob = state.masked.shape[1], state.knob[0]
    done, now, T = (t**knob for t in (state.t - 1, state.t, state.T))
    k = (state.masked.sum(-1, keepdim=True) * (now - done) / (T - done)).long().clamp(min=1)
    return top_k(-bits_from_behind(L, state.masked.device).expand(state.masked.shape), state.masked, k, state.block_index)


def oracle(state: State):
    """Highest p of the true token first. Looks at the answer, so it is no rule; greedy and evenly split, so it
    is no bound either: adaptive rules can beat it."""
    return even_share(state.log_p.gather(-1, state.x0[..., None]).squeeze(-1), state)


# --- adaptive -------------------------------------------------------------------------------------------------

def iid(state: State):
    """Each position opens with probability 1 / (T - t + 1) at step t: the same as one uniform reveal time
    in 1..T per position, drawn beforehand. Jumping to the earliest time at which anything opens skips
    the empty steps, and they are not counted. In blocks, or with EOS last, each group has its own T times."""
    time = (state.u_row * state.T).long().masked_fill(~state.front, state.T)
    return time == time.amin(-1, keepdim=True)


def threshold(state: State):
    """All with c^i >= knob, or else the best (Fast-dLLM, 2505.22618)."""
    score = state.log_p.amax(-1)
    return or_best(score.exp() >= state.knob[0], score, state)


def factor(state: State):
    """The n most confident, n the largest with (n + 1) (1 - c_(n)) < knob, at least 1 (Fast-dLLM): as long
    as 1 - c is small against 1/n, the most probable tokens one by one are the most probable together."""
    score = state.log_p.amax(-1)
    doubt = (-torch.expm1(score)).masked_fill(~state.front, torch.inf).sort(dim=-1).values        # 1 - c_(n)
    n = torch.arange(1, score.shape[1] + 1, device=score.device)
    return top_k(score, state.front, ((n + 1) * doubt < state.knob[0]).sum(-1, keepdim=True).clamp(min=1))


def entropy_bound(state: State):
    """The longest prefix, by rising entropy, with sum H - max H <= knob nats (EB-Sampler, 2505.24857): a
    bound on what the tokens of one step could tell about each other."""
    H = entropy_of(state.log_p)
    rising = H.to(precise(H.device)).masked_fill(~state.front, torch.inf).sort(dim=-1).values
    n = (rising.cumsum(-1) - rising <= state.knob[0]).sum(-1, keepdim=True)  # the largest is the last of the prefix
    return top_k(-H, state.front, n)


def low_entropy(state: State):
    """All with H^i < knob nats, or else the best (MED, 2510.19990)."""
    H = entropy_of(state.log_p)
    return or_best(H < state.knob[0], -H, state)


def klass(state: State):
    """All with c^i > knob 1 whose distribution has moved by a KL below knob 2 in each of the last two
    steps, or else the most confident (KLASS, 2511.05664)."""
    score, seen = state.log_p.amax(-1), [state.log_p, *state.past]
    if len(seen) < 3:
        return or_best(torch.zeros_like(state.masked), score, state)
    settled = [(new.exp() * (new - old)).sum(-1) < state.knob[1] for new, old in zip(seen, seen[1:])]
    return or_best((score.exp() > state.knob[0]) & settled[0] & settled[1], score, state)


# --- names ------------------------------------------------------------------------------------------------------

class Rule(NamedTuple):
    reveal: Callable       # State -> (B, L) bool
    knob: tuple = ()       # default
    sweep: tuple = ()      # knobs that eval_gsm8k.py tries where none is given


ORDERS = {
    "learned": Rule(learned, (), ((), *((alpha,) for alpha in (0.02, 0.05, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6)),
                                  *((alpha, nats) for alpha in (0.02, 0.1, 0.3, 0.35, 0.4, 0.5) for nats in (0.3, 0.75, 1.0)))),
    "left_to_right": Rule(left_to_right),
    "random": Rule(random),
    "confidence": Rule(confidence),
    "margin": Rule(margin),
    "entropy": Rule(entropy),
    "dilated": Rule(dilated, (2.0,), ((1.0,), (1.5,), (2.0,), (3.0,))),
    "iid": Rule(iid),
    "threshold": Rule(threshold, (0.9,), ((0.3,), (0.4,), (0.5,), (0.7,), (0.8,), (0.9,), (0.95,), (0.99,))),
    "factor": Rule(factor, (1.0,), ((0.25,), (0.5,), (1.0,), (2.0,), (4.0,), (8.0,), (16.0,))),
    "entropy_bound": Rule(entropy_bound, (0.01,), ((1e-3,), (0.01,), (0.1,), (0.3,), (1.0,), (3.0,), (10.0,), (20.0,))),
    "low_entropy": Rule(low_entropy, (0.2,), ((0.05,), (0.1,), (0.2,), (0.3,), (0.5,), (1.0,), (2.0,), (3.0,))),
    "klass": Rule(klass, (0.9, 0.01), ((0.3, 0.1), (0.5, 0.01), (0.7, 0.01), (0.9, 0.01), (0.9, 0.1))),
    "oracle": Rule(oracle),
}


CERTAIN = 0.99  # of +finish


@dataclass(frozen=True)
class Order:
    """An order and its options; str(order) is its name on the command line."""
    name: str
    knob: tuple = ()
    block: int = 10**9
    eos_last: bool = False
    finish: bool = False

    def __str__(self):
        knobs, block = "".join(f":{k:.15g}" for k in self.knob), f"@{self.block}" * (self.block < 10**9)
        return self.name + knobs + block + "+eos_last" * self.eos_last + "+finish" * self.finish

    def __call__(self, state: State, eos: int):
        """(B, L) bool: what to reveal now. eos: EOS is token V-2, PAD V-1."""
        masked = state.masked
        if self.eos_last:
            content = masked & (state.tokens < eos)
            masked = torch.where(content.any(-1, keepdim=True), content, masked)
        reveal = ORDERS[self.name].reveal(replace(state, masked=masked, knob=self.knob, block=self.block))
        if self.finish:  # [NEW] an answer needs as many steps as its uncertain tokens do
            settled = reveal | ~state.masked | (state.log_p.amax(-1).exp() >= CERTAIN)
            reveal = reveal | (state.masked & settled.all(-1, keepdim=True))
        return reveal


def parse_order(text: str) -> Order:
    """The order that a name stands for. Raises UserError for an unknown name or a bad knob."""
    text = text.strip()
    name = re.match(r"\w*", text)[0]
    if name not in ORDERS:
        raise UserError(f"unknown order {text!r}: choose from {', '.join(ORDERS)}")
    rule = ORDERS[name]
    try:
        match = re.fullmatch(r"\w+((?::[^:@]+?)*)(?:@(\d+))?(\+eos_last)?(\+finish)?", text, re.ASCII)
        if match is None:
            raise ValueError
        values, size = tuple(float(k) for k in match[1].split(":")[1:]) or rule.knob, int(match[2] or 10**9)
        least, most = (0.1, 10.0) if name == "dilated" else (0.0, 1e300)
        if len(values) not in {len(k) for k in (rule.knob, *rule.sweep)} or not all(least <= v <= most for v in values) or size < 1:
            raise ValueError
    except ValueError:
        example = ":".join([name, *(f"{k:g}" for k in rule.sweep[-1])]) if rule.sweep else name
        raise UserError(f"cannot read order {text!r}: write it like {example}, {example}@8, {example}+eos_last or {example}+finish") from None
    return Order(name, values, min(size, 10**9), bool(match[3]), bool(match[4]))


# --- drawing ------------------------------------------------------------------------------------------------------

def precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def draw(log_p, u):
    """One index per row from log-probabilities (..., V) by inverse CDF with uniforms u (...).
    In float64: float32 cuts off the tail and so lowers the temperature (Zheng et al., 2409.02908)."""
    cdf = log_p.to(precise(log_p.device)).exp().cumsum(-1)
    u = u.to(cdf.dtype)[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=log_p.shape[-1] - 1)
