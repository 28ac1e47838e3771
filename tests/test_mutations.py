"""The proofs can fail: each mutation breaks one line of a copy of a script, made here at run time, and
names a test that must then go red. tests/README.md holds the table in words."""

import types
from pathlib import Path

import pytest
import torch

import model
import posterior
import sample
import test_model
import test_objective
import test_sample
from tables import X0, TableModel, scores

ROOT = Path(__file__).parent.parent
TESTS = {"posterior.py": (posterior, test_objective), "sample.py": (sample, test_sample), "model.py": (model, test_model)}


def mutant(path, old="", new=""):
    """A copy of a file, as a module, with the one occurrence of `old` replaced by `new`."""
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not old or source.count(old) == 1, f"{path} has {source.count(old)} times {old!r}: update the mutation"
    module = types.ModuleType(f"mutant_of_{path}")
    exec(compile(source.replace(old, new), f"<mutant of {path}>", "exec"), module.__dict__)
    return module


def suite_on(path, broken, patch):
    """The test module of a script, with the script and all that was imported from it taken from the broken copy."""
    if path.startswith("tests/"):
        return broken  # the full-trajectory estimator stands in the test file itself
    script, tests = TESTS[path]
    for name, value in list(vars(tests).items()):
        if value is script:
            patch.setattr(tests, name, broken)
        elif name in vars(script) and value is vars(script)[name] and not isinstance(value, types.ModuleType):
            patch.setattr(tests, name, vars(broken)[name])
    return tests


GRADIENT = ("test_one_step_gradient_is_exact_in_expectation", 3, 3, 2)
TRAJECTORY = ("test_trajectory_gradient_is_exact_in_expectation", 3, 3, 2)
RAO_BLACKWELL = ("test_rao_blackwellised_elbo_is_the_elbo", 3, 2)
STEP_KL = ("test_step_kl_is_the_kl_between_the_two_laws_of_the_gates", 3, 2)
GATES = ("test_gates_are_a_law_on_nonempty_sets", None)
LOG_Q = ("test_log_q_matches_the_scalar_definition", 3, 3)
ORDER_LAW = ("test_orders_are_drawn_from_q", 3, 3)
DRAWN = ("test_drawn_orders_and_steps_estimate_the_same_elbo_and_gradient", 3, 3)
ROWS = ("test_a_batch_is_the_mean_of_its_rows",)
FINITE = ("test_gradients_stay_finite", [1e4, -1e4, 0.0])
LEARNED = ("test_learned_samples_follow_eq_1_and_2", 2)
IID = ("test_iid_samples_follow_uniform_reveal_times", 2)

OBJECTIVE = "objective = T * (step_elbo + surrogate).mean()"
BASELINE = "(value - value.mean(1, keepdim=True)) * K / (K - 1)"
LOG_ALPHAS = "F.logsigmoid(gate_logits), F.logsigmoid(-gate_logits)"

