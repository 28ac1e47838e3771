"""The masked diffusion model (MDM): one bidirectional transformer, two heads.

A state z is an answer x0 with some of its positions replaced by MASK, next to a prompt c that is
never masked. One forward pass gives, for every position of the answer,

    token head   p(x^i | z)       which token belongs here              Eq. 2 of posterior.py
    gate head    alpha^i(z)       should it be revealed now?            Eq. 1

The number of masks says how far generation has come, so no time is fed to the network. Only the
gate head is told how many steps are left. MASK (id V) can be read but not written: the token head
has only V outputs. The prompt attends to itself only, so it is read once, by all orders of an
example in training and by all steps in sampling. Its states cannot depend on what is written, which
may cost accuracy.

Stage 1 trains the trunk and the token head with the usual bound. Masking each position with
probability m, m ~ U(0, 1),

    log p(x0 | c)  >=  E_m E_z  (1/m) sum_{i masked} log p(x0^i | z)        (MDLM, LLaDA)

where 1/m gives each token its due weight (assets/derivation.md). Every order is equally likely
there; posterior.py replaces the random order by a learned one.

Axes: B batch, N states of each prompt, P prompt, L answer canvas, V vocabulary without MASK,
D width, H heads.
Simplified against common practice: no dropout, no weight tying, no bias but the gate head's.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import load_state, not_a_checkpoint, save_state


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int        # V: all tokens that can be written. EOS = V-2, PAD = V-1; MASK = V
    prompt_len: int = 36   # longest prompt
    answer_len: int = 60   # L, the canvas
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128      # D, a multiple of 2 H
    max_steps: int = 8     # the gate head knows 1 .. max_steps steps left

    @property
    def eos(self):
        return self.vocab_size - 2

    @property
    def pad(self):
        return self.vocab_size - 1

    @property
    def mask(self):
        return self.vocab_size


# --- the transformer ------------------------------------------------------------------------------

def rotary_table(length: int, head_dim: int):
    """Rotary position embedding (Su et al., 2104.09864): for each position and pair of channels a
    complex number of length 1, (length, head_dim / 2)."""
    frequency = 10_000 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(length)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, rotation):
    """Turn each pair of channels by an angle that grows with position. x (B, H, S, D/H)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))       # (B, H, S, D/H/2)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP, without a causal mask."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.n_embd
        self.n_head = config.n_head
        self.norm1 = nn.LayerNorm(D, bias=False)
        self.norm2 = nn.LayerNorm(D, bias=False)
        self.q = nn.Linear(D, D, bias=False)
        self.kv = nn.Linear(D, 2 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)
        nn.init.zeros_(self.proj.weight)  # every block starts as the identity
        nn.init.zeros_(self.down.weight)

    def keys_values(self, x, rotation):
        """What others can attend to of x (B, S, D): its keys and values, (B, 2, H, S, D/H)."""
        kv = self.kv(self.norm1(x)).unflatten(-1, (2, self.n_head, -1))   # (B, S, 2, H, D/H)
        k, v = kv.permute(2, 0, 3, 1, 4)                                  # (B, H, S, D/H) each
        k = rotate(F.layer_norm(k, k.shape[-1:]), rotation)
        return torch.stack([k, v], dim=1)

    def forward(self, x, rotation, kv, attend):
        """x (B, S, D) attends to kv, S' keys and values, where `attend` (B, 1, 1, S') is True."""
        q = self.q(self.norm1(x)).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        q = rotate(F.layer_norm(q, q.shape[-1:]), rotation)                        # (B, H, S, D/H)
        y = F.scaled_dot_product_attention(q, kv[:, 0], kv[:, 1], attn_mask=attend)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Trunk(nn.Module):
    """Embedding and blocks. Denoiser and order posterior have one each, of their own weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        S = config.prompt_len + config.answer_len
        self.token = nn.Embedding(config.vocab_size + 1, config.n_embd)  # + MASK
        # [NEW] rotary embedding tells how far apart two tokens are. A learned one tells each token
        # its position, because the token at position 20 often depends on a fixed position before.
        self.position = nn.Embedding(S, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        rotation = rotary_table(S, config.n_embd // config.n_head)
        self.register_buffer("rotation", rotation, persistent=False)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.5)

    def embed(self, tokens, start: int):
        """Embedded tokens (B, S, D), and the rotation of their positions, from `start` on."""
        positions = slice(start, start + tokens.shape[1])
        x = self.token(tokens) + self.position.weight[positions]
        return x, self.rotation[positions]

    # [NEW] the prompt does not see the answer.
    def encode_prompt(self, prompt):
        """The cache of prompts (B, P): keys and values of each block (B, n_layer, 2, H, P, D/H),
        and where they are not padding (B, P)."""
        x, rotation = self.embed(prompt, 0)
        not_pad = prompt != self.config.pad
        kvs = []
        for block in self.blocks:
            kv = block.keys_values(x, rotation)
            kvs.append(kv)
            if block is not self.blocks[-1]:  # nobody attends to what the last makes of the prompt
                x = block(x, rotation, kv, not_pad[:, None, None])
        return torch.stack(kvs, dim=1), not_pad

    def forward(self, cache, answer):
        """Hidden states (B*N, L, D) of answers (B*N, L), N in a row for each prompt of cache."""
        N = len(answer) // len(cache[0])
        prompt_kv, not_pad = (part.repeat_interleave(N, 0) for part in cache)
        everywhere = torch.ones_like(answer, dtype=torch.bool)
        attend = torch.cat([not_pad, everywhere], dim=1)[:, None, None]   # (B*N, 1, 1, P + L)
        x, rotation = self.embed(answer, self.config.prompt_len)
        for block, kv in zip(self.blocks, prompt_kv.unbind(1)):
            kv = torch.cat([kv, block.keys_values(x, rotation)], dim=-2)  # prompt, then answer
            x = block(x, rotation, kv, attend)
        return self.norm(x)


# --- the denoiser and its heads -------------------------------------------------------------------

class GateHead(nn.Module):
    """Eq. 1: the logits of alpha. p scores the positions of a state, and opens the best of them.

    [NEW] A gate is the more likely to open, the higher its score is above the n-th best, where n is
    a step's share of what is masked, as in q's gates (Eq. 3). It depends on how many steps are
    left, so one score per position serves every number of steps.

    [NEW] Each position has a bias in its score. The biases begin as an order of p's own, in which
    neighbours have very different scores: see first_order.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd))
        self.position_bias = nn.Parameter(first_order(config.answer_len))               # (L,)
        self.steps_bias = nn.Parameter(torch.zeros(config.max_steps))

    def forward(self, h, masked, steps_left):
        """h (..., L, D), masked (..., L), steps_left (..., 1) -> (..., L)."""
        with torch.autocast(h.device.type, enabled=False):       # bfloat16 would tie scores
            score = h.float() @ self.weight + self.position_bias
        row = steps_left.clamp(max=len(self.steps_bias)) - 1     # more steps take the last bias
        logits = score - nth_score(score, masked, steps_left) + self.steps_bias[row]
        return 15 * torch.tanh(logits / 15)  # [NEW] soft-capped, so every log stays finite


