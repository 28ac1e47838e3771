"""posterior.py against exact sums over all orders (tables.py), in float64, to 1e-10.

The equations are those of posterior.py. test_mutations.py breaks the scripts in many ways and runs
the tests of this file on what is left, to show that they can fail."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import posterior
from model import MDM, ModelConfig, log_p_of
from tables import (SIZES, TAU, V, X0, TableModel, answers, exact_elbo, log_p_gates, log_p_joint,
                    log_p_marginal, masked_at, orders, plain_step, possible_orders,
                    q_gates, q_of, q_step, scores, state_at)

NO_PROMPT = torch.zeros(1, 0, dtype=torch.long)


def close(a, b, tolerance=1e-10):
    return abs(torch.as_tensor(a - b).item()) < tolerance


def two_steps(model, s, x0, chosen, t, T):
    """What train.py maximises, and the logs, for N copies of one answer: (N,) each.

    Copy n has the K orders chosen[n], and t[n] as its later step. Scores s are (L,), or (N, L) for
    scores of its own for each copy.
    """
    reveal_step = torch.tensor(chosen)                                       # (N, K, L)
    t = torch.tensor(t)
    N = len(t)
    s = s.expand(N, -1)
    return posterior.objective(model, s, NO_PROMPT.expand(N, 0), torch.tensor([x0] * N),
                               reveal_step, t, T, TAU)


def step_logs(model, s, x0, order, t, T):
    """elbo, recon and kl of step t alone, at the state that it starts from in the order:
    L_1 + (T - 1) L_t less L_1. Where all came out at step 1, step T costs nothing."""
    all_at_once = (1,) * len(x0)
    _, logs = two_steps(model, s, x0, [[order] * 2, [all_at_once] * 2], [t, T], T)
    steps = {}
    for name in ("elbo", "recon", "kl"):
        at_t, first = logs[name]
        steps[name] = first if t == 1 else (at_t - first) / (T - 1)
    return steps


def step_term(model, s, x0, order, t, T):
    """Eq. 5: L_t at the state that step t of the order starts from."""
    return step_logs(model, s, x0, order, t, T)["elbo"]


def later_steps(T):
    """What train.py draws from."""
    return range(2, T + 1) if T > 1 else [1]


# --- Eq. 1, 2: the model --------------------------------------------------------------------------

@pytest.mark.parametrize("L, T", SIZES)
def test_p_sums_to_one_over_answers_and_orders(L, T):
    model = TableModel(L)
    pairs = itertools.product(answers(L), orders(L, T))
    assert close(sum(log_p_joint(model, x0, o, T).exp() for x0, o in pairs), 1)


def test_log_p_of_is_the_log_probability_of_x0_where_masked():
    model = TableModel()
    x0 = torch.tensor([X0[3]])
    masked = torch.tensor([[True, False, True]])
    h = model(None, x0.masked_fill(masked, V))
    expected = model.log_p(h).gather(-1, x0[..., None]).squeeze(-1) * masked
    assert torch.equal(log_p_of(model, h, x0, masked), expected)


# --- Eq. 3: the posterior -------------------------------------------------------------------------

@pytest.mark.parametrize("steps_left", [2, 3, 5])
@pytest.mark.parametrize("values", [None, [0.0, 0.0, 0.0], [5.0, 5.0, -3.0], [1e4, -1e4, 0.0]])
def test_gates_are_a_law_on_nonempty_sets(values, steps_left):
    """At every state: the gates of the scalar definition, sum_r q(r | z) = 1 and q(r = 0 | z) =
    0."""
    s = scores() if values is None else torch.tensor(values, dtype=torch.float64)
    for bits in itertools.product([False, True], repeat=3):
        order = [1 if bit else 0 for bit in bits]  # revealed before step 1, or masked at step 1
        masked = masked_at(order, 1)
        if not masked:
            continue
        log_q = posterior.log_gate_probs(s, torch.tensor(bits), steps_left, TAU)
        q = log_q.exp()
        not_q = torch.where(log_q == 0, 0.0, posterior.log_one_minus(log_q).exp())
        for i, expected in q_gates(s, order, 1, steps_left).items():
            assert close(q[i], expected) and close(not_q[i], 1 - expected)

        law = {}
        for r in itertools.product([False, True], repeat=len(masked)):
            gates = [q[i] if opens else not_q[i] for i, opens in zip(masked, r)]
            law[r] = torch.stack(gates).prod()
        assert close(sum(law.values()), 1) and law[(False,) * len(masked)] == 0


@pytest.mark.parametrize("L, T", SIZES)
def test_q_sums_to_one_over_orders(L, T):
    assert close(sum(q_of(scores(L), o, T) for o in orders(L, T)), 1)


@pytest.mark.parametrize("L, T", SIZES)
def test_log_q_matches_the_scalar_definition(L, T):
    s = scores(L)
    for o in possible_orders(s, T):
        for t in range(1, T + 1):
            path = torch.tensor([[o]])
            log_q = posterior.log_q_of_path(s[None], path, torch.tensor([t]), T, TAU)
            assert close(log_q, q_of(s, o, T, until=min(t, max(o) + 1)).log())


@pytest.mark.parametrize("L, T", SIZES)
def test_orders_are_drawn_from_q(L, T):
    s = scores(L).detach()
    n = 100_000
    drawn = posterior.sample_orders(s[None], n, T, TAU, torch.Generator().manual_seed(0))[0]
    law = possible_orders(s, T)
    seen = {o: (drawn == torch.tensor(o)).all(-1).sum().item() for o in law}
    assert sum(seen.values()) == n  # nothing outside the law
    chi2 = sum((seen[o] - n * q) ** 2 / (n * q) for o, q in law.items())
    assert chi2 < 25  # at most 7 degrees of freedom: p < 0.001 beyond 24.3


@settings(derandomize=True, deadline=None, max_examples=100)
@given(s=st.lists(st.integers(-2, 2) | st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
       T=st.integers(1, 9), tau=st.sampled_from([1e-3, 0.1, 1.0, 1e3]), seed=st.integers(0, 99))
def test_any_scores_give_orders_with_a_finite_log_q(s, T, tau, seed):
    """Ties and extremes included: no empty step, log q <= 0, finite gradients. In float32, as in
    training."""
    s = torch.tensor([s], dtype=torch.float32, requires_grad=True)
    reveal_step = posterior.sample_orders(s, 3, T, tau, torch.Generator().manual_seed(seed))
    for order in reveal_step[0].tolist():
        assert set(order) == set(range(1, max(order) + 1)) and max(order) <= T
    log_q = posterior.log_q_of_path(s, reveal_step, torch.tensor([T]), T, tau)
    gradient, = torch.autograd.grad(log_q.sum() + 0 * s.sum(), s)
    assert log_q.isfinite().all() and (log_q <= 0).all() and gradient.isfinite().all()


def test_no_gate_opens_with_more_than_certainty():
    """In float32 1 - (1 - e) (1 - f) may round to more than 1, whose log_one_minus is nan."""
    generator = torch.Generator().manual_seed(0)
    for tau in (0.67, 0.2, 0.05):
        s = torch.nn.functional.layer_norm(torch.randn(500, 60, generator=generator), (60,))
        log_q = posterior.log_gate_probs(s, torch.ones_like(s, dtype=torch.bool), 4, tau)
        assert log_q.max() == 0 and posterior.log_one_minus(log_q).isfinite().all()


def test_every_step_does_its_share():
    """Where neighbours lie ten tau apart, e alone opens one a step and leaves 57 to the last. With
    f the n-th best is open half of the time, for n = 8, 11 and 15."""
    s = 0.1 * torch.arange(60.0)[None]
    steps = posterior.sample_orders(s, 200, 4, 0.01, torch.Generator().manual_seed(0))[0]
    shares = [(steps == t).sum(-1).float().mean().item() for t in range(1, 5)]
    assert shares == pytest.approx([7.5, 10.5, 14.5, 27.5], abs=0.5)
    assert (steps.diff(dim=-1) <= 0).all()


def test_small_tau_follows_the_scores_and_large_tau_reveals_all_at_once():
    s = torch.tensor([[0.3, 2.0, -1.0, 1.0]])
    assert posterior.sample_orders(s, 2, 4, 1e-4)[0, 0].tolist() == [3, 1, 4, 2]
    assert posterior.sample_orders(s, 2, 4, 1e6)[0, 0].tolist() == [1, 1, 1, 1]


# --- Eq. 4: the bound -----------------------------------------------------------------------------

def elbo(model, s, x0, T):
    """Eq. 4: E_q sum_t L_t(z_t), by posterior.py."""
    total = 0.0
    for o, q in possible_orders(s, T).items():
        total += q * sum(step_term(model, s, x0, o, t, T) for t in range(1, T + 1))
    return total


@pytest.mark.parametrize("L, T", SIZES)
def test_the_gap_of_the_bound_is_the_kl_to_the_true_posterior(L, T):
    """For every answer: log p(x0) - ELBO = KL(q(order) || p(order | x0)) >= 0."""
    model, s = TableModel(L), scores(L)
    for x0 in answers(L):
        log_p = log_p_marginal(model, x0, T)
        kl = 0.0
        for o, q in possible_orders(s, T).items():
            log_p_of_order = log_p_joint(model, x0, o, T) - log_p
            kl += q * (q_of(s, o, T).log() - log_p_of_order)
        assert close(log_p - elbo(model, s, x0, T), kl) and kl >= -1e-12
        assert T == 1 or kl > 1e-3  # a random posterior is not the true one


@pytest.mark.parametrize("L, T", SIZES)
def test_the_bound_is_tight_at_the_true_posterior(L, T):
    """A table stands in for q: any law over orders. At p(order | x0) every order's term is log
    p(x0)."""
    model = TableModel(L)
    for x0 in answers(L):
        log_p = log_p_marginal(model, x0, T)
        joint = {o: log_p_joint(model, x0, o, T) for o in orders(L, T)}
        table = {o: (joint[o] - log_p).exp() for o in joint}
        assert close(sum(table.values()), 1)
        assert close(sum(q * (joint[o] - q.log()) for o, q in table.items()), log_p)


def model_that_follows(s, x0):
    """A model whose true posterior at x0 is q, for T = 1, 2 and 3 alike: its gates are q's, and its
    tokens do not look at the state."""
    model = TableModel(len(s))
    with torch.no_grad():
        model.table[...] = model.table[:1].clone()
        for T in (2, 3):
            for o in possible_orders(s, T):
                for t in range(1, min(T, max(o) + 1)):
                    row = model.row(state_at(x0, o, t))
                    for i, q in q_gates(s, o, t, T).items():
                        logit = q.logit().clamp(max=50)  # 50: alpha = 1 to 1e-21
                        model.table[row, i, model.gate_column(T - t + 1)] = logit
    return model


@pytest.mark.parametrize("L, T", [*SIZES, (4, 3)])
def test_the_bound_is_tight_where_the_true_posterior_has_the_form_of_eq_3(L, T):
    """The same with posterior.py's own factorised q, for a model made to have it as its posterior:
    one model for every T, since its gates know the steps left."""
    s, x0 = scores(L), X0[L]
    model = model_that_follows(s, x0)
    assert close(elbo(model, s, x0, T), log_p_marginal(model, x0, T))


def test_gates_that_do_not_know_the_steps_left_cannot_follow_q_for_every_T():
    """The same model, with the gates of 2 steps left for any number: tight at T = 2, not at 3."""
    s, x0 = scores(), X0[3]
    model = model_that_follows(s, x0)
    with torch.no_grad():
        model.table[..., V:] = model.table[..., model.gate_column(2), None]
    gaps = [log_p_marginal(model, x0, T) - elbo(model, s, x0, T) for T in (2, 3)]
    assert close(gaps[0], 0) and gaps[1] > 1e-3


# --- Eq. 5, 6: one step ---------------------------------------------------------------------------

@pytest.mark.parametrize("L, T", SIZES)
def test_rao_blackwellised_elbo_is_the_elbo(L, T):
    """E_q sum_t L_t (Eq. 4-6) = E_q log p(x0, order) - log q(order), for every answer."""
    model, s = TableModel(L), scores(L)
    for x0 in answers(L):
        assert close(elbo(model, s, x0, T), exact_elbo(model, s, x0, T))


@pytest.mark.parametrize("L, T", SIZES)
def test_step_kl_is_the_kl_between_the_two_laws_of_the_gates(L, T):
    """Eq. 6 at every state that q visits: sum over r_t of q(r_t | z_t) log q(r_t | z_t) / p(r_t |
    z_t) >= 0."""
    model, s, x0 = TableModel(L), scores(L), X0[L]
    for o in possible_orders(s, T):
        for t in range(1, max(o) + 1):
            # orders that share the steps before t, one for each way in which step t can go on
            following = {}
            for b in orders(L, T):
                if all(min(x, t) == min(y, t) for x, y in zip(o, b)):
                    following[tuple(step == t for step in b)] = b
            kl = 0.0
            for b in following.values():
                q = q_step(s, b, t, T)
                if q > 0:
                    kl += q * (q.log() - log_p_gates(model, x0, b, t, T))
            assert close(step_logs(model, s, x0, o, t, T)["kl"], kl) and kl >= -1e-12


def test_a_step_costs_what_its_state_and_the_steps_left_say_whatever_T():
    """Two positions revealed in one step of 3 or in two of 4: the same state with 2 steps left. In
    one step of 4 there are 3 left, and p knows it."""
    model, s, x0 = TableModel(4), scores(4), X0[4]
    in_one_of_3 = step_logs(model, s, x0, (1, 1, 2, 3), t=2, T=3)
    in_two_of_4 = step_logs(model, s, x0, (2, 1, 3, 4), t=3, T=4)
    in_one_of_4 = step_logs(model, s, x0, (1, 1, 2, 3), t=2, T=4)
    for name in ("elbo", "recon", "kl"):
        assert close(in_one_of_3[name], in_two_of_4[name])
    assert abs(in_one_of_3["kl"] - in_one_of_4["kl"]) > 1e-3


@pytest.mark.parametrize("L, T", SIZES)
def test_rao_blackwellisation_lowers_the_variance_of_each_step(L, T):
    """L_t is the conditional expectation of the plain term given z_t: same mean, and less variance,
    at every step and for T * L_t at a random step. It need not hold for the sum over t: see the
    next test."""
    model, s, x0 = TableModel(L), scores(L), X0[L]
    law = possible_orders(s, T)

    def mean(values):
        return sum(weight * value for weight, value in values)

    def variance(values):
        center = mean(values)
        return sum(weight * (value - center) ** 2 for weight, value in values).item()

    blackwell_at_random, plain_at_random = [], []
    for t in range(1, T + 1):
        blackwell = [(q, step_term(model, s, x0, o, t, T)) for o, q in law.items()]
        plain = [(q, plain_step(model, s, x0, o, t, T).detach()) for o, q in law.items()]
        assert close(mean(blackwell), mean(plain))
        # at T no gates are left to average
        assert variance(blackwell) < variance(plain) - 1e-3 or t == T
        blackwell_at_random += [(q / T, T * value) for q, value in blackwell]
        plain_at_random += [(q / T, T * value) for q, value in plain]
    assert variance(blackwell_at_random) < variance(plain_at_random) - 1e-3 or T == 1


def test_at_the_true_posterior_the_plain_sum_is_constant_and_the_rao_blackwellised_is_not():
    """log p(x0, order) - log q(order) = log p(x0) for every order: the plain terms of a path cancel
    each other's noise. sum_t L_t has lost that. What training uses, one step, has nothing to cancel
    with."""
    T = 3
    s, x0 = scores(), X0[3]
    model = model_that_follows(s, x0)
    plain, blackwell = [], []
    for o in possible_orders(s, T):
        steps = range(1, T + 1)
        plain.append(sum(plain_step(model, s, x0, o, t, T) for t in steps).item())
        blackwell.append(sum(step_term(model, s, x0, o, t, T) for t in steps).item())
    assert max(plain) - min(plain) < 1e-10 and max(blackwell) - min(blackwell) > 0.1


def terms_by_hand(model, x0, z, steps_left):
    """log p(x0^i | z) and alpha^i, (L,) each, from the rows of the table."""
    table = model.table[model.row(torch.tensor(z))]
    log_p = table[:, :V].log_softmax(-1)
    alpha = table[:, model.gate_column(steps_left)].sigmoid()
    return log_p[torch.arange(len(x0)), list(x0)], alpha


def test_one_step_costs_all_tokens_and_no_gates():
    model, x0 = TableModel(), X0[3]
    log_p, _ = terms_by_hand(model, x0, [V, V, V], steps_left=1)
    logs = step_logs(model, scores(), x0, (1, 1, 1), 1, T=1)
    assert close(logs["recon"], log_p.sum()) and logs["kl"] == 0


def test_equal_scores_reveal_everything_at_once():
    """q = 1 everywhere: p pays for opening all its gates, given that one opens."""
    model, x0 = TableModel(), X0[3]
    equal = torch.zeros(3, dtype=torch.float64)
    log_p, alpha = terms_by_hand(model, x0, [V, V, V], steps_left=2)
    p_of_all = alpha.prod() / (1 - (1 - alpha).prod())
    logs = step_logs(model, equal, x0, (1, 1, 1), 1, T=2)
    assert close(logs["recon"], log_p.sum()) and close(logs["kl"], -p_of_all.log())
    done = step_logs(model, equal, x0, (1, 1, 1), 2, T=2)
    assert done["recon"] == 0 and done["kl"] == 0  # nothing is left for step 2


def test_far_scores_reveal_one_position_at_a_time():
    model, x0 = TableModel(), X0[3]
    s = torch.tensor([-1e3, 1e3, 0.0], dtype=torch.float64)
    log_p, alpha = terms_by_hand(model, x0, [V, V, V], steps_left=3)
    p_of_the_best = alpha[1] * (1 - alpha[0]) * (1 - alpha[2]) / (1 - (1 - alpha).prod())
    logs = step_logs(model, s, x0, (3, 1, 2), 1, T=3)
    assert close(logs["recon"], log_p[1]) and close(logs["kl"], -p_of_the_best.log())


def test_the_last_position_opens_for_certain_and_costs_no_kl():
    model, x0 = TableModel(), X0[3]
    log_p, _ = terms_by_hand(model, x0, [x0[0], V, x0[2]], steps_left=2)
    logs = step_logs(model, scores(), x0, (1, 2, 1), 2, T=3)
    assert close(logs["recon"], log_p[1]) and close(logs["kl"], 0)


# --- Eq. 7: the gradient --------------------------------------------------------------------------

def trajectory(model, s, x0, chosen, _, T):
    """The full-trajectory estimator, for reference: all T steps of every order, each step's gates
    with the leave-one-out advantage of the steps after it (reward-to-go). It needs T forward passes
    per order, train.py's form one, and one per example; both have the same expectation."""
    reveal_step = torch.tensor(chosen)                                       # (N, K, L)
    x0 = torch.tensor(x0).expand(reveal_step.shape)
    terms, log_q_step = [], []
    for t in range(1, T + 1):
        masked = reveal_step >= t
        opens = reveal_step == t
        steps_left = torch.full_like(reveal_step[..., :1], T - t + 1)        # (N, K, 1)
        h = model(None, x0.masked_fill(masked, V))
        log_q = posterior.log_gate_probs(s[:, None].expand(masked.shape), masked, T - t + 1,
                                         TAU)
        recon = (log_q.exp() * log_p_of(model, h, x0, masked)).sum(-1)
        gate_logits = model.gate_logits(h, masked, steps_left)
        terms.append(recon - posterior.step_kl(log_q, gate_logits, masked, steps_left == 1))
        log_q_gates = torch.where(opens, log_q, posterior.log_one_minus(log_q))
        log_q_step.append(log_q_gates.sum(-1))                               # log q(r_t | z_t)
    terms = torch.stack(terms)                                               # L_t, (T, N, K)
    to_go = terms.detach().flip(0).cumsum(0).flip(0) - terms.detach()        # sum_{u > t} L_u
    advantage = torch.stack([posterior.leave_one_out(value) for value in to_go])
    surrogate = (advantage * torch.stack(log_q_step)).sum(0)                 # (N, K)
    return (terms.sum(0) + surrogate).mean(-1), None


