"""The order posterior and the variational objective: how a model learns in which order to write.

q reads the finished answer and proposes an order, in training only. p learns to write the answer
along these orders, and to propose such orders itself. Both maximise one lower bound on log p.
README.md has the idea, assets/derivation.md each equation with numbers; this is the notation.

  B batch, K orders per example, T steps (the next budget for each batch), L answer length,
  V vocabulary
  x0        the answer; EOS and PAD are tokens of it. c is its prompt
  z_t       the state before step t: x0, with what is not yet revealed set to MASK. z_1 is all MASK
  M_t       the positions that are masked in z_t
  r_t^i     1 if step t reveals position i, else 0. An order is r_1 .. r_T
  alpha^i   the probability that p opens gate i (before p is told that at least one must open);
            p's gate head knows the state and how many steps are left
  q_t^i     the probability that q opens gate i, given x0 and c
  s^i       q's score of position i; s^(n) is the n-th largest score in M_t
  n         the step's share of M_t: |M_t| / (T - t + 1)^1.5, rounded up
  tau       temperature of q

  Eq. 1  gates of p    p(r_t | z_t) = prod_{i in M_t} Bern(r_t^i; alpha^i)
                                      / (1 - prod_{i in M_t} (1 - alpha^i)),  r_t != 0
                       in the last step all gates open
  Eq. 2  tokens of p   p(x^i | z_t), independently for each position that step t reveals
  Eq. 3  gates of q    q_t^i = 1 - (1 - e^i) (1 - f^i) = e^i + (1 - e^i) f^i;  in the last step 1
                       e^i = exp((s^i - s^(1)) / tau)         the best position opens for certain
                       f^i = sigmoid((s^i - s^(n)) / tau)     about n positions open [NEW]
  Eq. 4  bound         log p(x0 | c) >= E_q sum_t L_t(z_t)
  Eq. 5  one step      L_t = sum_{i in M_t} q_t^i log p(x0^i | z_t) - KL_t
  Eq. 6  its KL        KL_t = sum_{i in M_t} KL(Bern(q_t^i) || Bern(alpha^i))
                              + log(1 - prod_{i in M_t} (1 - alpha^i));  in the last step 0
  Eq. 7  gradient      sum_t E_q mean_k [ grad L_t^k + A_t^k grad sum_{u<t} log q(r_u^k | z_u^k) ]
                       A_t^k = L_t^k - mean of L_t over the other K - 1 orders of the example
         grad: for the parameters of p and of q; ^k: of order k of an example

[NEW] marks what the paper does not have, as far as we know it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ModelConfig, Trunk, log_p_of, nth_score


class OrderPosterior(nn.Module):
    """q: reads prompt and finished answer once, and scores the positions of the answer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.trunk = Trunk(config)
        self.score_head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score_head.weight, std=0.01)

    def forward(self, prompt, x0):
        """prompt (B, P), x0 (B, L) -> scores (B, L).

        A position of higher score is revealed earlier. [NEW] The scores of an answer are
        standardised to mean 0 and variance 1, so tau alone sets how sharp an order is, whatever the
        scale of a network's scores.
        """
        h = self.trunk(self.trunk.encode_prompt(prompt), x0).float()
        with torch.autocast(h.device.type, enabled=False):       # bfloat16 would tie scores
            scores = self.score_head(h).squeeze(-1)
        return F.layer_norm(scores, scores.shape[-1:])


# --- Eq. 3: gates from scores, orders from gates --------------------------------------------------

def log_gate_probs(scores, masked, steps_left, tau: float):
    """log q_t^i of Eq. 3, for scores and masks of shape (..., L).

    steps_left is T - t + 1. It may be a number, or one for each row.
    Gates with nothing to decide have log q = 0: revealed positions, and all in the last step.
    """
    best = scores.masked_fill(~masked, -torch.inf).amax(-1, keepdim=True)    # s^(1)
    nth = nth_score(scores, masked, steps_left)                              # s^(n)
    settled = ~masked | (steps_left == 1)
    log_e = ((scores - best) / tau).masked_fill(settled, 0.0)
    log_f = F.logsigmoid(((scores - nth) / tau).masked_fill(settled, 0.0))
    certain = log_e == 0                                 # the best position, and settled gates

    # Eq. 3, q = e + (1 - e) f, in logs. Rounding must not lift it above 1.
    log_q = torch.logaddexp(log_e, log_one_minus(log_e) + log_f).clamp(max=0)
    return log_q.masked_fill(certain, 0.0)


def log_one_minus(log_q):
    """log(1 - q) from log q, with 0 in place of -inf where q = 1: such a gate never stays closed.

    The -1 that stands in before the log keeps its gradient from being nan.
    """
    certain = log_q == 0
    below_0 = log_q.masked_fill(certain, -1.0)
    log_not_q = torch.log(-torch.expm1(below_0))
    return log_not_q.masked_fill(certain, 0.0)


@torch.no_grad()
def sample_orders(scores, K: int, T: int, tau: float, generator=None):
    """K orders for each example: scores (B, L) -> reveal_step (B, K, L) in 1..T.

    reveal_step is the whole path: position i is masked in z_t if reveal_step >= t, and step t
    reveals it if reveal_step == t. [1, 1, 2, 1] is `· · · ·`, then `3 + · 7`, then `3 + 4 7`.
    """
    B, L = scores.shape
    scores = scores[:, None].expand(B, K, L)
    reveal_step = torch.full((B, K, L), T, device=scores.device)
    for t in range(1, T):
        masked = reveal_step >= t
        q = log_gate_probs(scores, masked, T - t + 1, tau).exp()
        noise = torch.rand(q.shape, device=q.device, dtype=q.dtype, generator=generator)
        reveal_step[masked & (noise < q)] = t
    return reveal_step