def step_share(masked, steps_left, power: float = 1.5):
    """n, how many of the masked positions are a step's share: (..., L) -> (..., 1).

    The shares grow, for the first steps know least: with a power of 1 they would be equal. Of 60
    positions the shares of 4 steps are 8, 11, 15 and 26.
    """
    return torch.ceil(masked.sum(-1, keepdim=True) / steps_left**power).long()


def nth_score(score, masked, steps_left):
    """The n-th largest score of the masked positions, n the step's share: (..., L) -> (..., 1)."""
    n = step_share(masked, steps_left)
    ranked = score.masked_fill(~masked, -torch.inf).sort(-1, descending=True).values
    nth = ranked.gather(-1, (n - 1).clamp(min=0))
    return nth.masked_fill(n == 0, 0.0)                # nothing is masked: any finite number


def first_order(length: int):
    """The order that p begins with, as biases (length,): 0, 3.1, 6.2, 9.2, 2.3 .. of 60.

    The KL pulls q to what p can predict, so q soon follows this order, and improves on it from
    there. From biases of 0 some seeds find as good an order, and others do not: as long as p
    predicts equal scores for tied operands, the KL pulls q to these, and one step may open both.
    So the biases of positions next to each other or two apart, as operands are, differ by 3 or more
    (on a canvas of 40 or more): the first term goes round a ring of length 10 in steps of 3.25.

    The second term falls by 10 over the canvas, so the order is roughly from left to right: what is
    written later often depends on what stands before. What is learned keeps some of both. Other
    starts: assets/experiments.md.
    """
    position = torch.arange(length)
    around_the_ring = 0.325 * position % 1
    to_the_right = position / length
    return 10 * around_the_ring - 10 * to_the_right


