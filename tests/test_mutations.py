"""The proofs can fail: each mutation breaks one line of a copy of a script, made here at run time,
and names a test that must then go red. tests/README.md holds the table in words.

It quotes source lines, so whoever changes a script may have to change it here: `pytest -m owner`.
"""

import inspect
import types
from pathlib import Path

import pytest
import torch

import eval_gsm8k
import model
import optim
import posterior
import sample
import test_model
import test_objective
import test_optim
import test_sample
from tables import X0, TableModel, scores

pytestmark = pytest.mark.owner

ROOT = Path(__file__).parent.parent
# Each script, and the modules that its proofs go through.
USERS = {
    "posterior.py": (posterior, test_objective),
    "model.py": (model, posterior, test_objective, test_model),
    "optim.py": (optim, test_optim),
    "sample.py": (sample, test_sample),
    "eval_gsm8k.py": (eval_gsm8k, test_sample),
}


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
    suite = {}
    for user in users:
        for name, value in list(vars(user).items()):
            if value is script:
                patch.setattr(user, name, broken)
            elif value is vars(script).get(name) and not isinstance(value, types.ModuleType):
                patch.setattr(user, name, vars(broken)[name])
        suite.update(vars(user))
    return types.SimpleNamespace(**suite)


# --- the proofs that are named below, with their parameters ---------------------------------------

GATES = ("test_gates_are_a_law_on_nonempty_sets", None, 2)
LOG_Q = ("test_log_q_matches_the_scalar_definition", 3, 3)
ORDER_LAW = ("test_orders_are_drawn_from_q", 3, 2)
RAO_BLACKWELL = ("test_rao_blackwellised_elbo_is_the_elbo", 3, 2)
STEP_KL = ("test_step_kl_is_the_kl_between_the_two_laws_of_the_gates", 3, 2)
TIGHT = ("test_the_bound_is_tight_where_the_true_posterior_has_the_form_of_eq_3", 3, 3)
WHATEVER_T = ("test_a_step_costs_what_its_state_and_the_steps_left_say_whatever_T",)
GRADIENT = ("test_gradient_is_exact_in_expectation", 3, 3, 2)
EVERY_T = ("test_one_model_learns_the_bounds_of_every_number_of_steps",)
TRAJECTORY = ("test_trajectory_gradient_is_exact_in_expectation", 3, 3, 2)
STEPS = ("test_each_later_step_is_drawn_equally_often_by_every_row", 3)
ROWS = ("test_a_row_of_a_batch_is_what_it_is_alone",)
LOGS = ("test_the_logged_bound_is_the_reconstruction_less_the_kl",)
START = ("test_gates_start_roughly_left_to_right_with_neighbours_apart",)
SPREAD = ("test_scores_have_mean_0_and_spread_1_in_each_answer",)
Q_READS = ("test_q_reads_every_token_of_prompt_and_answer_in_its_place",)
AUTOCAST = ("test_scores_and_gates_are_made_in_float32_under_bfloat16_autocast",)
FINITE = ("test_gradients_stay_finite", [1e4, -1e4, 0.0])

TRUNK = ("test_the_trunk_is_a_plain_transformer", [4, 5, 6, 7, 10, 10])
PADDING = ("test_padding_changes_nothing",)
GATE_ROWS = ("test_gates_know_how_many_steps_are_left_and_each_row_its_own_number",)
SOFT_CAP = ("test_a_gate_is_its_score_above_the_nth_best_soft_capped_at_15",)
STAGE_1 = ("test_stage_1_is_unbiased_where_eos_and_pad_are_part_of_the_answer", (0, 2, 3))

TORCHS = ("test_muon_is_torchs_but_for_its_rounding", (24, 8))
FORMULA = ("test_muon_is_its_formula", (24, 8))
RATES = ("test_rates_are_a_share_of_their_peaks_however_often_they_are_set",)
GROUPS = ("test_every_parameter_has_one_optimizer_and_the_matrices_of_blocks_have_muon",
          "posterior")

