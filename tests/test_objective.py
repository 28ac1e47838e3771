"""posterior.py against exact sums over all orders (tables.py), in float64, to 1e-10.

The equations are those of posterior.py. test_mutations.py breaks posterior.py in many ways and runs
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
                    log_p_marginal, log_p_tokens, orders, plain_step, possible_orders, q_gates,
                    q_of, q_step, scores)

NO_PROMPT = torch.zeros(1, 0, dtype=torch.long)


def close(a, b, tolerance=1e-10):
    return abs(torch.as_tensor(a - b).item()) < tolerance


def critic(L, T, seed=7):
    """Any numbers in the place of w: Eq. 7 must hold whatever the critic says."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, L, T, T, generator=generator, dtype=torch.float64)


def two_steps(model, s, x0, chosen, t, T, w=None, kl_weight=1.0):
    """What train.py maximises, for one example whose K orders are `chosen`, at steps 1 and t."""
    w = critic(len(x0), T) if w is None else w
    value, logs = posterior.objective(model, s[None], w, NO_PROMPT, torch.tensor([x0]),
                                      torch.tensor([chosen]), torch.tensor([t]), T, TAU, kl_weight)
    return value.sum(), {name: log.squeeze(0) for name, log in logs.items()}


def step_logs(model, s, x0, order, t, T):
    """elbo, recon and kl of step t alone, at the state that it starts from in the order:
    L_1 + (T - 1) L_t less L_1. Where all came out at step 1, step T costs nothing."""
    at, first = (two_steps(model, s, x0, [o, o], step, T)[1]
                 for o, step in ((order, t), ((1,) * len(x0), T)))
    return {name: first[name] if t == 1 else (at[name] - first[name]) / (T - 1)
            for name in ("elbo", "recon", "kl")}


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
    assert close(sum(log_p_joint(model, x0, o, T).exp() for x0 in answers(L) for o in orders(L, T)),
                 1)


def test_log_p_of_is_the_log_probability_of_x0_where_masked():
    model, x0 = TableModel(), torch.tensor([X0[3]])
    masked = torch.tensor([[True, False, True]])
    h = model(None, x0.masked_fill(masked, V))
    expected = model.log_p(h).gather(-1, x0[..., None]).squeeze(-1) * masked
    assert torch.equal(log_p_of(model, h, x0, masked), expected)


# --- Eq. 3: the posterior -------------------------------------------------------------------------

@pytest.mark.parametrize("values", [None, [0.0, 0.0, 0.0], [5.0, 5.0, -3.0], [1e4, -1e4, 0.0]])
def test_gates_are_a_law_on_nonempty_sets(values):
    """At every state: the gates of the scalar definition, sum_r q(r | z) = 1 and q(r = 0 | z) =
    0."""
    s = scores() if values is None else torch.tensor(values, dtype=torch.float64)
    for bits in itertools.product([False, True], repeat=3):
        if left := [i for i in range(3) if bits[i]]:
            log_q = posterior.log_gate_probs(s, torch.tensor(bits), 2, TAU)
            q, not_q = log_q.exp(), torch.where(log_q == 0, 0.0,
                                                posterior.log_complement(log_q).exp())
            order = [1 if bit else 0 for bit in bits]  # revealed before step 1, or masked at step 1
            assert all(close(q[i], expected) and close(not_q[i], 1 - expected)
                       for i, expected in q_gates(s, order, 1, 2).items())
            law = {r: torch.stack([q[i] if opens else not_q[i] for i, opens in zip(left, r)]).prod()
                   for r in itertools.product([False, True], repeat=len(left))}
            assert close(sum(law.values()), 1) and law[(False,) * len(left)] == 0


@pytest.mark.parametrize("L, T", SIZES)
def test_q_sums_to_one_over_orders(L, T):
    assert close(sum(q_of(scores(L), o, T) for o in orders(L, T)), 1)


