"""optim.py: Muon against torch's own and against a singular value decomposition, which parameter
goes to which optimizer, the rate."""

import copy

import pytest
import torch

from model import MDM, ModelConfig
from optim import Muon, make_optimizers, orthogonalise, set_rates
from posterior import OrderPosterior

TINY = ModelConfig(vocab_size=11, prompt_len=6, answer_len=5, n_layer=2, n_head=2, n_embd=16)
SHAPES = [(24, 8), (8, 24), (16, 16)]
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315), 5, 1e-7  # Jordan's coefficients, steps, eps


# --- Muon -----------------------------------------------------------------------------------------

def moved(kind, start, gradients):
    """What five updates at rate 0.1 change."""
    p = torch.nn.Parameter(start.clone())
    optimizer = kind([p], lr=0.1, weight_decay=0.0)
    for p.grad in gradients:
        optimizer.step()
    return p.detach() - start


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_torchs_but_for_its_rounding(shape):
    """torch's multiplies in bfloat16."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    ours = moved(Muon, start, gradients)
    theirs = moved(torch.optim.Muon, start, gradients)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_its_formula(shape):
    """Momentum 0.95, Nesterov's look ahead, the orthogonal factor, the scale of a tall matrix: five
    updates by hand, in float64, where the factor is a polynomial of the singular values."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    momentum = torch.zeros(shape, dtype=torch.float64)
    expected = torch.zeros(shape, dtype=torch.float64)
    a, b, c = NEWTON_SCHULZ[0]
    for gradient in gradients.double():
        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.95 * momentum + 0.05 * gradient
        u, sigma, v = torch.linalg.svd(update / update.norm(), full_matrices=False)
        for _ in range(5):
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        scale = max(1, shape[0] / shape[1]) ** 0.5
        expected -= 0.1 * scale * (u * sigma) @ v
    assert (moved(Muon, start, gradients) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalising_leaves_the_directions_and_makes_the_singular_values_about_1(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    found = orthogonalise(x, *NEWTON_SCHULZ)
    u, sigma, v = torch.linalg.svd(x, full_matrices=False)
    in_x_s_directions = u.T @ found @ v.T
    largest = sigma > 0.1 * sigma.max()
    assert (in_x_s_directions - in_x_s_directions.diag().diag()).abs().max() < 1e-4
    assert ((in_x_s_directions.diag()[largest] - 1).abs() < 0.4).all()
    assert torch.equal(orthogonalise(torch.zeros(shape), *NEWTON_SCHULZ), torch.zeros(shape))


def test_muon_goes_on_from_a_saved_state_as_if_nothing_had_happened():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 8))
    gradients = torch.randn(4, 8, 8)
    straight = Muon([p], lr=0.1, weight_decay=0.0)
    for p.grad in gradients[:2]:
        straight.step()
    stopped = torch.nn.Parameter(p.detach().clone())
    resumed = Muon([stopped], lr=0.3, weight_decay=0.0)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for p.grad in gradients[2:]:
        straight.step()
    for stopped.grad in gradients[2:]:
        resumed.step()
    assert torch.equal(p, stopped)


# --- who learns how -------------------------------------------------------------------------------

NETWORKS = {
    "denoiser": lambda: MDM(TINY),
    "posterior": lambda: OrderPosterior(TINY),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_one_optimizer_and_the_matrices_of_blocks_have_muon(name):
    network = NETWORKS[name]()
    held = {}
    for optimizer in make_optimizers(network, lr_matrix=0.01, lr_other=0.002):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert p not in held
                held[p] = optimizer, group
    assert held.keys() == set(network.parameters())
    for parameter_name, p in network.named_parameters():
        optimizer, group = held[p]
        words = parameter_name.split(".")
        if "blocks" in words and words[-2] in ("q", "kv", "proj", "up", "down"):
            assert isinstance(optimizer, Muon) and group["lr"] == 0.01
        else:
            assert isinstance(optimizer, torch.optim.AdamW) and group["lr"] == 0.002
        assert group["weight_decay"] == 0


def test_rates_are_a_share_of_their_peaks_however_often_they_are_set():
    optimizers = make_optimizers(MDM(TINY), lr_matrix=0.01, lr_other=0.002)
    for factor in (0.05, 1.0, 0.5, 0.0, 0.5):
        set_rates(optimizers, factor)
        rates = sorted(group["lr"] for o in optimizers for group in o.param_groups)
        assert rates == pytest.approx([0.002 * factor, 0.01 * factor])


@pytest.mark.parametrize("name", NETWORKS)
def test_one_update_moves_every_parameter_that_has_a_gradient(name):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in make_optimizers(network, lr_matrix=0.01, lr_other=0.002):
        optimizer.step()
    for key, p in network.named_parameters():
        assert (p - before[key]).abs().max() > 1e-4, key
