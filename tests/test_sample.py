"""sample.py: every rule against its definition in plain Python, one row at a time; the sampler's
law against exact sums; what holds for any order.

The definitions share nothing with sample.py: lists and floats instead of tensors, `sorted` and
`max`, which keep or take the first of equals, instead of ranks."""

import argparse
import io
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from conftest import outcome
from test_model import hidden, small_model

import sample
import tables
from common import UserError
from data import build_tokenizer, decode
from eval_gsm8k import log_p_of_answers
from model import load_checkpoint
from sample import (ORDERS, Order, State, generate, parse_order, parse_steps, render,
                    sample_categorical, whole_number)
from tables import TableModel, answers, log_p_gates, log_p_tokens, orders

V = 5
EOS = 3  # PAD is 4
KNOBS = {"learned": [None, 0.3, 0.6, 0.99], "threshold": [0.35, 0.5, 0.95],
         "entropy_bound": [0.0, 0.7, 3.0], "dilated": [1.0, 2.0, 3.0],
         **dict.fromkeys(("left_to_right", "confidence", "margin", "entropy", "first_order", "iid"),
                         [None, 1.0, 1.5, 2.0, 100.0])}
# Orders as a user names them, adaptive ones at knobs that reveal sometimes one, sometimes several.
RULES = ["learned:0.5", "learned", "left_to_right", "confidence", "margin", "entropy", "dilated",
         "first_order", "iid", "threshold:0.5", "entropy_bound:0.5"]
FLAGS = ["", "+eos_last"]
EVERY_ORDER = [rule + flags for rule in RULES for flags in FLAGS]
DRAWN = ("learned", "iid")  # without a knob
DRAWS_NOTHING = [order for order in EVERY_ORDER if order.split("+")[0] not in DRAWN]

# Distributions over V tokens, of which some tie in confidence alone. The others' scores, and the
# knobs above, lie so far apart that float32 orders them as exact numbers are ordered.
MENU = [(0.999996, 1e-6, 1e-6, 1e-6, 1e-6), (0.9, 0.04, 0.03, 0.02, 0.01),
        (0.6, 0.2, 0.1, 0.07, 0.03), (0.6, 0.3, 0.05, 0.03, 0.02), (0.4, 0.3, 0.15, 0.1, 0.05),
        (0.4, 0.38, 0.1, 0.07, 0.05), (0.2, 0.2, 0.2, 0.2, 0.2)]


def random_rows(seed):
    """The rows of a batch, with unequal numbers of masked positions and many equal positions."""
    rng = random.Random(seed)
    L = rng.randint(1, 8)
    T = rng.randint(1, L)
    t = rng.randint(1, T)
    menu = [rng.sample(p, V) for p in MENU]  # the likeliest token differs from one to the other

    def row():
        some = rng.sample(menu, 3)
        masked = [rng.random() < 0.7 for _ in range(L)]
        masked[rng.randrange(L)] = True
        return SimpleNamespace(p=[rng.choice(some) for _ in range(L)], masked=masked, t=t, T=T,
                               alpha=rng.choices([0.05, 0.25, 0.5, 0.75, 0.95], k=L),
                               gate_noise=[rng.random() for _ in range(L)],
                               first_noise=rng.random(),
                               order_noise=[rng.choice([rng.random(), 0.5]) for _ in range(L)])

    return [row() for _ in range(rng.randint(1, 4))]


def state_of(rows):
    def stack(name, dtype=torch.float64):
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

    return State(log_p=stack("p", torch.float32).log(), masked=stack("masked", torch.bool),
                 gate_logits=stack("alpha").logit().float(), t=rows[0].t, T=rows[0].T,
                 gate_noise=stack("gate_noise"), first_noise=stack("first_noise"),
                 order_noise=stack("order_noise"))


def revealed(order, rows):
    """The positions that an order reveals in each row of a batch."""
    return [[i for i, opens in enumerate(row) if opens] for row in order(state_of(rows)).tolist()]


# --- each rule and its definition -----------------------------------------------------------------

def H(row, i):
    return -sum(x * math.log(x) for x in row.p[i])