@pytest.mark.parametrize("L, T", SIZES)
def test_log_q_matches_the_scalar_definition(L, T):
    s = scores(L)
    for o in possible_orders(s, T):
        for t in range(1, T + 1):
            log_q, *_ = posterior.path_before(s[None], critic(L, T), torch.tensor([[o]]),
                                              torch.tensor([t]), T, TAU)
            assert close(log_q, q_of(s, o, T, until=min(t, max(o) + 1)).log())


@pytest.mark.parametrize("L, T", SIZES)
def test_orders_are_drawn_from_q(L, T):
    s, n = scores(L).detach(), 100_000
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
    w = torch.zeros(1, s.shape[1], T, T)
    log_q, *_ = posterior.path_before(s, w, reveal_step, torch.tensor([T]), T, tau)
    gradient, = torch.autograd.grad(log_q.sum() + 0 * s.sum(), s)
    assert log_q.isfinite().all() and (log_q <= 0).all() and gradient.isfinite().all()


def test_no_gate_opens_with_more_than_certainty():
    """In float32 1 - (1 - e) (1 - f) may round to more than 1, whose log_complement is nan."""
    generator = torch.Generator().manual_seed(0)
    for tau in (0.67, 0.2, 0.05):
        s = torch.nn.functional.layer_norm(torch.randn(500, 60, generator=generator), (60,))
        log_q = posterior.log_gate_probs(s, torch.ones_like(s, dtype=torch.bool), 4, tau)
        assert log_q.max() == 0 and posterior.log_complement(log_q).isfinite().all()


def test_every_step_does_its_share():
    """Where neighbours lie ten tau apart, e alone opens one a step and leaves six to the last."""
    s = 0.1 * torch.arange(10.0)[None]
    steps = posterior.sample_orders(s, 200, 5, 0.01, torch.Generator().manual_seed(0))[0]
    shares = torch.stack([(steps == t).sum(-1) for t in range(1, 6)]).float().mean(-1)
    assert ((shares > 1.3) & (shares < 3)).all() and (steps.diff(dim=-1) <= 0).all()


def test_small_tau_follows_the_scores_and_large_tau_reveals_all_at_once():
    s = torch.tensor([[0.3, 2.0, -1.0, 1.0]])
    assert posterior.sample_orders(s, 2, 4, 1e-4)[0, 0].tolist() == [3, 1, 4, 2]
    assert posterior.sample_orders(s, 2, 4, 1e6)[0, 0].tolist() == [1, 1, 1, 1]


# --- Eq. 4: the bound -----------------------------------------------------------------------------

def elbo(model, s, x0, T):
    """Eq. 4: E_q sum_t L_t(z_t), by posterior.py."""
    return sum(q * step_term(model, s, x0, o, t, T) for o, q in possible_orders(s, T).items()
               for t in range(1, T + 1))


@pytest.mark.parametrize("L, T", SIZES)
def test_the_gap_of_the_bound_is_the_kl_to_the_true_posterior(L, T):
    """For every answer: log p(x0) - ELBO = KL(q(order) || p(order | x0)) >= 0."""
    model, s = TableModel(L), scores(L)
    for x0 in answers(L):
        log_p = log_p_marginal(model, x0, T)
        kl = sum(q * (q_of(s, o, T).log() - (log_p_joint(model, x0, o, T) - log_p))
                 for o, q in possible_orders(s, T).items())
        assert close(log_p - elbo(model, s, x0, T), kl) and kl >= -1e-12
        assert T == 1 or kl > 1e-3  # a random posterior is not the true one


@pytest.mark.parametrize("L, T", SIZES)
def test_the_bound_is_tight_at_the_true_posterior(L, T):
    """A table stands in for q: any law over orders. At p(order | x0) every order's term is log
    p(x0)."""
    model = TableModel(L)
    for x0 in answers(L):
        log_p = log_p_marginal(model, x0, T)
        table = {o: (log_p_joint(model, x0, o, T) - log_p).exp() for o in orders(L, T)}
        assert close(sum(table.values()), 1)
        assert close(sum(q * (log_p_joint(model, x0, o, T) - q.log()) for o, q in table.items()),
                     log_p)