LAW = "test_samples_follow_the_law_of_the_order_and_of_the_tokens"
LEARNED = (LAW, "learned", test_sample.law_of_learned, 2)
LEARNED_3 = (LAW, "learned", test_sample.law_of_learned, 3)
IID = (LAW, "iid", test_sample.law_of_iid, 2)
REPLAY = ("test_every_step_is_the_order_s_choice_at_the_model_s_state", "confidence")
MIXTURE = ("test_log_p_of_orders_that_draw_is_of_their_mixture", "iid")
FORCED = ("test_forced_log_p_is_the_likelihood_of_the_sampler", "confidence")
RARE = ("test_drawing_reaches_tokens_rarer_than_float32_can_add_up", 1)


def rule(name, flags=""):
    return ("test_every_order_reveals_what_its_definition_says", name, flags)


# --- what is broken: {name: (line, broken line, the test that must go red)} -----------------------

L_T = "L_t = reconstruction - kl"
VALUE = "value = bound + (T - 1) * surrogate.mean(1)"
ADVANTAGE = "advantage = leave_one_out(L_t[:, 1:]).detach()"
LOG_ALPHA = "log_alpha = F.logsigmoid(gate_logits)"
GATE_LOGITS = "gate_logits = model.gate_logits(h, masked, steps_left)"
IN_FLOAT32 = "with torch.autocast(h.device.type, enabled=False):"
LOG_Q_LINE = "log_q = torch.logaddexp(log_e, log_one_minus(log_e) + log_f)"

