"""The masked diffusion model (MDM): one bidirectional transformer, two heads.

A state z is an answer x0 with some of its positions replaced by MASK, next to a prompt c that is
never masked. One forward pass gives, for every position of the answer,

    token head   p(x^i | z)       which token belongs here              Eq. 2 of posterior.py
    gate head    alpha^i(z)       should it be revealed now?            Eq. 1

The number of masks says how far generation has come, so no time is fed to the network. MASK (id V)
can be read but not written: the token head has only V outputs. The prompt attends to itself only,
so it is read once, by all orders of an example in training and by all steps in sampling.

Stage 1 trains the token head with the usual bound. Masking each position with probability m,
m ~ U(0, 1),

    log p(x0 | c)  >=  E_m E_z  (1/m) sum_{i masked} log p(x0^i | z)        (MDLM, LLaDA)

where 1/m makes up for the m L positions that are masked on average. Every order is equally likely
there; posterior.py replaces the random order by a learned one.

Axes: B batch, K orders, P prompt, L answer canvas, V vocabulary without MASK, D width, H heads.
Simplified against common practice: no dropout, no weight tying, no bias but the gate head's.
"""

import functools
import io
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError

SCHEMA = 5  # of checkpoint files


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int        # V: all tokens that can be written. EOS = V-2, PAD = V-1; MASK = V
    prompt_len: int = 36   # longest prompt
    answer_len: int = 60   # L, the canvas
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128      # D, a multiple of 2 H
    place_gates: bool = False  # p's gates have a bias for each place, not one for all

    @property
    def eos(self): return self.vocab_size - 2

    @property
    def pad(self): return self.vocab_size - 1

    @property
    def mask(self): return self.vocab_size


def rotary_table(length: int, head_dim: int):
    """cos and sin (length, head_dim / 2) of rotary position embedding (Su et al., 2104.09864)."""
    frequency = 10_000 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(length)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair of channels by an angle that grows with position. x (B, H, S, D/H)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and MLP, without a causal mask."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.n_embd
        self.n_head = config.n_head
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.q, self.kv = nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
        nn.init.zeros_(self.proj.weight)  # every block starts as the identity
        nn.init.zeros_(self.down.weight)

    def keys_values(self, x, cos, sin):
        """What others can attend to of x (B, S, D): its keys and values, (B, 2, H, S, D/H)."""
        k, v = self.kv(self.norm1(x)).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return torch.stack([rotate(F.rms_norm(k, k.shape[-1:]), cos, sin), v], dim=1)

    def forward(self, x, cos, sin, kv, attend):
        """x (B, S, D) attends to kv, S' keys and values, where `attend` (B, 1, 1, S') is True."""
        q = self.q(self.norm1(x)).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        q = rotate(F.rms_norm(q, q.shape[-1:]), cos, sin)                        # (B, H, S, D/H)
        y = F.scaled_dot_product_attention(q, kv[:, 0], kv[:, 1], attn_mask=attend)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        h = F.relu(self.up(self.norm2(x)))
        return x + self.down(h * h)  # square() is the same number, at twice the time backward


class Trunk(nn.Module):
    """Embedding and blocks. Denoiser and order posterior have one each, of their own weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        S = config.prompt_len + config.answer_len
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # + MASK
        # [NEW] rotary embedding tells how far apart two tokens are; a learned one tells each
        # its place, because what belongs at place 20 often depends on the prompt at a fixed place.
        self.place = nn.Embedding(S, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        for name, table in zip(("cos", "sin"), rotary_table(S, config.n_embd // config.n_head)):
            self.register_buffer(name, table, persistent=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.place.weight, std=0.5)

    def enter(self, tokens, start: int):
        """Embedded tokens (B, S, D), and the rotation of their places, which begin at `start`."""
        place = slice(start, start + tokens.shape[1])
        return self.embed(tokens) + self.place.weight[place], self.cos[place], self.sin[place]

    # [NEW] the prompt does not see the answer.
    def read(self, prompt):
        """The cache of prompts (B, P): each block's keys and values, and where it is not padding. A
        pair of tensors whose rows are the prompts. `trim` saves time."""
        x, cos, sin = self.enter(prompt, 0)
        real, kvs = prompt != self.config.pad, []
        for block in self.blocks:
            kvs.append(block.keys_values(x, cos, sin))
            if block is not self.blocks[-1]:  # nobody attends to what the last makes of the prompt
                x = block(x, cos, sin, kvs[-1], real[:, None, None])
        return torch.stack(kvs, dim=1), real                 # (B, n_layer, 2, H, P, D/H), (B, P)

    def forward(self, cache, answer):
        """Hidden states (B*K, L, D) of answers (B*K, L), K in a row for each prompt of cache."""
        K = len(answer) // len(cache[0])
        prompt_kv, real = (part.repeat_interleave(K, 0) for part in cache)
        attend = torch.cat([real, torch.ones_like(answer, dtype=torch.bool)], 1)[:, None, None]
        x, cos, sin = self.enter(answer, self.config.prompt_len)
        for block, kv in zip(self.blocks, prompt_kv.unbind(1)):
            kv = torch.cat([kv, block.keys_values(x, cos, sin)], dim=-2)      # prompt, then answer
            x = block(x, cos, sin, kv, attend)
        return self.norm(x)


class MDM(nn.Module):
    """The denoiser p_theta: trunk, token head (Eq. 2), gate head (Eq. 1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.read = self.trunk.read
        self.token_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.gate_head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.token_head.weight)
        nn.init.zeros_(self.gate_head.weight)
        biases = config.answer_len if config.place_gates else 1
        self.gate_head.bias = nn.Parameter(torch.full((biases,), -1.0))  # alpha = 0.27 at first

    def forward(self, cache, z):
        """Hidden states (B*K, L, D), for the heads below: logits only where they are needed."""
        return self.trunk(cache, z)

    def log_p(self, h):
        """log p(x | z) over the V tokens, float32: (..., D) -> (..., V)."""
        return self.token_head(h).float().log_softmax(-1)

    def gate_logits(self, h):
        """logit of alpha, float32: (..., L, D) -> (..., L)."""
        logits = (h.float() * self.gate_head.weight).sum(-1) + self.gate_head.bias
        return 15 * torch.tanh(logits / 15)  # [NEW] soft-capped, so every log stays finite