def model_that_follows(s, x0, T):
    """A model whose true posterior at x0 is q: its gates are q's, and its tokens do not look at the
    state."""
    model = TableModel(len(s))
    with torch.no_grad():
        model.table[...] = model.table[:1].clone()
        for o in possible_orders(s, T):
            for t in range(1, min(T, max(o) + 1)):
                z = torch.tensor([[token if step < t else V for token, step in zip(x0, o)]])
                for i, q in q_gates(s, o, t, T).items():
                    model.table[model.row(z), i, -1] = q.logit().clamp(
                        max=50
                    )  # 50: alpha = 1 to 1e-21
    return model


@pytest.mark.parametrize("L, T", SIZES)
def test_the_bound_is_tight_where_the_true_posterior_has_the_form_of_eq_3(L, T):
    """The same with posterior.py's own factorised q, for a model made to have it as its
    posterior."""
    s, x0 = scores(L), X0[L]
    model = model_that_follows(s, x0, T)
    assert close(elbo(model, s, x0, T), log_p_marginal(model, x0, T))


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
            following = {
                tuple(step == t for step in b): b
                for b in orders(L, T)
                if all(min(x, t) == min(y, t) for x, y in zip(o, b))
            }
            kl = sum(q * (q.log() - log_p_gates(model, x0, b, t, T)) for b in following.values()
                     if (q := q_step(s, b, t, T)) > 0)
            logs = step_logs(model, s, x0, o, t, T)
            assert close(logs["kl"], kl) and kl >= -1e-12


@pytest.mark.parametrize("L, T", SIZES)
def test_rao_blackwellisation_lowers_the_variance_of_each_step(L, T):
    """L_t is the conditional expectation of the plain term given z_t: same mean, and less variance,
    at every step and for T * L_t at a random step. It need not hold for the sum over t: see the
    next test."""
    model, s, x0 = TableModel(L), scores(L), X0[L]
    law = possible_orders(s, T)

    def variance(values):
        mean = sum(w * v for w, v in values)
        return sum(w * (v - mean) ** 2 for w, v in values).item()

    blackwell = {t: [(q, step_term(model, s, x0, o, t, T)) for o, q in law.items()]
                 for t in range(1, T + 1)}
    plain = {t: [(q, plain_step(model, s, x0, o, t, T).detach()) for o, q in law.items()]
             for t in range(1, T + 1)}
    for t in range(1, T + 1):
        assert close(sum(w * v for w, v in blackwell[t]), sum(w * v for w, v in plain[t]))
        assert (
            variance(blackwell[t]) < variance(plain[t]) - 1e-3 or t == T
        )  # no gates are left to average at T
    both = [variance([(w / T, T * v) for values in terms.values() for w, v in values])
            for terms in (blackwell, plain)]
    assert both[0] < both[1] - 1e-3 or T == 1


def test_at_the_true_posterior_the_plain_sum_is_constant_and_the_rao_blackwellised_is_not():
    """log p(x0, order) - log q(order) = log p(x0) for every order: the plain terms of a path cancel
    each other's noise. sum_t L_t has lost that. What training uses, one step, has nothing to cancel
    with."""
    T = 3
    s, x0 = scores(), X0[3]
    model = model_that_follows(s, x0, T)
    law = possible_orders(s, T)
    plain = [sum(plain_step(model, s, x0, o, t, T) for t in range(1, T + 1)).item() for o in law]
    blackwell = [sum(step_term(model, s, x0, o, t, T) for t in range(1, T + 1)).item() for o in law]
    assert max(plain) - min(plain) < 1e-10 and max(blackwell) - min(blackwell) > 0.1


def terms_by_hand(model, x0, z):
    h = model(None, torch.tensor([z]))[0]
    return [model.log_p(h)[i, x0[i]] for i in range(len(x0))], model.gate_logits(h).sigmoid()