def mean_gradient(estimator, model, s, x0, T, K, steps):
    """The mean of the estimator's gradient for (theta, phi), and the total variance of phi's: sums
    over all K-tuples of orders and all `steps`, each with its probability."""
    law = possible_orders(s, T)
    chosen, t, weight = [], [], []
    for some in itertools.product(law, repeat=K):
        for step in steps:
            chosen.append(some)
            t.append(step)
            weight.append(torch.tensor([law[o] for o in some], dtype=torch.float64).prod())
    weight = torch.stack(weight) / len(steps)                                # (N,)

    # Every copy gets scores of its own, so one backward pass gives the gradient of each.
    own_s = s.detach().expand(len(t), -1).clone().requires_grad_()           # (N, L)
    value, _ = estimator(model, own_s, x0, chosen, t, T)
    theta, phi = torch.autograd.grad((weight * value).sum(), (model.table, own_s),
                                     allow_unused=True, materialize_grads=True)
    mean = phi.sum(0)
    variance = (phi**2 / weight[:, None]).sum(0) - mean**2
    return (theta, mean), variance.sum()


def exact_gradient(model, s, bound):
    """Of the enumerated bound, for (theta, phi)."""
    return torch.autograd.grad(bound, (model.table, s), allow_unused=True, materialize_grads=True)


