"""sample.py: the sampler's law against exact sums, invariants of every order, rules by brute force."""

import itertools
from collections import Counter

import pytest
import torch

import sample
from data import UserError
from sample import ORDERS, State, generate, top_k
from tables import TableModel, log_p_joint, log_p_marginal, orders
from test_model import small_model


def prompts(n):
    return torch.zeros(n, 0, dtype=torch.long)


def chi_square(counts, probabilities, n):
    """Statistic and a bound that it exceeds with probability below 1e-4 if the law is right."""
    assert abs(sum(probabilities.values()) - 1) < 1e-9 and set(counts) <= set(probabilities)
    statistic = sum((counts[key] - n * p) ** 2 / (n * p) for key, p in probabilities.items())
    df = len(probabilities) - 1
    return statistic, df + 4 * (2 * df) ** 0.5 + 8


@pytest.mark.parametrize("T", [1, 2, 3])
def test_learned_samples_follow_eq_1_and_2(T):
    """Frequencies of (answer, order) against p(x0, order) for every one of them."""
    L, V, n = 3, 2, 20_000
    model = TableModel(L, V)
    out = generate(model, prompts(n), T, "learned", temperature=1.0)
    counts = Counter((tuple(x), tuple(o)) for x, o in zip(out.tokens.tolist(), out.reveal_step.tolist()))
    exact = {(x, o): log_p_joint(model, x, o, T).exp().item() for x in itertools.product(range(V), repeat=L) for o in orders(L, T)}
    statistic, bound = chi_square(counts, exact, n)
    assert statistic < bound


@pytest.mark.parametrize("T", [1, 2, 3])
def test_iid_reveals_each_position_at_a_uniform_time(T):
    """Law of the order: uniform times in 1..T, with the empty steps left out."""
    L, n = 3, 20_000
    exact = Counter()
    for times in itertools.product(range(T), repeat=L):
        exact[tuple(sorted(set(times)).index(x) + 1 for x in times)] += T ** -L
    out = generate(TableModel(L), prompts(n), T, "iid")
    statistic, bound = chi_square(Counter(map(tuple, out.reveal_step.tolist())), exact, n)
    assert statistic < bound


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 100])
def test_invariants(order, steps):
    model, n = small_model(), 40
    prompt = torch.randint(9, (n, 4), generator=torch.Generator().manual_seed(0))
    before = prompt.clone()
    out = generate(model, prompt, steps, order)
    assert torch.equal(prompt, before)
    assert ((out.tokens >= 0) & (out.tokens < model.config.vocab_size)).all()       # no MASK left
    for row, used in zip(out.reveal_step.tolist(), out.steps.tolist()):
        assert used <= min(steps, 5) and set(row) == set(range(1, used + 1))        # at least one a step
    if order in ("left_to_right", "confidence"):
        assert (out.steps == min(steps, 5)).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(order, temperature):
    model = small_model()
    prompt = torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(0))
    prompt[1, 2:] = model.config.pad
    together = generate(model, prompt, 3, order, temperature=temperature, seeds=list(range(6)))
    for i in range(6):
        alone = generate(model, prompt[i : i + 1], 3, order, temperature=temperature, seeds=[i])
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