def share(score, knob_as_published=1):
    """ceil(what may be revealed / steps left^knob) of the highest score, leftmost first.
    A definition takes a row, the positions that it may reveal, and a knob."""
    def define(row, may, knob):
        left = row.T - row.t + 1
        n = math.ceil(len(may) / left ** (knob_as_published if knob is None else knob))
        return sorted(may, key=lambda i: -score(row, i))[:n]
    return define


def dilated(row, may, knob):
    """Positions by their bits read from behind; after step t a share (t / T)^knob is open."""
    before, now, end = (t ** int(knob) for t in (row.t - 1, row.t, row.T))
    share = max(1, len(may) * (now - before) // (end - before))
    return sorted(may, key=lambda i: f"{i:010b}"[::-1])[:share]


def iid(row, may, knob):
    """The earliest of times in 1..T, of which a share (t / T)^knob is up to t."""
    time = {i: math.floor(row.order_noise[i] ** (1 / (knob or 1)) * row.T) for i in may}
    return [i for i in may if time[i] == min(time.values())]


def threshold(row, may, knob):
    return [i for i in may if max(row.p[i]) >= knob] or [max(may, key=lambda i: max(row.p[i]))]


def entropy_bound(row, may, knob):
    rising = sorted(may, key=lambda i: H(row, i))
    sums = [[H(row, i) for i in rising[:n]] for n in range(1, len(may) + 1)]
    return rising[: sum(sum(some) - max(some) <= knob for some in sums)]


def learned(row, may, knob):
    """Eq. 1: p(first open gate = i) = alpha^i prod_{j<i} (1 - alpha^j), normalised, by inverse CDF;
    gates after it are free. With a knob: all gates above it, or the likeliest, the leftmost of
    equals."""
    if knob is not None:
        return [i for i in may if row.alpha[i] > knob] or [max(may, key=lambda i: row.alpha[i])]
    law = [row.alpha[i] * math.prod(1 - row.alpha[j] for j in may if j < i) for i in may]
    assert math.isclose(sum(law), 1 - math.prod(1 - row.alpha[i] for i in may))
    cdf = [sum(law[: n + 1]) / sum(law) for n in range(len(may))]
    first = next(i for i, c in zip(may, cdf) if c > row.first_noise)
    return [i for i in may
            if i == first or (i > first and row.gate_noise[i] < row.alpha[i])]


DEFINITIONS = {
    "left_to_right": share(lambda row, i: -i),
    "confidence": share(lambda row, i: max(row.p[i])),
    "margin": share(lambda row, i: sorted(row.p[i])[-1] - sorted(row.p[i])[-2]),
    "entropy": share(lambda row, i: -H(row, i)),
    # Steps of 3.25 around a ring of 10, less a fall of 10 over the canvas.
    "first_order": share(lambda row, i: -10 * i / len(row.p) + 3.25 * i % 10, 1.5),
    "dilated": dilated, "iid": iid, "threshold": threshold, "entropy_bound": entropy_bound,
    "learned": learned}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", ORDERS)
def test_every_order_reveals_what_its_definition_says(name, flags):
    """Random batches of small canvases. +eos_last: while a masked position's likeliest token is
    neither EOS nor PAD, only such are to choose from."""
    sizes, waited = set(), 0
    for seed in range(150):
        rows = random_rows(seed)
        for knob in KNOBS.get(name, [None]):
            order = Order(name, knob, bool(flags))
            for row, found in zip(rows, revealed(order, rows)):
                masked = [i for i in range(len(row.p)) if row.masked[i]]
                content = [i for i in masked if row.p[i].index(max(row.p[i])) < EOS]
                may = content if order.eos_last and content else masked
                right = DEFINITIONS[name](row, may, knob)
                assert found == sorted(right)
                sizes.add(len(found))
                waited += may != masked
    assert len(sizes) > 1 and bool(waited) == bool(flags)


@pytest.mark.parametrize("order, n", [
    ("confidence", 4), ("margin", 4), ("entropy", 4), ("left_to_right", 4), ("entropy_bound:1", 2),
    ("threshold:0.99", 1), ("learned:0.9", 1)])
def test_equals_are_taken_from_the_left(order, n):
    """40 positions alike, the even ones masked: more than what sorting keeps in place by chance."""
    alike = SimpleNamespace(p=[(0.7, 0.2, 0.05, 0.03, 0.02)] * 40, masked=[True, False] * 20, t=1,
                            T=5, alpha=[0.5] * 40, gate_noise=[0.5] * 40, first_noise=0.5,
                            order_noise=[0.5] * 40)
    assert revealed(parse_order(order), [alike]) == [[2 * i for i in range(n)]]


# --- names ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("order, expected", [
    ("threshold:1", [0, 1]), ("entropy_bound:0", [0, 1, 3]), ("learned:0.5", [3])])