def assert_gradient_is_exact(estimator, L, T, K, steps):
    model, s, x0 = TableModel(L), scores(L), X0[L]
    exact = exact_gradient(model, s, exact_elbo(model, s, x0, T))
    mean, _ = mean_gradient(estimator, model, s, x0, T, K, steps)
    for a, b in zip(mean, exact):
        assert (a - b).abs().max() < 1e-10
    assert T == 1 or exact[1].abs().max() > 1e-3  # there was something to get wrong


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("L, T", SIZES)
def test_gradient_is_exact_in_expectation(L, T, K):
    """Pathwise plus surrogate, summed over all K-tuples of orders and all later steps, is autograd
    through the enumerated ELBO, for theta and for phi. This is the form that train.py uses."""
    assert_gradient_is_exact(two_steps, L, T, K, later_steps(T))


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("L, T", SIZES)
def test_trajectory_gradient_is_exact_in_expectation(L, T, K):
    assert_gradient_is_exact(trajectory, L, T, K, [1])


def test_one_model_learns_the_bounds_of_every_number_of_steps():
    """One table and one q, T = 1, 2 and 3 equally often: the mean gradient is that of the mean
    bound. With T steps in all, the gates with 2 to T left learn, and no others."""
    model, s, x0 = TableModel(), scores(), X0[3]
    total = 0.0
    learned = 0.0
    for T in (1, 2, 3):
        total = total + exact_elbo(model, s, x0, T) / 3
        (theta, _), _ = mean_gradient(two_steps, model, s, x0, T, 2, later_steps(T))
        learned = learned + theta / 3
        gates = theta[..., V:].abs().amax(dim=(0, 1)) > 0                    # by steps left
        assert gates.tolist() == [2 <= steps_left <= T for steps_left in range(1, len(gates) + 1)]
    exact, _ = exact_gradient(model, s, total)
    assert (learned - exact).abs().max() < 1e-10


