"""The order posterior and the variational objective: how a model learns in which order to write.

The denoiser of model.py fills positions in parallel but each by itself, so positions that depend on
each other should not be revealed in the same step. Which may go together is latent: we see answers,
never the order in which to write them. As in a variational autoencoder, a posterior q reads the
finished answer and proposes orders; the model p learns to write the answer along them and to
propose such orders itself. The argument for each equation: README.md, "The derivation".

  B batch, K orders per example, T step budget, L answer length, V vocabulary
  x0       the answer (EOS and PAD included), c its prompt
  z_t      the state before step t: x0 with what is not yet revealed set to MASK; z_1 is all MASK
  M_t      the masked positions of z_t; n = |M_t| / (T - t + 1), rounded up: an even share of them
  r_t^i    1 if step t reveals position i; an order is r_1 .. r_T
  alpha^i  p's probability of opening gate i, without the condition that at least one opens
  q_t^i    q's probability of opening gate i, given x0 and c; tau a temperature
  s^i      q's score of position i; s^(n) the n-th largest of M_t
  w_ut^i   the critic: what opening gate i at step u is worth to the later step t, in nats

  Eq. 1  gates       p(r_t | z_t) = prod_{i in M_t} Bern(r_t^i; alpha^i)
                                    / (1 - prod_{i in M_t} (1 - alpha^i)),  r_t != 0;  r_T = 1
  Eq. 2  tokens      p(x^i | z_t) for every position revealed at t, independently
  Eq. 3  posterior   q_t^i = 1 - (1 - e^i) (1 - f^i),  e^i = exp((s^i - s^(1)) / tau),
                     f^i = sigmoid((s^i - s^(n)) / tau);  q_T^i = 1
  Eq. 4  bound       log p(x0 | c) >= E_q sum_t L_t(z_t)
  Eq. 5  step term   L_t = sum_{i in M_t} q_t^i log p(x0^i | z_t) - KL_t
  Eq. 6  step KL     KL_t = sum_{i in M_t} KL(Bern(q_t^i) || Bern(alpha^i))
                            + log(1 - prod_{i in M_t} (1 - alpha^i));  KL_T = 0
  Eq. 7  gradient    E_q sum_t grad (L_t + S_t^k),  S_t^k = A_t^k sum_{u<t} log q(r_u^k | z_u^k)
                                                          + sum_{u<t} sum_{i in M_u} w_ut^i q_u^i,
                     A_t^k = (L_t - b_t)^k - mean_{k' != k} (L_t - b_t)^k'
  Eq. 8  critic      b_t = sum_{u<t} sum_{i in M_u} w_ut^i (r_u^i - q_u^i);  w makes |A_t| small

In S, A and w are constants to grad; Eq. 8's fit moves w alone. [NEW]: ours, as is the numbering.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MDM, ModelConfig, Trunk, log_p_of


class OrderPosterior(nn.Module):
    """q_phi reads the clean answer once: scores of positions, and the critic's worth of gates."""

    def __init__(self, config: ModelConfig, T: int):
        super().__init__()
        D, self.T = config.n_embd, T
        self.trunk = Trunk(config)
        self.score_head = nn.Linear(D, 1, bias=False)
        self.critic = nn.Sequential(nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, T * T))
        nn.init.normal_(self.score_head.weight, std=0.01)  # scale cancels in s; small: turns fast
        nn.init.zeros_(self.critic[-1].weight)  # w = 0 to begin with
        nn.init.zeros_(self.critic[-1].bias)

    def forward(self, prompt, x0):
        """prompt (B, P), x0 (B, L) -> scores s (B, L), higher is revealed earlier, and the critic's
        w (B, L, T, T) by position, step u, step t; float32 (bfloat16 would tie scores)."""
        h = self.trunk(self.trunk.read(prompt), x0).float()                          # (B, L, D)
        # [NEW] Standardised over the positions, mean 0 and spread 1: tau sets the scale, q the
        # shape. A free scale grows until all K orders are the same, and q learns no more.
        s = F.layer_norm((h * self.score_head.weight).sum(-1), x0.shape[-1:])
        embedded, *_ = self.trunk.enter(x0, self.trunk.config.prompt_len)
        seen = torch.cat([h, embedded], -1).detach()    # the trunk does not learn for the critic
        return s, self.critic(seen).float().unflatten(-1, (self.T, self.T))


# --- Eq. 3: gates from scores, and orders from gates ----------------------------------------------

