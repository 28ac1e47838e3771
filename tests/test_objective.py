"""posterior.py against exact sums over all orders (tables.py), in float64, to 1e-10."""

import itertools

import pytest
import torch

import posterior
from model import log_p_of
from tables import TableModel, exact_elbo, log_p_joint, log_p_marginal, orders, q_gates, q_of

L, V, TAU = 3, 2, 0.5
X0 = [1, 0, 1]


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(L, generator=generator, dtype=torch.float64).requires_grad_()


def objective(model, s, chosen, t, T, x0=X0):
    """objective_at for one example whose K orders are `chosen`, at step t."""
    value, logs = posterior.objective_at(model, s[None], torch.zeros(1, 0, dtype=torch.long), torch.tensor([x0]),
                                         torch.tensor([chosen]), torch.tensor([t]), T=T, tau=TAU)
    return value, logs


def step_term(model, s, order, t, T, x0=X0):
    return objective(model, s, [order, order], t, T, x0)[1]["elbo"] / T


@pytest.mark.parametrize("T", [1, 2, 3])
def test_p_sums_to_one_over_answers_and_orders(T):
    model = TableModel()
    total = sum(log_p_joint(model, x0, o, T).exp() for x0 in itertools.product(range(V), repeat=L) for o in orders(L, T))
    assert abs(total.item() - 1) < 1e-10


@pytest.mark.parametrize("T", [1, 2, 3])
def test_q_sums_to_one_over_orders(T):
    assert abs(sum(q_of(scores(), o, T, TAU) for o in orders(L, T)).item() - 1) < 1e-10


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("x0", list(itertools.product(range(V), repeat=L)))
def test_rao_blackwellised_elbo_is_the_elbo(T, x0):
    """E_q sum_t L_t (Eq. 4-6) = E_q log p(x0, order) - log q(order), which is below log p(x0)."""
    model, s = TableModel(), scores()
    total = sum(q_of(s, o, T, TAU) * step_term(model, s, o, t, T, x0) for o in orders(L, T) for t in range(1, T + 1))
    expected = exact_elbo(model, s, x0, T, TAU)
    assert abs((total - expected).item()) < 1e-10
    assert expected < log_p_marginal(model, x0, T) + 1e-12


@pytest.mark.parametrize("T", [1, 2, 3])
def test_gradient_is_exact_in_expectation(T):
    """The gradient of the objective, summed over all pairs of orders and all steps with their
    probabilities, is autograd through the enumerated ELBO, for theta and for phi."""
    model, s = TableModel(), scores()
    exact_theta, exact_phi = torch.autograd.grad(exact_elbo(model, s, X0, T, TAU), (model.table, s), allow_unused=True, materialize_grads=True)
    got_theta, got_phi = torch.zeros_like(exact_theta), torch.zeros_like(exact_phi)
    for pair in itertools.product(orders(L, T), repeat=2):
        weight = (q_of(s, pair[0], T, TAU) * q_of(s, pair[1], T, TAU)).item() / T
        if weight == 0:
            continue
        for t in range(1, T + 1):
            theta, phi = torch.autograd.grad(objective(model, s, pair, t, T)[0], (model.table, s), allow_unused=True, materialize_grads=True)
            got_theta += weight * theta
            got_phi += weight * phi
    assert (got_theta - exact_theta).abs().max() < 1e-10
    assert (got_phi - exact_phi).abs().max() < 1e-10
    assert T == 1 or exact_phi.abs().max() > 1e-3  # there was something to get wrong


def score_term_variance(model, s, baseline, t=2, T=3):
    """Variance of Eq. 7's gradient at step t, summed over all pairs of orders."""
    first, second = 0.0, 0.0
    for pair in itertools.product(orders(L, T), repeat=2):
        weight = (q_of(s, pair[0], T, TAU) * q_of(s, pair[1], T, TAU)).item()
        if weight == 0:
            continue
        value = torch.stack([step_term(model, s, o, t, T) for o in pair])[None]
        advantage = posterior.leave_one_out(value) if baseline else value
        log_q = posterior.log_q_before(s[None], torch.tensor([pair]), torch.tensor([t]), T, TAU)
        gradient, = torch.autograd.grad((advantage * log_q).mean(), s)
        first, second = first + weight * gradient, second + weight * gradient ** 2
    return (second - first ** 2).sum().item()


