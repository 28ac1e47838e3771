"""model.py: the network against a plain one, no leakage, masks and padding, stage 1's bound against
an exact sum, checkpoints."""

import contextlib
import importlib.util
import itertools
import math
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import tables
from common import SCHEMA, UserError, versions
from model import MDM, ModelConfig, denoiser_elbo, load_checkpoint, save_checkpoint, trim
from tables import TableModel

ROOT = Path(__file__).parent.parent
PROMPT = torch.tensor([[1, 2, 3]])


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=11, prompt_len=6, answer_len=5, n_layer=2, n_head=2, n_embd=16)
    model = MDM(ModelConfig(**{**sizes, **changes}))
    for p in model.parameters():  # heads and projections start at 0, which would hide everything
        torch.nn.init.normal_(p, std=0.3)
    return model


def hidden(model, prompt, z):
    return model(model.encode_prompt(prompt), z)


# --- the transformer, position by position --------------------------------------------------------

def plain_norm(x, gain=1.0):
    """A vector less its mean, divided by its spread."""
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * gain


def plain_rotation(x, position):
    """Turn the pair of channels 2j and 2j + 1 of x (d,) by position / 10000^(2j/d)."""
    out = x.clone()
    for j in range(0, len(x), 2):
        angle = position * 10_000 ** (-j / len(x))
        out[j] = x[j] * math.cos(angle) - x[j + 1] * math.sin(angle)
        out[j + 1] = x[j] * math.sin(angle) + x[j + 1] * math.cos(angle)
    return out


def plain_attention(q, k, v, attends):
    """One head: q, k, v are lists of (d,), attends[a] lists the positions that position a sees."""
    out = []
    for a, seen in enumerate(attends):
        share = torch.stack([q[a] @ k[b] / len(q[a]) ** 0.5 for b in seen]).softmax(0)
        out.append(sum(share[n] * v[b] for n, b in enumerate(seen)))
    return out


def plain_trunk(trunk, prompt, answer):
    """Hidden states of the answer, from [prompt | answer] in one pass, written from formulas: the
    prompt sees itself, the answer sees everything but padding."""
    weights = dict(trunk.named_parameters())
    config = trunk.config
    d = config.n_embd // config.n_head
    tokens = [*prompt, *answer]
    positions = [*range(len(prompt)), *range(config.prompt_len, config.prompt_len + len(answer))]
    in_prompt = [a for a in range(len(prompt)) if prompt[a] != config.pad]
    in_answer = list(range(len(prompt), len(tokens)))
    attends = [in_prompt] * len(prompt) + [in_prompt + in_answer] * len(answer)

    x = [weights["token.weight"][token] + weights["position.weight"][position]
         for token, position in zip(tokens, positions)]
    for n in range(config.n_layer):
        block = {name: weights[f"blocks.{n}.{name}.weight"]
                 for name in ("norm1", "norm2", "q", "kv", "proj", "up", "down")}
        h = [plain_norm(x_a, block["norm1"]) for x_a in x]
        q = [block["q"] @ h_a for h_a in h]
        k = [block["kv"][: config.n_embd] @ h_a for h_a in h]
        v = [block["kv"][config.n_embd :] @ h_a for h_a in h]

        heads = []
        for head in range(config.n_head):
            part = slice(head * d, (head + 1) * d)
            q_head = [plain_rotation(plain_norm(q_a[part]), i) for q_a, i in zip(q, positions)]
            k_head = [plain_rotation(plain_norm(k_a[part]), i) for k_a, i in zip(k, positions)]
            heads.append(plain_attention(q_head, k_head, [v_a[part] for v_a in v], attends))

        for a in range(len(x)):
            x[a] = x[a] + block["proj"] @ torch.cat([head[a] for head in heads])
            up = block["up"] @ plain_norm(x[a], block["norm2"])
            x[a] = x[a] + block["down"] @ up.clamp(min=0)
    return torch.stack([plain_norm(x_a, weights["norm.weight"]) for x_a in x[len(prompt) :]])


