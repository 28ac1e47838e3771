"""[NEW] A critic for the order posterior: less noise in the gradient of Eq. 7, and no bias.

REINFORCE judges all gates that led to z_t by one number, L_t, so most of its gradient is noise. The
critic predicts how L_t depends on each of these gates. w_ut^i says what opening gate i at step u is
worth to the later step t, in nats. What the critic foretells of L_t is

  Eq. 8   b_t = sum_{u<t} sum_{i in M_u} w_ut^i (r_u^i - q_u^i)

  1. b_t is subtracted from L_t in the advantage of Eq. 7. What is left varies less.
  2. What this takes away from the gradient is given back exactly. Given z_u,
     E[ (r_u^i - q_u^i) grad log q(r_u | z_u) ] = grad q_u^i, so the correction is

         sum_{u<t} sum_{i in M_u} w_ut^i grad q_u^i

So the mean of the gradient stays the same for any w that does not depend on the gates that were
drawn. w is fitted by least squares. Compare MuProp (1511.05176) and factorised baselines
(1803.07246).
"""

import torch
import torch.nn as nn

from posterior import log_gate_probs


def critic_features(posterior, h, x0):
    """What q knows of each position, (B, L, 2 D): its hidden state and its embedded token."""
    embedded, _ = posterior.trunk.embed(x0, posterior.trunk.config.prompt_len)
    return torch.cat([h, embedded], dim=-1)


class Critic(nn.Module):
    """w of one later step: for each position and each earlier step, what opening a gate is worth.

    Steps are counted from the end, 1 .. M steps left. So one critic serves every budget T up to M.
    """

    def __init__(self, n_features: int, width: int, max_steps: int):
        super().__init__()
        M = max_steps
        self.hidden = nn.Sequential(nn.Linear(n_features, width), nn.ReLU())
        self.weight = nn.Parameter(torch.zeros(M, width, M))   # by the steps left at t, and at u
        self.bias = nn.Parameter(torch.zeros(M, 1, M))         # all 0 to begin with: plain Eq. 7

    def forward(self, features, left_at_t):
        """features (B, L, n_features), left_at_t (B,) -> w (B, L, M), by the steps left at u.

        Features are detached: q does not learn for the critic."""
        hidden = self.hidden(features.detach())                               # (B, L, width)
        row = left_at_t - 1
        return torch.baddbmm(self.bias[row], hidden, self.weight[row]).float()


def critic_terms(scores, w, reveal_step, t, T: int, tau: float):
    """b_t of Eq. 8 and the correction of its gradient, (B, K) each, for one t (B,) per example."""
    scores = scores[:, None].expand(reveal_step.shape)                       # (B, K, L)
    foretold = torch.zeros(reveal_step.shape[:2], device=scores.device, dtype=scores.dtype)
    correction = torch.zeros_like(foretold)
    for u in range(1, T):
        before_t = (u < t)[:, None, None]
        masked = (reveal_step >= u) & before_t
        opens = (reveal_step == u) & before_t
        left_at_u = T - u + 1
        q = log_gate_probs(scores, masked, left_at_u, tau).exp() * masked
        w_u = w[:, None, :, left_at_u - 1]                                   # (B, 1, L)
        foretold = foretold + (w_u * (opens.to(q.dtype) - q.detach())).sum(-1)
        correction = correction + (w_u.detach() * q).sum(-1)
    return foretold, correction