def test_leave_one_out_is_value_minus_mean_of_the_others():
    value = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.empty_like(value)
    for k in range(4):
        others = [j for j in range(4) if j != k]
        expected[:, k] = value[:, k] - value[:, others].mean(1)
    assert torch.allclose(posterior.leave_one_out(value), expected, atol=1e-12)


def test_a_row_of_a_batch_is_what_it_is_alone():
    """Different answers, scores, orders and steps side by side: no row's baseline or path touches
    another."""
    T, model = 4, TableModel(4)
    rows = [(scores(4, seed=1), (1, 0, 1, 1), [(1, 2, 3, 2), (1, 1, 2, 3)], 2),
            (scores(4, seed=2), (0, 0, 1, 0), [(2, 1, 1, 3), (1, 1, 1, 1)], 2),
            (scores(4, seed=3), (1, 1, 0, 1), [(3, 2, 1, 4), (2, 1, 2, 3)], 3)]
    s, x0, chosen, t = zip(*rows)
    s_rows = torch.stack(s)
    together, logs = posterior.objective(model, s_rows, NO_PROMPT.expand(3, 0), torch.tensor(x0),
                                         torch.tensor(chosen), torch.tensor(t), T, TAU)
    total = 0.0
    for i, (s_i, x0_i, chosen_i, t_i) in enumerate(rows):
        value, alone = two_steps(model, s_i, x0_i, [chosen_i], [t_i], T)
        assert close(together[i], value)
        assert all(close(logs[name][i], alone[name]) for name in alone)
        total = total + value.sum()
    for a, b in zip(torch.autograd.grad(together.sum(), (model.table, *s)),
                    torch.autograd.grad(total, (model.table, *s))):
        assert (a - b).abs().max() < 1e-12


