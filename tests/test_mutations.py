"""The proofs can fail: each mutation breaks one line of a copy of a script, made here at run time, and
names a test that must then go red. tests/README.md holds the table in words."""

import types
from pathlib import Path

import pytest
import torch

import model
import orders
import posterior
import sample
import test_model
import test_objective
import test_orders
import test_sample
from tables import X0, TableModel, scores

ROOT = Path(__file__).parent.parent
# each script, and the modules that its proofs go through
USERS = {"posterior.py": (posterior, test_objective), "model.py": (model, test_model),
         "sample.py": (sample, test_sample, test_orders), "orders.py": (orders, sample, test_sample, test_orders)}


def mutant(path, old="", new=""):
    """A copy of a file, as a module, with the one occurrence of `old` replaced by `new`."""
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not old or source.count(old) == 1, f"{path} has {source.count(old)} times {old!r}: update the mutation"
    module = types.ModuleType(f"mutant_of_{path}")
    exec(compile(source.replace(old, new), f"<mutant of {path}>", "exec"), module.__dict__)
    return module


def suite_on(path, broken, patch):
    """The proofs for a script, with the script and all that was imported from it taken from the broken copy."""
    if path.startswith("tests/"):
        return broken  # the full-trajectory estimator stands in the test file itself
    script, *users = USERS[path]
    for user in users:
        for name, value in list(vars(user).items()):
            if value is script:
                patch.setattr(user, name, broken)
            elif name in vars(script) and value is vars(script)[name] and not isinstance(value, types.ModuleType):
                patch.setattr(user, name, vars(broken)[name])
    return types.SimpleNamespace(**{name: value for user in users for name, value in vars(user).items()})


PLATEAU = ("test_gradient_is_exact_with_a_plateau", 3, 3)
LEFT_OUT = ("test_gradient_is_exact_whatever_share_of_a_token_is_left_out", 3, 3)
GRADIENT = ("test_gradient_is_exact_in_expectation", 3, 3, 2)
TRAJECTORY = ("test_trajectory_gradient_is_exact_in_expectation", 3, 3, 2)
RAO_BLACKWELL = ("test_rao_blackwellised_elbo_is_the_elbo", 3, 2)
STEP_KL = ("test_step_kl_is_the_kl_between_the_two_laws_of_the_gates", 3, 2)
GATES = ("test_gates_are_a_law_on_nonempty_sets", None)
LOG_Q = ("test_log_q_matches_the_scalar_definition", 3, 3)
ORDER_LAW = ("test_orders_are_drawn_from_q", 3, 3, 0.0)
DRAWN = ("test_drawn_orders_and_steps_estimate_the_same_elbo_and_gradient", 3, 3)
ROWS = ("test_a_batch_is_the_mean_of_its_rows",)
FINITE = ("test_gradients_stay_finite", [1e4, -1e4, 0.0])
PADDING = ("test_padding_the_prompt_changes_nothing",)
LEARNED = ("test_learned_samples_follow_eq_1_and_2", 2)
IID = ("test_iid_samples_follow_uniform_reveal_times", 2)
RANDOM = ("test_random_samples_follow_a_shuffle", 3)
REPLAY = ("test_every_step_is_the_order_s_choice_at_the_model_s_state",)
FORCED = ("test_forced_log_p_is_the_likelihood_of_a_sampler", "confidence", 2)
PASSES = ("test_steps_are_the_forward_passes_that_a_row_takes_part_in", "threshold")
CONFIDENCE = ("test_confidence_takes_the_most_probable",)
MARGIN = ("test_margin_takes_the_largest_lead_of_the_first_token_over_the_second", "")
ORACLE = ("test_oracle_takes_the_most_probable_true_token", "")
ENTROPY = ("test_entropy_reveals_the_certain_not_the_uncertain",)
GATES_ABOVE = ("test_learned_with_a_knob_opens_the_gates_above_it_or_the_likeliest",)
WAITS = ("test_learned_with_two_knobs_keeps_open_gates_waiting_while_their_token_is_in_doubt", "")
EQ_1 = ("test_learned_is_eq_1_by_inverse_cdf",)
THRESHOLD = ("test_threshold_is_all_that_reach_it_or_the_best",)
FACTOR = ("test_factor_is_the_largest_n_within_it", "")
LAST_SLOT = ("test_factor_does_not_give_the_last_slot_away",)
BOUND = ("test_entropy_bound_is_the_longest_prefix_within_the_bound", "")
LOW_ENTROPY = ("test_low_entropy_is_all_below_it_or_the_lowest", "")
KLASS = ("test_klass_is_all_that_are_sure_and_have_settled_for_two_steps_or_the_best", "")
EQUALS_KNOB = ("test_what_equals_the_knob",)
EOS_LAST = ("test_eos_last_holds_the_end_back", "confidence", 1.0)
RARE = ("test_draw_reaches_tokens_rarer_than_float32_can_add_up", 1)