def log_gate_probs(s, masked, left, tau: float):
    """Eq. 3: log q_t^i (..., L) of scores s and masks of that shape, with `left` = T - t + 1 steps
    to go (an int, or one for each row). Where there is nothing to decide (position already
    revealed, or the last step) it is 0, that is q = 1. [NEW] f: the paper's gate is e alone."""
    settled = ~masked | (left == 1)
    ranked = s.masked_fill(~masked, -torch.inf).sort(-1, descending=True).values
    n = -(-masked.sum(-1, keepdim=True) // left)                       # |M| / left, rounded up
    fair = ranked.gather(-1, (n - 1).clamp(min=0))                     # the n-th largest score
    log_e = ((s - ranked[..., :1]) / tau).masked_fill(settled, 0.0)
    log_f = F.logsigmoid(((s - fair) / tau).masked_fill(settled, 0.0))
    log_q = torch.logaddexp(log_e, log_complement(log_e) + log_f)  # e + (1 - e) f, except at e = 1
    return log_q.clamp(max=0).masked_fill(log_e == 0, 0.0)  # no rounding above 1; e = 1: q = 1


def log_complement(log_q):
    """log(1 - q) from log q. Where q = 1 it is -inf, and given as 0: callers mask it or multiply by
    0 (no order leaves such a gate closed), and 0 * inf would be nan. The substitution stands before
    the log, or the gradient would be nan."""
    certain = log_q == 0
    return torch.log(-torch.expm1(log_q.masked_fill(certain, -1.0))).masked_fill(certain, 0.0)


@torch.no_grad()
def sample_orders(s, K: int, T: int, tau: float, generator=None):
    """K orders per example: s (B, L) -> reveal_step (B, K, L), the step in 1..T that reveals each
    position. It is the whole path: masked at t is (reveal_step >= t), r_t is (reveal_step == t)."""
    s = s[:, None].expand(-1, K, -1)
    reveal_step = torch.full(s.shape, T, device=s.device)                             # (B, K, L)
    for t in range(1, T):  # what is left after step T-1 is revealed at T
        masked = reveal_step >= t
        q = log_gate_probs(s, masked, T - t + 1, tau).exp()
        opens = torch.rand(s.shape, device=s.device, dtype=s.dtype, generator=generator) < q
        reveal_step[masked & opens] = t
    return reveal_step


def path_before(s, w, reveal_step, t, T: int, tau: float):
    """Three sums over the gates that led to z_t, (B, K) each: log q(r_1 .. r_{t-1}); b_t of Eq. 8,
    a [NEW] control variate (compare MuProp, 1511.05176, and 1803.07246); the last sum of Eq. 7,
    which gives back what b_t took. s (B, L), w (B, L, T, T), t (B,) in 1..T."""
    log_q_path, b, worth = torch.zeros(3, *reveal_step.shape[:2], device=s.device, dtype=s.dtype)
    s = s[:, None].expand(reveal_step.shape)                                      # (B, K, L)
    for u in range(1, T):
        earlier = (u < t)[:, None, None]
        masked, opens = (reveal_step >= u) & earlier, (reveal_step == u) & earlier    # (B, K, L)
        w_ut = w[torch.arange(len(t)), :, u - 1, t - 1][:, None]                      # (B, 1, L)
        log_q = log_gate_probs(s, masked, T - u + 1, tau)
        q = log_q.exp() * masked
        log_q_path = log_q_path + torch.where(opens, log_q, log_complement(log_q)).sum(-1)
        b = b + (w_ut * (opens.to(q.dtype) - q.detach())).sum(-1)            # mean 0 given z_u
        worth = worth + (w_ut.detach() * q).sum(-1)
    return log_q_path, b, worth


# --- Eq. 5, 6: one step's term of the bound -------------------------------------------------------

def step_terms(log_p, gate_logits, log_q, masked, last):
    """Eq. 5 and 6 at one state, in nats: reconstruction and KL, each (...). All inputs (..., L):
    log_p = log p(x0^i | z), logits of alpha, log_q from Eq. 3, masked; `last` (..., 1) bool."""
    q, not_q = log_q.exp() * masked, -torch.expm1(log_q)              # 1 - q is 0 where q = 1
    log_alpha, log_not_alpha = F.logsigmoid(gate_logits), F.logsigmoid(-gate_logits)
    reconstruction = (q * log_p).sum(-1)                              # sum_i q^i log p(x0^i | z)
    # Eq. 6: KL of the bare gates, then what it means that p knows that at least one opens.
    kl = q * (log_q - log_alpha) + not_q * (log_complement(log_q) - log_not_alpha)
    log_none = (log_not_alpha * masked).sum(-1)                       # log prod (1 - alpha)
    undecided = masked.any(-1) & ~last.squeeze(-1)                    # elsewhere there is no KL
    log_some = torch.log(-torch.expm1(log_none.masked_fill(~undecided, -1.0)))
    return reconstruction, torch.where(undecided, kl.sum(-1) + log_some, 0.0)


# --- Eq. 4, 7, 8: the objective -------------------------------------------------------------------

def leave_one_out(value):
    """value^k - mean_{k' != k} value^k' over the orders of one example: (B, K) -> (B, K)."""
    K = value.shape[1]
    return (value - value.mean(1, keepdim=True)) * K / (K - 1)


def draw_orders_and_steps(s, K: int, T: int, tau: float, generator=None):
    """What objective needs a draw of: reveal_step (B, K, L), and a later step t (B,) in 2..T.
    [NEW] stratified. T-1 examples in a row see each step once; of each alone t is uniform."""
    reveal_step = sample_orders(s, K, T, tau, generator)
    later = max(T - 1, 1)
    first = torch.randint(later, (1,), device=s.device, generator=generator)
    t = 2 + (torch.arange(len(s), device=s.device) + first) % later
    return reveal_step, t.clamp(max=T)  # T = 1 has no later step, and gives it weight 0


def objective(model: MDM, s, w, prompt, x0, reveal_step, t, T: int, tau: float, kl_weight=1.0):
    """Eq. 4 at step 1 and at step t of each of K orders, with the gradient of Eq. 7 (q's KL times
    kl_weight); less the critic's squared error, which moves w alone. s (B, L) scores, w
    (B, L, T, T), prompt (B, P), x0 (B, L), reveal_step (B, K, L), t (B,) in 2..T.

    Returns what to maximise and detached logs, each (B,): `elbo`, `recon`, `kl` in nats per answer,
    `q_entropy` of the gates in nats per step; in nats^2 `spread`, the mean square of L_t's
    leave-one-out difference over the orders of an example, and `error`, what the critic leaves."""
    K = reveal_step.shape[1]
    # [NEW] L_1 is exact: its one state stands in column 0, z_t of the K orders in columns 1..K.
    step = torch.cat([torch.ones_like(t)[:, None], t[:, None].expand(-1, K)], 1)       # (B, 1+K)
    left = (T - step + 1)[..., None]
    masked = torch.cat([reveal_step[:, :1], reveal_step], 1) >= step[..., None]     # (B, 1+K, L)
    x0 = x0[:, None].expand_as(masked)
    z = x0.masked_fill(masked, model.config.mask)

    h = model(model.read(prompt), z.flatten(0, 1)).unflatten(0, (-1, 1 + K))     # (B, 1+K, L, D)
    log_q = log_gate_probs(s[:, None].expand_as(masked), masked, left, tau)
    # [NEW] q maximises recon - kl_weight kl, p recon - kl: the gates keep their value; their
    # gradient is divided by the weight that the KL below multiplies it with.
    gates = model.gate_logits(h)
    gates = gates.detach() + (gates - gates.detach()) / kl_weight
    recon, kl = step_terms(log_p_of(model, h, x0, masked), gates, log_q, masked, left == 1)
    step_elbo = recon - kl_weight * kl            # Eq. 5, the KL weighted: L_1, L_t^1 .. L_t^K

    # Eq. 7. The surrogate's value means nothing; its gradient is REINFORCE's. The advantage is
    # a constant in it: what L_t itself adds to the gradient already stands in step_elbo.
    value = step_elbo[:, 1:].detach()                                                    # (B, K)
    log_q_path, b, worth = path_before(s, w, reveal_step, t, T, tau)
    advantage = leave_one_out(value - b)                          # A_t^k of Eq. 7
    surrogate = advantage.detach() * log_q_path + worth
    error = advantage.square()                                    # Eq. 8: what w is fitted by

    def all_steps(term):  # L_1 + (T - 1) L_t, mean over the orders of an example
        return term[:, 0] + (T - 1) * term[:, 1:].mean(1)

    q, not_q = log_q.exp(), -torch.expm1(log_q)
    entropy = -(q * log_q + not_q * log_complement(log_q)).sum(-1)
    logs = {"elbo": all_steps(recon - kl), "recon": all_steps(recon), "kl": all_steps(kl),
            "q_entropy": all_steps(entropy) / T, "error": error.mean(1),
            "spread": leave_one_out(value).square().mean(1)}
    logs = {name: log.detach() for name, log in logs.items()}
    return all_steps(step_elbo) + (T - 1) * surrogate.mean(1) - error.mean(1), logs