def test_the_logged_bound_is_the_reconstruction_less_the_kl():
    """And none of the three carries a gradient."""
    _, logs = two_steps(TableModel(), scores(), X0[3], [[(1, 2, 3), (2, 1, 1)]], [2], 3)
    assert close(logs["elbo"], logs["recon"] - logs["kl"]) and logs["kl"] > 0
    assert not any(log.requires_grad for log in logs.values())


@pytest.mark.parametrize("L, T", [(3, 3), (4, 2)])
def test_drawn_orders_and_steps_estimate_the_same_elbo_and_gradient(L, T):
    """draw_orders_and_steps and objective, two different answers and a batch that is no multiple of
    T - 1: within 4 standard errors over 100 batches."""
    model, s = TableModel(L), scores(L)
    other = tuple(1 - token for token in X0[L])
    x0 = torch.tensor([X0[L]] * 251 + [other] * 250)
    B = len(x0)
    s_rows = s.expand(B, -1)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(100):
        drawn = posterior.draw_orders_and_steps(s_rows, 4, T, TAU, generator)
        value, logs = posterior.objective(model, s_rows, NO_PROMPT.expand(B, 0), x0, *drawn, T, TAU)
        gradient = torch.autograd.grad(value.mean(), (model.table, s))
        batches.append(torch.cat([logs["elbo"].mean()[None], *(g.flatten() for g in gradient)]))
    batches = torch.stack(batches)

    exact = (251 * exact_elbo(model, s, X0[L], T) + 250 * exact_elbo(model, s, other, T)) / B
    gradient = exact_gradient(model, s, exact)
    exact = torch.cat([exact[None].detach(), *(g.flatten() for g in gradient)])
    error = (batches.mean(0) - exact).abs()
    standard = batches.std(0) / len(batches) ** 0.5
    assert (error <= 4 * standard + 1e-12).all()
    assert standard[0] < 0.01 * exact[0].abs()  # the test has power


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_each_later_step_is_drawn_equally_often_by_every_row(T):
    s, generator = torch.zeros(4, 2), torch.Generator().manual_seed(0)
    t = torch.stack([posterior.draw_orders_and_steps(s, 2, T, 1.0, generator)[1]
                     for _ in range(1500)])
    later = max(T - 1, 1)
    shares = torch.stack([(t == min(step, T)).double().mean(0) for step in range(2, 2 + later)])
    assert (shares.sum(0) - 1).abs().max() < 1e-5 and (shares - 1 / later).abs().max() < 0.05
    assert T < 3 or (t[:, 0] != t[:, 1]).all()  # stratified: rows in a row see different steps


