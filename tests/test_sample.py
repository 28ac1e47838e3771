"""sample.py: the sampler's law against exact sums, invariants of every order, rules by brute force."""

import itertools
from collections import Counter
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from data import UserError
from sample import ORDERS, State, generate, top_k
from tables import TableModel, answers, log_p_gates, log_p_tokens, orders
from test_model import small_model


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DRAWS = 100_000


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
    out = sample.generate(model, prompts(DRAWS), T, order, temperature=1.0)
    law = {(x0, o): (law_of_gates(model, x0, o) * sum(log_p_tokens(model, x0, o, t) for t in range(1, max(o) + 1)).exp()).item()
           for x0 in answers(3) for o in orders(3, T)}
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


@lru_cache
def model_of(answer_len):
    return small_model(answer_len=answer_len)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(prompt=st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=5), answer_len=st.integers(1, 7), steps=st.integers(1, 12),
       order=st.sampled_from(sorted(ORDERS)), temperature=st.sampled_from([0.0, 0.7, 1.0]), greedy_gates=st.booleans(), seed=st.integers(0, 1000))
def test_any_prompts_and_budget_give_finished_answers(prompt, answer_len, steps, order, temperature, greedy_gates, seed):
    """The prompt is untouched, no MASK is left, steps used <= budget, every step reveals at least one
    position, and the last row is what it would be alone."""
    model = model_of(answer_len)
    padded = torch.tensor([ids + [model.config.pad] * (6 - len(ids)) for ids in prompt])
    before, seeds = padded.clone(), [seed + i for i in range(len(prompt))]
    arguments = dict(temperature=temperature, greedy_gates=greedy_gates)
    out = sample.generate(model, padded, steps, order, seeds=seeds, **arguments)
    assert torch.equal(padded, before)
    assert out.tokens.shape == (len(prompt), answer_len) and ((out.tokens >= 0) & (out.tokens < model.config.vocab_size)).all()
    for row, used in zip(out.reveal_step.tolist(), out.steps.tolist()):
        assert used <= min(steps, answer_len) and set(row) == set(range(1, used + 1))
    if order in ("left_to_right", "confidence"):
        assert (out.steps == min(steps, answer_len)).all()
    alone = sample.generate(model, padded[-1:], steps, order, seeds=seeds[-1:], **arguments)
    assert torch.equal(alone.tokens[0], out.tokens[-1]) and torch.equal(alone.reveal_step[0], out.reveal_step[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(order, temperature, device):
    model = small_model().to(device)
    prompt = torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(0))
    prompt[1, 2:] = model.config.pad
    prompt = prompt.to(device)
    together = sample.generate(model, prompt, 3, order, temperature=temperature, seeds=list(range(6)))
    for i in range(6):
        alone = sample.generate(model, prompt[i : i + 1], 3, order, temperature=temperature, seeds=[i])
        assert torch.equal(alone.tokens[0], together.tokens[i]) and torch.equal(alone.reveal_step[0], together.reveal_step[i])


def test_greedy_decoding_follows_the_model_at_every_step():
    """Replay: the token revealed at step t is the argmax of the model at the state before step t."""
    model, prompt = small_model(), torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(0))
    out = generate(model, prompt, 3, "confidence")
    for t in range(1, 4):
        z = out.tokens.masked_fill(out.reveal_step >= t, model.config.mask)
        log_p = model.log_p(model(prompt, z))
        now = out.reveal_step == t
        assert torch.equal(log_p.argmax(-1)[now], out.tokens[now])
        confidence = log_p.amax(-1)
        for row in range(8):  # the chosen are the most confident of the masked
            waiting = (out.reveal_step[row] > t).nonzero()
            assert t == 3 or confidence[row][now[row]].min() >= confidence[row][waiting].max()


def make_state(**changes):
    state = dict(log_p=torch.zeros(1, 4, 2), gate_logits=torch.zeros(1, 4), masked=torch.ones(1, 4, dtype=torch.bool), t=1, T=4,
                 u_gate=torch.full((1, 4), 0.5), u_first=torch.full((1,), 0.5), u_row=torch.full((1, 4), 0.5), greedy=False)
    return State(**{**state, **changes})


def test_greedy_gates_open_the_likely_ones_or_the_best():
    likely = make_state(gate_logits=torch.tensor([[1.0, -1.0, 2.0, -3.0]]), greedy=True)
    assert ORDERS["learned"](likely)[0].tolist() == [True, False, True, False]
    unlikely = make_state(gate_logits=torch.tensor([[-5.0, -4.0, -2.0, -2.0]]), greedy=True)
    assert ORDERS["learned"](unlikely)[0].tolist() == [False, False, True, False]


def test_learned_opens_a_gate_even_where_all_are_nearly_closed():
    state = make_state(gate_logits=torch.full((1, 4), -15.0), masked=torch.tensor([[False, True, False, True]]), u_first=torch.tensor([0.99]))
    assert ORDERS["learned"](state)[0].tolist() == [False, False, False, True]


def test_left_to_right_splits_evenly():
    model = TableModel(L=7)
    assert generate(model, prompts(1), 3, "left_to_right").reveal_step[0].tolist() == [1, 1, 2, 2, 3, 3, 3]


def test_top_k_breaks_ties_to_the_left_and_skips_the_revealed():
    score, masked = torch.tensor([[1.0, 2.0, 2.0, 2.0]]), torch.tensor([[True, False, True, True]])
    assert top_k(score, masked, 1)[0].tolist() == [False, False, True, False]
    assert top_k(score, masked, 9)[0].tolist() == [True, False, True, True]


def test_draw_matches_the_probabilities():
    log_p = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.bincount(sample.draw(log_p.expand(1000, -1), u), minlength=4).tolist() == [100, 0, 600, 300]


def test_a_low_temperature_approaches_the_argmax():
    model, prompt = small_model(), torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(0))
    cold, greedy = generate(model, prompt, 2, "left_to_right", temperature=1e-4), generate(model, prompt, 2, "left_to_right")
    assert torch.equal(cold.tokens, greedy.tokens)


@pytest.mark.parametrize("arguments", [dict(steps=0), dict(steps=4, order="best"), dict(steps=4, temperature=-1.0)])
def test_bad_arguments(arguments):
    with pytest.raises(UserError):
        generate(small_model(), torch.zeros(1, 2, dtype=torch.long), **arguments)
