"""The masked diffusion model (MDM): one bidirectional transformer, two heads.

A state z is an answer x0 with some of its positions replaced by MASK, next to a prompt c that is
never masked. One forward pass gives, for every answer position,

    token head   p(x^i | z)          which token belongs here             Eq. 2
    gate head    alpha^i(z)          should this position be revealed now?  Eq. 1

The prompt attends to itself only, so it is read once: by all orders of an example in training, by all
steps in sampling. (With the answer visible to the prompt, stage 1 of the toy ended hardly better, at a
bound of -3.8 against -3.9 after 2,400 steps, seed 0, and a step of the order stage took 1.3 times as long.)

The state is its own clock: the number of masks says how far generation has come, so no time is fed
to the network; nor is the number of steps left (tried, see assets/experiments.md). MASK (id V) can be
read but not written: the token head has only V outputs.

Stage 1 trains the token head with the usual masked-diffusion bound. Masking each position with
probability m, m ~ U(0, 1),

    log p(x0 | c)  >=  E_m E_z  (1/m) sum_{i masked} log p(x0^i | z)          (MDLM, LLaDA)

where 1/m makes up for the m L positions that are masked on average. Each position is as likely to
be written at any time, before or after any other, so this is the bound for a uniformly random
order. posterior.py replaces it by a learned one.

Positions enter twice: rotary embedding tells attention how far apart two tokens are, a learned
embedding tells each token its place, because what belongs at place 20 of a canvas often depends on
the prompt at a fixed place. With rotary alone an earlier toy (one chain of 5-8 operations) learned
less than half as fast: bound -7.3 after 1,330 steps, against -6.4 after 600 with both.

Axes: B batch, P prompt, L answer canvas, V vocabulary without MASK, D width, H heads.
Simplified against common practice: no dropout, no weight tying, no bias but the gate head's.
"""

import ctypes
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError, replacing

SCHEMA = 3  # of checkpoint files


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int        # V: all tokens that can be written. EOS = V-2, PAD = V-1; MASK = V
    prompt_len: int = 32   # longest prompt
    answer_len: int = 60   # L, the canvas
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128      # D

    def __post_init__(self):
        """Raises ValueError: a checkpoint may say anything, and train.py looks at its flags itself."""
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {value!r} is not a whole number of at least 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of 2 * n_head")

    @property
    def eos(self): return self.vocab_size - 2

    @property
    def pad(self): return self.vocab_size - 1

    @property
    def mask(self): return self.vocab_size