POSTERIOR = {
    # Eq. 3
    "q's last step not forced": ("settled = ~masked | (steps_left == 1)", "settled = ~masked",
                                 RAO_BLACKWELL),
    "no tau": ("log_e = ((scores - best) / tau)", "log_e = ((scores - best))", GATES),
    "no tau in the share": ("((scores - nth) / tau)", "((scores - nth))", GATES),
    "best of all positions": ("scores.masked_fill(~masked, -torch.inf).amax", "scores.amax", GATES),
    "no share": (LOG_Q_LINE, "log_q = log_e", GATES),
    "the share alone": (LOG_Q_LINE, "log_q = log_f", GATES),
    "log q above 0": ("+ log_f).clamp(max=0)", "+ log_f)",
                      ("test_no_gate_opens_with_more_than_certainty",)),
    "closed gates left out of log q": ("torch.where(opens, log_q, log_one_minus(log_q)).sum(-1)",
                                       "torch.where(opens, log_q, 0.0).sum(-1)", LOG_Q),
    "own step in REINFORCE": ("of_step_u * (u < t)", "of_step_u * (u <= t)", LOG_Q),
    "the first row's step for all rows": ("of_step_u * (u < t)", "of_step_u * (u < t[:1])", ROWS),
    "a path told one step too few": ("log_q = log_gate_probs(scores, masked, T - u + 1, tau)",
                                     "log_q = log_gate_probs(scores, masked, T - u, tau)", LOG_Q),
    "orders told one step too many": ("q = log_gate_probs(scores, masked, T - t + 1, tau).exp()",
                                      "q = log_gate_probs(scores, masked, T - t + 2, tau).exp()",
                                      ORDER_LAW),
    "gates drawn from q squared": ("(noise < q)", "(noise < q * q)",
                                   ORDER_LAW),
    "log of 0": ("log_q.masked_fill(certain, -1.0)", "log_q", FINITE),
    "scores with a mean": ("F.layer_norm(scores, scores.shape[-1:])",
                           "scores / scores.std(-1, keepdim=True)", SPREAD),
    "scores of a free scale": ("F.layer_norm(scores, scores.shape[-1:])",
                               "scores - scores.mean(-1, keepdim=True)", SPREAD),
    "scores standardised over the batch": ("F.layer_norm(scores, scores.shape[-1:])",
                                           "F.layer_norm(scores, scores.shape)", SPREAD),
    "q without the prompt": ("self.trunk.encode_prompt(prompt), x0)",
                             "self.trunk.encode_prompt(0 * prompt), x0)", Q_READS),
    "q with the prompt's tokens sorted": ("self.trunk.encode_prompt(prompt), x0)",
                                          "self.trunk.encode_prompt(prompt.sort(-1).values), x0)",
                                          Q_READS),
    "scores made in bfloat16": (IN_FLOAT32, "if True:", AUTOCAST),
    # Eq. 5 and 6
    "KL without its normaliser": ("kl_of_gates + log_some", "kl_of_gates",
                                  RAO_BLACKWELL),
    "normaliser counts revealed positions": (
        "(log_not_alpha * masked).sum(-1)", "log_not_alpha.sum(-1)",
        ("test_the_last_position_opens_for_certain_and_costs_no_kl",)),
    "KL charged at the last step": ("masked.any(-1) & ~last.squeeze(-1)", "masked.any(-1)",
                                    STEP_KL),
    "alpha and 1 - alpha swapped": (LOG_ALPHA, LOG_ALPHA.replace("gate", "-gate"), STEP_KL),
    "closed gates cost nothing": ("(if_open + if_closed).sum(-1)", "if_open.sum(-1)", STEP_KL),
    "reconstruction without q": ("(log_q.exp() * log_p).sum(-1)",
                                 "(masked * log_p).sum(-1)", RAO_BLACKWELL),
    "state one step late": (">= step[..., None]", "> step[..., None]", RAO_BLACKWELL),
    "the answer is shown to the denoiser": ("z = x0.masked_fill(masked, model.config.mask)",
                                            "z = x0", RAO_BLACKWELL),
    "EOS and PAD are free": (
        "log_p = log_p_of(model, h, x0, masked)",
        "log_p = log_p_of(model, h, x0, masked & (x0 < model.config.vocab_size - 2))",
        ("test_the_real_networks_bound_what_they_can_write", 2)),
    # p's gates and the steps left
    "gates told one step too many": (GATE_LOGITS, GATE_LOGITS.replace("left)", "left + 1)"),
                                     STEP_KL),
    "gates told one step too few": (
        GATE_LOGITS, GATE_LOGITS.replace("left)", "left.sub(1).clamp(min=1))"), STEP_KL),
    "gates told the step": (GATE_LOGITS, GATE_LOGITS.replace("steps_left)", "step[..., None])"),
                            STEP_KL),
    "gates told T": (GATE_LOGITS,
                     GATE_LOGITS.replace("steps_left)", "torch.full_like(steps_left, T))"),
                     WHATEVER_T),
    "gates told nothing": (GATE_LOGITS,
                           GATE_LOGITS.replace("steps_left)", "torch.full_like(steps_left, 2))"),
                           TIGHT),
    "gates told what the first step has left": (
        GATE_LOGITS,
        GATE_LOGITS.replace("steps_left)", "steps_left[:, :1].expand_as(steps_left))"), GRADIENT),
    "gates told the steps left to the first row": (
        GATE_LOGITS,
        GATE_LOGITS.replace("steps_left)", "steps_left[:1].expand_as(steps_left))"), ROWS),
    "gates told the masks of step 1": (
        GATE_LOGITS, GATE_LOGITS.replace(" masked,", " masked[:, :1].expand_as(masked),"), STEP_KL),
    # Eq. 4 and 7
    "REINFORCE's sign": ("surrogate = advantage", "surrogate = -advantage", GRADIENT),
    "the KL's sign": (L_T, L_T.replace("- kl", "+ kl"), GRADIENT),
    "no KL": (L_T, L_T.replace(" - kl", ""), EVERY_T),
    "no KL for p": (L_T, L_T.replace("- kl", "- step_kl(log_q, gate_logits.detach(), masked, "
                                             "steps_left == 1)"), GRADIENT),
    "no KL for q": ("kl = step_kl(log_q, gate", "kl = step_kl(log_q.detach(), gate", GRADIENT),
    "q is not charged for its order": (ADVANTAGE, ADVANTAGE.replace("L_t", "reconstruction"),
                                       GRADIENT),
    "advantage not detached": (ADVANTAGE, ADVANTAGE.replace(".detach()", ""), GRADIENT),
    "the logged bound without its KL": ('"elbo": bound', '"elbo": over_steps(reconstruction)',
                                        LOGS),
    "the logs carry a gradient": ("log.detach() for name", "log for name", LOGS),
    "no REINFORCE": (VALUE, VALUE.replace(" + (T - 1) * surrogate.mean(1)", ""), GRADIENT),
    "no pathwise term": (VALUE, VALUE.replace("bound", "bound.detach()"), GRADIENT),
    "sum for mean": (VALUE, VALUE.replace("surrogate.mean", "surrogate.sum"), GRADIENT),
    "REINFORCE of one step": (VALUE, VALUE.replace("(T - 1) * ", ""), GRADIENT),
    "best score detached": ("(scores - best)", "(scores - best.detach())", GRADIENT),
    "n-th score detached": ("(scores - nth)", "(scores - nth.detach())", GRADIENT),
    "baseline includes its own sample": ("(value.sum(1, keepdim=True) - value) / (K - 1)",
                                         "value.mean(1, keepdim=True)", GRADIENT),
    "baseline across examples": ("(value.sum(1, keepdim=True) - value) / (K - 1)",
                                 "(value.sum() - value) / (value.numel() - 1)", ROWS),
    "terms of one step": ("term[:, 0] + (T - 1) * term", "term[:, 0] + term", GRADIENT),
    "step 1 counted with the others": ("term[:, 0] + (T - 1) * term", "term[:, 0] + T * term",
                                       GRADIENT),
    "step T never drawn": ("+ start) % later_steps\n", "+ start) % max(later_steps - 1, 1)\n",
                           STEPS),
    "steps without a random start": ("+ start) % later_steps\n", "+ 0) % later_steps\n", STEPS),
    "the same step for all rows": ("(row + start)", "(0 * row + start)", STEPS),
}