MUTATIONS = {
    # what is broken: (file, line, broken line, the test that must go red)
    "score term's sign": ("posterior.py", "advantage * log_q_before(", "-advantage * log_q_before(", GRADIENT),
    "KL's sign": ("posterior.py", "recon - kl_weight * kl ", "recon + kl_weight * kl ", GRADIENT),
    "no score term": ("posterior.py", OBJECTIVE, "objective = T * step_elbo.mean()", GRADIENT),
    "no pathwise term": ("posterior.py", OBJECTIVE, "objective = T * (step_elbo.detach() + surrogate).mean()", GRADIENT),
    "advantage not detached": ("posterior.py", "leave_one_out(step_elbo.detach())", "leave_one_out(step_elbo)", GRADIENT),
    "best score detached": ("posterior.py", ".amax(-1, keepdim=True)   ", ".amax(-1, keepdim=True).detach()   ", GRADIENT),
    "baseline includes its own sample": ("posterior.py", BASELINE, "value - value.mean(1, keepdim=True)", GRADIENT),
    "baseline across examples": ("posterior.py", "value.mean(1, keepdim=True)", "value.mean()", ROWS),
    "sum for mean": ("posterior.py", OBJECTIVE, OBJECTIVE.replace("mean", "sum"), GRADIENT),
    "no factor T": ("posterior.py", OBJECTIVE, OBJECTIVE.replace("T * ", ""), GRADIENT),
    "own step in the score term": ("posterior.py", "(u < t)[:, None]", "(u <= t)[:, None]", LOG_Q),
    "the first row's step for all rows": ("posterior.py", "(u < t)[:, None]", "(u < t[0])", ROWS),
    "KL without its normaliser": ("posterior.py", "kl.sum(-1) + log_some", "kl.sum(-1)", RAO_BLACKWELL),
    "normaliser counts revealed positions": ("posterior.py", "(log_not_alpha * masked).sum(-1)", "log_not_alpha.sum(-1)", ("test_the_last_position_opens_for_certain_and_costs_no_kl",)),
    "KL charged at the last step": ("posterior.py", "masked.any(-1) & ~last.squeeze(-1)", "masked.any(-1)", STEP_KL),
    "alpha and 1 - alpha swapped": ("posterior.py", LOG_ALPHAS, "F.logsigmoid(-gate_logits), F.logsigmoid(gate_logits)", STEP_KL),
    "reconstruction without q": ("posterior.py", "(q * log_p).sum(-1)", "(masked * log_p).sum(-1)", RAO_BLACKWELL),
    "q's last step not forced": ("posterior.py", ".masked_fill(~masked | last, 0.0)", ".masked_fill(~masked, 0.0)", RAO_BLACKWELL),
    "no tau": ("posterior.py", "((s - top) / tau)", "(s - top)", GATES),
    "best of all positions, not of the masked": ("posterior.py", "s.masked_fill(~masked, -torch.inf).amax", "s.amax", GATES),
    "closed gates left out of log q": ("posterior.py", "torch.where(opens, log_q, log_complement(log_q)).sum(-1)", "torch.where(opens, log_q, 0.0).sum(-1)", LOG_Q),
    "state one step late": ("posterior.py", "reveal_step >= t[:, None, None]", "reveal_step > t[:, None, None]", RAO_BLACKWELL),
    "log of 0": ("posterior.py", "log_q.masked_fill(certain, -1.0)", "log_q", FINITE),
    "step T never drawn": ("posterior.py", "% T + 1 ", "% (T - 1) + 1 ", DRAWN),
    "gates drawn from q squared": ("posterior.py", "dtype=s.dtype, generator=generator) < q", "dtype=s.dtype, generator=generator) < q * q", ORDER_LAW),
    "the answer is shown to the denoiser": ("posterior.py", "z = x0_k.masked_fill(masked, model.config.mask)", "z = x0_k", RAO_BLACKWELL),
    "trajectory: score term's sign": ("tests/test_objective.py", "(terms.sum(0) + surrogate)", "(terms.sum(0) - surrogate)", TRAJECTORY),
    "trajectory: advantage not detached": ("tests/test_objective.py", "to_go = terms.detach().flip(0).cumsum(0).flip(0) - terms.detach()", "to_go = terms.flip(0).cumsum(0).flip(0) - terms", TRAJECTORY),
    "trajectory: own step's expectation twice": ("tests/test_objective.py", "- terms.detach()  ", "- terms.detach() + terms  ", TRAJECTORY),
    "trajectory: steps before instead of after": ("tests/test_objective.py", "terms.detach().flip(0).cumsum(0).flip(0)", "terms.detach().cumsum(0)", TRAJECTORY),
    "a gate past the first instead of the first": ("sample.py", "state.u_first)[:, None]  ", "state.u_first)[:, None] + 1  ", LEARNED),
    "first open gate, closed ones not counted": ("sample.py", "log_not.cumsum(-1) - log_not", "0", LEARNED),
    "gates before the first are free": ("sample.py", "(position > first) & (state.u_gate", "(state.u_gate", LEARNED),
    "one noise for gates and tokens": ("sample.py", "u[:, T + 1, :L])", "u[:, t - 1, :L])", LEARNED),
    "sampler's last step not forced": ("sample.py", "if t < T else masked", "if t <= T else masked", LEARNED),
    "iid counts empty steps": ("sample.py", "time == time.amin(-1, keepdim=True)", "time == state.t - 1", IID),
    "stage 1 without 1/t": ("model.py", "(log_p_of(model, h, x0, masked) / t).sum(-1)", "log_p_of(model, h, x0, masked).sum(-1)", ("test_denoiser_elbo_matches_the_exact_sum",)),
    "stage 1 sees the answer": ("model.py", "h = model(prompt, x0.masked_fill(masked, model.config.mask))", "h = model(prompt, x0)", ("test_hidden_tokens_get_no_gradient",)),
    "padding is attended to": ("model.py", "prompt != self.config.pad,", "prompt >= 0,", ("test_padding_the_prompt_changes_nothing",)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_copy_turns_its_proof_red(name, monkeypatch):
    path, old, new, (proof, *arguments) = MUTATIONS[name]
    tests = suite_on(path, mutant(path, old, new), monkeypatch)
    with pytest.raises(AssertionError):
        getattr(tests, proof)(*arguments)


@pytest.mark.parametrize("path", sorted({path for path, *_ in MUTATIONS.values()}))
def test_an_unbroken_copy_stays_green(path, monkeypatch):
    """What turns the proofs red is the mutation, not the copying."""
    tests = suite_on(path, mutant(path), monkeypatch)
    done = []
    for proof in [proof for used_on, _, _, proof in MUTATIONS.values() if used_on == path]:
        if proof not in done:
            getattr(tests, proof[0])(*proof[1:])
            done.append(proof)


def phi_gradient(seed, K, patch, *mutation, L=4, T=2, nats=10):
    """Mean and total variance of the gradient for phi. The model is still bad, as early in training: every
    token of x0 is about 10 nats less likely than the other, whatever the order."""
    table, s = TableModel(L, seed), scores(L, seed)
    with torch.no_grad():
        for i, token in enumerate(X0[L]):
            table.table[:, i, token] -= nats
    with patch.context() as patch:
        tests = suite_on("posterior.py", mutant("posterior.py", *mutation), patch)
        mean, variance = tests.gradient_moments(tests.one_step, table, s, X0[L], T, K, range(1, T + 1))
    return mean[1], variance[1].sum()


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_baseline_costs_no_bias_and_lowers_the_variance(seed, K, monkeypatch):
    """Not a theorem: see tests/README.md for where it fails."""
    mean, variance = phi_gradient(seed, K, monkeypatch)
    plain_mean, plain_variance = phi_gradient(seed, K, monkeypatch, "leave_one_out(step_elbo.detach())", "step_elbo.detach()")
    assert (mean - plain_mean).abs().max() < 1e-10 and variance < 0.7 * plain_variance


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_own_step_in_the_score_term_costs_no_bias_but_adds_variance(seed, monkeypatch):
    """L_t does not depend on the gates of step t, so they would only add noise of mean 0."""
    mean, variance = phi_gradient(seed, 2, monkeypatch, L=3, T=3, nats=0)
    own_mean, own_variance = phi_gradient(seed, 2, monkeypatch, "(u < t)[:, None]", "(u <= t)[:, None]", L=3, T=3, nats=0)
    assert (mean - own_mean).abs().max() < 1e-10 and variance < own_variance
