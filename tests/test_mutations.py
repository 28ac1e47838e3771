"""The proofs can fail: each mutation breaks one line of a copy of a script, made here at run time,
and names a test that must then go red. tests/README.md holds the table in words."""

import inspect
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
# each script, and the modules that its proofs go through
USERS = {"posterior.py": (posterior, test_objective), "model.py": (model, test_model),
         "sample.py": (sample, test_sample)}


def mutant(path, old="", new=""):
    """A copy of a file, as a module, with the one occurrence of `old` replaced by `new`."""
    source = (ROOT / path).read_text(encoding="utf-8")
    times = source.count(old)
    assert not old or times == 1, f"{path} has {times} times {old!r}: update the mutation"
    module = types.ModuleType(f"mutant_of_{path}")
    exec(compile(source.replace(old, new), f"<mutant of {path}>", "exec"), module.__dict__)
    return module


def suite_on(path, broken, patch):
    """The proofs for a script, with all that was imported from it taken from the broken copy."""
    if path.startswith("tests/"):
        return broken  # the full-trajectory estimator stands in the test file itself
    script, *users = USERS[path]
    for user in users:
        for name, value in list(vars(user).items()):
            if value is script:
                patch.setattr(user, name, broken)
            elif value is vars(script).get(name) and not isinstance(value, types.ModuleType):
                patch.setattr(user, name, vars(broken)[name])
    return types.SimpleNamespace(**{k: v for user in users for k, v in vars(user).items()})


GRADIENT = ("test_gradient_is_exact_in_expectation", 3, 3, 2)
TRAJECTORY = ("test_trajectory_gradient_is_exact_in_expectation", 3, 3, 2)
RAO_BLACKWELL = ("test_rao_blackwellised_elbo_is_the_elbo", 3, 2)
STEP_KL = ("test_step_kl_is_the_kl_between_the_two_laws_of_the_gates", 3, 2)
GATES = ("test_gates_are_a_law_on_nonempty_sets", None)
LOG_Q = ("test_log_q_matches_the_scalar_definition", 3, 3)
ORDER_LAW = ("test_orders_are_drawn_from_q", 3, 3)
DRAWN = ("test_drawn_orders_and_steps_estimate_the_same_elbo_and_gradient", 3, 3)
STEPS = ("test_each_later_step_is_drawn_equally_often_by_every_row", 3)
ROWS = ("test_a_row_of_a_batch_is_what_it_is_alone",)
FINITE = ("test_gradients_stay_finite", [1e4, -1e4, 0.0])
KL_WEIGHT = ("test_kl_weight_spares_q_only", 3, 3)
LOGS = ("test_the_logs_are_those_of_the_orders",)
FITTED = ("test_a_fitted_critic_lowers_the_variance_and_moves_no_mean",)
W = ("test_w_moves_by_its_squared_error_alone_and_moves_nothing_else",)
PADDING = ("test_padding_changes_nothing",)
STAGE_1 = ("test_stage_1_is_unbiased_where_eos_and_pad_are_part_of_the_answer", (0, 2, 3))
LAW = "test_samples_follow_the_law_of_the_order_and_of_the_tokens"
LEARNED = (LAW, "learned", test_sample.law_of_learned, 2)
IID = (LAW, "iid", test_sample.law_of_iid, 2)
REPLAY = ("test_every_step_is_the_order_s_choice_at_the_model_s_state", "confidence")
FORCED = ("test_forced_log_p_is_the_likelihood_of_the_sampler", "confidence")
RARE = ("test_draw_reaches_tokens_rarer_than_float32_can_add_up", 1)


def rule(name, flags=""):
    return ("test_every_order_reveals_what_its_definition_says", name, flags)


RETURN = "return all_steps(step_elbo) + (T - 1) * surrogate.mean(1) - error.mean(1), logs"
BASELINE = "(value - value.mean(1, keepdim=True)) * K / (K - 1)"
LOG_ALPHAS = "F.logsigmoid(gate_logits), F.logsigmoid(-gate_logits)"
GATES_LINE = "    gates = gates.detach() + (gates - gates.detach()) / kl_weight\n"
LEVELS = "u = ((torch.arange(B, device=x0.device) + first) % B + u) / B"
SURROGATE = "surrogate = advantage.detach() * log_q_path + worth"

