"""sample.py: the sampler's law against exact sums, invariants of generation in every order. What each
order reveals at a state is proved in test_orders.py."""

import itertools
from collections import Counter
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import UserError
from orders import ORDERS, State, parse_order
from sample import generate, row_noise
from tables import TableModel, answers, log_p_gates, log_p_tokens, orders
from test_model import small_model


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DRAWS = 100_000

# Knobs at which each adaptive rule reveals sometimes one position of model_of's and sometimes several.
KNOB = {"entropy_bound": ":0.5", "low_entropy": ":0.5", "klass": ":0.5:0.5"}
RULES = [*(name + KNOB.get(name, "") for name in ORDERS), "learned:0.5", "learned:0.3:0.5"]
EVERY_ORDER = [rule + variant for rule in RULES for variant in ("", "+eos_last", "@2", "@3+eos_last")]
DRAWN = ("learned", "random", "iid")
WHOLE_BUDGET = ("left_to_right", "random", "dilated", "confidence", "margin", "entropy", "oracle")


def prompts(n):
    return torch.zeros(n, 0, dtype=torch.long)


def assert_follows(outcomes, law):
    """Chi-square of the outcomes against a law {outcome: probability}: red with probability 1e-4 or less if
    the law is right, and always the same draws."""
    counts, n = Counter(outcomes), len(outcomes)
    assert abs(sum(law.values()) - 1) < 1e-9 and set(counts) <= set(law)
    statistic = sum((counts[key] - n * p) ** 2 / (n * p) for key, p in law.items())
    df = len(law) - 1
    # Wilson-Hilferty: the cube root of chi-square / df is nearly normal; 3.72 is its 1 - 1e-4 quantile
    assert df == 0 or statistic < df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3


def assert_samples_follow(order, T, law_of_gates):
    """At temperature 1: (answer, order), then the answer alone and the number of steps alone."""
    model = TableModel()
    out = generate(model, prompts(DRAWS), T, order, temperature=1.0)
    law = {(x0, o): (law_of_gates(model, x0, o) * sum(log_p_tokens(model, x0, o, t) for t in range(1, max(o) + 1)).exp()).item()
           for x0 in answers(3) for o in orders(3, T) if law_of_gates(model, x0, o) > 0}
    drawn = [(tuple(x), tuple(o)) for x, o in zip(out.tokens.tolist(), out.reveal_step.tolist())]
    assert_follows(drawn, law)
    p_answer, p_steps = Counter(), Counter()
    for (x0, o), p in law.items():
        p_answer[x0] += p
        p_steps[max(o)] += p
    assert_follows([x0 for x0, _ in drawn], p_answer)
    assert_follows(out.steps.tolist(), p_steps)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_learned_samples_follow_eq_1_and_2(T):
    def law(model, x0, o):
        return sum(log_p_gates(model, x0, o, t, T) for t in range(1, max(o) + 1)).exp()
    assert_samples_follow("learned", T, law)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_iid_samples_follow_uniform_reveal_times(T):
    """Law of the order: a uniform time in 1..T per position, with the empty steps left out."""
    law = Counter()
    for times in itertools.product(range(T), repeat=3):
        law[tuple(sorted(set(times)).index(x) + 1 for x in times)] += T ** -3
    assert_samples_follow("iid", T, lambda model, x0, o: law[o])


@pytest.mark.parametrize("T", [1, 2, 3])
def test_random_samples_follow_a_shuffle(T):
    """Law of the order: all orders whose steps reveal 3 // T, then an even share of the rest, are as likely."""
    sizes = {1: [3], 2: [1, 2], 3: [1, 1, 1]}[T]
    even = {o for o in orders(3, T) if [o.count(t) for t in range(1, T + 1)] == sizes}
    assert_samples_follow("random", T, lambda model, x0, o: (o in even) / len(even))


@pytest.mark.parametrize("order", [rule for rule in RULES if parse_order(rule).knob or parse_order(rule).name not in (*DRAWN, "oracle")])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_forced_log_p_is_the_likelihood_of_a_sampler(order, T):
    """Where the order draws nothing, answers partition the probability: their likelihoods sum to 1, and each is the product
    over the steps of what the table says at the states on its own path. Unforced, log_p is that of the answer given."""
    model, x0 = TableModel(L=4), answers(4)
    out = generate(model, prompts(len(x0)), T, order, x0=torch.tensor(x0), forced=True)
    assert out.tokens.tolist() == [list(x) for x in x0]
    assert torch.allclose(out.log_p.exp().sum(), torch.ones((), dtype=torch.float64))
    for x, path, log_p in zip(x0, out.reveal_step.tolist(), out.log_p):
        assert torch.isclose(log_p, sum(log_p_tokens(model, x, path, t) for t in range(1, max(path) + 1)))
    free = generate(model, prompts(1), T, order)
    assert torch.equal(free.log_p[0], out.log_p[x0.index(tuple(free.tokens[0].tolist()))])


@lru_cache
def model_of(answer_len, device="cpu"):
    """A small model that is sure of some tokens and gates and unsure of others."""
    model = small_model(answer_len=answer_len)
    for head in (model.token_head, model.gate_head):
        head.weight.data *= 20
    return model.to(device)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(prompt=st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=5), answer_len=st.integers(1, 7),
       steps=st.integers(1, 12), order=st.sampled_from(EVERY_ORDER), temperature=st.sampled_from([0.0, 0.7, 1.0]),
       seed=st.integers(0, 1000))