def test_what_equals_the_knob(order, expected):
    """Reaching a threshold or a bound is enough, a gate has to be above its knob."""
    certain = (1.0, 0.0, 0.0, 0.0, 0.0)
    row = SimpleNamespace(p=[certain, certain, MENU[2], MENU[3]], masked=[True] * 4, t=1, T=4,
                          alpha=[0.5, 0.5, 0.5, 0.75], gate_noise=[0.5] * 4, first_noise=0.5,
                          order_noise=[0.5] * 4)
    state = state_of([row])
    state.log_p.clamp_(min=-200)  # finite, as the model's
    assert [i for i in range(4) if parse_order(order)(state)[0, i]] == expected


@pytest.mark.parametrize("name", ORDERS)
def test_names_survive_being_printed(name):
    _, default, sweep = ORDERS[name]
    for knob in {None, default, *sweep}:
        for flags in FLAGS:
            text = name + flags if knob is None else f"{name}:{knob}{flags}"
            order = Order(name, knob, bool(flags))
            assert parse_order(f" {text} ") == order == parse_order(str(order))


def test_two_knobs_have_two_names():
    """Results are kept by these names."""
    for knob in (0.4999999, 0.1234564, 1e-3, 20.0):
        assert parse_order(str(Order("threshold", knob))).knob == knob
    assert str(Order("threshold", 20.0)) == "threshold:20"


def test_learned_without_a_knob_draws_and_is_never_tuned():
    """`learned` is the paper's: eval_gsm8k.py must not put learned:0.5 in its place."""
    assert ORDERS["learned"][1:] == (None, []) and parse_order("learned").knob is None
    sure_of_none = SimpleNamespace(p=[MENU[2]] * 3, masked=[True] * 3, t=1, T=3, alpha=[0.4] * 3,
                                   first_noise=0.01, gate_noise=[0.3] * 3, order_noise=[0.5] * 3)
    assert revealed(parse_order("learned"), [sure_of_none]) == [[0, 1, 2]]
    assert revealed(parse_order("learned:0.5"), [sure_of_none]) == [[0]]


@pytest.mark.parametrize("text", [
    "", "best", "Learned", "+eos_last", ":0.5", "learned 0.5", "confidence:0", "iid:0",
    "learned:.5:.5:.5",
    "learned:0.5:", "threshold:high", "threshold:1.2.3", "threshold:-",
    "iid+", "iid+eos", "iid+eos_last+eos_last", "threshold:0.9:0.5", "iid@8",
    "dilated:600", "dilated:0", "threshold:-1"])
def test_a_name_that_cannot_be_read_is_one_line(text):
    with pytest.raises(UserError, match="order") as told:
        parse_order(text)
    assert repr(text) in str(told.value) and "\n" not in str(told.value)


# --- drawing --------------------------------------------------------------------------------------

def test_drawing_matches_the_probabilities():
    log_p = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    noise = (torch.arange(1000) + 0.5) / 1000
    counts = torch.bincount(sample_categorical(log_p.expand(1000, -1), noise), minlength=4)
    assert counts.tolist() == [100, 0, 600, 300]
    never_the_first = torch.tensor([0.0, 0.5, 0.5]).log()
    assert sample_categorical(never_the_first, torch.tensor(0.0)) == 1
    even = torch.tensor([0.5, 0.5]).log()
    assert sample_categorical(even, torch.tensor(1.0)) == 1  # float64 noise rounded to float32


