"""Networks replaced by lookup tables, and the equations of posterior.py summed exactly in float64.

With L positions, V tokens and T steps everything is discrete: (V+1)^L states, V^L answers, and the
ordered partitions of L positions into at most T groups. What follows is written from the equations,
gate by gate and token by token, and shares no code with posterior.py or sample.py."""

import itertools
import math
from types import SimpleNamespace

import torch
import torch.nn as nn

SIZES = [(3, 1), (3, 2), (3, 3), (4, 2)]  # (L, T)
V, TAU = 2, 0.5
X0 = {3: (1, 0, 1), 4: (1, 0, 1, 1)}


class TableModel(nn.Module):
    """Token and gate logits looked up by state. The "hidden state" of a position is its V token
    logits followed by its gate logit."""

    def __init__(self, L=3, seed=0):
        super().__init__()
        self.config = SimpleNamespace(answer_len=L, vocab_size=V, mask=V, pad=-1, eos=V)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn((V + 1) ** L, L, V + 1, generator=generator,
                                              dtype=torch.float64))

    def row(self, z):
        return (z * (V + 1) ** torch.arange(z.shape[-1])).sum(-1)  # the state read as a number

    def read(self, prompt):
        return (prompt,)

    def forward(self, cache, z):
        return self.table[self.row(z)]

    def log_p(self, h):
        return h[..., :-1].log_softmax(-1)

    def gate_logits(self, h):
        return h[..., -1]


def scores(L=3, seed=0):
    """The posterior's table: one score per position of one answer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(L, generator=generator, dtype=torch.float64).requires_grad_()


# An order is a tuple with the step that reveals each position: (1, 3, 2) reveals places 0, 2, 1.

def orders(L, T):
    """Every order: steps 1..m are all used, m <= T."""
    return [
        o
        for o in itertools.product(range(1, T + 1), repeat=L)
        if set(o) == set(range(1, max(o) + 1))
    ]


def answers(L):
    return list(itertools.product(range(V), repeat=L))


def lookup(model, x0, order, t):
    """Table entry of the state before step t, and the positions that it masks."""
    z = [token if step < t else model.config.mask for token, step in zip(x0, order)]
    return model(None, torch.tensor([z]))[0], [i for i, step in enumerate(order) if step >= t]


# --- the model, Eq. 1 and 2 -----------------------------------------------------------------------

def log_p_gates(model, x0, order, t, T):
    """Eq. 1: log p(r_t | z_t)."""
    h, left = lookup(model, x0, order, t)
    if t == T:
        return torch.zeros((), dtype=h.dtype)
    alpha = model.gate_logits(h).sigmoid()
    chosen = sum(torch.log(alpha[i] if order[i] == t else 1 - alpha[i]) for i in left)
    return chosen - torch.log(1 - math.prod(1 - alpha[i] for i in left))


def log_p_tokens(model, x0, order, t):
    """Eq. 2: log p of the tokens that step t reveals."""
    h, left = lookup(model, x0, order, t)
    return sum(model.log_p(h)[i, x0[i]] for i in left if order[i] == t)


def log_p_joint(model, x0, order, T):
    """log p(x0, order)."""
    return sum(log_p_gates(model, x0, order, t, T) + log_p_tokens(model, x0, order, t)
               for t in range(1, max(order) + 1))


def log_p_marginal(model, x0, T):
    return torch.logsumexp(torch.stack([log_p_joint(model, x0, o, T) for o in orders(len(x0), T)]),
                           0)


# --- the posterior, Eq. 3 -------------------------------------------------------------------------

def q_gates(s, order, t, T, tau=TAU):
    """{position: q} over the positions still masked at step t."""
    left = [i for i, step in enumerate(order) if step >= t]
    if t == T:
        return {i: torch.ones((), dtype=s.dtype) for i in left}
    ranked = sorted((s[i] for i in left), reverse=True)
    fair = ranked[math.ceil(len(left) / (T - t + 1)) - 1]
    e = {i: torch.exp((s[i] - ranked[0]) / tau) for i in left}
    return {i: 1 - (1 - e[i]) * (1 - torch.sigmoid((s[i] - fair) / tau)) for i in left}


def q_step(s, order, t, T, tau=TAU):
    """q(r_t | z_t)."""
    return math.prod(q if order[i] == t else 1 - q for i, q in q_gates(s, order, t, T, tau).items())


def q_of(s, order, T, until=None):
    """q(order), or q(r_1 .. r_{until-1})."""
    return math.prod((q_step(s, order, t, T) for t in range(1, until or max(order) + 1)),
                     start=torch.ones((), dtype=s.dtype))


def possible_orders(s, T):
    """{order: q(order)} of those that q can draw."""
    return {o: q.item() for o in orders(len(s), T) if (q := q_of(s, o, T)) > 0}


# --- the bound, Eq. 4, without Rao-Blackwellisation -----------------------------------------------

def plain_step(model, s, x0, order, t, T):
    """log p(r_t, x | z_t) - log q(r_t | z_t) at the gates that the order opens; 0 when nothing is
    left."""
    if t > max(order):
        return torch.zeros((), dtype=s.dtype)
    return (
        log_p_gates(model, x0, order, t, T)
        + log_p_tokens(model, x0, order, t)
        - q_step(s, order, t, T).log()
    )


def exact_elbo(model, s, x0, T):
    """sum over orders of q(order) (log p(x0, order) - log q(order))."""
    return sum(q_of(s, o, T) * (log_p_joint(model, x0, o, T) - q_of(s, o, T).log())
               for o in possible_orders(s, T))