MUTATIONS = {
    # what is broken: (file, line, broken line, the test that must go red)
    "REINFORCE's sign": ("posterior.py", "surrogate = advantage.detach()",
                          "surrogate = -advantage.detach()", GRADIENT),
    "KL's sign": ("posterior.py", "recon - kl_weight * kl ", "recon + kl_weight * kl ", GRADIENT),
    "gates learn at the KL's weight": ("posterior.py", GATES_LINE, "", KL_WEIGHT),
    "the KL at full weight": ("posterior.py", "recon - kl_weight * kl ", "recon - kl ", KL_WEIGHT),
    "the advantage at full weight": (
        "posterior.py", "value = step_elbo[:, 1:].detach() ",
        "value = (recon - kl)[:, 1:].detach() ", KL_WEIGHT),
    "the logged bound is weighted": ("posterior.py", '"elbo": all_steps(recon - kl)',
                                     '"elbo": all_steps(step_elbo)', KL_WEIGHT),
    "no REINFORCE": ("posterior.py", RETURN, "return all_steps(step_elbo), logs", GRADIENT),
    "no pathwise term": ("posterior.py", "return all_steps(step_elbo) ",
                         "return all_steps(step_elbo.detach()) ", GRADIENT),
    "advantage not detached": ("posterior.py", "value = step_elbo[:, 1:].detach()",
                               "value = step_elbo[:, 1:]", GRADIENT),
    "best score detached": ("posterior.py", "s - ranked[..., :1])", "s - ranked[..., :1].detach())",
                            GRADIENT),
    "n-th score detached": ("posterior.py", "(s - fair)", "(s - fair.detach())", GRADIENT),
    "baseline includes its own sample": ("posterior.py", BASELINE,
                                         "value - value.mean(1, keepdim=True)", GRADIENT),
    "baseline across examples": ("posterior.py", "value.mean(1, keepdim=True)", "value.mean()",
                                 ROWS),
    "sum for mean": ("posterior.py", RETURN, RETURN.replace("surrogate.mean", "surrogate.sum"),
                     GRADIENT),
    "REINFORCE of one step": ("posterior.py", RETURN, RETURN.replace("(T - 1) * ", ""), GRADIENT),
    "terms of one step": ("posterior.py", "term[:, 0] + (T - 1) * term", "term[:, 0] + term",
                          GRADIENT),
    "step 1 counted with the others": ("posterior.py", "term[:, 0] + (T - 1) * term",
                                       "term[:, 0] + T * term", GRADIENT),
    "own step in REINFORCE": ("posterior.py", "earlier = (u < t)[:, None, None]",
                                   "earlier = (u <= t)[:, None, None]", LOG_Q),
    "the first row's step for all rows": ("posterior.py", "earlier = (u < t)[:, None, None]",
                                          "earlier = (u < t[:1])[:, None, None]", ROWS),
    "critic of q instead of r - q": ("posterior.py", "(opens.to(q.dtype) - q.detach())",
                                     "q.detach()", FITTED),
    "critic of r instead of r - q": ("posterior.py", "(opens.to(q.dtype) - q.detach())",
                                     "opens.to(q.dtype)", GRADIENT),
    "critic's q learns": ("posterior.py", "(opens.to(q.dtype) - q.detach())",
                          "(opens.to(q.dtype) - q)",
                          GRADIENT),
    "no closed form for the critic": ("posterior.py", SURROGATE,
                                      SURROGATE.replace(" + worth", ""), GRADIENT),
    "the critic's closed form of another step": (
        "posterior.py", "worth + (w_ut.detach() * q)",
        "worth + (w[torch.arange(len(t)), :, 0, t - 1][:, None].detach() * q)", GRADIENT),
    "the critic stays in REINFORCE": ("posterior.py", "advantage = leave_one_out(value - b)",
                                           "advantage = leave_one_out(value)", GRADIENT),
    "another t for the critic": ("posterior.py", "w[torch.arange(len(t)), :, u - 1, t - 1]",
                                 "w[torch.arange(len(t)), :, u - 1, t[:1] - 1]", ROWS),
    "w moves by the surrogate": ("posterior.py", "worth + (w_ut.detach() * q)",
                                 "worth + (w_ut * q)", W),
    "w moves by REINFORCE": ("posterior.py", "surrogate = advantage.detach()",
                                  "surrogate = advantage", W),
    "w is not fitted": ("posterior.py", RETURN, RETURN.replace("- error", "- 0 * error"), W),
    "w is fitted to grow the error": ("posterior.py", RETURN,
                                      RETURN.replace("- error", "+ error"), W),
    "KL without its normaliser": ("posterior.py", "kl.sum(-1) + log_some", "kl.sum(-1)",
                                  RAO_BLACKWELL),
    "normaliser counts revealed positions": (
        "posterior.py", "(log_not_alpha * masked).sum(-1)", "log_not_alpha.sum(-1)",
        ("test_the_last_position_opens_for_certain_and_costs_no_kl",)),
    "KL charged at the last step": ("posterior.py", "masked.any(-1) & ~last.squeeze(-1)",
                                    "masked.any(-1)", STEP_KL),
    "alpha and 1 - alpha swapped": ("posterior.py", LOG_ALPHAS,
                                    "F.logsigmoid(-gate_logits), F.logsigmoid(gate_logits)",
                                    STEP_KL),
    "reconstruction without q": ("posterior.py", "(q * log_p).sum(-1)",
                                 "(masked * log_p).sum(-1)", RAO_BLACKWELL),
    "q's last step not forced": ("posterior.py", "settled = ~masked | (left == 1)",
                                 "settled = ~masked", RAO_BLACKWELL),
    "no tau": ("posterior.py", "((s - ranked[..., :1]) / tau)", "(s - ranked[..., :1])", GATES),
    "no tau in the share": ("posterior.py", "((s - fair) / tau)", "(s - fair)", GATES),
    "best of all positions": ("posterior.py", "s.masked_fill(~masked, -torch.inf).sort", "s.sort",
                              GATES),
    "no share": ("posterior.py", "log_q = torch.logaddexp(log_e, log_complement(log_e) + log_f)",
                 "log_q = log_e", GATES),
    "the share alone": ("posterior.py", "torch.logaddexp(log_e, log_complement(log_e) + log_f)",
                        "log_f", GATES),
    "log q above 0": ("posterior.py", "log_q.clamp(max=0).masked_fill", "log_q.masked_fill",
                      ("test_no_gate_opens_with_more_than_certainty",)),
    "half at every step": ("posterior.py", "keepdim=True) // left)", "keepdim=True) // 2)", LOG_Q),
    "share rounded down": ("posterior.py", "-(-masked.sum(-1, keepdim=True) // left)",
                           "masked.sum(-1, keepdim=True) // left", GATES),
    "closed gates left out of log q": ("posterior.py",
                                       "torch.where(opens, log_q, log_complement(log_q)).sum(-1)",
                                       "torch.where(opens, log_q, 0.0).sum(-1)", LOG_Q),
    "state one step late": ("posterior.py", ">= step[..., None]", "> step[..., None]",
                            RAO_BLACKWELL),
    "log of 0": ("posterior.py", "log_q.masked_fill(certain, -1.0)", "log_q", FINITE),
    "step T never drawn": ("posterior.py", "+ first) % later\n", "+ first) % max(later - 1, 1)\n",
                           STEPS),
    "steps without a random first": ("posterior.py", "+ first) % later\n", "+ 0) % later\n", STEPS),
    "the same step for all rows": ("posterior.py",
                                   "(torch.arange(len(s), device=s.device) + first)",
                                   "(0 * torch.arange(len(s), device=s.device) + first)", STEPS),
    "gates drawn from q squared": ("posterior.py", "dtype=s.dtype, generator=generator) < q",
                                   "dtype=s.dtype, generator=generator) < q * q", ORDER_LAW),
    "EOS and PAD are free": (
        "posterior.py", "step_terms(log_p_of(model, h, x0, masked)",
        "step_terms(log_p_of(model, h, x0, masked & (x0 < model.config.vocab_size - 2))",
        ("test_the_real_networks_bound_what_they_can_write", 2)),
    "the answer is shown to the denoiser": ("posterior.py",
                                            "z = x0.masked_fill(masked, model.config.mask)",
                                            "z = x0", RAO_BLACKWELL),
    "q_entropy without closed gates": ("posterior.py",
                                       "(q * log_q + not_q * log_complement(log_q))",
                                       "(q * log_q)", LOGS),
    "trajectory: REINFORCE's sign": ("tests/test_objective.py", "(terms.sum(0) + surrogate)",
                                      "(terms.sum(0) - surrogate)", TRAJECTORY),
    "trajectory: advantage not detached": (
        "tests/test_objective.py",
        "to_go = terms.detach().flip(0).cumsum(0).flip(0) - terms.detach()",
        "to_go = terms.flip(0).cumsum(0).flip(0) - terms", TRAJECTORY),
    "trajectory: steps before instead of after": (
        "tests/test_objective.py", "terms.detach().flip(0).cumsum(0).flip(0)",
        "terms.detach().cumsum(0)", TRAJECTORY),
    "a gate past the first": ("sample.py", "state.u[:, -1])[:, None]  ",
                              "state.u[:, -1])[:, None] + 1  ", LEARNED),
    "first open gate, closed ones not counted": ("sample.py", "log_not.cumsum(-1) - log_not", "0",
                                                 LEARNED),
    "gates before the first are free": ("sample.py", "(position > first) & (state.u[",
                                        "(state.u[", LEARNED),
    "a gate at the knob opens": ("sample.py", "logits.sigmoid() > state.knob[0]",
                                 "logits.sigmoid() >= state.knob[0]",
                                 ("test_what_equals_the_knob", "learned:0.5", [3])),
    "fewer gates than an even share": ("sample.py", "| even_share(logits, state)",
                                       "| top_k(logits, state.masked, 1)", rule("learned")),
    "iid counts empty steps": ("sample.py", "time == time.amin(-1, keepdim=True)",
                               "time == state.t - 1", IID),
    "the batch's mean count": ("sample.py", "state.masked.sum(-1, keepdim=True) //",
                               "state.masked.sum(-1, keepdim=True).float().mean().long() //",
                               rule("confidence")),
    "equals in any order": ("sample.py", ".argsort(dim=-1, descending=True, stable=True)",
                            ".topk(score.shape[-1], dim=-1).indices",
                            ("test_equals_are_taken_from_the_left", "confidence", 4)),
    "an even share rounded down": ("sample.py", "-(-state.masked.sum(-1, keepdim=True) //",
                                   "(state.masked.sum(-1, keepdim=True) //", rule("confidence")),
    "a share of one step too many": ("sample.py", "(state.T - state.t + 1)",
                                     "(state.T - state.t + 2)", rule("confidence")),
    "margin without the second": ("sample.py", "even_share(best[..., 0] - best[..., 1]",
                                  "even_share(best[..., 0]", rule("margin")),
    "entropy's sign": ("sample.py", "even_share(-entropy_of(state)", "even_share(entropy_of(state)",
                       rule("entropy")),
    "dilated in even shares": ("sample.py", "(t**knob for t", "(t for t", rule("dilated")),
    "threshold without the best": ("sample.py",
                                   " | top_k(score, state.masked, 1)\n", "\n",
                                   rule("threshold")),
    "threshold not to be reached": ("sample.py", "score.exp() >= state.knob[0]",
                                    "score.exp() > state.knob[0]",
                                    ("test_what_equals_the_knob", "threshold:1", [0, 1])),
    "entropy_bound without the max": ("sample.py", "rising.cumsum(-1) - rising <=",
                                      "rising.cumsum(-1) <=", rule("entropy_bound")),
    "eos_last dropped": ("sample.py", "if self.eos_last:", "if False:",
                         rule("confidence", "+eos_last")),
    "eos_last lets PAD through": ("sample.py", "< state.log_p.shape[-1] - 2)",
                                  "!= state.log_p.shape[-1] - 2)", rule("confidence", "+eos_last")),
    "draw in float32": ("sample.py", "log_p.to(precise(log_p.device)).exp()",
                        "log_p.float().exp()", RARE),
    "one noise for gates and tokens": ("sample.py", "u[:, T + 1, :L])", "u[:, t - 1, :L])",
                                       LEARNED),
    "sampler's last step not forced": ("sample.py", "if t < T else masked", "if t <= T else masked",
                                       LEARNED),
    "noise of the rows that were there before": (
        "sample.py", "noise[rows]", "noise[: len(rows)]",
        ("test_any_budget_gives_finished_answers_and_a_row_does_not_depend_on_its_batch",
         "iid", 0.0)),
    "likelihood of every step's masks": ("sample.py", ".squeeze(-1) * reveal).sum(-1)",
                                         ".squeeze(-1) * masked).sum(-1)", FORCED),
    "rows that are done stay": ("sample.py", "(masked & ~reveal).any(-1)", "masked.any(-1)",
                                (REPLAY[0], "threshold:0.5")),
    "order told the next step": ("sample.py", "masked=masked, t=t, T=T",
                                 "masked=masked, t=t + 1, T=T", REPLAY),
    "tokens of every position written": ("sample.py", "torch.where(reveal, tokens, z[rows])",
                                         "torch.where(masked, tokens, z[rows])", REPLAY),
    "stage 1 without 1/m": ("model.py", "(log_p_of(model, h, x0, masked) / m).sum(-1)",
                            "log_p_of(model, h, x0, masked).sum(-1)", STAGE_1),
    "stage 1 spares PAD": ("model.py", "(log_p_of(model, h, x0, masked) / m).sum(-1)",
                           "(log_p_of(model, h, x0, masked & (x0 < model.config.pad)) / m).sum(-1)",
                           STAGE_1),
    "stage 1's eps": ("model.py", "eps: float = 1e-3", "eps: float = 0.03",
                    ("test_levels_reach_down_to_a_thousandth",)),
    "levels from a fixed first": ("model.py", LEVELS, LEVELS.replace(" + first", ""),
                                  ("test_levels_are_stratified_and_each_row_alone_is_uniform",)),
    "stage 1 sees the answer": ("model.py", "x0.masked_fill(masked, model.config.mask))", "x0)",
                                ("test_stage_1_does_not_show_what_it_asks_for",)),
    "padding is attended to": ("model.py", "real, kvs = prompt != self.config.pad, []",
                               "real, kvs = prompt >= 0, []", PADDING),
    "the answer does not see the prompt": (
        "model.py", "kv = torch.cat([kv, block", "kv = torch.cat([0 * kv, block",
        ("test_the_prompt_is_read_without_the_answer_and_the_answer_with_all_of_the_prompt",)),
    "another order's prompt": ("model.py", "part.repeat_interleave(K, 0)",
                               "part.repeat(K, *[1] * (part.ndim - 1))",
                               ("test_answers_of_one_prompt_stand_together",)),
}


