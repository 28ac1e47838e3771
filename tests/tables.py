"""Networks replaced by lookup tables, and the equations of posterior.py summed exactly in float64.

With L positions, V tokens and T steps everything is discrete: (V+1)^L states, V^L answers, and the
ordered partitions of L positions into at most T groups. What follows is written from the equations,
gate by gate and token by token, and shares no code with posterior.py or sample.py.

One table serves every T: its gates are looked up by the state and by how many steps are left.
"""

import itertools
import math
from types import SimpleNamespace

import torch
import torch.nn as nn

SIZES = [(3, 1), (3, 2), (3, 3), (4, 2)]  # (L, T)
V = 2
TAU = 0.5
X0 = {3: (1, 0, 1), 4: (1, 0, 1, 1)}


class TableModel(nn.Module):
    """Token and gate logits looked up by state.

    The "hidden state" of a position is a row of its V token logits, then one gate logit for each
    number of steps left, 1 to max_steps, then 1 where the state is masked.
    """

    def __init__(self, L=3, seed=0, max_steps=4):
        super().__init__()
        self.config = SimpleNamespace(answer_len=L, vocab_size=V, mask=V, pad=-1, eos=V,
                                      max_steps=max_steps)
        generator = torch.Generator().manual_seed(seed)
        n_states = (V + 1) ** L
        self.table = nn.Parameter(torch.randn(n_states, L, V + max_steps, generator=generator,
                                              dtype=torch.float64))

    def row(self, z):
        """The state read as a number to the base V + 1."""
        return (z * (V + 1) ** torch.arange(z.shape[-1])).sum(-1)

    def gate_column(self, steps_left):
        return V + steps_left - 1

    def encode_prompt(self, prompt):
        return (prompt,)

    def forward(self, cache, z):
        is_masked = (z == self.config.mask)[..., None]
        return torch.cat([self.table[self.row(z)], is_masked.to(self.table.dtype)], dim=-1)

    def log_p(self, h):
        return h[..., :V].log_softmax(-1)

    def gate_logits(self, h, masked, steps_left):
        """h (..., L, V + max_steps + 1), masked (..., L), steps_left (..., 1) -> (..., L)."""
        assert torch.equal(masked, h[..., -1] == 1), "told the masks of another state"
        assert ((steps_left >= 1) & (steps_left <= self.config.max_steps)).all()
        column = self.gate_column(steps_left)[..., None].expand(*masked.shape, 1)
        return h.gather(-1, column).squeeze(-1)


def scores(L=3, seed=0):
    """The posterior's table: one score per position of one answer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(L, generator=generator, dtype=torch.float64).requires_grad_()


# An order is a tuple with the step that reveals each position: (1, 3, 2) reveals positions 0, 2, 1.

def orders(L, T):
    """Every order: steps 1..m are all used, m <= T."""
    return [
        o
        for o in itertools.product(range(1, T + 1), repeat=L)
        if set(o) == set(range(1, max(o) + 1))
    ]


def answers(L):
    return list(itertools.product(range(V), repeat=L))


def masked_at(order, t):
    """The positions that are masked before step t."""
    return [i for i, step in enumerate(order) if step >= t]


def state_at(x0, order, t):
    """The state before step t (L,): V, the token after the last, is MASK."""
    return torch.tensor([V if step >= t else token for token, step in zip(x0, order)])


# --- the model, Eq. 1 and 2 -----------------------------------------------------------------------

def log_p_gates(model, x0, order, t, T):
    """Eq. 1: log p(r_t | z_t)."""
    if t == T:
        return torch.zeros((), dtype=model.table.dtype)
    column = model.gate_column(T - t + 1)
    alpha = model.table[model.row(state_at(x0, order, t)), :, column].sigmoid()
    masked = masked_at(order, t)
    chosen = sum(torch.log(alpha[i] if order[i] == t else 1 - alpha[i]) for i in masked)
    return chosen - torch.log(1 - math.prod(1 - alpha[i] for i in masked))


def log_p_tokens(model, x0, order, t):
    """Eq. 2: log p of the tokens that step t reveals."""
    logits = model.table[model.row(state_at(x0, order, t)), :, :V]
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return sum(log_p[i, x0[i]] for i in masked_at(order, t) if order[i] == t)


def log_p_joint(model, x0, order, T):
    """log p(x0, order)."""
    return sum(log_p_gates(model, x0, order, t, T) + log_p_tokens(model, x0, order, t)
               for t in range(1, max(order) + 1))


def log_p_marginal(model, x0, T):
    joints = [log_p_joint(model, x0, o, T) for o in orders(len(x0), T)]
    return torch.logsumexp(torch.stack(joints), 0)


# --- the posterior, Eq. 3 -------------------------------------------------------------------------

def q_gates(s, order, t, T, tau=TAU):
    """{position: q} over the positions still masked at step t."""
    masked = masked_at(order, t)
    if t == T:
        return {i: torch.ones((), dtype=s.dtype) for i in masked}
    ranked = sorted((s[i] for i in masked), reverse=True)
    share = math.ceil(len(masked) / (T - t + 1) ** 1.5)
    gates = {}
    for i in masked:
        e = torch.exp((s[i] - ranked[0]) / tau)
        f = torch.sigmoid((s[i] - ranked[share - 1]) / tau)
        gates[i] = 1 - (1 - e) * (1 - f)
    return gates


def q_step(s, order, t, T, tau=TAU):
    """q(r_t | z_t)."""
    return math.prod(q if order[i] == t else 1 - q for i, q in q_gates(s, order, t, T, tau).items())


def q_of(s, order, T, until=None):
    """q(order), or q(r_1 .. r_{until-1})."""
    return math.prod((q_step(s, order, t, T) for t in range(1, until or max(order) + 1)),
                     start=torch.ones((), dtype=s.dtype))


def possible_orders(s, T):
    """{order: q(order)} of those that q can draw."""
    law = {o: q_of(s, o, T).item() for o in orders(len(s), T)}
    return {o: q for o, q in law.items() if q > 0}


# --- the bound, Eq. 4, without Rao-Blackwellisation -----------------------------------------------

def plain_step(model, s, x0, order, t, T):
    """log p(r_t, x | z_t) - log q(r_t | z_t) at the gates that the order opens; 0 when nothing is
    left."""
    if t > max(order):
        return torch.zeros((), dtype=s.dtype)
    log_p = log_p_gates(model, x0, order, t, T) + log_p_tokens(model, x0, order, t)
    return log_p - q_step(s, order, t, T).log()


def exact_elbo(model, s, x0, T):
    """sum over orders of q(order) (log p(x0, order) - log q(order))."""
    total = 0.0
    for o in possible_orders(s, T):
        q = q_of(s, o, T)
        total = total + q * (log_p_joint(model, x0, o, T) - q.log())
    return total