@pytest.mark.parametrize("index", [1, 2])
def test_drawing_reaches_tokens_rarer_than_float32_can_add_up(index, monkeypatch):
    """p = 2^-30, between two tokens of nearly 1/2 or after them: drawn by the uniforms it owns. And
    the noise that generate gives to an order is finer than float32."""
    p = [0.5, 0.5]
    p.insert(index, 2.0**-30)
    exact = [math.exp(x) for x in torch.tensor(p).log().tolist()]
    start = sum(exact[:index]) / sum(exact)
    end = sum(exact[: index + 1]) / sum(exact)
    noise = torch.tensor([start - 2**-32, start + 2**-32, end - 2**-32,
                          min(end + 2**-32, 1 - 2**-53)], dtype=torch.float64)
    drawn = sample_categorical(torch.tensor(p).log().expand(4, -1), noise)
    assert drawn.tolist() == [index - 1, index, index, 2]

    seen = []
    monkeypatch.setitem(ORDERS, "iid",
                        (lambda state: seen.append(state) or state.masked, None, []))
    generate(TableModel(), prompts(2), 2, "iid")
    state = seen[0]
    noise = torch.cat([state.gate_noise, state.first_noise[:, None], state.order_noise], 1)
    assert (noise * 2**24 % 1 != 0).all() and len(set(noise.flatten().tolist())) == 14


# --- the law of the sampler -----------------------------------------------------------------------

DRAWS = 30_000


def prompts(n):
    return torch.zeros(n, 0, dtype=torch.long)


def outcomes(out):
    """(answer, order) of each row."""
    return list(zip(map(tuple, out.tokens.tolist()), map(tuple, out.reveal_step.tolist())))


def assert_follows(outcomes, law):
    """Chi-square of the outcomes against a law {outcome: probability}: red with probability 1e-4
    or less if the law is right, and always the same draws."""
    counts, n = Counter(outcomes), len(outcomes)
    assert abs(sum(law.values()) - 1) < 1e-9 and set(counts) <= set(law)
    statistic = sum((counts[key] - n * p) ** 2 / (n * p) for key, p in law.items())
    df = len(law) - 1
    # Wilson-Hilferty: the cube root of chi-square / df is nearly normal; 3.72: its 1 - 1e-4
    assert df == 0 or statistic < df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3


def law_of_learned(model, x0, o, T):
    """Eq. 1."""
    return sum(log_p_gates(model, x0, o, t, T) for t in range(1, max(o) + 1)).exp().item()


def law_of_iid(model, x0, o, T):
    """A uniform time in 1..T per position, the empty steps left out."""
    paths = [tuple(sorted(set(times)).index(x) + 1 for x in times)
             for times in itertools.product(range(T), repeat=3)]
    return paths.count(o) / len(paths)


@pytest.mark.parametrize("order, law_of_gates", [("learned", law_of_learned), ("iid", law_of_iid)])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_samples_follow_the_law_of_the_order_and_of_the_tokens(order, law_of_gates, T):
    """At temperature 1: (answer, order), then the answer alone and the number of steps alone."""
    model = TableModel()
    out = generate(model, prompts(DRAWS), T, order, temperature=1.0)
    law, p_answer, p_steps = {}, Counter(), Counter()
    for x0, o in itertools.product(answers(3), orders(3, T)):
        if (p := law_of_gates(model, x0, o, T)) > 0:
            tokens = sum(log_p_tokens(model, x0, o, t) for t in range(1, max(o) + 1)).exp()
            law[x0, o] = p = p * tokens.item()
            p_answer[x0] += p
            p_steps[max(o)] += p
    assert_follows(outcomes(out), law)
    assert_follows([x0 for x0, _ in outcomes(out)], p_answer)
    assert_follows(out.steps.tolist(), p_steps)


@pytest.mark.parametrize("order", DRAWS_NOTHING)
def test_forced_log_p_is_the_likelihood_of_the_sampler(order, monkeypatch):
    """Where the order draws nothing, answers partition the probability: their likelihoods sum to 1,
    so an order looks at the state alone, never at the token to come. Each is the product over the
    steps of what the table says at the states on its own path. Of 4 tokens 2 is EOS, 3 is PAD."""
    monkeypatch.setattr(tables, "V", 4)
    model, x0 = TableModel(seed=1), answers(3)
    for T in (1, 2, 3):
        out = generate(model, prompts(len(x0)), T, order, x0=torch.tensor(x0))
        assert out.tokens.tolist() == [list(x) for x in x0]
        assert math.isclose(out.log_p.exp().sum().item(), 1)
        for x, path, log_p in zip(x0, out.reveal_step.tolist(), out.log_p.tolist()):
            steps = range(1, max(path) + 1)
            assert math.isclose(log_p, sum(log_p_tokens(model, x, path, t) for t in steps).item())
        likeliest = generate(model, prompts(1), T, order)
        i = x0.index(tuple(likeliest.tokens[0].tolist()))
        assert likeliest.log_p[0] == out.log_p[i]
        assert torch.equal(likeliest.reveal_step[0], out.reveal_step[i])