def prove(tests, name, arguments, monkeypatch):
    proof = getattr(tests, name)
    proof(*arguments, *[monkeypatch] * ("monkeypatch" in inspect.signature(proof).parameters))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_copy_turns_its_proof_red(name, monkeypatch):
    path, old, new, (proof, *arguments) = MUTATIONS[name]
    tests = suite_on(path, mutant(path, old, new), monkeypatch)
    with pytest.raises(AssertionError):
        prove(tests, proof, arguments, monkeypatch)


@pytest.mark.parametrize("path", sorted({path for path, *_ in MUTATIONS.values()}))
def test_an_unbroken_copy_stays_green(path, monkeypatch):
    """What turns the proofs red is the mutation, not the copying."""
    tests = suite_on(path, mutant(path), monkeypatch)
    for name, *arguments in {proof[0]: proof for used_on, _, _, proof in MUTATIONS.values()
                             if used_on == path}.values():
        with monkeypatch.context() as patch:
            prove(tests, name, arguments, patch)


def phi_gradient(seed, K, patch, *mutation, L=4, T=2, nats=10):
    """Mean and total variance of the gradient for phi. The model is still bad, as early in
    training: every token of x0 is some 10 nats less likely than the other, whatever the order."""
    table, s = TableModel(L, seed), scores(L, seed)
    with torch.no_grad():
        for i, token in enumerate(X0[L]):
            table.table[:, i, token] -= nats
    with patch.context() as patch:
        tests = suite_on("posterior.py", mutant("posterior.py", *mutation), patch)
        no_critic = torch.zeros(1, L, T, T, dtype=torch.float64)
        def estimator(*args):
            return tests.two_steps(*args, w=no_critic)
        mean, variance = tests.gradient_moments(estimator, table, s, X0[L], T, K,
                                                tests.later_steps(T))
    return mean[1], variance[1].sum()


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_baseline_costs_no_bias_and_lowers_the_variance(seed, K, monkeypatch):
    """Not a theorem: see tests/README.md for where it fails."""
    mean, variance = phi_gradient(seed, K, monkeypatch)
    plain_mean, plain_variance = phi_gradient(
        seed, K, monkeypatch, "surrogate = advantage.detach()", "surrogate = value")
    assert (mean - plain_mean).abs().max() < 1e-10 and variance < 0.7 * plain_variance


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_own_step_in_the_score_term_costs_no_bias_but_adds_variance(seed, monkeypatch):
    """L_t does not depend on the gates of step t, so they would only add noise of mean 0."""
    mean, variance = phi_gradient(seed, 2, monkeypatch, L=3, T=3, nats=0)
    own_mean, own_variance = phi_gradient(seed, 2, monkeypatch, "(u < t)[:, None, None]",
                                         "(u <= t)[:, None, None]", L=3, T=3, nats=0)
    assert (mean - own_mean).abs().max() < 1e-10 and variance < own_variance