def test_one_step_costs_all_tokens_and_no_gates():
    model, x0 = TableModel(), X0[3]
    log_p, _ = terms_by_hand(model, x0, [V, V, V])
    logs = step_logs(model, scores(), x0, (1, 1, 1), 1, T=1)
    assert close(logs["recon"], sum(log_p)) and logs["kl"] == 0


def test_equal_scores_reveal_everything_at_once():
    """q = 1 everywhere: p pays for opening all its gates, given that one opens."""
    model, x0 = TableModel(), X0[3]
    log_p, alpha = terms_by_hand(model, x0, [V, V, V])
    logs = step_logs(model, torch.zeros(3, dtype=torch.float64), x0, (1, 1, 1), 1, T=2)
    assert close(logs["recon"], sum(log_p)) and close(
        logs["kl"], -(alpha.prod() / (1 - (1 - alpha).prod())).log()
    )
    done = step_logs(model, torch.zeros(3, dtype=torch.float64), x0, (1, 1, 1), 2, T=2)
    assert done["recon"] == 0 and done["kl"] == 0  # nothing is left for step 2


def test_far_scores_reveal_one_position_at_a_time():
    model, x0, order = TableModel(), X0[3], (3, 1, 2)
    s = torch.tensor([-1e3, 1e3, 0.0], dtype=torch.float64)
    log_p, alpha = terms_by_hand(model, x0, [V, V, V])
    logs = step_logs(model, s, x0, order, 1, T=3)
    assert close(logs["recon"], log_p[1])
    assert close(logs["kl"],
                 -(alpha[1] * (1 - alpha[0]) * (1 - alpha[2]) / (1 - (1 - alpha).prod())).log())


def test_the_last_position_opens_for_certain_and_costs_no_kl():
    model, x0 = TableModel(), X0[3]
    log_p, _ = terms_by_hand(model, x0, [x0[0], V, x0[2]])
    logs = step_logs(model, scores(), x0, (1, 2, 1), 2, T=3)
    assert close(logs["recon"], log_p[1]) and close(logs["kl"], 0)


# --- Eq. 7: the gradient --------------------------------------------------------------------------

def trajectory(model, s, x0, chosen, _, T):
    """The full-trajectory estimator, for reference: all T steps of every order, each step's gates
    with the leave-one-out advantage of the steps after it (reward-to-go). It needs T forward passes
    per order, train.py's form one, and one per example; both have the same expectation."""
    reveal_step, x0_k = torch.tensor(chosen), torch.tensor(x0).expand(len(chosen), -1)  # (K, L)
    terms, log_q_step = [], []
    for t in range(1, T + 1):
        masked, opens, last = reveal_step >= t, reveal_step == t, torch.tensor([t == T])
        h = model(None, x0_k.masked_fill(masked, V))
        log_q = posterior.log_gate_probs(s.expand(masked.shape), masked, T - t + 1, TAU)
        recon, kl = posterior.step_terms(log_p_of(model, h, x0_k, masked), model.gate_logits(h),
                                         log_q, masked, last)
        terms.append(recon - kl)  # L_t (K,)
        log_q_step.append(
            torch.where(opens, log_q, posterior.log_complement(log_q)).sum(-1)
        )  # log q(r_t | z_t)
    terms, log_q_step = torch.stack(terms), torch.stack(log_q_step)  # (T, K)
    to_go = terms.detach().flip(0).cumsum(0).flip(0) - terms.detach()  # sum_{t' > t} L_t'
    surrogate = (posterior.leave_one_out(to_go) * log_q_step).sum(0)
    return (terms.sum(0) + surrogate).mean(), None


def gradient_moments(estimator, model, s, x0, T, K, steps):
    """Mean and variance of the estimator's gradient for (theta, phi), summed over all K-tuples of
    orders and all `steps`, each with its probability."""
    law = possible_orders(s, T)
    first, second = [0.0, 0.0], [0.0, 0.0]
    for chosen in itertools.product(law, repeat=K):
        weight = torch.tensor([law[o] for o in chosen], dtype=torch.float64).prod() / len(steps)
        for t in steps:
            gradient = torch.autograd.grad(estimator(model, s, x0, chosen, t, T)[0],
                                           (model.table, s), allow_unused=True,
                                           materialize_grads=True)
            for i, g in enumerate(gradient):
                first[i], second[i] = first[i] + weight * g, second[i] + weight * g ** 2
    return first, [b - a ** 2 for a, b in zip(first, second)]