def test_any_prompts_and_budget_give_finished_answers(prompt, answer_len, steps, order, temperature, seed):
    """The prompt is untouched, no MASK is left, steps used <= budget, every step reveals at least one
    position, rules with an even share use the budget up, and the last row is what it would be alone."""
    model = model_of(answer_len)
    padded = torch.tensor([ids + [model.config.pad] * (6 - len(ids)) for ids in prompt])
    x0 = torch.randint(11, (len(prompt), answer_len), generator=torch.Generator().manual_seed(seed))
    before, seeds = padded.clone(), [seed + i for i in range(len(prompt))]
    out = generate(model, padded, steps, order, temperature=temperature, seeds=seeds, x0=x0)
    assert torch.equal(padded, before)
    assert out.tokens.shape == (len(prompt), answer_len) and ((out.tokens >= 0) & (out.tokens < model.config.vocab_size)).all()
    for row, used in zip(out.reveal_step.tolist(), out.steps.tolist()):
        assert used <= min(steps, answer_len) and set(row) == set(range(1, used + 1))
    if parse_order(order).name in WHOLE_BUDGET:
        assert (out.steps == min(steps, answer_len)).all()
    alone = generate(model, padded[-1:], steps, order, temperature=temperature, seeds=seeds[-1:], x0=x0[-1:])
    assert torch.equal(alone.tokens[0], out.tokens[-1]) and torch.equal(alone.reveal_step[0], out.reveal_step[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", EVERY_ORDER)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(order, temperature, device):
    model = model_of(5, device)
    prompt, x0 = torch.randint(9, (6, 9), generator=torch.Generator().manual_seed(0)).to(device).split([4, 5], dim=1)
    prompt[1, 2:] = model.config.pad
    together = generate(model, prompt, 4, order, temperature=temperature, seeds=list(range(6)), x0=x0)
    for i in range(6):
        alone = generate(model, prompt[i : i + 1], 4, order, temperature=temperature, seeds=[i], x0=x0[i : i + 1])
        assert torch.equal(alone.tokens[0], together.tokens[i]) and torch.equal(alone.reveal_step[0], together.reveal_step[i])


@pytest.mark.parametrize("T", [4, 7])
@pytest.mark.parametrize("order", [text for text in EVERY_ORDER if parse_order(text).knob or parse_order(text).name not in DRAWN])
def test_every_step_is_the_order_s_choice_at_the_model_s_state(order, T):
    """Replay: the positions revealed at step t are those that the order picks at the state before step t, given
    the distributions of the two steps before; their tokens are the model's most probable."""
    model = model_of(7)
    prompt, x0 = torch.randint(9, (8, 11), generator=torch.Generator().manual_seed(0)).split([4, 7], dim=1)
    out, past = generate(model, prompt, T, order, x0=x0), []
    assert T < 7 or (out.steps < T).any() == (parse_order(order).name not in WHOLE_BUDGET)  # adaptive rules adapt
    for t in range(1, T + 1):
        z = out.tokens.masked_fill(out.reveal_step >= t, model.config.mask)
        h, masked, now = model(prompt, z), z == model.config.mask, out.reveal_step == t
        log_p = model.log_p(h)
        tokens = log_p.argmax(-1)
        state = State(log_p, tokens, model.gate_logits(h), masked, t, T, None, None, None, past, x0)  # no noise
        assert torch.equal(now, masked & parse_order(order)(state, model.config.eos) if t < T else masked)
        assert torch.equal(tokens[now], out.tokens[now])
        past = [log_p, *past][:2]


def test_dilated_takes_more_at_every_step():
    assert generate(TableModel(L=8), prompts(1), 4, "dilated").reveal_step[0].tolist() == [1, 4, 3, 4, 2, 4, 3, 4]


def test_left_to_right_splits_evenly():
    assert generate(TableModel(L=7), prompts(1), 3, "left_to_right").reveal_step[0].tolist() == [1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("order", RULES)
def test_steps_are_the_forward_passes_that_a_row_takes_part_in(order):
    """Rows that are done leave the batch: over all passes, as many rows go through the model as steps are counted."""
    model, rows = model_of(7), []
    prompt, x0 = torch.randint(9, (8, 11), generator=torch.Generator().manual_seed(0)).split([4, 7], dim=1)
    hook = model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[1])))
    out = generate(model, prompt, 7, order, x0=x0)
    hook.remove()
    assert rows == [(out.steps >= t).sum() for t in range(1, out.steps.max() + 1)]


def test_hidden_states_at_hand_replace_the_first_pass_and_nothing_else():
    model, prompt = model_of(5), torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(0))
    first = model(prompt, torch.full((8, 5), model.config.mask))
    given, computed = (generate(model, prompt, 3, "learned", temperature=1.0, first=h) for h in (first, None))
    assert torch.equal(given.tokens, computed.tokens) and torch.equal(given.reveal_step, computed.reveal_step)
    assert torch.equal(generate(model, prompt, 1, first=first.flip(0)).tokens, model.log_p(first.flip(0)).argmax(-1))


def test_a_low_temperature_approaches_the_argmax():
    model, prompt = model_of(5), torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(0))
    cold, greedy = (generate(model, prompt, 2, "left_to_right", temperature=temperature) for temperature in (1e-4, 0.0))
    assert torch.equal(cold.tokens, greedy.tokens)


def test_the_noise_is_finer_than_float32():
    """So that draw() meets the uniforms which belong to tokens rarer than 2^-24."""
    assert (row_noise([0, 1], 3, 4, torch.device("cpu")) * 2**24 % 1 != 0).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(steps=0), "steps >= 1"), (dict(steps=4, temperature=-1.0), "temperature 0 or"), (dict(steps=4, temperature=1e-9), ">= 1e-6"),
    (dict(steps=4, order="best"), "unknown order"), (dict(steps=4, order="oracle@2"), "the oracle looks at the true answer")])
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        generate(small_model(), torch.zeros(1, 2, dtype=torch.long), **arguments)