def log_p_of(model: MDM, h, x0, masked):
    """log p(x0^i | z) at the masked positions, 0 elsewhere: (..., L)."""
    picked = model.log_p(h[masked]).gather(-1, x0[masked][:, None]).squeeze(-1)
    return picked.new_zeros(masked.shape).masked_scatter(masked, picked)


def denoiser_elbo(model: MDM, prompt, x0, generator=None, eps: float = 1e-3):
    """Stage 1's bound on log p(x0 | c), one masking level a row: (B,), in nats. The levels are
    stratified: each of B equal slices of (eps, 1) gives one. eps keeps 1/m bounded, for a bias of
    about eps of the bound."""
    B, L = x0.shape
    first = torch.randint(B, (1,), device=x0.device, generator=generator)
    u = torch.rand(B, device=x0.device, generator=generator)
    u = ((torch.arange(B, device=x0.device) + first) % B + u) / B
    m = (eps + (1 - eps) * u)[:, None]                                                   # (B, 1)
    masked = torch.rand(B, L, device=x0.device, generator=generator) < m
    h = model(model.read(prompt), x0.masked_fill(masked, model.config.mask))
    return (log_p_of(model, h, x0, masked) / m).sum(-1)


def trim(prompt, pad: int):
    """Drop the padding that all prompts of a batch share: (B, P) -> (B, P')."""
    return prompt[:, : int((prompt != pad).sum(-1).amax())]


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA (under torchrun the process's own), then MPS, then CPU."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device in found if found[device]), "cpu")
    if not found.get(name, name == "cpu"):
        raise UserError(f"no device {name!r} here: take --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


# --- checkpoints: one self-describing file of plain types -----------------------------------------

@functools.cache
def versions() -> dict:
    """Of this code: its commit ("+" if files differ from it; "" if it is not a repository of its
    own), of torch and of Python."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    commit = ""
    if shutil.which("git") and git("ls-files", "model.py") and not git("rev-parse", "--show-cdup"):
        commit = git("rev-parse", "--short", "HEAD") + "+" * bool(git("diff", "HEAD"))
    return {"commit": commit, "torch": str(torch.__version__), "python": platform.python_version()}


def save_checkpoint(path: Path, model: MDM, **extra):
    """Write atomically: a reader sees the old file or the new one, never half of one."""
    state = {"schema": SCHEMA, "versions": versions(), **extra,
             "model_config": asdict(model.config), "model": model.state_dict()}
    file = io.BytesIO()  # torch.save into a file that cannot grow raises no OSError
    torch.save(state, file)
    path.with_suffix(".tmp").write_bytes(file.getbuffer())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: str | Path, device="cpu") -> tuple[MDM, dict]:
    """Model in eval mode and the file's dict. Read as plain types: no code in the file is run."""
    if not os.path.isfile(path):
        raise UserError(f"{path} not found: run `python train.py` first, or pass its path")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']}, this code reads {SCHEMA}: train again")
        entries = {"pieces", "train_config", "stage", "step", "log", "states", "versions"}
        if missing := entries - set(state):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        model = MDM(ModelConfig(**state["model_config"])).to(device)
        model.load_state_dict(state["model"])  # names and shapes must be the network's
    except Exception as e:  # unpickling a foreign file raises almost anything
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path} is not a checkpoint of this project: {reason}") from e
    return model.eval(), state