SLICES = "slices = (torch.arange(B, device=device) + first) % B"
BOUND_1 = "(log_p_of(model, h, x0, masked) / m[:, None]).sum(-1)"
NTH = "torch.ceil(masked.sum(-1, keepdim=True) / steps_left**power).long()"

MODEL = {
    "keys do not turn": ("k = rotate(F.layer_norm(k, k.shape[-1:]), rotation)",
                         "k = F.layer_norm(k, k.shape[-1:])", TRUNK),
    "queries do not turn": ("q = rotate(F.layer_norm(q, q.shape[-1:]), rotation) ",
                            "q = F.layer_norm(q, q.shape[-1:]) ", TRUNK),
    "nothing turns": ("torch.view_as_real(pairs * rotation)", "torch.view_as_real(pairs)", TRUNK),
    "keys not normalised": ("rotate(F.layer_norm(k, k.shape[-1:]), rotation)",
                            "rotate(k, rotation)", TRUNK),
    "no learned positions": ("self.token(tokens) + self.position.weight[positions]",
                             "self.token(tokens)", TRUNK),
    "the answer's positions from 0": ("self.embed(answer, self.config.prompt_len)",
                                      "self.embed(answer, 0)", TRUNK),
    "no last norm": ("return self.norm(x)", "return x", TRUNK),
    "no relu": ("F.relu(self.up(self.norm2(x)))", "self.up(self.norm2(x))", TRUNK),
    "one norm for both": ("self.up(self.norm2(x))", "self.up(self.norm1(x))", TRUNK),
    "padding is attended to": ("not_pad = prompt != self.config.pad", "not_pad = prompt >= 0",
                               PADDING),
    "the answer does not see the prompt": (
        "kv = torch.cat([kv, block", "kv = torch.cat([0 * kv, block",
        ("test_the_prompt_is_read_without_the_answer_and_the_answer_with_all_of_the_prompt",)),
    "another order's prompt": ("part.repeat_interleave(N, 0)",
                               "part.repeat(N, *[1] * (part.ndim - 1))",
                               ("test_answers_of_one_prompt_stand_together",)),
    "one bias for two steps left and more": ("clamp(max=len(self.steps_bias))", "clamp(max=2)",
                                             GATE_ROWS),
    "gates above the best": (NTH, "torch.ones_like(masked.sum(-1, keepdim=True))", SOFT_CAP),
    "even shares": (NTH, NTH.replace("**power", ""), SOFT_CAP),
    "half at every step": (NTH, NTH.replace("steps_left**power", "2"), LOG_Q),
    "share rounded down": (NTH, NTH.replace("/ steps_left**power", "// steps_left**power"), GATES),
    "n-th best of all positions": ("score.masked_fill(~masked, -torch.inf).sort", "score.sort",
                                   SOFT_CAP),
    "a start that does not fall": (" - 10 * to_the_right", "", START),
    "a start without a ring": ("10 * around_the_ring - 10", "-10", START),
    "gates made in bfloat16": (IN_FLOAT32, "if True:", AUTOCAST),
    "gates capped at 14": ("15 * torch.tanh(logits / 15)", "14 * torch.tanh(logits / 14)",
                           SOFT_CAP),
    "gates cut off at 15": ("15 * torch.tanh(logits / 15)", "logits.clamp(-15, 15)", SOFT_CAP),
    "stage 1 without 1/m": (BOUND_1, "log_p_of(model, h, x0, masked).sum(-1)", STAGE_1),
    "stage 1 spares PAD": (BOUND_1,
                           BOUND_1.replace("masked)", "masked & (x0 < model.config.pad))"),
                           STAGE_1),
    "stage 1's eps": ("eps: float = 1e-3", "eps: float = 0.03",
                      ("test_levels_reach_down_to_a_thousandth",)),
    "levels from a fixed first": (SLICES, SLICES.replace(" + first", ""),
                                  ("test_levels_are_stratified_and_each_row_alone_is_uniform",)),
    "stage 1 sees the answer": ("z = x0.masked_fill(masked, model.config.mask)", "z = x0",
                                ("test_stage_1_does_not_show_what_it_asks_for",)),
}