@pytest.mark.parametrize("order", ["iid", "learned", "learned:0.5", "confidence"])
def test_log_p_of_orders_that_draw_is_of_their_mixture(order):
    """Along any one order the likelihoods of all answers sum to 1. So does their mean over orders,
    and the mean of their logs would stay below. One draw is enough for orders that draw nothing."""
    model, x0 = TableModel(seed=1), answers(3)
    order = parse_order(order)

    def of(draws):
        return log_p_of_answers(model, prompts(len(x0)), torch.tensor(x0), 2, order,
                                [7] * len(x0), draws).exp()

    assert of(5).sum().item() == pytest.approx(1)
    assert torch.allclose(of(1), of(5)) == (not order.is_random)
    ways = {tuple(generate(model, prompts(1), 3, order, seeds=[seed]).reveal_step[0].tolist())
            for seed in range(20)}
    assert (len(ways) > 1) == order.is_random


@pytest.mark.parametrize("order", ["threshold:0.5+eos_last", "confidence+eos_last"])
def test_drawn_answers_follow_the_likelihoods(order, monkeypatch):
    """The order is a function of the answer: it looks at the likeliest token, not at the drawn."""
    monkeypatch.setattr(tables, "V", 4)
    model, x0 = TableModel(seed=0), torch.tensor(answers(3))
    forced = generate(model, prompts(64), 3, order, x0=x0)
    drawn = generate(model, prompts(20_000), 3, order, temperature=1.0)
    assert len(set(map(tuple, forced.reveal_step.tolist()))) > 1
    assert_follows(outcomes(drawn), dict(zip(outcomes(forced), forced.log_p.exp().tolist())))


# --- what holds for any order ---------------------------------------------------------------------

@lru_cache
def model_of(answer_len):
    """A small model that is sure of some tokens and gates and unsure of others."""
    model = small_model(answer_len=answer_len)
    model.token_head.weight.data *= 20
    model.gate_head.weight.data *= 20
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("order", EVERY_ORDER)
def test_any_budget_gives_finished_answers_and_a_row_does_not_depend_on_its_batch(
        order, temperature):
    """The prompt is untouched, no MASK is left, steps are at most the budget, each of them reveals
    something, and a row alone, with its own padding only, gives the same tokens and order."""
    model = model_of(6)
    prompt = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(0))
    for row, n in zip(prompt, (4, 2, 1, 3, 4)):
        row[n:] = model.config.pad
    for steps in (1, 3, 9):
        before, seeds = prompt.clone(), [7, 0, 3, 11, 5]
        out = generate(model, prompt, steps, order, seeds=seeds, temperature=temperature)
        assert torch.equal(prompt, before) and 0 <= out.tokens.min()
        assert out.tokens.max() < model.config.mask and out.tokens.shape == (5, 6)
        for row, used in zip(out.reveal_step.tolist(), out.steps.tolist()):
            assert used <= steps and set(row) == set(range(1, used + 1))
        if order in ("left_to_right", "dilated", "first_order", "confidence", "margin", "entropy"):
            assert (out.steps == min(steps, 6)).all()  # shares use the budget up
        for i in range(5):
            alone = generate(model, prompt[i : i + 1], steps, order, seeds=seeds[i : i + 1],
                             temperature=temperature)
            assert torch.equal(alone.tokens[0], out.tokens[i])
            assert torch.equal(alone.reveal_step[0], out.reveal_step[i])
            assert torch.allclose(alone.log_p[0], out.log_p[i], atol=1e-4)