# --- the network of q -----------------------------------------------------------------------------

TINY = ModelConfig(vocab_size=11, prompt_len=6, answer_len=5, n_layer=2, n_head=2, n_embd=16)


def any_posterior(seed=0):
    torch.manual_seed(seed)
    q = posterior.OrderPosterior(TINY)
    for p in q.parameters():  # projections start at 0, which would hide everything
        torch.nn.init.normal_(p, std=0.3)
    return q


def test_scores_have_mean_0_and_spread_1_in_each_answer():
    """Row by row: what stands beside an answer does not move its scores."""
    q = any_posterior()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 10]])
    x0 = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    s = q(prompt, x0)
    assert s.mean(-1).abs().max() < 1e-5
    assert (s.std(-1, correction=0) - 1).abs().max() < 1e-2
    assert torch.allclose(q(prompt[:1], x0[:1]), s[:1], atol=1e-4)


def test_q_reads_every_token_of_prompt_and_answer_in_its_place():
    q = any_posterior()
    prompt, x0 = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 1, 4, 1, 5]])
    before = q(prompt, x0)
    for other in ([2, 1, 3], [1, 3, 2], [4, 2, 3], [1, 4, 3], [1, 2, 4]):
        assert (q(torch.tensor([other]), x0) - before).abs().max() > 1e-3
    for i in range(5):
        other = x0.clone()
        other[0, i] = 8
        assert (q(prompt, other) - before).abs().max() > 1e-3