OPTIM = {
    "momentum not Nesterov's": ('update = p.grad.lerp(momentum, group["momentum"])',
                                "update = momentum", FORMULA),
    "no scale for tall matrices": ("max(1, p.shape[0] / p.shape[1]) ** 0.5", "1", TORCHS),
    "coefficients swapped": ("beta=b, alpha=c", "beta=c, alpha=b", TORCHS),
    "fewer rounds of Newton-Schulz": ('group["ns_steps"]', "3", FORMULA),
    "Adam for most matrices": ('".blocks." in name', '".up." in name', GROUPS),
    "Muon for the heads": ('".blocks." in name and p.ndim == 2', "p.ndim == 2", GROUPS),
    "rates as a share of the last": ('factor * group["peak_lr"]', 'factor * group["lr"]', RATES),
}

STEPS_LEFT = "steps_left = torch.full((len(rows), 1), T - t + 1, device=device)"
STATE = "state = State(log_p, gate_logits, masked, t, T,"

SAMPLE = {
    "a gate past the first": ("state.first_noise)[:, None]  ", "state.first_noise)[:, None] + 1  ",
                              LEARNED),
    "first open gate, closed ones not counted": (
        "log_none_before = log_not_alpha.cumsum(-1) - log_not_alpha", "log_none_before = 0",
        LEARNED),
    "gates before the first are free": ("((position > first) & opens)", "opens", LEARNED),
    "the sampler's gates told the step": (STEPS_LEFT, STEPS_LEFT.replace("T - t + 1", "t"),
                                          LEARNED_3),
    "the sampler's gates told T": (STEPS_LEFT, STEPS_LEFT.replace("T - t + 1", "T"), LEARNED_3),
    "the sampler's gates told nothing": (STEPS_LEFT, STEPS_LEFT.replace("T - t + 1", "2"),
                                         LEARNED_3),
    "the sampler's gates told one step too many": (STEPS_LEFT, STEPS_LEFT.replace("+ 1", "+ 2"),
                                                   LEARNED),
    "the sampler's gates told one step too few": (STEPS_LEFT, STEPS_LEFT.replace(" + 1", ""),
                                                  LEARNED),
    "a gate at the knob opens": ("logits.sigmoid() > state.knob", "logits.sigmoid() >= state.knob",
                                 ("test_what_equals_the_knob", "learned:0.5", [3])),
    "no gate above the knob, none opens": (" | top_k(logits, state.masked, 1)", "",
                                           rule("learned")),
    "iid counts empty steps": ("time == time.amin(-1, keepdim=True)", "time == state.t - 1", IID),
    "iid in even shares": ("state.order_noise ** (1 / state.knob)", "state.order_noise",
                           rule("iid")),
    "iid in the other shares": ("(1 / state.knob)", "state.knob", rule("iid")),
    "a share of none": ("state.knob).clamp(min=1)", "state.knob)", rule("confidence")),
    "equals in any order": (".argsort(dim=-1, descending=True, stable=True)",
                            ".topk(score.shape[-1], dim=-1).indices",
                            ("test_equals_are_taken_from_the_left", "confidence", 4)),
    "all rules in even shares": ("state.T - state.t + 1, state.knob)",
                                 "state.T - state.t + 1, 1)", rule("confidence")),
    "a share of one step too many": ("state.T - state.t + 1, state.knob)",
                                     "state.T - state.t + 2, state.knob)", rule("confidence")),
    "margin without the second": ("best_share(best[..., 0] - best[..., 1]",
                                  "best_share(best[..., 0]", rule("margin")),
    "entropy's sign": ("best_share(-entropy_of(state)", "best_share(entropy_of(state)",
                       rule("entropy")),
    "the first order backwards": ("best_share(score.expand(", "best_share(-score.expand(",
                                  rule("first_order")),
    "dilated in even shares": ("open_after = state.t**state.knob", "open_after = state.t",
                               rule("dilated")),
    "threshold without the best": ("sure | top_k(score, state.masked, 1)\n", "sure\n",
                                   rule("threshold")),
    "threshold not to be reached": ("score.exp() >= state.knob", "score.exp() > state.knob",
                                    ("test_what_equals_the_knob", "threshold:1", [0, 1])),
    "entropy_bound without the max": ("rising.cumsum(-1) - rising <=", "rising.cumsum(-1) <=",
                                      rule("entropy_bound")),
    "eos_last dropped": ("if self.eos_last:  #", "if False:  #", rule("confidence", "+eos_last")),
    "eos_last lets PAD through": ("< state.log_p.shape[-1] - 2)", "!= state.log_p.shape[-1] - 2)",
                                  rule("confidence", "+eos_last")),
    "draw in float32": ("log_p.to(precise(log_p.device)).exp()", "log_p.float().exp()", RARE),
    "one noise for gates and tokens": ("noise[:, T + 1, :L]", "noise[:, 0, :L]", LEARNED),
    "sampler's last step not forced": ("        if t < T:\n", "        if t <= T:\n", LEARNED),
    "noise of the rows that were there before": (
        "order_noise[rows]", "order_noise[: len(rows)]",
        ("test_any_budget_gives_finished_answers_and_a_row_does_not_depend_on_its_batch",
         "iid", 0.0)),
    "likelihood of every step's masks": ("(log_p_tokens * reveal).sum(-1)",
                                         "(log_p_tokens * masked).sum(-1)", FORCED),
    "rows that are done stay": ("(masked & ~reveal).any(-1)", "masked.any(-1)",
                                (REPLAY[0], "threshold:0.5")),
    "order told the next step": (STATE, STATE.replace("t, T", "t + 1, T"), REPLAY),
    "tokens of every position written": ("torch.where(reveal, tokens, z[rows])",
                                         "torch.where(masked, tokens, z[rows])", REPLAY),
}