@pytest.mark.parametrize("order", DRAWS_NOTHING)
def test_every_step_is_the_order_s_choice_at_the_model_s_state(order):
    """Replay: what step t reveals is what the order picks at the state before step t, with the
    model's likeliest tokens. As many rows go through the model as steps are counted."""
    model, passes = model_of(7), []
    prompt = torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(0))
    hook = model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[1])))
    out = generate(model, prompt, 7, order)
    hook.remove()
    assert passes == [(out.steps >= t).sum() for t in range(1, out.steps.max() + 1)]
    for t in range(1, 8):
        z = out.tokens.masked_fill(out.reveal_step >= t, model.config.mask)
        open_rows = (z == model.config.mask).any(-1)
        if not open_rows.any():
            break
        z = z[open_rows]
        h = hidden(model, prompt[open_rows], z)
        masked = z == model.config.mask
        now = (out.reveal_step == t)[open_rows]
        steps_left = torch.full((len(z), 1), 7 - t + 1)
        gate_logits = model.gate_logits(h, masked, steps_left)
        state = State(model.log_p(h), gate_logits, masked, t, 7, None, None, None)  # no noise
        assert torch.equal(now, parse_order(order)(state) if t < 7 else masked)
        assert torch.equal(state.log_p.argmax(-1)[now], out.tokens[open_rows][now])


def test_a_low_temperature_approaches_the_likeliest():
    prompt = torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(0))
    cold, greedy, warm = (generate(model_of(5), prompt, 2, "left_to_right", temperature=t).tokens
                          for t in (1e-4, 0.0, 1.0))
    assert torch.equal(cold, greedy) and not torch.equal(warm, greedy)


def test_more_steps_than_positions_are_as_many_as_positions():
    """Also to the gates, which are told how many are left."""
    model = model_of(6)
    prompt = torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(0))
    for order in ("learned:0.5", "learned"):
        enough, more = (generate(model, prompt, steps, order) for steps in (6, 7))
        assert torch.equal(enough.reveal_step, more.reveal_step)
        assert torch.equal(enough.tokens, more.tokens)


# --- the script -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ckpt(straight):
    return ["--ckpt", str(straight / "ckpt.pt")]


def test_orders_are_shown_side_by_side_and_any_number_of_steps_will_do(ckpt, capfd):
    argv = [*ckpt, "--steps", "L", "--num_samples", "2", "--compare", "learned:0.5,left_to_right"]
    status, out, _ = outcome(sample, argv, capfd)
    assert status == 0 and out.count("question  ") == 2
    for name in ("learned:0.5", "left_to_right"):
        assert len(re.findall(rf"number +{name} .* in \d+ steps", out)) == 2
    steps = re.findall(r"step +(\d+) +left_to_right", out)
    assert steps == [str(t) for t in range(1, 17)] * 2 and "\033" not in out