@contextlib.contextmanager
def float64():
    """Networks are made in float64, the table of the rotation included."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [4, 5, 6, 7, 10, 10]])
def test_the_trunk_is_a_plain_transformer(prompt):
    """In float64, but for the rotation; a prompt shorter than the longest, with and without
    padding, which is 10."""
    with float64():
        model = small_model(n_head=4, n_layer=3)
        for answer in ([11, 5, 11, 7, 10], [0, 9, 2, 11, 1]):
            h = hidden(model, torch.tensor([prompt]), torch.tensor([answer]))[0]
            assert (h - plain_trunk(model.trunk, prompt, answer)).abs().max() < 1e-5


def test_networks_start_as_the_embedding_alone():
    """Every block starts as the identity, and every token as likely as any other."""
    torch.manual_seed(0)
    model = MDM(ModelConfig(vocab_size=11, prompt_len=6, answer_len=5, n_embd=16))
    z = torch.tensor([[11, 5, 11, 7, 10]])
    embedded = model.trunk.token.weight[z] + model.trunk.position.weight[6:]
    h = hidden(model, PROMPT, z)
    assert torch.allclose(h, torch.nn.functional.layer_norm(embedded, (16,)), atol=1e-5)
    assert torch.allclose(model.log_p(h).exp(), torch.full((1, 5, 11), 1 / 11))


# --- the state ------------------------------------------------------------------------------------

def test_what_is_under_a_mask_does_not_leak():
    model, x0 = small_model(), torch.tensor([[4, 5, 6, 7, 8]])
    masked = torch.tensor([[True, False, True, False, True]])
    other = torch.where(masked, (x0 + 1) % 9, x0)
    a, b = (hidden(model, PROMPT, x.masked_fill(masked, model.config.mask)) for x in (x0, other))
    assert torch.equal(a, b)


def test_stage_1_does_not_show_what_it_asks_for():
    """The embedding of a token that stands under a mask gets no gradient, every other's does, and
    MASK's own."""
    model = small_model()
    read = []
    model.trunk.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    x0 = torch.tensor([[0, 1, 2, 3, 4]])  # token i stands at position i
    elbo = denoiser_elbo(model, torch.tensor([[8, 8, 8]]), x0, torch.Generator().manual_seed(1))
    used, = torch.autograd.grad(elbo.sum(), model.trunk.token.weight)
    masked = read[0] == model.config.mask
    assert 0 < masked.sum() < 5 and torch.equal(read[0][~masked], x0[~masked])
    assert [not used[i].any() for i in range(5)] == masked[0].tolist()
    assert used[model.config.mask].any()


def test_the_prompt_is_read_without_the_answer_and_the_answer_with_all_of_the_prompt():
    """No position of the answer is independent of a token of its prompt, or of another."""
    model, z = small_model(), torch.full((1, 5), 11)
    before = hidden(model, PROMPT, z)
    for i in range(3):
        other = PROMPT.clone()
        other[0, i] = 4
        assert (hidden(model, other, z) - before).abs().amax(-1).min() > 1e-4
    for i in range(5):
        other = z.clone()
        other[0, i] = 4
        assert (hidden(model, PROMPT, other) - before).abs().amax(-1).min() > 1e-4


def test_mask_cannot_be_written():
    model = small_model()
    log_p = model.log_p(hidden(model, PROMPT, torch.full((1, 5), model.config.mask)))
    assert log_p.shape[-1] == model.config.mask  # tokens 0..V-1; MASK is V
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(1, 5))


def test_padding_changes_nothing():
    model, z = small_model(), torch.tensor([[11, 5, 11, 7, 8], [11] * 5])
    prompts, pad = torch.tensor([[1, 2, 3, 10, 10, 10], [4, 10, 10, 10, 10, 10]]), model.config.pad
    assert torch.equal(trim(prompts, pad), torch.tensor([[1, 2, 3], [4, 10, 10]]))
    alone = torch.cat([hidden(model, PROMPT, z[:1]), hidden(model, torch.tensor([[4]]), z[1:])])
    for prompt in (prompts, trim(prompts, pad)):
        assert torch.allclose(hidden(model, prompt, z), alone, atol=1e-5)