def rotary_table(length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
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
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    def keys_values(self, x, cos, sin):
        """What there is to see of x (B, S, D): keys and values, (B, 2, H, S, D/H)."""
        k, v = self.kv(self.norm1(x)).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return torch.stack([rotate(F.rms_norm(k, k.shape[-1:]), cos, sin), v], dim=1)

    def forward(self, x, cos, sin, seen, attend):
        """x (B, S, D) looks at `seen`, keys and values of S' positions, where attend (B, 1, 1, S') is True."""
        q = self.q(self.norm1(x)).unflatten(-1, (self.n_head, -1)).transpose(1, 2)                # (B, H, S, D/H)
        q = rotate(F.rms_norm(q, q.shape[-1:]), cos, sin)
        y = F.scaled_dot_product_attention(q, seen[:, 0], seen[:, 1], attn_mask=attend)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


class Trunk(nn.Module):
    """Embedding and blocks. Denoiser and order posterior have one each, with weights of their own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # + MASK
        # DEVIATION: a learned embedding of the place beside the rotary one (see the top of this file).
        self.place = nn.Embedding(config.prompt_len + config.answer_len, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        cos, sin = rotary_table(config.prompt_len + config.answer_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.place.weight, std=0.5)
        for block in self.blocks:  # every block starts as the identity
            nn.init.zeros_(block.proj.weight)
            nn.init.zeros_(block.down.weight)

    def enter(self, tokens, start: int):
        """Embedded tokens (B, S, D), and the rotation of their places, which begin at `start`."""
        place = slice(start, start + tokens.shape[1])
        return self.embed(tokens) + self.place.weight[place], self.cos[place], self.sin[place]

    # DEVIATION: the prompt does not see the answer (see the top of this file).
    def read(self, prompt):
        """What the answer sees of a prompt (B, P'): keys and values of every block, (B, n_layer, 2, H, P', D/H).
        Padding is not attended to, so trimming the padding that a batch's prompts share changes nothing."""
        x, cos, sin = self.enter(prompt, 0)
        attend, seen = (prompt != self.config.pad)[:, None, None], []
        for i, block in enumerate(self.blocks):
            seen.append(block.keys_values(x, cos, sin))
            if i + 1 < len(self.blocks):  # nobody sees what the last block would make of the prompt
                x = block(x, cos, sin, seen[i], attend)
        return torch.stack(seen, dim=1)

    def forward(self, prompt, answer, read=None):
        """prompt (B, P'), answer (B*K, L) token ids -> hidden states of the answer (B*K, L, D). K answers of the
        same prompt stand together. `read`: what read(prompt) gave, where it is at hand."""
        K = len(answer) // len(prompt)
        read = (self.read(prompt) if read is None else read).repeat_interleave(K, 0)
        there = (prompt != self.config.pad).repeat_interleave(K, 0)
        attend = torch.cat([there, torch.ones_like(answer, dtype=torch.bool)], dim=1)[:, None, None]      # (B*K, 1, 1, P'+L)
        x, cos, sin = self.enter(answer, self.config.prompt_len)
        for block, seen in zip(self.blocks, read.unbind(1)):
            x = block(x, cos, sin, torch.cat([seen, block.keys_values(x, cos, sin)], dim=-2), attend)
        return self.norm(x)


class MDM(nn.Module):
    """The denoiser p_theta: trunk, token head (Eq. 2), gate head (Eq. 1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.token_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.gate_head = nn.Linear(config.n_embd, 1)
        # [NEW] A bias for each place, learned with --place_gates: hidden states of a denoiser need not tell their place.
        self.gate_head.place = nn.Parameter(torch.zeros(config.answer_len))
        nn.init.zeros_(self.token_head.weight)
        nn.init.zeros_(self.gate_head.weight)
        nn.init.constant_(self.gate_head.bias, -1.0)  # alpha = 0.27 until the order stage

    def read(self, prompt):
        return self.trunk.read(prompt)

    def forward(self, prompt, z, read=None):
        """prompt (B, P'), z (B*K, L) -> hidden states (B*K, L, D), for the two heads below. Kept apart so
        that logits are computed only where they are needed. `read`: read(prompt), where it is at hand."""
        return self.trunk(prompt, z, read)

    def log_p(self, h):
        """log p(x | z) over the V tokens, float32: (..., D) -> (..., V)."""
        return self.token_head(h).float().log_softmax(-1)

    def gate_logits(self, h):
        """logit of alpha, float32: (..., L, D) -> (..., L). Soft-capped at +-15 so that every log stays finite."""
        # DEVIATION: gates are soft-capped.
        logits = (h.float() * self.gate_head.weight).sum(-1) + self.gate_head.bias + self.gate_head.place
        return 15 * torch.tanh(logits / 15)


def log_p_of(model, h, x0, masked):
    """log p(x0^i | z) at the masked positions, 0 elsewhere: (..., L). Logits only where needed."""
    picked = model.log_p(h[masked]).gather(-1, x0[masked][:, None]).squeeze(-1)
    return picked.new_zeros(masked.shape).masked_scatter(masked, picked)


def trim(prompt, pad: int):
    """Drop the padding that all prompts of a batch share: (B, P) -> (B, P')."""
    return prompt[:, : int((prompt != pad).sum(-1).amax())]


def denoiser_elbo(model: MDM, prompt, x0, generator=None, eps: float = 1e-3):
    """Stage 1's bound on log p(x0 | c), one masking level per row: (B,), in nats per answer. The levels
    are stratified over the batch: each of B equal slices of (eps, 1) gives one, the slices dealt in turn
    from a random first. eps keeps 1/m bounded; what it cuts off is about a thousandth of the bound."""
    B, L = x0.shape
    first = torch.randint(B, (1,), device=x0.device, generator=generator)
    u = ((torch.arange(B, device=x0.device) + first) % B + torch.rand(B, device=x0.device, generator=generator)) / B
    m = (eps + (1 - eps) * u)[:, None]                                               # (B, 1)
    masked = torch.rand(B, L, device=x0.device, generator=generator) < m
    h = model(prompt, x0.masked_fill(masked, model.config.mask))
    return (log_p_of(model, h, x0, masked) / m).sum(-1)


def keep_freed_memory():
    """Have glibc keep freed buffers for the next step. Otherwise large ones go back to the system and come again page by
    page, zeroed: of sampling 512 answers at once, on 2 CPU cores, that took a third of the time; of a training step nothing that shows."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no buffer is mapped for itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is handed back


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA (under torchrun the process's own), then MPS, then CPU. Raises UserError when the named device is absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in present if present[device])
    if not present[name]:
        raise UserError(f"--device {name}: not available here, use --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


# --- checkpoints: one self-describing file of plain types ----------------------------------------

STATE = {"model_config": dict, "model": dict, "pieces": list, "train_config": dict, "versions": dict, "stage": str, "step": int,
         "posterior": list, "optimizers": list, "counts": dict, "data": int}  # beside "schema"; train.py says what they hold


def save_checkpoint(path: str | Path, model: MDM, pieces: list[str], **extra):
    """Write atomically: a reader sees the old file or the new one, never half of one."""
    state = {"schema": SCHEMA, "model_config": asdict(model.config), "model": model.state_dict(), "pieces": pieces, **extra}
    with replacing(path, "wb") as file:
        torch.save(state, file)


def check_tensors(tensors: dict, wanted: dict):
    """Raises ValueError unless `tensors` has the names of `wanted` and each the shape, the type and finite numbers."""
    if set(tensors) != set(wanted):
        raise ValueError(f"tensors missing or unknown: {', '.join(sorted(map(str, set(tensors) ^ set(wanted)))[:3])}")
    for name, want in wanted.items():
        got = tensors[name]
        if not torch.is_tensor(got) or (got.shape, got.dtype) != (want.shape, want.dtype):
            raise ValueError(f"{name} is not {want.dtype} of shape {tuple(want.shape)}")
        if not got.isfinite().all():
            raise ValueError(f"{name} holds NaN or inf")


def load_checkpoint(path: str | Path, device="cpu") -> tuple[MDM, dict]:
    """Model in eval mode and the file's dict. The file is not trusted: it is read as plain types, no code in
    it is run, and nothing larger than the file itself is built from it. Raises UserError for a missing file,
    another schema and anything that is not a checkpoint."""
    if not os.path.isfile(path):
        raise UserError(f"{path} not found: run `python train.py` first, or pass the path of a checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or type(state.get("schema")) is not int:
            raise ValueError("no schema")
        if state["schema"] != SCHEMA:
            todo = "update the code" if state["schema"] > SCHEMA else "train again"
            raise UserError(f"{path} has schema {state['schema']}, this code reads {SCHEMA}: {todo}")
        for name, kind in STATE.items():
            if not isinstance(state.get(name), kind):
                raise ValueError(f"no {name}, or not a {kind.__name__}")
        if state["step"] < 0:
            raise ValueError(f"step {state['step']}")
        config, pieces = ModelConfig(**state["model_config"]), state["pieces"]
        if asdict(config) != state["model_config"]:
            raise ValueError("model_config is not complete")
        if len({p for p in pieces if len(p.encode()) > 1}) != len(pieces) or config.vocab_size != 256 + len(pieces) + 2:
            raise ValueError("pieces and vocab_size do not fit")
        for name in ("dataset", "data_dir", "target"):
            if not isinstance(state["train_config"].get(name), str):
                raise ValueError(f"train_config has no {name}")
        if config.n_layer > len(state["model"]):  # before a billion layers are built
            raise ValueError(f"n_layer {config.n_layer} has no tensors")
        with torch.device("meta"):                # shapes without memory
            wanted = MDM(config).state_dict()
        if sum(t.numel() * t.element_size() for t in wanted.values()) > os.path.getsize(path):
            raise ValueError("model_config is larger than the file")
        check_tensors(state["model"], wanted)
        model = MDM(config).to(device)
        model.load_state_dict(state["model"])
    except UserError:
        raise
    except Exception as e:  # unpickling a foreign file raises almost anything
        reason = str(e) if isinstance(e, (ValueError, TypeError)) else type(e).__name__
        raise UserError(f"{path} is not a checkpoint of this project ({reason})") from e
    return model.eval(), state