def test_a_question_of_ones_own_is_sampled_a_few_at_a_time(ckpt, monkeypatch):
    """As many samples as asked for, each of its own seed, and no list of a billion items."""
    batches = []

    def stop_soon(model, prompt, steps, order, *, seeds, temperature):
        batches.append((len(prompt), seeds[0]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(model, prompt, steps, order, seeds=seeds, temperature=temperature)

    monkeypatch.setattr(sample, "generate", stop_soon)
    with pytest.raises(KeyboardInterrupt):
        sample.main([*ckpt, "--prompt", "Jo has 3 pens.", "--num_samples", "1000000000",
                     "--seed", "7"])
    assert batches == [(16, 7), (16, 23), (16, 39)]


@pytest.mark.parametrize("argv, shown", [
    ([], 3), (["--num_samples", "2"], 2), (["--prompt", "Jo has 3 pens."], 1),
    (["--prompt", "Jo has 3 pens.", "--num_samples", "2"], 2)])
def test_three_answers_are_shown_but_one_to_a_question_of_ones_own(ckpt, argv, shown, capfd):
    """A second one to the same question, by an order that draws nothing, would be the same."""
    status, out, _ = outcome(sample, [*ckpt, *argv], capfd)
    assert status == 0 and out.count("question  ") == shown


def test_a_prompt_is_read_as_it_is_given(straight, monkeypatch):
    """A denoiser of one's own may have padding on the left, or a pad inside a prompt."""
    model, _ = load_checkpoint(straight / "ckpt.pt")
    prompt = torch.tensor([[model.config.pad, model.config.pad, 5, model.config.pad, 6]])
    read = []
    encode_prompt = model.encode_prompt
    monkeypatch.setattr(model, "encode_prompt",
                        lambda prompt: read.append(prompt) or encode_prompt(prompt))
    generate(model, prompt, 2)
    assert len(read) == 1 and torch.equal(read[0], prompt)


@pytest.mark.parametrize("argv, message", [
    (["--num_samples", "L"], "whole number"), (["--num_samples", "0"], "whole number"),
    (["--steps", "0"], "whole number"), (["--steps", "l"], "or L"), (["--seed", "-1"], "--seed"),
    (["--seed", "99999999999999999999"], "--seed"),
    *[(["--temperature", t], "--temperature") for t in ("1e-40", "-1", "nan", "inf", "0.0009")],
    (["--prompt", " "], "has 0 tokens"), (["--prompt", "long " * 99], "tokens, not 1 to 24"),
    (["--prompt", "Jo", "--data_dir", "x"], "--data_dir"), (["--compare", "best"], "cannot read"),
    (["--data_dir", "absent"], "absent"), (["--ckpt", "absent.pt"], "absent.pt not found"),
    (["--ckpt", "."], "is a folder"), (["--device", "tpu"], "no device 'tpu'")])
def test_bad_input_ends_in_one_line(ckpt, argv, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    status, _, err = outcome(sample, [*ckpt, *argv], capfd)
    assert status != 0 and message in err and err.count("\n") == 1 and err[:-1].isprintable()


def test_the_lowest_temperature_is_safe(straight):
    """No nan: the likeliest tokens, but for ties."""
    model, state = load_checkpoint(straight / "ckpt.pt")
    prompt = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
    cold = generate(model, prompt, 3, "iid", temperature=0.001)
    assert torch.equal(cold.tokens, generate(model, prompt, 3, "iid").tokens)


@pytest.mark.parametrize("name", ["denoiser", "control"])
def test_untrained_gates_are_not_called_learned(straight, name, capfd):
    """The file to take is named; rules run on any checkpoint."""
    argv = ["--ckpt", str(straight / f"{name}.pt"), "--num_samples", "1"]
    for order in ("learned", "learned:0.5", "iid,learned:0.3+eos_last"):
        status, out, err = outcome(sample, [*argv, "--compare", order], capfd)
        assert status == 1 and not out and err.count("\n") == 1
        assert "trained gates" in err and str(straight / "ckpt.pt") in err
    assert outcome(sample, [*argv, "--compare", "iid,threshold:0.5"], capfd)[0] == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("variables, colored", [
    ({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)])
def test_color_is_for_terminals_that_want_it(ckpt, variables, colored, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.main([*ckpt, "--num_samples", "1"])
    assert ("\033[38;5;196m" in terminal.getvalue()) == colored


def test_nothing_breaks_the_line_of_a_canvas():
    """Tokens are bytes of any text, also of half a character; EOS and PAD have signs of their
    own."""
    enc = build_tokenizer(["ab"])
    tokens = [256, 10, 27, 195, 257, 258, 256]
    line = render(tokens, [1, 1, 1, 1, 1, 1, 2], 1, enc, color=False)
    assert line == "ab  \ufffd∎_·"


def test_numbers_of_steps_and_samples():
    assert parse_steps("L") >= 10**9 and parse_steps("12") == whole_number("12") == 12
    for text in ("0", "-1", "1.5", "", "L", "1e3", "٣x", "9" * 12):
        with pytest.raises(argparse.ArgumentTypeError):
            whole_number(text)


def test_a_question_is_shown_above_the_answers_to_its_own_prompt(ckpt, tmp_path):
    """The first item does not fit, and --data_dir goes before the folder that was trained on."""
    rows = [{"question": question, "answer": "#### 1"} for question in ("long " * 99, "Jo has 1.")]
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, state = load_checkpoint(ckpt[1])
    enc = build_tokenizer(state["pieces"])
    args = sample.parse_args([*ckpt, "--data_dir", str(tmp_path)])
    [item], prompt = sample.items_to_show(args, state["train_config"], enc, model.config)
    assert item["question"] == decode(prompt[0].tolist(), enc) == "Jo has 1."