# --- numerics -------------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [5.0, 5.0, -3.0]])
def test_gradients_stay_finite(values):
    """Ties, extreme scores, one position left, nothing left; float32."""
    model = TableModel().float()
    s = torch.tensor([values], requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    drawn = posterior.sample_orders(s, 4, 3, 0.1, generator)
    reveal_step = torch.cat([drawn, torch.ones(1, 1, 3, dtype=torch.long)], 1)
    for t in (2, 3):
        value, _ = posterior.objective(model, s, NO_PROMPT, torch.tensor([X0[3]]), reveal_step,
                                       torch.tensor([t]), 3, 0.1)
        theta, phi = torch.autograd.grad(value.sum(), (model.table, s))
        assert value.isfinite() and theta.isfinite().all() and phi.isfinite().all()


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_gradients_stay_finite_under_bfloat16_autocast(spread):
    """The real networks, from nearly equal to extreme scores and gates."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, prompt_len=6, answer_len=8, n_layer=2, n_head=2, n_embd=16)
    model, q = MDM(config), posterior.OrderPosterior(config)
    parameters = [*model.parameters(), *q.parameters()]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        q.score_head.weight *= spread
        for p in model.gate_head.parameters():
            p *= spread
    prompt, x0 = torch.randint(9, (6, 4)), torch.randint(9, (6, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = q(prompt, x0)
        drawn = posterior.draw_orders_and_steps(s, 4, 4, 0.1, torch.Generator().manual_seed(0))
        value, _ = posterior.objective(model, s, prompt, x0, *drawn, 4, 0.1)
    gradients = torch.autograd.grad(value.sum(), parameters)
    assert value.dtype == torch.float32 and value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_scores_and_gates_are_made_in_float32_under_bfloat16_autocast():
    """In bfloat16, scores that differ by less than 1 % would tie, and gates would be as coarse.
    From one hidden state these heads make the same numbers inside autocast and outside."""
    q, model = any_posterior(), MDM(TINY)
    torch.nn.init.normal_(model.gate_head.weight)
    h = torch.randn(64, 5, 16)
    masked, steps_left = torch.ones(64, 5, dtype=torch.bool), torch.full((64, 1), 2)
    q.trunk.forward = lambda cache, answer: h
    prompt, x0 = torch.tensor([[1, 2, 3]]).expand(64, 3), torch.zeros(64, 5, dtype=torch.long)

    def heads():
        return q(prompt, x0), model.gate_logits(h, masked, steps_left), model.log_p(h)

    outside = heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = heads()
    assert all(a.dtype == torch.float32 for a in inside)
    for a, b in zip(inside[:2], outside[:2]):  # the token head may multiply in bfloat16
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("T", [2, 3])
def test_the_real_networks_bound_what_they_can_write(T):
    """MDM and OrderPosterior themselves, an answer with EOS and PAD in it, every order summed: the
    bound is charged for all tokens, and stays below the likelihood of the sampler's law."""
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=5, prompt_len=3, answer_len=3, n_layer=1, n_head=1, n_embd=8)
    model, q = MDM(config), posterior.OrderPosterior(config)
    for p in [*model.parameters(), *q.parameters()]:
        torch.nn.init.normal_(p, std=0.4)
    prompt, x0 = torch.tensor([[1, 0]]), (2, config.eos, config.pad)
    s = q(prompt, torch.tensor([x0])).detach()

    def log_p_of_order(o):
        """Eq. 1 and 2, gate by gate and token by token."""
        total = 0.0
        for t in range(1, max(o) + 1):
            left = masked_at(o, t)
            masked = torch.tensor([step >= t for step in o])
            z = torch.tensor(x0).masked_fill(masked, config.mask)
            h = model(model.encode_prompt(prompt), z[None])[0]
            log_p = model.log_p(h)
            total += sum(log_p[i, x0[i]] for i in left if o[i] == t)
            if t < T:
                alpha = model.gate_logits(h, masked, torch.tensor([T - t + 1])).sigmoid()
                total += sum((alpha[i] if o[i] == t else 1 - alpha[i]).log() for i in left)
                total -= (1 - torch.stack([1 - alpha[i] for i in left]).prod()).log()
        return total

    law, exact, bound = possible_orders(s[0].double(), T), 0.0, 0.0
    for o, q_of_order in law.items():
        exact += q_of_order * (log_p_of_order(o) - torch.tensor(q_of_order).log())
        for t in later_steps(T):
            _, logs = posterior.objective(model, s, prompt, torch.tensor([x0]),
                                          torch.tensor([[o, o]]), torch.tensor([t]), T, TAU)
            bound += q_of_order * logs["elbo"] / len(later_steps(T))
    log_p = torch.logsumexp(torch.stack([log_p_of_order(o) for o in orders(3, T)]), 0)
    assert close(bound, exact.detach(), 1e-4) and bound < log_p