def assert_gradient_is_exact(estimator, L, T, K, steps):
    model, s, x0 = TableModel(L), scores(L), X0[L]
    exact = torch.autograd.grad(exact_elbo(model, s, x0, T), (model.table, s), allow_unused=True,
                                materialize_grads=True)
    mean, _ = gradient_moments(estimator, model, s, x0, T, K, steps)
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
    assert_gradient_is_exact(trajectory, L, T, K, [None])


def test_leave_one_out_is_value_minus_mean_of_the_others():
    value = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.stack([value[:, k] - value[:, [j for j in range(4) if j != k]].mean(1)
                            for k in range(4)], 1)
    assert torch.allclose(posterior.leave_one_out(value), expected, atol=1e-12)


def test_a_row_of_a_batch_is_what_it_is_alone():
    """Different answers, scores, orders and steps side by side: no row's baseline, path or critic
    touches another."""
    T, model, w = 3, TableModel(), torch.cat([critic(3, 3, seed) for seed in range(3)])
    rows = [(scores(seed=1), (1, 0, 1), [(1, 2, 3), (1, 1, 2)], 2),
            (scores(seed=2), (0, 0, 1), [(2, 1, 1), (1, 1, 1)], 2),
            (scores(seed=3), (1, 1, 0), [(3, 2, 1), (2, 1, 2)], 3)]
    s, x0, chosen, t = zip(*rows)
    together, logs = posterior.objective(model, torch.stack(s), w, NO_PROMPT.expand(3, 0),
                                         torch.tensor(x0), torch.tensor(chosen), torch.tensor(t),
                                         T, TAU)
    alone = [two_steps(model, *row, T, w[i : i + 1]) for i, row in enumerate(rows)]
    for i, (value, one) in enumerate(alone):
        assert close(together[i], value) and all(close(logs[name][i], one[name]) for name in one)
    total = sum(value for value, _ in alone)
    for a, b in zip(torch.autograd.grad(together.sum(), (model.table, *s)),
                    torch.autograd.grad(total, (model.table, *s))):
        assert (a - b).abs().max() < 1e-12


def weighted_elbo(model, s, x0, T, kl_weight):
    """E_q sum_t recon_t - kl_weight KL_t, gate by gate."""
    total = 0.0
    for o in possible_orders(s, T):
        tokens = sum(log_p_tokens(model, x0, o, t) for t in range(1, max(o) + 1))
        gates = q_of(s, o, T).log() - sum(log_p_gates(model, x0, o, t, T)
                                          for t in range(1, max(o) + 1))
        total = total + q_of(s, o, T) * (tokens - kl_weight * gates)
    return total


@pytest.mark.parametrize("L, T", [(3, 3), (4, 2)])
def test_kl_weight_spares_q_only(L, T):
    """In expectation, advantage included: theta's gradient is that of the whole bound, phi's that
    of recon - kl_weight KL. The logged bound has no weight."""
    model, s, x0 = TableModel(L), scores(L), X0[L]
    def estimator(*args):
        return two_steps(*args, kl_weight=0.3)
    (theta, phi), _ = gradient_moments(estimator, model, s, x0, T, 2, later_steps(T))
    exact, = torch.autograd.grad(exact_elbo(model, s, x0, T), model.table)
    weighted, = torch.autograd.grad(weighted_elbo(model, s, x0, T, 0.3), s)
    assert (theta - exact).abs().max() < 1e-10 and (phi - weighted).abs().max() < 1e-10
    order = [next(iter(possible_orders(s, T)))] * 2
    assert all(close(a, b) for (name, a), b in zip(estimator(model, s, x0, order, 2, T)[1].items(),
                                                   two_steps(model, s, x0, order, 2, T)[1].values())
               if name not in ("spread", "error"))