def test_leave_one_out_lowers_the_variance():
    """For a model that is still bad, whose terms are many nats below 0 whatever the order, as in training."""
    model, s = TableModel(), (0.5 * scores().detach()).requires_grad_()
    with torch.no_grad():
        for i, token in enumerate(X0):
            model.table[:, i, token] -= 10
    assert score_term_variance(model, s, True) < 0.5 * score_term_variance(model, s, False)


def test_leave_one_out_is_value_minus_mean_of_the_others():
    value = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.stack([value[:, k] - value[:, [j for j in range(4) if j != k]].mean(1) for k in range(4)], 1)
    assert torch.allclose(posterior.leave_one_out(value), expected, atol=1e-12)


# --- Eq. 3 -----------------------------------------------------------------------------------------

def test_gates_match_the_scalar_definition():
    s, T = scores(), 3
    for o in orders(L, T):
        for t in range(1, max(o) + 1):
            masked = torch.tensor([step >= t for step in o])
            log_q = posterior.log_gate_probs(s, masked, torch.tensor(t == T), TAU)
            for i, q in q_gates(s, o, t, T, TAU).items():
                assert abs(log_q[i].exp() - q) < 1e-12


def test_log_q_matches_the_scalar_definition():
    s, T = scores(), 3
    for o in orders(L, T):
        for t in range(1, T + 1):
            q = q_of(s, o, T, TAU, until=min(t, max(o) + 1))
            if q > 0:
                log_q = posterior.log_q_before(s[None], torch.tensor([[o]]), torch.tensor([t]), T, TAU)
                assert abs(log_q.item() - q.log().item()) < 1e-10


@pytest.mark.parametrize("tau", [1e-3, 0.1, 100.0])
def test_every_step_reveals_at_least_one(tau):
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(50, 12, generator=generator)
    for T in (1, 3, 12):
        reveal_step = posterior.sample_orders(s, 4, T, tau, generator)
        for row in reveal_step.flatten(0, 1).tolist():
            assert set(row) == set(range(1, max(row) + 1)) and max(row) <= T


def test_small_tau_follows_the_scores_and_large_tau_reveals_all_at_once():
    s = torch.tensor([[0.3, 2.0, -1.0, 1.0]])
    assert posterior.sample_orders(s, 2, 4, 1e-4)[0, 0].tolist() == [3, 1, 4, 2]
    assert posterior.sample_orders(s, 2, 4, 1e6)[0, 0].tolist() == [1, 1, 1, 1]


def test_orders_are_drawn_from_q():
    s, T, n = scores().detach(), 3, 100_000
    drawn = posterior.sample_orders(s[None], n, T, TAU, torch.Generator().manual_seed(0))[0]
    chi2 = 0.0
    for o in orders(L, T):
        expected = n * q_of(s, o, T, TAU).item()
        seen = (drawn == torch.tensor(o)).all(-1).sum().item()
        if expected == 0:
            assert seen == 0
        else:
            chi2 += (seen - expected) ** 2 / expected
    assert chi2 < 20  # 5 possible orders, 4 degrees of freedom: p < 0.001 beyond 18.5


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [5.0, 5.0, -3.0]])
def test_gradients_stay_finite(values):
    """Ties, extreme scores, one position left, nothing left; float32."""
    model = TableModel().float()
    s = torch.tensor(values, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    reveal_step = torch.cat([posterior.sample_orders(s[None], 4, 3, 0.1, generator), torch.ones(1, 1, 3, dtype=torch.long)], 1)
    for t in (1, 2, 3):
        value, _ = posterior.objective_at(model, s[None], torch.zeros(1, 0, dtype=torch.long), torch.tensor([X0]), reveal_step,
                                          torch.tensor([t]), T=3, tau=0.1)
        theta, phi = torch.autograd.grad(value, (model.table, s))
        assert value.isfinite() and theta.isfinite().all() and phi.isfinite().all()


def test_log_p_of_is_the_log_probability_of_x0_where_masked():
    model, x0 = TableModel(), torch.tensor([X0])
    masked = torch.tensor([[True, False, True]])
    h = model(None, x0.masked_fill(masked, V))
    expected = model.log_p(h).gather(-1, x0[..., None]).squeeze(-1) * masked
    assert torch.equal(log_p_of(model, h, x0, masked), expected)
