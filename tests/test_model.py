"""model.py: no leakage, masks and padding, the stage-1 bound against an exact sum, checkpoints."""

import itertools
import math

import pytest
import torch

from data import UserError
from model import MDM, ModelConfig, denoiser_elbo, load_checkpoint, save_checkpoint, trim
from posterior import objective_at
from tables import TableModel


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = MDM(ModelConfig(**{"vocab_size": 11, "prompt_len": 6, "answer_len": 5, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes}))
    for p in model.parameters():  # heads and output projections start at 0, which would hide everything
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_what_is_under_a_mask_does_not_leak():
    model, prompt = small_model(), torch.tensor([[1, 2, 3]])
    x0, masked = torch.tensor([[4, 5, 6, 7, 8]]), torch.tensor([[True, False, True, False, True]])
    other = torch.where(masked, (x0 + 1) % 9, x0)
    a, b = (model(prompt, x.masked_fill(masked, model.config.mask)) for x in (x0, other))
    assert torch.equal(a, b)


def test_hidden_tokens_get_no_gradient():
    """Both stages: the embedding of a token that stands only under masks is not used at all, with every
    other token's in use. Token i stands at place i."""
    model, prompt, x0 = small_model(), torch.tensor([[8, 8, 8]]), torch.tensor([[0, 1, 2, 3, 4]])
    reveal_step = torch.tensor([[[1, 2, 1, 3, 2], [1, 3, 1, 2, 3]]])  # at step 2, places 1, 3, 4 are masked in both
    objective, _ = objective_at(model, torch.randn(1, 5), prompt, x0, reveal_step, torch.tensor([2]), T=3, tau=1.0)
    used, = torch.autograd.grad(objective, model.trunk.embed.weight)
    assert [row.abs().sum().item() > 0 for row in used] == [True, False, True, False, False, False, False, False, True, False, False, True]

    read = []
    model.trunk.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    used, = torch.autograd.grad(denoiser_elbo(model, prompt, x0, torch.Generator().manual_seed(1)).sum(), model.trunk.embed.weight)
    masked = read[0] == model.config.mask
    assert 0 < masked.sum() < 5 and torch.equal(read[0][~masked], x0[~masked])
    assert [used[i].abs().sum().item() == 0 for i in range(5)] == masked[0].tolist()


def test_attention_is_bidirectional():
    model, prompt = small_model(), torch.tensor([[1, 2, 3]])
    a, b = model(prompt, torch.tensor([[11, 5, 6, 7, 8]])), model(prompt, torch.tensor([[11, 5, 6, 7, 9]]))
    assert (a[0, 0] - b[0, 0]).abs().max() > 1e-4  # the first position sees the last


def test_mask_cannot_be_written():
    model = small_model()
    log_p = model.log_p(model(torch.tensor([[1]]), torch.full((1, 5), model.config.mask)))
    assert log_p.shape[-1] == model.config.mask  # tokens 0..V-1; MASK is V
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(1, 5))


def test_padding_the_prompt_changes_nothing():
    model, z = small_model(), torch.tensor([[11, 5, 11, 7, 8]])
    padded = torch.tensor([[1, 2, 3, 10, 10, 10]])
    assert torch.equal(trim(padded, model.config.pad), torch.tensor([[1, 2, 3]]))
    assert torch.allclose(model(padded, z), model(trim(padded, model.config.pad), z), atol=1e-5)


def test_the_answer_depends_on_every_token_of_its_own_prompt():
    model, z, prompt = small_model(), torch.full((1, 5), 11), torch.tensor([[1, 2, 3]])
    for i in range(3):
        other = prompt.clone()
        other[0, i] = 4
        assert (model(other, z) - model(prompt, z)).abs().amax(-1).min() > 1e-4


def test_answers_of_one_prompt_stand_together():
    """Rows 0..K-1 of the answers belong to prompt 0, and a prompt read beforehand changes nothing."""
    model, prompt, z = small_model(), torch.tensor([[1, 2, 3], [4, 5, 10]]), torch.randint(11, (6, 5))
    rows = torch.cat([model(prompt[i // 3, None], z[i, None]) for i in range(6)])
    assert torch.allclose(model(prompt, z), rows, atol=1e-5)
    assert torch.equal(model(prompt, z), model(prompt, z, model.read(prompt)))


def test_trim_keeps_the_longest_prompt():
    prompts = torch.tensor([[1, 9, 9, 9], [2, 3, 9, 9]])
    assert torch.equal(trim(prompts, 9), torch.tensor([[1, 9], [2, 3]]))


def test_gates_start_mostly_closed_and_stay_finite():
    model = MDM(ModelConfig(11, 6, 5, 1, 2, 16))
    h = model(torch.tensor([[1]]), torch.full((1, 5), 11))
    assert torch.allclose(model.gate_logits(h), torch.full((1, 5), -1.0), atol=0.01)
    assert model.gate_logits(1e9 * torch.ones(1, 5, 16)).abs().max() <= 15


def test_denoiser_elbo_matches_the_exact_sum():
    """E over masking of (1/m) sum log p = sum over masked sets of so many of 1 / (size C(L, size)) sum log p."""
    L, x0 = 3, torch.tensor([[1, 0, 1]])
    model, exact = TableModel(L), 0.0
    for bits in itertools.product([False, True], repeat=L):
        masked = torch.tensor([bits])
        if size := sum(bits):
            log_p = model.log_p(model(None, x0.masked_fill(masked, 2))).gather(-1, x0[..., None]).squeeze(-1)
            exact += (log_p * masked).sum() / (size * math.comb(L, size))
    n = 200_000
    with torch.no_grad():
        draws = denoiser_elbo(model, torch.zeros(n, 0, dtype=torch.long), x0.expand(n, -1), torch.Generator().manual_seed(0))
    assert abs(draws.mean() - exact) < 4 * draws.std() / n ** 0.5
    assert draws.std() / n ** 0.5 < 0.02 * abs(exact)


def test_a_model_overfits_one_batch():
    torch.manual_seed(0)
    model = MDM(ModelConfig(11, 6, 5, 2, 2, 32))
    prompt, x0 = torch.randint(9, (4, 3)), torch.randint(9, (4, 5))
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    losses = []
    for _ in range(400):
        loss = -denoiser_elbo(model, prompt, x0).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) / 50 < 0.1 * losses[0]