@pytest.mark.parametrize("L, T", [(3, 3), (4, 2)])
def test_drawn_orders_and_steps_estimate_the_same_elbo_and_gradient(L, T):
    """draw_orders_and_steps and objective, two different answers and a batch that is no multiple of
    T - 1: within 4 standard errors over 100 batches."""
    model, s, generator, batches = TableModel(L), scores(L), torch.Generator().manual_seed(0), []
    other, B = tuple(1 - token for token in X0[L]), 501
    x0 = torch.tensor([X0[L]] * 251 + [other] * 250)
    share = {X0[L]: 251 / 501, other: 250 / 501}
    for _ in range(100):
        drawn = posterior.draw_orders_and_steps(s.expand(B, -1), 4, T, TAU, generator)
        value, logs = posterior.objective(model, s.expand(B, -1),
                                          critic(L, T).expand(B, -1, -1, -1),
                                          NO_PROMPT.expand(B, 0), x0, *drawn, T, TAU)
        gradient = torch.autograd.grad(value.mean(), (model.table, s))
        batches.append(torch.cat([logs["elbo"].mean()[None], *(g.flatten() for g in gradient)]))
    batches = torch.stack(batches)
    exact = sum(share[x] * exact_elbo(model, s, x, T) for x in share)
    exact = torch.cat([exact[None].detach(),
                       *(g.flatten() for g in torch.autograd.grad(exact, (model.table, s)))])
    error, standard = (batches.mean(0) - exact).abs(), batches.std(0) / len(batches) ** 0.5
    assert (error <= 4 * standard + 1e-12).all()
    assert standard[0] < 0.01 * exact[0].abs()  # the test has power


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_each_later_step_is_drawn_equally_often_by_every_row(T):
    s, generator = torch.zeros(4, 2), torch.Generator().manual_seed(0)
    t = torch.stack([posterior.draw_orders_and_steps(s, 2, T, 1.0, generator)[1]
                     for _ in range(4000)])
    later = max(T - 1, 1)
    counts = torch.stack([(t == min(step, T)).sum(0) for step in range(2, 2 + later)]) / 4000
    assert (counts.sum(0) - 1).abs().max() < 1e-5 and (counts - 1 / later).abs().max() < 0.04
    assert T < 3 or (t[:, 0] != t[:, 1]).all()  # stratified: rows in a row see different steps


def test_the_logs_are_those_of_the_orders():
    """q_entropy in nats per step, by hand, at two orders of different lengths."""
    T, model, s, x0 = 3, TableModel(), scores(), X0[3]
    first, second, *_ = sorted(possible_orders(s, T), key=max)
    first, second = first, next(o for o in possible_orders(s, T) if max(o) == 3)
    def entropy(order, t):
        gates = (torch.stack([*q_gates(s, order, t, T).values()]) if max(order) >= t
                 else torch.ones(1))
        xlogy = torch.special.xlogy
        return -(xlogy(gates, gates) + xlogy(1 - gates, 1 - gates)).sum()
    logs = two_steps(model, s, x0, [first, second], 2, T)[1]
    later = sum(entropy(o, 2) for o in (first, second)) / 2
    assert close(logs["q_entropy"], (entropy(first, 1) + (T - 1) * later) / T)


# --- Eq. 8: the critic ----------------------------------------------------------------------------

def model_where_a_gate_matters():
    """Token 0 is certain once position 2 is known, and worth 6 nats less before."""
    model = TableModel()
    with torch.no_grad():
        for z in itertools.product(range(V + 1), repeat=3):
            if z[2] == V:
                model.table[model.row(torch.tensor(z)), 0, X0[3][0]] -= 6
    return model