def test_answers_of_one_prompt_stand_together():
    """Rows 0..K-1 of the answers belong to prompt 0, and rows of the cache are those of prompts."""
    model, z = small_model(), torch.randint(11, (6, 5))
    prompt = torch.tensor([[1, 2, 3], [4, 5, 10]])
    rows = torch.cat([hidden(model, prompt[i // 3, None], z[i, None]) for i in range(6)])
    assert torch.allclose(hidden(model, prompt, z), rows, atol=1e-5)
    second = [part[[1]] for part in model.encode_prompt(prompt)]
    assert torch.allclose(model(second, z[3:]), rows[3:], atol=1e-5)


def test_an_answer_teaches_how_its_prompt_is_read():
    """The cache of a prompt is no constant: each of its tokens and positions has a gradient."""
    model = small_model()
    h = hidden(model, PROMPT, torch.tensor([[11, 5, 11, 7, 10]]))
    trunk = model.trunk
    tokens, positions = torch.autograd.grad((h * torch.randn_like(h)).sum(),
                                            (trunk.token.weight, trunk.position.weight))
    assert tokens[PROMPT[0]].any(-1).all() and positions[:3].any(-1).all()
    assert not tokens[4].any() and not positions[3:6].any()  # nobody has read these


# --- the heads ------------------------------------------------------------------------------------

def test_the_token_head_is_a_linear_map_of_the_hidden_state():
    model = small_model()
    h = torch.randn(2, 5, 16)
    logits = h @ model.token_head.weight.T
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    assert torch.allclose(model.log_p(h), log_p, atol=1e-5)


def gates_of(model, h, steps_left, masked=None):
    """Gate logits of states h (B, L, D), with steps_left a list of B; all masked by default."""
    if masked is None:
        masked = torch.ones(h.shape[:2], dtype=torch.bool)
    return model.gate_logits(h, masked, torch.tensor(steps_left)[:, None]).detach()


def test_gates_know_how_many_steps_are_left_and_each_row_its_own_number():
    """Side by side in a batch as alone; 1 to 8 steps left give 8 sets of gates, more that of 8."""
    model = small_model()
    h = torch.randn(1, 5, 16).expand(10, 5, 16)
    together = gates_of(model, h, list(range(1, 11)))
    for i in range(10):
        assert torch.allclose(gates_of(model, h[:1], [i + 1])[0], together[i], atol=1e-5)
    differ = (together[:, None] - together[None]).abs().amax(-1) > 1e-3           # (10, 10)
    assert differ[:8, :8].sum() == 8 * 7
    assert not differ[7:, 7:].any()


def test_a_gate_is_its_score_above_the_nth_best_soft_capped_at_15():
    """15 tanh(x / 15), where x is what the score is above the n-th best of the masked positions, n
    the step's share, and a bias for the steps left."""
    model = small_model()
    head = model.gate_head
    h = 10 * torch.randn(40, 5, 16)
    masked = torch.rand(40, 5) < 0.7
    masked[:, 0] = True
    steps_left = torch.randint(1, 12, (40,)).tolist()
    found = gates_of(model, h, steps_left, masked)
    for row in range(40):
        score = [(head.weight @ h[row, i] + head.position_bias[i]).item() for i in range(5)]
        those_masked = [i for i in range(5) if masked[row, i]]
        n = math.ceil(len(those_masked) / steps_left[row] ** 1.5)
        nth_best = sorted((score[i] for i in those_masked), reverse=True)[n - 1]
        bias = head.steps_bias[min(steps_left[row], 8) - 1].item()
        for i in those_masked:
            x = score[i] - nth_best + bias
            assert abs(found[row, i] - 15 * math.tanh(x / 15)) < 1e-3
    assert found.abs().max() > 14 and found.abs().min() < 1  # capped, and hardly


def test_raising_every_score_moves_no_gate():
    """The n-th best is raised as well: it is no constant in the gradient."""
    model = small_model()
    logits = model.gate_logits(torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool),
                               torch.tensor([[2]]))
    slope, = torch.autograd.grad(logits.sum(), model.gate_head.position_bias)
    assert slope.sum().abs() < 1e-4 and slope.abs().max() > 1e-2


def test_gates_do_not_look_at_what_is_revealed():
    model, h = small_model(), torch.randn(1, 5, 16)
    masked = torch.tensor([[True, False, True, False, True]])
    other = torch.where(masked[..., None], h, 100 * torch.randn(1, 5, 16))
    a, b = gates_of(model, h, [2], masked), gates_of(model, other, [2], masked)
    assert torch.equal(a[masked], b[masked])


def test_gates_stay_finite():
    """However large what they look at, and where nothing is masked."""
    h = 1e9 * torch.randn(2, 5, 16)
    masked = torch.tensor([[True] * 5, [False] * 5])
    assert gates_of(small_model(), h, [3, 3], masked).abs().max() <= 15


def test_gates_start_roughly_left_to_right_with_neighbours_apart():
    """Whatever the state and the steps left: the logits of positions next to each other or two
    apart differ by 3 at least. Places a whole number of rings apart show the fall: 10 in all."""
    model = MDM(ModelConfig(11, 6, 200, 1, 2, 16))
    gates = gates_of(model, torch.randn(8, 200, 16), list(range(1, 9)))
    start = 15 * (gates / 15).atanh()
    start = start - start[:, :1]                       # without the n-th best
    assert torch.allclose(start, start[:1].expand(8, 200), atol=1e-3)
    for distance in (1, 2):
        assert (start[:, distance:] - start[:, :-distance]).abs().min() > 3
    assert torch.allclose(start[:, :-40] - start[:, 40:], torch.tensor(10 * 40 / 200), atol=1e-3)


def test_gates_teach_the_network_that_they_look_at():
    model = small_model()
    h = torch.randn(1, 5, 16, requires_grad=True)
    masked = torch.ones(1, 5, dtype=torch.bool)
    logits = model.gate_logits(h, masked, torch.tensor([[2]]))
    slope, = torch.autograd.grad((logits * torch.randn(5)).sum(), h)
    assert slope.any(-1).all()


def test_log_p_is_made_in_float32_under_bfloat16_autocast():
    """In bfloat16 the probabilities would not sum to 1, nor nats be comparable."""
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        log_p = model.log_p(torch.randn(2, 5, 16))
    assert log_p.dtype == torch.float32
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(2, 5), atol=1e-5)


# --- stage 1's bound ------------------------------------------------------------------------------

@pytest.mark.parametrize("x0", [(1, 0, 1), (0, 2, 3), (2, 3, 3)])
def test_stage_1_is_unbiased_where_eos_and_pad_are_part_of_the_answer(x0, monkeypatch):
    """E over masks of (1/m) sum log p is a sum over sets: (1 / (n C(L, n))) sum log p, n = |set|.
    Of 4 tokens, 2 is EOS and 3 is PAD. The draws' mean is within 4 of its standard errors."""
    monkeypatch.setattr(tables, "V", 4)
    model = TableModel(3)
    x0 = torch.tensor([x0])
    exact = 0.0
    for bits in itertools.product([False, True], repeat=3):
        n = sum(bits)
        if n:
            masked = torch.tensor([bits])
            log_p = model.log_p(model(None, x0.masked_fill(masked, 4)))
            log_p = log_p.gather(-1, x0[..., None]).squeeze(-1)
            exact += (log_p * masked).sum() / (n * math.comb(3, n))

    # Batches of 1000: each is a mean of its own, as levels are stratified.
    prompts, generator = torch.zeros(1000, 0, dtype=torch.long), torch.Generator().manual_seed(0)
    with torch.no_grad():
        means = torch.stack([denoiser_elbo(model, prompts, x0.expand(1000, -1), generator).mean()
                             for _ in range(200)])
    error = means.std() / 200 ** 0.5
    assert abs(means.mean() - exact) < 4 * error and error < 0.01 * abs(exact)


class FairCoin(torch.nn.Module):
    """A network that gives every one of 2 tokens 1/2, and keeps what it was asked."""

    config = ModelConfig(2)

    def encode_prompt(self, prompt):
        return (prompt,)

    def forward(self, cache, z):
        self.z = z
        return z[..., None].expand(-1, -1, 2) * 0.0

    def log_p(self, h):
        return h.log_softmax(-1)


def test_levels_are_stratified_and_each_row_alone_is_uniform():
    """The bound tells each row's level: n masks of log 1/2 each over m. Of B slices of (eps, 1)
    each gives one level, in turn from a random first; a single row's level is uniform."""
    model, B, eps = FairCoin(), 4, 0.1
    x0, generator = torch.zeros(B, 200, dtype=torch.long), torch.Generator().manual_seed(0)
    levels = []
    for _ in range(4000):
        elbo = denoiser_elbo(model, x0[:, :0], x0, generator, eps)
        n = (model.z == 2).sum(-1)
        levels.append(n * -math.log(2) / elbo)
        assert (n > 0).all() and ((n / 200 - levels[-1]).abs() < 0.2).all()  # the masks' share is m
    u = ((torch.stack(levels) - eps) / (1 - eps)).double()
    slices = (u * B).floor().long()
    first = slices[:, :1]
    assert torch.equal(slices, (first + torch.arange(B)) % B)
    for row in u.T:  # Kolmogorov-Smirnov: 2.2 / sqrt(n) is passed by chance once in 8000
        ranks = torch.arange(1, len(row) + 1) / len(row)
        assert (row.sort().values - ranks).abs().max() < 2.2 / len(row) ** 0.5


def test_levels_reach_down_to_a_thousandth():
    model, generator = FairCoin(), torch.Generator().manual_seed(0)
    x0 = torch.zeros(400, 2000, dtype=torch.long)
    elbo = denoiser_elbo(model, x0[:, :0], x0, generator)
    least = ((model.z == 2).sum(-1) * -math.log(2) / elbo).min()
    assert 1e-3 < least < 1e-2


# --- checkpoints ----------------------------------------------------------------------------------

KEPT = dict(pieces=["x"], train_config={"seed": 1}, stage="order", step=3, log=["{}"])


def test_a_checkpoint_gives_the_same_network_and_what_was_kept_with_it(tmp_path):
    model, path = small_model(), tmp_path / "a b.pt"
    save_checkpoint(path, model, **KEPT)
    loaded, state = load_checkpoint(path)
    z = torch.full((1, 5), 11)
    assert torch.equal(hidden(model, PROMPT, z), hidden(loaded, PROMPT, z)) and not loaded.training
    assert state["versions"] == versions() and {name: state[name] for name in KEPT} == KEPT
    assert [p.name for p in tmp_path.iterdir()] == ["a b.pt"]


class Payload:
    """Unpickled as code it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def half_of_a_checkpoint():
    save_checkpoint(Path("whole.pt"), small_model(), **KEPT)
    return Path("whole.pt").read_bytes()[:5000]


FOREIGN = {  # the content of a file
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "a pickle": lambda: pickle.dumps(Payload(), 2),
    "half": half_of_a_checkpoint,
}
BROKEN = {  # what is done to the dict of a good checkpoint
    "no weights": lambda state: state.pop("model"),
    "no tokenizer": lambda state: state.pop("pieces"),
    "a weight missing": lambda state: state["model"].popitem(),
    "a foreign weight": lambda state: state["model"].update(extra=torch.zeros(1)),
    "another shape": lambda state: state["model"].update({"trunk.token.weight": torch.ones(3, 16)}),
    "other sizes": lambda state: state["model_config"].update(n_layer=3),
    "a size missing": lambda state: state["model_config"].pop("n_embd"),
    "a foreign size": lambda state: state["model_config"].update(depth=3),
    "an older schema": lambda state: state.update(schema=SCHEMA - 1),
    "code": lambda state: state.update(pieces=Payload()),
}


@pytest.mark.parametrize("wrong", [*FOREIGN, *BROKEN])
def test_a_wrong_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    if wrong in FOREIGN:
        Path("x.pt").write_bytes(FOREIGN[wrong]())
    else:
        save_checkpoint(Path("x.pt"), small_model(), **KEPT)
        state = torch.load("x.pt")
        BROKEN[wrong](state)
        torch.save(state, "x.pt")
    with pytest.raises(UserError, match="^x.pt is not a checkpoint of this project: ") as refused:
        load_checkpoint("x.pt")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    assert not Path("executed").exists()


def test_the_commit_is_that_of_a_repository_of_its_own(tmp_path):
    """Not of one whose folder the files were copied into, whether or not they were added to it."""
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *words],
                       check=True, capture_output=True)

    def commit_of(folder):
        folder.mkdir(exist_ok=True)
        for name in ("common.py", "model.py"):
            shutil.copy(ROOT / name, folder)
        spec = importlib.util.spec_from_file_location("common_copy", folder / "common.py")
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy.versions()["commit"]

    assert commit_of(tmp_path / "none") == ""
    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    assert commit_of(tmp_path / "copied") == commit_of(tmp_path) == ""
    git("add", ".")
    git("commit", "-m", "ours")
    assert commit_of(tmp_path / "copied") == "" and len(commit_of(tmp_path)) >= 7
    (tmp_path / "copied" / "model.py").unlink()
    assert commit_of(tmp_path)[-1] == "+"
