"""Networks replaced by lookup tables, and the model of Eq. 1-2 summed exactly in float64.

With L positions, V tokens and T steps everything is discrete: (V+1)^L states, V^L answers, and the
ordered partitions of L positions into at most T groups. What follows is written from the equations,
position by position, and shares no code with posterior.py or sample.py."""

import itertools
import math
from types import SimpleNamespace

import torch
import torch.nn as nn


class TableModel(nn.Module):
    """Token and gate logits looked up by state. The "hidden state" of a position is its V token
    logits followed by its gate logit."""

    def __init__(self, L=3, V=2, seed=0):
        super().__init__()
        self.config = SimpleNamespace(answer_len=L, vocab_size=V, mask=V, pad=-1, eos=V)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn((V + 1) ** L, L, V + 1, generator=generator, dtype=torch.float64))

    def forward(self, prompt, z):
        base = (self.config.vocab_size + 1) ** torch.arange(self.config.answer_len)
        return self.table[(z * base).sum(-1)]

    def log_p(self, h):
        return h[..., :-1].log_softmax(-1)

    def gate_logits(self, h):
        return h[..., -1]


def orders(L, T):
    """Every order as a tuple of reveal steps: steps 1..m are all used, m <= T."""
    return [o for o in itertools.product(range(1, T + 1), repeat=L) if set(o) == set(range(1, max(o) + 1))]


def state(x0, order, t, mask):
    return [token if step < t else mask for token, step in zip(x0, order)]


def log_p_joint(model, x0, order, T):
    """log p(x0, order) of Eq. 1-2, one gate and one token at a time."""
    total = 0.0
    for t in range(1, max(order) + 1):
        h = model(None, torch.tensor([state(x0, order, t, model.config.mask)]))[0]
        alpha, log_p = model.gate_logits(h).sigmoid(), model.log_p(h)
        left = [i for i, step in enumerate(order) if step >= t]
        for i in left:
            if order[i] == t:
                total = total + log_p[i, x0[i]]
            if t < T:
                total = total + torch.log(alpha[i] if order[i] == t else 1 - alpha[i])
        if t < T:
            total = total - torch.log(1 - math.prod(1 - alpha[i] for i in left))
    return total


def q_gates(s, order, t, T, tau):
    """Eq. 3 at step t of an order: {position: q} over the masked positions."""
    left = [i for i, step in enumerate(order) if step >= t]
    if t == T:
        return {i: torch.ones((), dtype=s.dtype) for i in left}
    top = max(left, key=lambda i: s[i].item())
    return {i: torch.exp((s[i] - s[top]) / tau) for i in left}


def q_of(s, order, T, tau, until=None):
    """Probability of an order under Eq. 3 (of its steps before `until`)."""
    total = torch.ones((), dtype=s.dtype)
    for t in range(1, (until or max(order) + 1)):
        for i, q in q_gates(s, order, t, T, tau).items():
            total = total * (q if order[i] == t else 1 - q)
    return total


def log_p_marginal(model, x0, T):
    L = model.config.answer_len
    return torch.logsumexp(torch.stack([log_p_joint(model, x0, o, T) for o in orders(L, T)]), 0)


def exact_elbo(model, s, x0, T, tau):
    """sum over orders of q (log p(x0, order) - log q), without Rao-Blackwellisation."""
    total = 0.0
    for o in orders(len(x0), T):
        q = q_of(s, o, T, tau)
        if q > 0:
            total = total + q * (log_p_joint(model, x0, o, T) - q.log())
    return total