class MDM(nn.Module):
    """p: the denoiser, which is trunk and token head (Eq. 2), and the gate head (Eq. 1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.token_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.gate_head = GateHead(config)
        nn.init.zeros_(self.token_head.weight)

    def encode_prompt(self, prompt):
        """The cache of prompts (B, P): what all their states share. Two tensors, a row a prompt."""
        return self.trunk.encode_prompt(prompt)

    def forward(self, cache, z):
        """Hidden states (B*N, L, D), for the heads below: logits only where they are needed."""
        return self.trunk(cache, z)

    def log_p(self, h):
        """log p(x | z) over the V tokens, float32: (..., D) -> (..., V)."""
        return self.token_head(h).float().log_softmax(-1)

    def gate_logits(self, h, masked, steps_left):
        """logit of alpha, float32: h (..., L, D), masked (..., L), steps_left (..., 1) -> (..., L).
        Logits of revealed positions mean nothing."""
        return self.gate_head(h, masked, steps_left)


def log_p_of(model: MDM, h, x0, masked):
    """log p(x0^i | z) at the masked positions, 0 elsewhere: (..., L)."""
    log_p = model.log_p(h[masked])                                        # (masked, V)
    picked = log_p.gather(-1, x0[masked][:, None]).squeeze(-1)            # (masked,)
    return picked.new_zeros(masked.shape).masked_scatter(masked, picked)


# --- stage 1 --------------------------------------------------------------------------------------

def denoiser_elbo(model: MDM, prompt, x0, generator=None, eps: float = 1e-3):
    """Stage 1's bound on log p(x0 | c), one masking level a row: (B,), in nats.

    The levels are stratified: each of B equal slices of (eps, 1) gives one. eps keeps 1/m bounded,
    for a bias of at most about eps times the bound.
    """
    B, L = x0.shape
    device = x0.device
    first = torch.randint(B, (1,), device=device, generator=generator)
    within = torch.rand(B, device=device, generator=generator)
    slices = (torch.arange(B, device=device) + first) % B
    m = eps + (1 - eps) * (slices + within) / B                           # (B,)
    masked = torch.rand(B, L, device=device, generator=generator) < m[:, None]
    z = x0.masked_fill(masked, model.config.mask)
    h = model(model.encode_prompt(prompt), z)
    return (log_p_of(model, h, x0, masked) / m[:, None]).sum(-1)


def trim(prompt, pad: int):
    """Drop the padding that all prompts of a batch share: (B, P) -> (B, P')."""
    longest = int((prompt != pad).sum(-1).amax())
    return prompt[:, :longest]


# --- checkpoints ----------------------------------------------------------------------------------

def save_checkpoint(path: Path, model: MDM, **extra):
    """Write the model, and what else it takes to use it or to go on, atomically."""
    save_state(path, {"model_config": asdict(model.config), "model": model.state_dict(), **extra})


def load_checkpoint(path: str | Path, device="cpu") -> tuple[MDM, dict]:
    """Model in eval mode and the file's dict."""
    state = load_state(path, device)
    try:
        model = MDM(ModelConfig(**state["model_config"])).to(device)
        model.load_state_dict(state["model"])  # names and shapes must be the network's
    except Exception as e:
        raise not_a_checkpoint(path, e) from e
    return model.eval(), state