EVAL = {
    "the mean of logs": ("logsumexp(0) - math.log(len(along_an_order))", "mean(0)", MIXTURE),
    "the same draw again": ("row + 10**6 * draw", "row", MIXTURE),
}

REFERENCE = {
    "trajectory: REINFORCE's sign": ("(terms.sum(0) + surrogate)", "(terms.sum(0) - surrogate)",
                                     TRAJECTORY),
    "trajectory: advantage not detached": (
        "to_go = terms.detach().flip(0).cumsum(0).flip(0) - terms.detach()",
        "to_go = terms.flip(0).cumsum(0).flip(0) - terms", TRAJECTORY),
    "trajectory: steps before instead of after": (
        "terms.detach().flip(0).cumsum(0).flip(0)", "terms.detach().cumsum(0)", TRAJECTORY),
}

FILES = {"posterior.py": POSTERIOR, "model.py": MODEL, "optim.py": OPTIM, "sample.py": SAMPLE,
         "eval_gsm8k.py": EVAL, "tests/test_objective.py": REFERENCE}
MUTATIONS = [pytest.param(path, *change, id=f"{path}: {name}")
             for path, changes in FILES.items() for name, change in changes.items()]


def prove(tests, name, arguments, monkeypatch):
    proof = getattr(tests, name)
    if "monkeypatch" in inspect.signature(proof).parameters:
        arguments = [*arguments, monkeypatch]
    proof(*arguments)