def test_a_fitted_critic_lowers_the_variance_and_moves_no_mean():
    """w by gradient ascent on the objective, over all pairs of orders: nothing but Eq. 8 moves
    it."""
    T, model, s, x0 = 3, model_where_a_gate_matters(), scores(), X0[3]
    law = possible_orders(s, T)
    w = torch.zeros(1, 3, T, T, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.7)
    for _ in range(20):
        loss = -sum(law[a] * law[b] * two_steps(model, s, x0, [a, b], t, T, w)[0]
                    for a in law for b in law for t in later_steps(T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moments = {}
    for name, numbers in (("none", torch.zeros_like(w)), ("fitted", w.detach())):
        def estimator(*args):
            return two_steps(*args, w=numbers)
        mean, variance = gradient_moments(estimator, model, s, x0, T, 2, later_steps(T))
        moments[name] = mean[1], variance[1].sum()
    assert (moments["none"][0] - moments["fitted"][0]).abs().max() < 1e-10
    assert moments["fitted"][1] < 0.5 * moments["none"][1]


def test_w_moves_by_its_squared_error_alone_and_moves_nothing_else():
    T, model, s, x0, chosen = 3, TableModel(), scores(), X0[3], [(1, 2, 3), (2, 1, 1)]
    w = critic(3, T).requires_grad_()
    value, logs = two_steps(model, s, x0, chosen, 3, T, w)
    theta, by_w = torch.autograd.grad(value, (model.table, w))
    without, = torch.autograd.grad(two_steps(model, s, x0, chosen, 3, T, 0 * w)[0], model.table)
    assert torch.equal(theta, without)  # p's gradient knows no critic
    _, b, _ = posterior.path_before(s[None], w, torch.tensor([chosen]), torch.tensor([3]), T, TAU)
    terms = torch.stack([step_term(model, s, x0, o, 3, T) for o in chosen]).detach()
    gap = (terms[0] - b[0, 0]) - (terms[1] - b[0, 1])  # leave-one-out of two: plus and minus this
    assert close(logs["error"], gap.detach() ** 2)
    assert close(logs["spread"], (terms[0] - terms[1]) ** 2)
    expected, = torch.autograd.grad(-gap**2, w)
    assert (by_w - expected).abs().max() < 1e-10 and by_w.abs().max() > 1e-3


# --- numerics -------------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [5.0, 5.0, -3.0]])
def test_gradients_stay_finite(values):
    """Ties, extreme scores, one position left, nothing left; float32."""
    model = TableModel().float()
    s = torch.tensor(values, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    reveal_step = torch.cat([posterior.sample_orders(s[None], 4, 3, 0.1, generator),
                             torch.ones(1, 1, 3, dtype=torch.long)], 1)
    for t in (2, 3):
        value, _ = posterior.objective(model, s[None], torch.ones(1, 3, 3, 3), NO_PROMPT,
                                       torch.tensor([X0[3]]), reveal_step, torch.tensor([t]), 3,
                                       0.1)
        theta, phi = torch.autograd.grad(value.sum(), (model.table, s))
        assert value.isfinite() and theta.isfinite().all() and phi.isfinite().all()


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_gradients_stay_finite_under_bfloat16_autocast(spread):
    """The real networks, from nearly equal to extreme scores and gates. Scores and
    log-probabilities leave autocast in float32: in bfloat16, scores that differ by less than 1 %
    would tie."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, prompt_len=6, answer_len=8, n_layer=2, n_head=2, n_embd=16)
    model, order_posterior = MDM(config), posterior.OrderPosterior(config, T=4)
    parameters = [*model.parameters(), *order_posterior.parameters()]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        order_posterior.score_head.weight *= spread
        model.gate_head.weight *= spread
    prompt, x0 = torch.randint(9, (6, 4)), torch.randint(9, (6, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s, w = order_posterior(prompt, x0)
        drawn = posterior.draw_orders_and_steps(s, 4, 4, 0.1, torch.Generator().manual_seed(0))
        value, _ = posterior.objective(model, s, w, prompt, x0, *drawn, 4, 0.1)
    gradients = torch.autograd.grad(value.sum(), parameters)
    assert s.dtype == w.dtype == value.dtype == torch.float32
    assert len(s.unique()) > 0.9 * s.numel() and value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("T", [2, 3])
def test_the_real_networks_bound_what_they_can_write(T):
    """MDM and OrderPosterior themselves, an answer with EOS and PAD in it, every order summed: the
    bound is charged for all tokens, and stays below the likelihood of the sampler's law."""
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=5, prompt_len=3, answer_len=3, n_layer=1, n_head=1, n_embd=8)
    model, q = MDM(config).double(), posterior.OrderPosterior(config, T).double()
    for p in [*model.parameters(), *q.parameters()]:
        torch.nn.init.normal_(p, std=0.4)
    prompt, x0 = torch.tensor([[1, 0]]), (2, config.eos, config.pad)
    s, w = q(prompt, torch.tensor([x0]))
    s = s.detach().double()[0]
    law, exact, log_p = possible_orders(s, T), 0.0, []
    for o in orders(3, T):
        joint = 0.0
        for t in range(1, max(o) + 1):
            z = torch.tensor([[x if step < t else config.mask for x, step in zip(x0, o)]])
            h = model(model.read(prompt), z)[0]
            left = [i for i, step in enumerate(o) if step >= t]
            alpha = model.gate_logits(h).sigmoid()
            joint += sum(model.log_p(h)[i, x0[i]] for i in left if o[i] == t)
            if t < T:
                joint += sum((alpha[i] if o[i] == t else 1 - alpha[i]).log() for i in left)
                joint -= (1 - torch.stack([1 - alpha[i] for i in left]).prod()).log()
        log_p.append(joint)
        if o in law:
            exact += law[o] * (joint - q_of(s, o, T).log())
    bound = sum(law[o] * posterior.objective(model, s[None], w.double(), prompt, torch.tensor([x0]),
                                             torch.tensor([[o, o]]), torch.tensor([t]), T,
                                             TAU)[1]["elbo"] for o in law
                for t in later_steps(T)) / len(later_steps(T))
    assert close(bound, exact.detach(), 1e-5) and bound < torch.logsumexp(torch.stack(log_p), 0)


class Foreign(torch.nn.Module):
    """A denoiser that is not MDM: no attention, no cache but the prompt itself."""

    def __init__(self, mask, L, V, D=32):
        super().__init__()
        self.config = SimpleNamespace(mask=mask)
        self.inside = torch.nn.Sequential(torch.nn.Embedding(mask + 1, D), torch.nn.Flatten(),
                                          torch.nn.Linear(L * D, L * D), torch.nn.Tanh())
        self.tokens, self.gates = torch.nn.Linear(D, V), torch.nn.Linear(D, 1)

    def read(self, prompt):
        return prompt

    def forward(self, cache, z):
        assert len(z) % len(cache) == 0  # K states in a row for each prompt
        return self.inside(z).view(*z.shape, -1)

    def log_p(self, h):
        return self.tokens(h).log_softmax(-1)

    def gate_logits(self, h):
        return self.gates(h).squeeze(-1)


def test_an_order_is_learned_with_a_denoiser_of_ones_own():
    """Two tokens that stand in either order: together they cost 2 log 2, one by one log 2."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=4, prompt_len=1, answer_len=2, n_layer=1, n_head=1, n_embd=8)
    model, q = Foreign(config.mask, L=2, V=4), posterior.OrderPosterior(config, T=2)
    optimizer = torch.optim.Adam([*model.parameters(), *q.parameters()], 0.01)
    x0, prompt = torch.tensor([[0, 1], [1, 0]]).repeat(8, 1), torch.zeros(16, 1, dtype=torch.long)
    for _ in range(200):
        s, w = q(prompt, x0)
        value, logs = posterior.objective(model, s, w, prompt, x0,
                                          *posterior.draw_orders_and_steps(s, 2, 2, 0.3), 2, 0.3)
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
    assert -0.9 < logs["elbo"].mean() < -0.69