def log_q_of_path(scores, reveal_step, t, T: int, tau: float):
    """log q(r_1 .. r_{t-1}) of K orders, (B, K), for one t (B,) per example."""
    scores = scores[:, None].expand(reveal_step.shape)                       # (B, K, L)
    total = torch.zeros(reveal_step.shape[:2], device=scores.device, dtype=scores.dtype)
    for u in range(1, T):
        masked = reveal_step >= u
        opens = reveal_step == u
        log_q = log_gate_probs(scores, masked, T - u + 1, tau)
        # Where nothing is to decide, log q and log(1 - q) are both 0.
        of_step_u = torch.where(opens, log_q, log_one_minus(log_q)).sum(-1)
        total = total + of_step_u * (u < t)[:, None]
    return total


# --- Eq. 5 and 6: one step of the bound -----------------------------------------------------------

def step_kl(log_q, gate_logits, masked, last):
    """Eq. 6, in nats: (..., L) each -> (...). last (..., 1) is True in the last step."""
    log_alpha = F.logsigmoid(gate_logits)
    log_not_alpha = F.logsigmoid(-gate_logits)
    q = log_q.exp() * masked
    not_q = -torch.expm1(log_q)                        # 1 - q; 0 where there is nothing to decide

    # One KL for each gate: it opens, or it stays closed.
    if_open = q * (log_q - log_alpha)
    if_closed = not_q * (log_one_minus(log_q) - log_not_alpha)
    kl_of_gates = (if_open + if_closed).sum(-1)

    # p knows that at least one gate opens. That makes every r_t likelier: the KL gets smaller.
    log_none = (log_not_alpha * masked).sum(-1)                              # log prod (1 - alpha)
    log_some = log_one_minus(log_none)
    decides = masked.any(-1) & ~last.squeeze(-1)
    return torch.where(decides, kl_of_gates + log_some, 0.0)


# --- Eq. 4 and 7: the objective -------------------------------------------------------------------

def leave_one_out(value):
    """value^k minus the mean of the other K - 1 orders of the example: (B, K) -> (B, K)."""
    K = value.shape[1]
    mean_of_others = (value.sum(1, keepdim=True) - value) / (K - 1)
    return value - mean_of_others


def draw_orders_and_steps(scores, K: int, T: int, tau: float, generator=None):
    """The random draws of one training step: reveal_step (B, K, L), and t (B,) in 2..T.

    [NEW] t is stratified: the examples take 2..T in turn, from a random start on.
    """
    reveal_step = sample_orders(scores, K, T, tau, generator)
    later_steps = max(T - 1, 1)                        # T = 1 has none, and gives it weight 0
    start = torch.randint(later_steps, (1,), device=scores.device, generator=generator)
    row = torch.arange(len(scores), device=scores.device)
    t = 2 + (row + start) % later_steps
    return reveal_step, t.clamp(max=T)


def objective(model, scores, prompt, x0, reveal_step, t, T: int, tau: float):
    """What training maximises, and logs: both for each example, (B,).

    [NEW] Step 1 is the same for all orders, so it is computed once. Of the later steps one, t, is
    drawn for each example and stands for all T - 1 of them. So an example takes 1 + K states of p.

    scores (B, L), prompt (B, P), x0 (B, L), reveal_step (B, K, L), t (B,) in 2..T.
    """
    K = reveal_step.shape[1]

    # The states: z_1 in column 0 (all MASK, so any order's row will do), z_t of the K in 1..K.
    first = torch.ones_like(t)[:, None]
    later = t[:, None].expand(-1, K)
    step = torch.cat([first, later], dim=1)                                           # (B, 1+K)
    steps_left = (T - step + 1)[..., None]                                            # (B, 1+K, 1)
    orders = torch.cat([reveal_step[:, :1], reveal_step], dim=1)                      # (B, 1+K, L)
    masked = orders >= step[..., None]                                                # (B, 1+K, L)
    x0 = x0[:, None].expand_as(masked)
    z = x0.masked_fill(masked, model.config.mask)

    # p and q at these states.
    cache = model.encode_prompt(prompt)
    h = model(cache, z.flatten(0, 1))                                                 # a row each
    h = h.unflatten(0, (-1, 1 + K))                                                   # (B, 1+K, ..)
    log_p = log_p_of(model, h, x0, masked)                                            # (B, 1+K, L)
    gate_logits = model.gate_logits(h, masked, steps_left)                            # (B, 1+K, L)
    log_q = log_gate_probs(scores[:, None].expand_as(masked), masked, steps_left, tau)

    # L_t, Eq. 5 and 6.
    reconstruction = (log_q.exp() * log_p).sum(-1)                                    # (B, 1+K)
    kl = step_kl(log_q, gate_logits, masked, steps_left == 1)
    L_t = reconstruction - kl

    # Eq. 7. The gradient of L_t takes the state as given. What it misses is q's gradient through
    # the gates that led to the state. That is the gradient of the surrogate, whose value means
    # nothing: the advantage is only a weight in it.
    advantage = leave_one_out(L_t[:, 1:]).detach()                                    # (B, K)
    surrogate = advantage * log_q_of_path(scores, reveal_step, t, T, tau)

    def over_steps(term):                              # step 1, and T - 1 times the one at t
        return term[:, 0] + (T - 1) * term[:, 1:].mean(1)

    bound = over_steps(L_t)                                                           # Eq. 4
    value = bound + (T - 1) * surrogate.mean(1)
    logs = {"elbo": bound, "recon": over_steps(reconstruction), "kl": over_steps(kl)}
    return value, {name: log.detach() for name, log in logs.items()}
