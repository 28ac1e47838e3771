"""The order posterior and the variational objective: how a model learns in which order to write.

The denoiser of model.py can fill any set of positions in parallel, but it fills them independently,
so positions that depend on each other should not be revealed in the same step. Which ones may go
together is latent: we see answers, never the order in which they should be written. So the order is
inferred, as in a variational autoencoder: a posterior q reads the finished answer and proposes
orders; the model p learns to write the answer along them and to propose such orders by itself.

NOTATION
  B batch, K orders per example, T step budget, L answer length, V vocabulary
  x0       the answer (EOS and PAD included), c its prompt
  z_t      the state before step t: x0 with the positions not yet revealed set to MASK; z_1 is all MASK
  M        the masked positions of z_t
  r_t^i    1 if step t reveals position i; an order is r_1 .. r_T
  alpha^i  p's probability of opening gate i (never a noise schedule, as in some papers)
  q_t^i    q's probability of opening gate i, given x0 and c; s^i is its score of position i, tau a temperature

  Eq. 1  gates       p(r_t | z_t) = prod_{i in M} Bern(r_t^i; alpha^i) / (1 - prod_{i in M} (1 - alpha^i)),  r_t != 0;  r_T = 1
  Eq. 2  tokens      p(x^i | z_t) for every position revealed at t, independently; MASK has probability 0, the head has no output for it
  Eq. 3  posterior   q_t^i = exp((s^i - max_{j in M} s^j) / tau);  q_T^i = 1
  Eq. 4  bound       log p(x0 | c) >= E_q sum_t L_t(z_t)
  Eq. 5  step term   L_t = sum_{i in M} q_t^i log p(x0^i | z_t) - KL_t
  Eq. 6  step KL     KL_t = sum_{i in M} KL(Bern(q_t^i) || Bern(alpha^i)) + log(1 - prod_{i in M} (1 - alpha^i));  KL_T = 0
  Eq. 7  score term  (L_t^k - mean_{k' != k} L_t^k') sum_{u<t} log q(r_u^k | z_u^k), the bracket held constant
END NOTATION

Why Eq. 3 works. The best remaining position has q = 1, so while anything is masked every step reveals at
least one token: no step is wasted. Score gaps that are large against tau make an order, small gaps make
parallelism. The scores come from one look at x0, so whole orders are sampled without calling a network
again.

Why Eq. 5 is what it is. The textbook term is log p(r_t, x | z_t) - log q(r_t | z_t) at a sampled r_t. Apart
from p's normaliser, which is a constant, it is a sum over positions (q's gates are independent), linear in
each r_t^i, so its expectation over r_t has a closed form: replace r_t^i by q_t^i. This is Rao-
Blackwellisation: the noise of the gates at step t is gone from L_t, and only the noise in *which states are
visited* is left. The second term of Eq. 6 is negative: p rules out "no gate opens" too, so everything that
q can draw has more probability than the bare Bernoullis give it. Where nothing is masked any more, L_t = 0.

Why Eq. 7 is needed. q_t^i inside L_t gives one part of the gradient for q by plain autograd. The other
part: moving q also moves the states z_t that later steps see. L_t depends on the gates of the steps before
t only, hence sum_{u<t}: a gate is judged by its own step's L through autograd, and by the later ones through
this term. The mean over the *other* orders of the same example is a baseline (leave-one-out, RLOO):
independent of order k, so it costs no bias, and it removes what the orders of an example have in common,
tens of nats early in training.

Cost. Summing over t needs T forward passes per order. But before step 1 everything is masked, whatever the
order, so one pass gives L_1 exactly. For the rest one step t of 2..T is drawn per example, shared by its K
orders so that the baseline compares like with like, and (T - 1) L_t estimates their sum: 1 + K network
states per example. Only the later step needs a score term: L_1 does not depend on q's draws.

Ties. Two tokens that may stand in either order (the operands of 3 + 4) must not be revealed together, but which comes
first is all the same: at equal scores the bound has no slope in their difference, though a difference of either sign is
better. q can sit on that saddle. Going by values (the larger one first) does not lead off it: while both are masked p
cannot know which place holds which, so the KL wears such a rule down; a rule by place survives. So p gets one to begin
with, gates that start at random (train.py), and learns them at full weight while q's KL is still weighted down.

Groups. Eq. 3 opens several places together only where their scores are equal to a hundredth of tau or so: one that stays closed by
chance is the best at the next step and has that step for itself. With a `plateau`, q = e / (1 - plateau (1 - e)) for Eq. 3's e, gates
within some tau of the best one are nearly certain to open with it, and q can hold groups.

The numbering is ours: see the README on what of the paper was available to us.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MDM, ModelConfig, Trunk, log_p_of


class OrderPosterior(nn.Module):
    """s_phi: reads the clean answer and scores every position; a higher score is revealed earlier."""

    def __init__(self, config: ModelConfig, start=None):
        """`start` (L,): scores to begin with, those of a rule by place. None: 0."""
        super().__init__()
        self.trunk = Trunk(config)
        self.score_head = nn.Linear(config.n_embd, 1, bias=False)
        self.register_buffer("start", torch.zeros(config.answer_len) if start is None else start)
        # Scores spread by about tau: gates soft, not all open. On top of a rule by a tenth of it.
        nn.init.normal_(self.score_head.weight, std=0.01 if start is None else 0.001)

    def forward(self, prompt, x0):
        """prompt (B, P'), x0 (B, L) -> scores s (B, L), float32."""
        h = self.trunk(prompt, x0).float()
        return (h * self.score_head.weight).sum(-1) + self.start  # not a matmul: autocast would round it to bfloat16 and tie scores


# --- Eq. 3: gates from scores ---------------------------------------------------------------------

def log_gate_probs(s, masked, last, tau: float, plateau: float = 0.0):
    """Eq. 3: log q_t^i (..., L). Where there is nothing to decide (position already revealed, or
    the last step) it is 0, that is q = 1. `masked` (..., L) bool, `last` bool broadcastable to it.
    With a plateau from 0 to below 1, q = e / (1 - plateau (1 - e)) for Eq. 3's e: about 1 within some tau of the best."""
    top = s.masked_fill(~masked, -torch.inf).amax(-1, keepdim=True)         # max over M; -inf where M is empty
    log_e = ((s - top) / tau).masked_fill(~masked | last, 0.0)
    # [NEW] With e alone a step cannot open a group of places unless their scores are the same to a hundredth of tau or so: what is
    # left of the group by chance is best in the next step, and has it for itself.
    return log_e - torch.log1p(plateau * torch.expm1(log_e))


def log_complement(log_q):
    """log(1 - q) from log q, with 0 in place of -inf where q = 1. There it meets a factor 0, or stands for
    a position that is already revealed: no sampled order leaves a gate with q = 1 closed. Substituting
    before the log keeps the gradient finite too (0 * inf would be nan)."""
    certain = log_q == 0
    return torch.log(-torch.expm1(log_q.masked_fill(certain, -1.0))).masked_fill(certain, 0.0)


@torch.no_grad()
def sample_orders(s, K: int, T: int, tau: float, generator=None, plateau: float = 0.0):
    """K orders per example from Eq. 3: s (B, L) -> reveal_step (B, K, L), the step in 1..T that
    reveals each position. It holds the whole path: masked at t = (reveal_step >= t), r_t = (== t)."""
    s = s[:, None].expand(-1, K, -1)                                        # (B, K, L)
    reveal_step = torch.full(s.shape, T, device=s.device)
    for t in range(1, T):  # what is left after step T-1 is revealed at T
        masked = reveal_step >= t
        q = log_gate_probs(s, masked, False, tau, plateau).exp()
        opens = torch.rand(s.shape, device=s.device, dtype=s.dtype, generator=generator) < q
        reveal_step[masked & opens] = t
    return reveal_step


def log_q_before(s, reveal_step, t, T: int, tau: float, plateau: float = 0.0):
    """log q(r_1 .. r_{t-1}), the part of the path that led to z_t: (B, K).
    s (B, L), reveal_step (B, K, L), t (B,) in 1..T."""
    total = torch.zeros(reveal_step.shape[:2], device=s.device, dtype=s.dtype)
    for u in range(1, T):
        masked, opens = reveal_step >= u, reveal_step == u                  # (B, K, L)
        log_q = log_gate_probs(s[:, None], masked, False, tau, plateau)
        log_q_r = torch.where(opens, log_q, log_complement(log_q)).sum(-1)  # log q(r_u | z_u)
        total = total + log_q_r * (u < t)[:, None]
    return total


# --- Eq. 5, 6: one step's term of the bound --------------------------------------------------------

def step_terms(log_p, gate_logits, log_q, masked, last):
    """Eq. 5 and 6 at one state, in nats: reconstruction and KL, each (...). All inputs (..., L):
    log_p = log p(x0^i | z), gate_logits of alpha, log_q from Eq. 3, masked; `last` (..., 1) bool."""
    q = log_q.exp() * masked
    not_q = -torch.expm1(log_q)                                             # 1 - q, 0 where q = 1
    log_alpha, log_not_alpha = F.logsigmoid(gate_logits), F.logsigmoid(-gate_logits)
    reconstruction = (q * log_p).sum(-1)                                    # Eq. 5: sum_i q^i log p(x0^i | z)
    kl = q * (log_q - log_alpha) + not_q * (log_complement(log_q) - log_not_alpha)
    # Eq. 6, second term: p knows that at least one gate opens.
    log_none = (log_not_alpha * masked).sum(-1)                             # log prod (1 - alpha)
    undecided = masked.any(-1) & ~last.squeeze(-1)
    log_some = torch.log(-torch.expm1(log_none.masked_fill(~undecided, -1.0)))
    kl = torch.where(undecided, kl.sum(-1) + log_some, 0.0)                 # KL_T = 0, and nothing to pay when done
    return reconstruction, kl


def leave_one_out(value):
    """value^k - mean_{k' != k} value^k' over the orders of one example: (B, K) -> (B, K)."""
    K = value.shape[1]
    return (value - value.mean(1, keepdim=True)) * K / (K - 1)


def order_objective(model: MDM, posterior: OrderPosterior, prompt, x0, *, T: int, K: int, tau: float,
                    kl_weight: float = 1.0, plateau: float = 0.0, token_baseline: float = 0.0, generator=None):
    """Eq. 4 estimated at step 1 and one random later step of each example, with the gradient of Eq. 7: draws
    K orders and a step, then calls objective_at. prompt (B, P'), x0 (B, L). Returns what objective_at returns."""
    B = len(x0)
    s = posterior(prompt, x0)                                               # (B, L)
    reveal_step = sample_orders(s, K, T, tau, generator, plateau)           # (B, K, L)
    # DEVIATION: stratified. Any T-1 examples in a row see each later step once, and each alone a uniform one.
    later = max(T - 1, 1)
    first = torch.randint(later, (1,), device=x0.device, generator=generator)
    t = 2 + (torch.arange(B, device=x0.device) + first) % later             # (B,); T = 1 has no later step, and gives it weight 0
    return objective_at(model, s, prompt, x0, reveal_step, t, T=T, tau=tau, kl_weight=kl_weight, plateau=plateau, token_baseline=token_baseline)


def objective_at(model: MDM, s, prompt, x0, reveal_step, t, *, T: int, tau: float, kl_weight: float = 1.0, plateau: float = 0.0,
                 token_baseline: float = 0.0):
    """Eq. 5-7 at step 1 and at the states that step t (B,) in 2..T of the orders reveal_step (B, K, L) starts from.

    Returns the objective to maximise (scalar) and a dict of detached tensors: `elbo`, `recon`, `kl`
    in nats per answer (kl_weight not applied), `q_entropy` of the gates in nats per step, `q_steps`
    used by the orders, `reveal_step`. kl_weight > 0 weights the KL in q's gradient, not in p's; token_baseline
    subtracts what has a constant mean, so the expected gradient stays."""
    # [NEW] L_1 is exact: its one state stands in column 0, z_t of the K orders in columns 1..K.
    K = reveal_step.shape[1]
    step = torch.cat([torch.ones_like(t)[:, None], t[:, None].expand(-1, K)], dim=1)        # (B, 1+K)
    last = (step == T)[..., None]                                                           # (B, 1+K, 1)
    masked = torch.cat([reveal_step[:, :1], reveal_step], dim=1) >= step[..., None]         # (B, 1+K, L), all True in column 0
    x0_k = x0[:, None].expand_as(masked)
    z = x0_k.masked_fill(masked, model.config.mask)

    h = model(prompt, z.flatten(0, 1)).unflatten(0, (-1, 1 + K))                            # (B, 1+K, L, D)
    log_q = log_gate_probs(s[:, None], masked, last, tau, plateau)
    # [NEW] q maximises recon - kl_weight * kl, p recon - kl: the gates keep their value, their gradient is divided by kl_weight.
    gates = model.gate_logits(h)
    gates = torch.lerp(gates.detach(), gates, 1 / kl_weight)
    log_p = log_p_of(model, h, x0_k, masked)
    recon, kl = step_terms(log_p, gates, log_q, masked, last)
    step_elbo = recon - kl_weight * kl                                      # Eq. 5: L_1, L_t^1 .. L_t^K
    # [NEW] Every token is revealed once, so sum_t q_t^i has mean 1, and a constant per token, here a share of its nats at the all-MASK
    # state, can be left out of all steps. Without it a step looks bad that has many tokens to pay, though others then have few.
    step_elbo = step_elbo - token_baseline * (log_q.exp() * masked * log_p[:, :1].detach()).sum(-1)

    # Eq. 7. The surrogate's value means nothing; its gradient is the score term. The advantage is a
    # constant in it: what L_t itself contributes to the gradient already stands in step_elbo.
    advantage = leave_one_out(step_elbo[:, 1:].detach())                    # (B, K)
    surrogate = advantage * log_q_before(s, reveal_step, t, T, tau, plateau)

    def all_steps(term):  # L_1 + (T - 1) L_t, mean over orders and examples
        return (term[:, 0] + (T - 1) * term[:, 1:].mean(1)).mean()

    objective = all_steps(step_elbo) + (T - 1) * surrogate.mean()
    gate_entropy = -(log_q.exp() * log_q - torch.expm1(log_q) * log_complement(log_q)).sum(-1)
    logs = {"elbo": all_steps(recon - kl), "recon": all_steps(recon), "kl": all_steps(kl), "q_entropy": all_steps(gate_entropy) / T,
            "q_steps": reveal_step.amax(-1).float().mean(), "reveal_step": reveal_step}
    return objective, {name: value.detach() for name, value in logs.items()}