KL_WEIGHT = ("test_kl_weight_spares_q_only",)
OBJECTIVE = "objective = all_steps(step_elbo) + (T - 1) * surrogate.mean()"
BASELINE = "(value - value.mean(1, keepdim=True)) * K / (K - 1)"
LOG_ALPHAS = "F.logsigmoid(gate_logits), F.logsigmoid(-gate_logits)"

MUTATIONS = {
    # what is broken: (file, line, broken line, the test that must go red)
    "score term's sign": ("posterior.py", "advantage * log_q_before(", "-advantage * log_q_before(", GRADIENT),
    "KL's sign": ("posterior.py", "recon - kl_weight * kl ", "recon + kl_weight * kl ", GRADIENT),
    "gates learn at the KL's weight": ("posterior.py", "    gates = torch.lerp(gates.detach(), gates, 1 / kl_weight)\n", "", KL_WEIGHT),
    "the KL at full weight": ("posterior.py", "recon - kl_weight * kl ", "recon - kl ", KL_WEIGHT),
    "no score term": ("posterior.py", OBJECTIVE, "objective = all_steps(step_elbo)", GRADIENT),
    "no pathwise term": ("posterior.py", OBJECTIVE, "objective = all_steps(step_elbo.detach()) + (T - 1) * surrogate.mean()", GRADIENT),
    "advantage not detached": ("posterior.py", "leave_one_out(step_elbo[:, 1:].detach())", "leave_one_out(step_elbo[:, 1:])", GRADIENT),
    "best score detached": ("posterior.py", ".amax(-1, keepdim=True)   ", ".amax(-1, keepdim=True).detach()   ", GRADIENT),
    "baseline includes its own sample": ("posterior.py", BASELINE, "value - value.mean(1, keepdim=True)", GRADIENT),
    "plateau of the wrong sign": ("posterior.py", "log_e - torch.log1p(plateau", "log_e + torch.log1p(plateau", PLATEAU),
    "orders drawn without the plateau": ("posterior.py", "log_gate_probs(s, masked, False, tau, plateau)", "log_gate_probs(s, masked, False, tau)",
                                         ("test_orders_are_drawn_from_q", 3, 3, 0.8)),
    "log q before t without the plateau": ("posterior.py", "log_gate_probs(s[:, None], masked, False, tau, plateau)", "log_gate_probs(s[:, None], masked, False, tau)", PLATEAU),
    "what a token costs by now is left out": ("posterior.py", "log_p[:, :1].detach()", "log_p.detach()", LEFT_OUT),
    "what a token costs is not held constant": ("posterior.py", "log_p[:, :1].detach()", "log_p[:, :1]", LEFT_OUT),
    "left out of the later steps only": ("posterior.py", "token_baseline * (log_q.exp() * masked", "token_baseline * (step > 1) * (log_q.exp() * masked", LEFT_OUT),
    "baseline across examples": ("posterior.py", "value.mean(1, keepdim=True)", "value.mean()", ROWS),
    "sum for mean": ("posterior.py", OBJECTIVE, OBJECTIVE.replace("mean", "sum"), GRADIENT),
    "score term of one step": ("posterior.py", OBJECTIVE, OBJECTIVE.replace("(T - 1) * ", ""), GRADIENT),
    "terms of one step": ("posterior.py", "term[:, 0] + (T - 1) * term", "term[:, 0] + term", GRADIENT),
    "step 1 counted with the others": ("posterior.py", "term[:, 0] + (T - 1) * term", "term[:, 0] + T * term", GRADIENT),
    "own step in the score term": ("posterior.py", "(u < t)[:, None]", "(u <= t)[:, None]", LOG_Q),
    "the first row's step for all rows": ("posterior.py", "(u < t)[:, None]", "(u < t[0])", ROWS),
    "KL without its normaliser": ("posterior.py", "kl.sum(-1) + log_some", "kl.sum(-1)", RAO_BLACKWELL),
    "normaliser counts revealed positions": ("posterior.py", "(log_not_alpha * masked).sum(-1)",
        "log_not_alpha.sum(-1)", ("test_the_last_position_opens_for_certain_and_costs_no_kl",)),
    "KL charged at the last step": ("posterior.py", "masked.any(-1) & ~last.squeeze(-1)", "masked.any(-1)", STEP_KL),
    "alpha and 1 - alpha swapped": ("posterior.py", LOG_ALPHAS, "F.logsigmoid(-gate_logits), F.logsigmoid(gate_logits)", STEP_KL),
    "reconstruction without q": ("posterior.py", "(q * log_p).sum(-1)", "(masked * log_p).sum(-1)", RAO_BLACKWELL),
    "q's last step not forced": ("posterior.py", ".masked_fill(~masked | last, 0.0)",
        ".masked_fill(~masked, 0.0)", RAO_BLACKWELL),
    "no tau": ("posterior.py", "((s - top) / tau)", "(s - top)", GATES),
    "best of all positions, not of the masked": ("posterior.py", "s.masked_fill(~masked, -torch.inf).amax", "s.amax", GATES),
    "closed gates left out of log q": ("posterior.py", "torch.where(opens, log_q, log_complement(log_q)).sum(-1)",
        "torch.where(opens, log_q, 0.0).sum(-1)", LOG_Q),
    "state one step late": ("posterior.py", ">= step[..., None]", "> step[..., None]", RAO_BLACKWELL),
    "log of 0": ("posterior.py", "log_q.masked_fill(certain, -1.0)", "log_q", FINITE),
    "step T never drawn": ("posterior.py", "+ first) % later", "+ first) % (later - 1)", DRAWN),
    "gates drawn from q squared": ("posterior.py", "dtype=s.dtype, generator=generator) < q",
        "dtype=s.dtype, generator=generator) < q * q", ORDER_LAW),
    "the answer is shown to the denoiser": ("posterior.py", "z = x0_k.masked_fill(masked, model.config.mask)",
        "z = x0_k", RAO_BLACKWELL),
    "trajectory: score term's sign": ("tests/test_objective.py", "(terms.sum(0) + surrogate)",
        "(terms.sum(0) - surrogate)", TRAJECTORY),
    "trajectory: advantage not detached": ("tests/test_objective.py",
        "to_go = terms.detach().flip(0).cumsum(0).flip(0) - terms.detach()",
        "to_go = terms.flip(0).cumsum(0).flip(0) - terms", TRAJECTORY),
    "trajectory: own step's expectation twice": ("tests/test_objective.py", "- terms.detach()  ",
        "- terms.detach() + terms  ", TRAJECTORY),
    "trajectory: steps before instead of after": ("tests/test_objective.py", "terms.detach().flip(0).cumsum(0).flip(0)",
        "terms.detach().cumsum(0)", TRAJECTORY),
    "a gate past the first instead of the first": ("orders.py", "state.u_first)[:, None]  ",
        "state.u_first)[:, None] + 1  ", LEARNED),
    "first open gate, closed ones not counted": ("orders.py", "log_not.cumsum(-1) - log_not", "0", LEARNED),
    "gates before the first are free": ("orders.py", "(position > first) & (state.u_gate", "(state.u_gate", LEARNED),
    "gates of later blocks open too": ("orders.py", "state.gate_logits.masked_fill(~state.front",
        "state.gate_logits.masked_fill(~state.masked", (*EQ_1, "@3")),
    "a gate at the knob opens": ("orders.py", "logits.sigmoid() > alpha",
        "logits.sigmoid() >= alpha", (*EQUALS_KNOB, "learned:0.5", [3])),
    "no gate above the knob, none opens": ("orders.py", "opened = or_best(logits.sigmoid() > alpha, logits, state)",
        "opened = logits.sigmoid() > alpha", (*GATES_ABOVE, "")),
    "doubt opens gates": ("orders.py", "or_best(H <= nats[0], -H, replace", "or_best(H > nats[0], -H, replace", WAITS),
    "of those in doubt the most": ("orders.py", "or_best(H <= nats[0], -H, replace", "or_best(H <= nats[0], H, replace", WAITS),
    "closed gates open where nothing is in doubt": ("orders.py", "-H, replace(state, masked=opened))", "-H, state)", WAITS),
    "iid counts empty steps": ("orders.py", "time == time.amin(-1, keepdim=True)", "time == state.t - 1", IID),
    "random is confidence": ("orders.py", "even_share(state.u_row, state)", "even_share(state.log_p.amax(-1), state)", RANDOM),
    "one top-k over the batch": ("orders.py", "return (rank < k) & masked",
        "return (score >= score[masked].sort(descending=True).values[(k + 0 * score[:, :1]).long().sum() - 1]) & masked",
        ("test_each_row_has_its_own_top_k", "confidence")),
    "the batch's mean count": ("orders.py", "state.masked.sum(-1, keepdim=True) //",
        "state.masked.sum(-1, keepdim=True).float().mean().long() //", ("test_each_row_counts_its_own_masks",)),
    "equals in any order": ("orders.py", ".argsort(dim=-1, descending=True, stable=True)",
        ".topk(score.shape[-1], dim=-1).indices", ("test_equals_are_taken_from_the_left", "confidence", 4)),
    "a share of none": ("orders.py", "(state.T - state.t + 1)).clamp(min=1)", "(state.T - state.t + 1))", (*CONFIDENCE, "")),
    "a share of one step too many": ("orders.py", "(state.T - state.t + 1)", "(state.T - state.t + 2)", (*CONFIDENCE, "")),
    "margin without the second": ("orders.py", "even_share(best[..., 0] - best[..., 1]", "even_share(best[..., 0]", MARGIN),
    "entropy's sign": ("orders.py", "even_share(-entropy_of(state.log_p)", "even_share(entropy_of(state.log_p)", ENTROPY),
    "oracle without the truth": ("orders.py", "state.x0[..., None]", "state.tokens[..., None]", ORACLE),
    "threshold without the best": ("orders.py", "return or_best(score.exp() >= state.knob[0], score, state)",
        "return (score.exp() >= state.knob[0]) & state.front", (*THRESHOLD, "")),
    "threshold not to be reached": ("orders.py", "score.exp() >= state.knob[0]",
        "score.exp() > state.knob[0]", (*EQUALS_KNOB, "threshold:1", [0, 1])),
    "factor counts one position less": ("orders.py", "(n + 1) * doubt", "n * doubt", FACTOR),
    "factor gives the last slot away": ("orders.py", "(n + 1) * doubt <",
        "(n + 1) * doubt * (n < state.front.sum(-1, keepdim=True)) <", LAST_SLOT),
    "entropy_bound without the max": ("orders.py", "rising.cumsum(-1) - rising <=", "rising.cumsum(-1) <=", BOUND),
    "entropy_bound not to be reached": ("orders.py", "rising.cumsum(-1) - rising <=", "rising.cumsum(-1) - rising <", BOUND),
    "low_entropy's comparison": ("orders.py", "H < state.knob[0]", "H > state.knob[0]", LOW_ENTROPY),
    "low_entropy's best is the highest": ("orders.py", "or_best(H < state.knob[0], -H,",
        "or_best(H < state.knob[0], H,", LOW_ENTROPY),
    "klass looks one step back": ("orders.py", "& settled[0] & settled[1]", "& settled[0]", KLASS),
    "klass' KL turned round": ("orders.py", "new.exp() * (new - old)", "old.exp() * (old - new)", KLASS),
    "eos_last dropped": ("orders.py", "if self.eos_last:", "if False:", EOS_LAST),
    "eos_last lets PAD through": ("orders.py", "state.tokens < eos", "state.tokens != eos", EOS_LAST),
    "eos_last reveals nothing at the end": ("orders.py", "torch.where(content.any(-1, keepdim=True), content, masked)",
        "content", (*CONFIDENCE, "+eos_last")),
    "block ignored": ("orders.py", ", block=self.block))", "))", (*THRESHOLD, "@3")),
    "block ignored by even shares": ("orders.py", "top_k(score, state.masked, k, state.block_index)",
        "top_k(score, state.masked, k)", (*CONFIDENCE, "@3")),
    "block ignored by those found safe": ("orders.py", "chosen & state.front", "chosen & state.masked", (*THRESHOLD, "@3")),
    "block ignored by the best": ("orders.py", "top_k(score, state.front, 1))",
        "top_k(score, state.masked, 1))", (*THRESHOLD, "@3")),
    "draw in float32": ("orders.py", "log_p.to(precise(log_p.device)).exp()", "log_p.float().exp()", RARE),
    "draw can give what is impossible": ("orders.py", "right=True", "right=False", ("test_draw_matches_the_probabilities",)),
    "one noise for gates and tokens": ("sample.py", "u[:, T + 1, :L])", "u[:, t - 1, :L])", LEARNED),
    "sampler's last step not forced": ("sample.py", "if t < T else masked", "if t <= T else masked", LEARNED),
    "noise in float32": ("sample.py", "dtype=torch.float64) for seed",
        "dtype=torch.float32) for seed", ("test_the_noise_is_finer_than_float32",)),
    "noise of the rows that were there before": ("sample.py", "noise[rows]",
        "noise[: len(rows)]", ("test_a_row_does_not_depend_on_its_batch", "learned", 0.0, "cpu")),
    "order shown other tokens than are written": ("sample.py", "State(log_p, tokens,",
        "State(log_p, log_p.argmax(-1),", EOS_LAST),
    "likelihood of every step's masks": ("sample.py", ".squeeze(-1) * reveal).sum(-1)", ".squeeze(-1) * masked).sum(-1)", FORCED),
    "likelihood of the model's own tokens": ("sample.py", "log_p.gather(-1, written[", "log_p.gather(-1, tokens[", FORCED),
    "rows that are done stay": ("sample.py", "(masked & ~reveal).any(-1)", "masked.any(-1)", PASSES),
    "past turned round": ("sample.py", "[log_p, *past[:1]]", "[*past[:1], log_p]", (*REPLAY, "klass:0.5:0.5", 7)),
    "past of one step": ("sample.py", "[log_p, *past[:1]]", "[log_p]", (*REPLAY, "klass:0.5:0.5", 7)),
    "order told the next step": ("sample.py", "masked, t, T, u", "masked, t + 1, T, u", (*REPLAY, "confidence", 4)),
    "tokens of every position written": ("sample.py", "z[rows] = torch.where(reveal, written, z[rows])",
        "z[rows] = torch.where(masked, written, z[rows])", (*REPLAY, "confidence", 4)),
    "stage 1 without 1/m": ("model.py", "(log_p_of(model, h, x0, masked) / m).sum(-1)",
        "log_p_of(model, h, x0, masked).sum(-1)", ("test_denoiser_elbo_matches_the_exact_sum",)),
    "stage 1 sees the answer": ("model.py", "h = model(prompt, x0.masked_fill(masked, model.config.mask))",
        "h = model(prompt, x0)", ("test_hidden_tokens_get_no_gradient",)),
    "the prompt attends to padding": ("model.py", "attend, seen = (prompt != self.config.pad)", "attend, seen = (prompt >= 0)", PADDING),
    "the answer attends to padding": ("model.py", "there = (prompt != self.config.pad)", "there = (prompt >= 0)", PADDING),
    "the answer does not see the prompt": ("model.py", "torch.cat([seen, block.keys_values(x, cos, sin)], dim=-2)",
        "torch.cat([0 * seen, block.keys_values(x, cos, sin)], dim=-2)", ("test_the_answer_depends_on_every_token_of_its_own_prompt",)),
    "another order's prompt": ("model.py", "(self.read(prompt) if read is None else read).repeat_interleave(K, 0)",
        "(self.read(prompt) if read is None else read).repeat(K, 1, 1, 1, 1, 1)", ("test_answers_of_one_prompt_stand_together",)),
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
        mean, variance = tests.gradient_moments(tests.two_steps, table, s, X0[L], T, K, tests.later_steps(T))
    return mean[1], variance[1].sum()


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_baseline_costs_no_bias_and_lowers_the_variance(seed, K, monkeypatch):
    """Not a theorem: see tests/README.md for where it fails."""
    mean, variance = phi_gradient(seed, K, monkeypatch)
    plain_mean, plain_variance = phi_gradient(seed, K, monkeypatch, "leave_one_out(step_elbo[:, 1:].detach())", "step_elbo[:, 1:].detach()")
    assert (mean - plain_mean).abs().max() < 1e-10 and variance < 0.7 * plain_variance


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_own_step_in_the_score_term_costs_no_bias_but_adds_variance(seed, monkeypatch):
    """L_t does not depend on the gates of step t, so they would only add noise of mean 0."""
    mean, variance = phi_gradient(seed, 2, monkeypatch, L=3, T=3, nats=0)
    own_mean, own_variance = phi_gradient(seed, 2, monkeypatch, "(u < t)[:, None]", "(u <= t)[:, None]", L=3, T=3, nats=0)
    assert (mean - own_mean).abs().max() < 1e-10 and variance < own_variance