@pytest.mark.parametrize("path, old, new, proof", MUTATIONS)
def test_a_broken_copy_turns_its_proof_red(path, old, new, proof, monkeypatch):
    name, *arguments = proof
    tests = suite_on(path, mutant(path, old, new), monkeypatch)
    with pytest.raises(AssertionError):
        prove(tests, name, arguments, monkeypatch)


@pytest.mark.parametrize("path", FILES)
def test_an_unbroken_copy_stays_green(path, monkeypatch):
    """What turns the proofs red is the mutation, not the copying."""
    tests = suite_on(path, mutant(path), monkeypatch)
    proofs = {name: arguments for _, _, (name, *arguments) in FILES[path].values()}
    for name, arguments in proofs.items():
        with monkeypatch.context() as patch:
            prove(tests, name, arguments, patch)


# --- mutations that cost variance, not the mean ---------------------------------------------------

def phi_gradient(seed, K, patch, *mutation, L=4, T=2, nats=10):
    """Mean and total variance of the gradient for phi. The model is still bad, as early in
    training: every token of x0 is some 10 nats less likely than the other, whatever the order."""
    table, s = TableModel(L, seed), scores(L, seed)
    with torch.no_grad():
        for i, token in enumerate(X0[L]):
            table.table[:, i, token] -= nats
    with patch.context() as patch:
        tests = suite_on("posterior.py", mutant("posterior.py", *mutation), patch)
        (_, phi), variance = tests.mean_gradient(tests.two_steps, table, s, X0[L], T, K,
                                                 tests.later_steps(T))
    return phi, variance


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_baseline_costs_no_bias_and_lowers_the_variance(seed, K, monkeypatch):
    """Not a theorem: see tests/README.md for where it fails."""
    mean, variance = phi_gradient(seed, K, monkeypatch)
    plain_mean, plain_variance = phi_gradient(
        seed, K, monkeypatch, ADVANTAGE, ADVANTAGE.replace("leave_one_out(", "("))
    assert (mean - plain_mean).abs().max() < 1e-10 and variance < 0.7 * plain_variance


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_own_step_in_the_score_term_costs_no_bias_but_adds_variance(seed, monkeypatch):
    """L_t does not depend on the gates of step t, so they would only add noise of mean 0."""
    mean, variance = phi_gradient(seed, 2, monkeypatch, L=3, T=3, nats=0)
    own_mean, own_variance = phi_gradient(seed, 2, monkeypatch, "of_step_u * (u < t)",
                                          "of_step_u * (u <= t)", L=3, T=3, nats=0)
    assert (mean - own_mean).abs().max() < 1e-10 and variance < own_variance