class Foreign(torch.nn.Module):
    """A denoiser that is not MDM: no attention, no cache but the prompt itself."""

    def __init__(self, mask, L, V, D=32):
        super().__init__()
        self.config = SimpleNamespace(mask=mask)
        self.inside = torch.nn.Sequential(torch.nn.Embedding(mask + 1, D), torch.nn.Flatten(),
                                          torch.nn.Linear(L * D, L * D), torch.nn.Tanh())
        self.tokens = torch.nn.Linear(D, V)
        self.gates = torch.nn.Linear(D, 1)

    def encode_prompt(self, prompt):
        return prompt

    def forward(self, cache, z):
        assert len(z) % len(cache) == 0  # K states in a row for each prompt
        return self.inside(z).view(*z.shape, -1)

    def log_p(self, h):
        return self.tokens(h).log_softmax(-1)

    def gate_logits(self, h, masked, steps_left):
        assert steps_left.shape == (*masked.shape[:-1], 1)
        return self.gates(h).squeeze(-1)


def test_an_order_is_learned_with_a_denoiser_of_ones_own():
    """Two tokens that stand in either order: together they cost 2 log 2, one by one log 2."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=4, prompt_len=1, answer_len=2, n_layer=1, n_head=1, n_embd=8)
    model, q = Foreign(config.mask, L=2, V=4), posterior.OrderPosterior(config)
    optimizer = torch.optim.Adam([*model.parameters(), *q.parameters()], 0.01)
    x0, prompt = torch.tensor([[0, 1], [1, 0]]).repeat(8, 1), torch.zeros(16, 1, dtype=torch.long)
    for _ in range(200):
        s = q(prompt, x0)
        drawn = posterior.draw_orders_and_steps(s, 2, 2, 0.3)
        value, logs = posterior.objective(model, s, prompt, x0, *drawn, 2, 0.3)
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
    assert -0.9 < logs["elbo"].mean() < -0.69
