"""model.py: no leakage, masks and padding, stage 1's bound against an exact sum, checkpoints."""

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
from conftest import ROOT

import tables
from data import UserError
from model import (MDM, ModelConfig, denoiser_elbo, load_checkpoint, save_checkpoint, trim,
                   versions)
from tables import TableModel

PROMPT = torch.tensor([[1, 2, 3]])


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=11, prompt_len=6, answer_len=5, n_layer=2, n_head=2, n_embd=16)
    model = MDM(ModelConfig(**{**sizes, **changes}))
    for p in model.parameters():  # heads and projections start at 0, which would hide everything
        torch.nn.init.normal_(p, std=0.3)
    return model


def hidden(model, prompt, z):
    return model(model.read(prompt), z)


def test_what_is_under_a_mask_does_not_leak():
    model, x0 = small_model(), torch.tensor([[4, 5, 6, 7, 8]])
    masked = torch.tensor([[True, False, True, False, True]])
    other = torch.where(masked, (x0 + 1) % 9, x0)
    a, b = (hidden(model, PROMPT, x.masked_fill(masked, model.config.mask)) for x in (x0, other))
    assert torch.equal(a, b)


def test_stage_1_does_not_show_what_it_asks_for():
    """The embedding of a token that stands under a mask gets no gradient, every other's does."""
    model, read = small_model(), []
    model.trunk.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    x0 = torch.tensor([[0, 1, 2, 3, 4]])  # token i stands at place i
    elbo = denoiser_elbo(model, torch.tensor([[8, 8, 8]]), x0, torch.Generator().manual_seed(1))
    used, = torch.autograd.grad(elbo.sum(), model.trunk.embed.weight)
    masked = read[0] == model.config.mask
    assert 0 < masked.sum() < 5 and torch.equal(read[0][~masked], x0[~masked])
    assert [used[i].abs().sum().item() == 0 for i in range(5)] == masked[0].tolist()


def test_the_prompt_is_read_without_the_answer_and_the_answer_with_all_of_the_prompt():
    """No place of the answer is independent of a token of its prompt, or of another place."""
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
    second = [part[[1]] for part in model.read(prompt)]
    assert torch.allclose(model(second, z[3:]), rows[3:], atol=1e-5)


def test_gates_start_mostly_closed_and_stay_finite():
    model = MDM(ModelConfig(11, 6, 5, 1, 2, 16))
    gates = model.gate_logits(hidden(model, PROMPT, torch.full((1, 5), 11)))
    assert torch.allclose(gates, torch.full((1, 5), -1.0), atol=0.01)
    assert small_model().gate_logits(1e9 * torch.ones(1, 5, 16)).abs().max() <= 15


# --- stage 1's bound ------------------------------------------------------------------------------

@pytest.mark.parametrize("x0", [(1, 0, 1), (0, 2, 3), (2, 3, 3)])
def test_stage_1_is_unbiased_where_eos_and_pad_are_part_of_the_answer(x0, monkeypatch):
    """E over masks of (1/m) sum log p is a sum over sets: (1 / (n C(L, n))) sum log p, n = |set|.
    Of 4 tokens, 2 is EOS and 3 is PAD. The draws' mean is within 4 of its standard errors."""
    monkeypatch.setattr(tables, "V", 4)
    model, x0, exact = TableModel(3), torch.tensor([x0]), 0.0
    for bits in itertools.product([False, True], repeat=3):
        masked = torch.tensor([bits])
        if n := sum(bits):
            log_p = model.log_p(model(None, x0.masked_fill(masked, 4)))
            log_p = log_p.gather(-1, x0[..., None]).squeeze(-1)
            exact += (log_p * masked).sum() / (n * math.comb(3, n))
    prompts, generator = torch.zeros(1000, 0, dtype=torch.long), torch.Generator().manual_seed(0)
    with torch.no_grad():  # batches of 1000: each is a mean of its own, as levels are stratified
        means = torch.stack([denoiser_elbo(model, prompts, x0.expand(1000, -1), generator).mean()
                             for _ in range(200)])
    error = means.std() / 200 ** 0.5
    assert abs(means.mean() - exact) < 4 * error and error < 0.01 * abs(exact)


class FairCoin(torch.nn.Module):
    """A network that gives every one of 2 tokens 1/2, and keeps what it was asked."""

    config = ModelConfig(2)

    def read(self, prompt):
        return (prompt,)

    def forward(self, cache, z):
        self.z = z
        return z[..., None].expand(-1, -1, 2) * 0.0

    def log_p(self, h):
        return h.log_softmax(-1)


def test_levels_are_stratified_and_each_row_alone_is_uniform():
    """The bound tells each row's level: n masks of log 1/2 each over m. Of B slices of (eps, 1)
    each gives one level, in turn from a random first; a single row's level is uniform."""
    model, B, eps, levels = FairCoin(), 4, 0.1, []
    x0, generator = torch.zeros(B, 200, dtype=torch.long), torch.Generator().manual_seed(0)
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

KEPT = dict(pieces=["x"], train_config={"seed": 1}, stage="order", step=3, log=["{}"], states=[])


def test_a_checkpoint_gives_the_same_network_and_what_was_kept_with_it(tmp_path):
    model, path = small_model(), tmp_path / "a b.pt"
    save_checkpoint(path, model, **KEPT)
    loaded, state = load_checkpoint(path)
    z = torch.full((1, 5), 11)
    assert torch.equal(hidden(model, PROMPT, z), hidden(loaded, PROMPT, z)) and not loaded.training
    assert state["versions"] == versions() and {name: state[name] for name in KEPT} == KEPT
    assert [p.name for p in tmp_path.iterdir()] == ["a b.pt"]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


WRONG = {  # a file's content, or what is done to a good checkpoint's dict
    "empty": b"", "text": b"hello", "a pickle": pickle.dumps(Payload(), 2),
    "half": lambda state: Path("x.pt").read_bytes()[:5000],
    "no weights": lambda state: state.pop("model") and None,
    "no tokenizer": lambda state: state.pop("pieces") and None,
    "a weight missing": lambda state: state["model"].popitem() and None,
    "a foreign weight": lambda state: state["model"].update(extra=torch.zeros(1)),
    "another shape": lambda state: state["model"].update({"trunk.embed.weight": torch.ones(3, 16)}),
    "other sizes": lambda state: state["model_config"].update(n_layer=3),
    "a size missing": lambda state: state["model_config"].pop("n_embd") and None,
    "a foreign size": lambda state: state["model_config"].update(depth=3),
    "an older schema": lambda state: state.update(schema=1),
    "code": lambda state: state.update(pieces=Payload())}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("x.pt"), small_model(), **KEPT)
    content, state = WRONG[wrong], torch.load("x.pt")
    if callable(content) and not (content := content(state)):
        torch.save(state, "x.pt")
    else:
        Path("x.pt").write_bytes(content)
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
        shutil.copy(ROOT / "model.py", folder)
        spec = importlib.util.spec_from_file_location("model_copy", folder / "model.py")
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
