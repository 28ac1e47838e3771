"""orders.py: every rule against its definition in plain Python, one row at a time; bugs known from other
implementations; names.

The definitions share nothing with orders.py: lists and floats instead of tensors, `sorted` and `max`, which
keep or take the first of equals, instead of ranks."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import UserError
from orders import ORDERS, Order, State, draw, parse_order, top_k
from sample import generate

V, EOS, PAD = 5, 3, 4
CERTAIN = (1.0, 0.0, 0.0, 0.0, 0.0)
VARIANTS = ["", "+eos_last", "@3", "@2+eos_last"]
KNOBS = {"learned": [(), (0.3,), (0.6,), (0.3, 1.2), (0.1, 0.5), (0.6, 0.001)], "threshold": [(0.35,), (0.5,), (0.95,)], "factor": [(0.25,), (1.0,), (2.5,)],
         "entropy_bound": [(0.0,), (0.7,), (3.0,)], "low_entropy": [(0.3,), (1.0,), (1.4,)],
         "dilated": [(1.0,), (2.0,), (3.0,)], "klass": [(0.1, 0.2), (0.5, 0.02), (0.5, 0.5)]}

# Distributions over V tokens. Positions with the same one tie in every score, and some tie in confidence alone.
# Other scores, and the knobs above, lie far enough apart that float32 orders them as exact numbers are ordered.
MENU = [(0.999996, 1e-6, 1e-6, 1e-6, 1e-6), (0.9, 0.04, 0.03, 0.02, 0.01), (0.6, 0.2, 0.1, 0.07, 0.03),
        (0.6, 0.3, 0.05, 0.03, 0.02), (0.4, 0.3, 0.15, 0.1, 0.05), (0.4, 0.38, 0.1, 0.07, 0.05), (0.2, 0.2, 0.2, 0.2, 0.2)]


def entropy(p):
    return -sum(x * math.log(x) for x in p)


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q))


def random_rows(seed):
    """The rows of a batch, with unequal numbers of masked positions."""
    rng = random.Random(seed)
    L, tokens = rng.randint(1, 8), rng.sample(range(V), V)
    T = rng.randint(1, L)
    t, seen = rng.randint(1, T), rng.choice([0, 1, 2, 2, 2])

    def row():
        menu = [[p[token] for token in tokens] for p in rng.sample(MENU, 3)]
        masked = [rng.random() < 0.7 for _ in range(L)]
        masked[rng.randrange(L)] = True
        p = [rng.choice(menu) for _ in range(L)]
        past = [[now if rng.random() < 0.7 else rng.choice(menu) for now in p] for _ in range(seen)]  # mostly settled
        return SimpleNamespace(
            p=p, past=past, masked=masked, t=t, T=T, tokens=rng.choices(range(V), k=L), x0=rng.choices(range(V), k=L),
            alpha=rng.choices([0.05, 0.25, 0.5, 0.75, 0.95], k=L), u_first=rng.random(),
            u_gate=[rng.random() for _ in range(L)], u_row=[rng.choice([rng.random(), 0.5]) for _ in range(L)])

    return [row() for _ in range(rng.randint(1, 4))]


def row_of(p, **changes):
    """A row written by hand: distributions p, all positions masked, first step of many unless said otherwise."""
    L = len(p)
    row = dict(p=p, past=[], masked=[True] * L, t=1, T=L, tokens=[0] * L, x0=[0] * L, alpha=[0.5] * L, u_first=0.5,
               u_gate=[0.5] * L, u_row=[0.5] * L)
    return SimpleNamespace(**{**row, **changes})


def state_of(rows):
    def stack(name, dtype=torch.float64):
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

    def log(p):
        return torch.tensor(p).log().clamp(min=-200)  # float32 and finite, as the model's

    return State(
        log_p=log([row.p for row in rows]), past=[log(p) for p in zip(*(row.past for row in rows))], t=rows[0].t, T=rows[0].T,
        tokens=stack("tokens", torch.long), x0=stack("x0", torch.long), masked=stack("masked", torch.bool),
        gate_logits=stack("alpha").logit().float(), u_gate=stack("u_gate"), u_first=stack("u_first"), u_row=stack("u_row"))


def revealed(order, *rows):
    """The positions that an order reveals in each row of a batch."""
    order = parse_order(order) if isinstance(order, str) else order
    return [[i for i, opens in enumerate(row) if opens] for row in order(state_of(rows), EOS).tolist()]


def choices(masked, tokens, eos_last):
    """The positions that a row's order may reveal."""
    masked = [i for i, is_masked in enumerate(masked) if is_masked]
    content = [i for i in masked if tokens[i] < EOS]
    return content if eos_last and content else masked


def cases(name, variant):
    """Random rows with what a rule may reveal, its knob and what it reveals."""
    order, sizes = parse_order(name + variant), set()
    for seed in range(150):
        rows = random_rows(seed)
        for knob in KNOBS.get(name, [()]):
            for row, found in zip(rows, revealed(replace(order, knob=knob), *rows)):
                row.block = order.block
                yield row, choices(row.masked, row.tokens, order.eos_last), knob, found
                sizes.add(len(found))
    assert len(sizes) > 1, "every state gave the same number of positions"


def cases_in_front(name, variant):
    """The same for the rules that stay in the leftmost block which has something to reveal."""
    for row, may, knob, found in cases(name, variant):
        yield row, [i for i in may if i // row.block == may[0] // row.block], knob, found


# --- an even share at every step -----------------------------------------------------------------------------

def assert_best_of_an_even_share(name, variant, score):
    """floor(what may be revealed / steps left), at least 1, earlier blocks first, the leftmost of equals first."""
    for row, may, _, found in cases(name, variant):
        share = max(1, len(may) // (row.T - row.t + 1))
        assert found == sorted(sorted(may, key=lambda i: (i // row.block, -score(row, i)))[:share])


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_to_right_takes_the_leftmost(variant):
    assert_best_of_an_even_share("left_to_right", variant, lambda row, i: -i)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dilated_takes_places_far_apart_and_more_at_every_step(variant):
    bits_from_behind = lambda i: f"{i:010b}"[::-1]
    for row, may, (knob,), found in cases("dilated", variant):
        done, now, end = ((t**int(knob) for t in (row.t - 1, row.t, row.T)))
        share = max(1, len(may) * (now - done) // (end - done))
        assert found == sorted(sorted(may, key=lambda i: (i // row.block, bits_from_behind(i)))[:share])


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_takes_the_highest_of_the_noise_that_stays(variant):
    assert_best_of_an_even_share("random", variant, lambda row, i: row.u_row[i])


@pytest.mark.parametrize("variant", VARIANTS)
def test_confidence_takes_the_most_probable(variant):
    assert_best_of_an_even_share("confidence", variant, lambda row, i: max(row.p[i]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_margin_takes_the_largest_lead_of_the_first_token_over_the_second(variant):
    assert_best_of_an_even_share("margin", variant, lambda row, i: sorted(row.p[i])[-1] - sorted(row.p[i])[-2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_entropy_takes_the_lowest(variant):
    assert_best_of_an_even_share("entropy", variant, lambda row, i: -entropy(row.p[i]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_oracle_takes_the_most_probable_true_token(variant):
    assert_best_of_an_even_share("oracle", variant, lambda row, i: math.log(row.p[i][row.x0[i]]))


# --- adaptive --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_learned_is_eq_1_by_inverse_cdf(variant):
    """p(first open gate = i) is alpha^i prod_{j<i} (1 - alpha^j), normalised; gates after it are free."""
    for row, front, knob, found in cases_in_front("learned", variant):
        if not knob:
            law = [row.alpha[i] * math.prod(1 - row.alpha[j] for j in front if j < i) for i in front]
            assert math.isclose(sum(law), 1 - math.prod(1 - row.alpha[i] for i in front))
            first = next(i for n, i in enumerate(front) if sum(law[: n + 1]) / sum(law) > row.u_first)
            assert found == [i for i in front if i == first or (i > first and row.u_gate[i] < row.alpha[i])]


def open_gates(row, front, alpha):
    return [i for i in front if row.alpha[i] > alpha] or [max(front, key=lambda i: row.alpha[i])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_learned_with_a_knob_opens_the_gates_above_it_or_the_likeliest(variant):
    for row, front, knob, found in cases_in_front("learned", variant):
        if len(knob) == 1:
            assert found == open_gates(row, front, *knob)


@pytest.mark.parametrize("variant", VARIANTS)
def test_learned_with_two_knobs_keeps_open_gates_waiting_while_their_token_is_in_doubt(variant):
    waited = set()
    for row, front, knob, found in cases_in_front("learned", variant):
        if len(knob) == 2:
            opened, H = open_gates(row, front, knob[0]), lambda i: entropy(row.p[i])
            assert found == ([i for i in opened if H(i) <= knob[1]] or [min(opened, key=H)])
            waited.add((len(opened) > 1, len(found) < len(opened)))
    assert waited == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_iid_is_the_earliest_of_uniform_reveal_times(variant):
    for row, front, _, found in cases_in_front("iid", variant):
        time = {i: math.floor(row.u_row[i] * row.T) + 1 for i in front}
        assert found == [i for i in front if time[i] == min(time.values())]


@pytest.mark.parametrize("variant", VARIANTS)
def test_threshold_is_all_that_reach_it_or_the_best(variant):
    for row, front, (c,), found in cases_in_front("threshold", variant):
        assert found == ([i for i in front if max(row.p[i]) >= c] or [max(front, key=lambda i: max(row.p[i]))])


@pytest.mark.parametrize("variant", VARIANTS)
def test_factor_is_the_largest_n_within_it(variant):
    for row, front, (f,), found in cases_in_front("factor", variant):
        ranking = sorted(front, key=lambda i: -max(row.p[i]))
        sizes = [n for n in range(1, len(front) + 1) if (n + 1) * (1 - max(row.p[ranking[n - 1]])) < f]
        assert found == sorted(ranking[: max(sizes, default=1)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_entropy_bound_is_the_longest_prefix_within_the_bound(variant):
    for row, front, (bound,), found in cases_in_front("entropy_bound", variant):
        ranking = sorted(front, key=lambda i: entropy(row.p[i]))
        prefixes = [ranking[:n] for n in range(1, len(front) + 1)]
        within = [prefix for prefix in prefixes if sum(H := [entropy(row.p[i]) for i in prefix]) - max(H) <= bound]
        assert found == sorted(max(within, key=len))


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_entropy_is_all_below_it_or_the_lowest(variant):
    for row, front, (bound,), found in cases_in_front("low_entropy", variant):
        assert found == ([i for i in front if entropy(row.p[i]) < bound] or [min(front, key=lambda i: entropy(row.p[i]))])


@pytest.mark.parametrize("variant", VARIANTS)
def test_klass_is_all_that_are_sure_and_have_settled_for_two_steps_or_the_best(variant):
    for row, front, (c, bound), found in cases_in_front("klass", variant):
        ready = []
        if len(row.past) == 2:
            last, before = row.past
            ready = [i for i in front if max(row.p[i]) > c and kl(row.p[i], last[i]) < bound and kl(last[i], before[i]) < bound]
        assert found == (ready or [max(front, key=lambda i: max(row.p[i]))])


@pytest.mark.parametrize("order, expected", [
    ("threshold:1", [0, 1]), ("low_entropy:0", [0]), ("entropy_bound:0", [0, 1, 3]), ("factor:0", [0]), ("learned:0.5", [3]),
    ("klass:1:0.1", [0]), ("klass:0.9:0", [0]), ("klass:0.9:0.1", [0, 1])])
def test_what_equals_the_knob(order, expected):
    """Reaching a threshold or a bound is enough; every other comparison is strict."""
    p = [CERTAIN, CERTAIN, MENU[2], MENU[3]]
    assert revealed(order, row_of(p, past=[p, p], alpha=[0.5, 0.5, 0.5, 0.75])) == [expected]


# --- all of them -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ORDERS)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(spread=st.sampled_from([0.0, 0.01, 1.0, 100.0]), B=st.integers(1, 5), L=st.integers(1, 20), seed=st.integers(0, 10**6),
       data=st.data())
def test_any_state_reveals_some_of_its_choices_whatever_the_batch(name, variant, spread, B, L, seed, data):
    generator = torch.Generator().manual_seed(seed)
    log_p, now, before = (spread * torch.randn(3, B, L, V, generator=generator)).log_softmax(-1)
    T = data.draw(st.integers(1, L))
    masked = torch.rand(B, L, generator=generator) < 0.6
    masked[torch.arange(B), torch.randint(L, (B,), generator=generator)] = True
    u = torch.rand(B, 2 * L + 1, generator=generator, dtype=torch.float64)
    tokens, x0 = torch.randint(V, (2, B, L), generator=generator)
    gate_logits = 15 * (spread * torch.randn(B, L, generator=generator)).tanh()
    s = State(log_p, tokens, gate_logits, masked, data.draw(st.integers(1, T)), T,
              u[:, :L], u[:, -1], u[:, L:-1], [now, before][: data.draw(st.integers(0, 2))], x0)
    knob = data.draw(st.sampled_from((ORDERS[name].knob, *ORDERS[name].sweep, *KNOBS.get(name, ()))))
    order = replace(parse_order(name + variant), knob=knob)
    together = order(s, EOS)
    for b in range(B):
        found = [i for i, opens in enumerate(together[b].tolist()) if opens]
        assert found and set(found) <= set(choices(masked[b].tolist(), s.tokens[b].tolist(), order.eos_last))
        alone = {k: v[b : b + 1] for k, v in vars(s).items() if isinstance(v, torch.Tensor)}
        assert torch.equal(order(replace(s, **alone, past=[p[b : b + 1] for p in s.past]), EOS)[0], together[b])


@pytest.mark.parametrize("order, n", [
    ("random", 4), ("confidence", 4), ("margin", 4), ("entropy", 4), ("oracle", 4), ("factor:1.5", 3), ("entropy_bound:1", 2),
    ("threshold:0.99", 1), ("low_entropy:0.1", 1), ("klass:0.99:0.1", 1), ("learned:0.9", 1), ("learned:0.4:0.1", 1)])
def test_equals_are_taken_from_the_left(order, n):
    """40 positions alike, of which the even ones are masked: more than what sorting routines keep in order by chance."""
    alike = row_of([(0.7, 0.2, 0.05, 0.03, 0.02)] * 40, masked=[True, False] * 20, T=5)
    assert revealed(order, alike) == [[2 * i for i in range(n)]]


def test_top_k_skips_what_is_revealed():
    score, masked = torch.tensor([[1.0, 2.0, 2.0, 2.0]]), torch.tensor([[True, False, True, True]])
    assert top_k(score, masked, 1)[0].tolist() == [False, False, True, False]
    assert top_k(score, masked, 9)[0].tolist() == [True, False, True, True]


def test_learned_opens_a_gate_even_where_all_are_nearly_closed():
    closed = row_of([MENU[0]] * 4, masked=[False, True, False, True], alpha=[3e-7] * 4, u_first=0.99)
    assert revealed("learned", closed) == [[3]]


# --- bugs of other implementations: beside the right answer, the one that the bug gives -----------------------------

def test_entropy_reveals_the_certain_not_the_uncertain():
    """The sign flipped: KLASS' repository, llama.cpp's diffusion example."""
    p = [MENU[3], MENU[6], MENU[1]]
    H = [entropy(x) for x in p]
    right, wrong = H.index(min(H)), H.index(max(H))
    assert (right, wrong) == (2, 1)
    assert revealed("entropy", row_of(p)) == [[right]]


@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy", "oracle"])
def test_each_row_has_its_own_top_k(rule):
    """One top-k over the whole batch: SMDM's sampler."""
    sure, doubtful = [MENU[0], MENU[1], MENU[2]], [MENU[6], MENU[4], MENU[6]]
    best_of_six = sorted(range(6), key=lambda i: -max([*sure, *doubtful][i]))[:2]
    right, wrong = [[0], [1]], [[i for i in best_of_six if i < 3], [i - 3 for i in best_of_six if i >= 3]]
    assert wrong == [[0, 1], []]
    assert revealed(rule, row_of(sure), row_of(doubtful)) == right


def test_each_row_counts_its_own_masks():
    """The batch's mean for every row: Dream's sampler."""
    masked = [[True] * 6, [True, False, False, False, False, True]]
    right, wrong = [sum(row) // 2 for row in masked], [sum(map(sum, masked)) // len(masked) // 2] * 2
    assert (right, wrong) == ([3, 1], [2, 2])
    rows = [row_of([MENU[2]] * 6, masked=row, t=5, T=6) for row in masked]
    assert [len(found) for found in revealed("confidence", *rows)] == right


def test_factor_does_not_give_the_last_slot_away():
    """If only the last one fails, it is revealed all the same: Fast-dLLM's loop."""
    c = [0.99, 0.98, 0.3]
    stop = next((n for n in range(3) if (n + 2) * (1 - c[n]) >= 1), 2)  # this index cannot tell "fails at the last" from "ends"
    right, wrong = list(range(stop)), list(range(stop + 1))
    assert (right, wrong) == ([0, 1], [0, 1, 2])
    row = row_of([(x, *[(1 - x) / 4] * 4) for x in c])
    assert revealed("factor:1", row) == [right]
    assert revealed("factor:3", row) == [wrong]  # here the last one passes: 4 * 0.7 < 3


class SurestOfTheEnd:
    """A network whose distributions are the same at every state, and surest where it is likely to write EOS or PAD."""
    config = SimpleNamespace(answer_len=6, vocab_size=V, mask=V, eos=EOS, pad=PAD)
    best = torch.tensor([EOS, 0, PAD, 1, 2, PAD])

    def read(self, prompt):
        return prompt

    def __call__(self, prompt, z, read=None):
        return torch.where(self.best < EOS, 0.6, 0.88).expand(z.shape)  # p of the best token

    def log_p(self, h):
        is_best = torch.nn.functional.one_hot(self.best, V).bool()
        return torch.where(is_best, h[..., None], (1 - h[..., None]) / (V - 1)).log()

    def gate_logits(self, h):
        return 15 * h - 11


@pytest.mark.parametrize("order", [*ORDERS, "learned:0.5", "learned:0.4:0.6", "confidence@2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eos_last_holds_the_end_back(order, temperature):
    """A ban without effect, because the score does not look where it is set: LLaDA's EOS flags. Through generate(), which
    proposes the same tokens at every state here, since neither the distributions nor the noise of a row's tokens change."""
    model, prompt = SurestOfTheEnd(), torch.zeros(32, 0, dtype=torch.long)
    x0 = model.best.expand(32, -1)
    held, dead = (generate(model, prompt, 6, order + flag, temperature=temperature, x0=x0) for flag in ("+eos_last", ""))
    assert torch.equal(held.tokens, dead.tokens)
    end = held.tokens >= EOS
    assert end.any() and not end.all()

    def waits(out):
        return out.reveal_step.masked_fill(end, 0).amax(-1) < out.reveal_step.masked_fill(~end, 7).amin(-1)

    assert waits(held).all() and not waits(dead).all()


@pytest.mark.parametrize("name", [*ORDERS, "learned:0.5", "learned:0.4:0.6", "confidence@2", "entropy+eos_last"])
def test_finish_reveals_everything_once_all_that_would_be_left_is_certain(name):
    finished = set()
    for seed in range(150):
        rows = random_rows(seed)
        for row, plain, found in zip(rows, revealed(name, *rows), revealed(name + "+finish", *rows)):
            masked = [i for i in range(len(row.p)) if row.masked[i]]
            done = all(i in plain or max(row.p[i]) >= 0.99 for i in masked)
            assert found == (masked if done else plain)
            finished.add((done, found == plain))
    assert (False, True) in finished and ((True, False) in finished or name in ("threshold", "factor", "entropy_bound", "low_entropy"))  # they leave nothing certain


# --- drawing -------------------------------------------------------------------------------------------------------

def test_draw_matches_the_probabilities():
    log_p = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.bincount(draw(log_p.expand(1000, -1), u), minlength=4).tolist() == [100, 0, 600, 300]
    assert draw(torch.tensor([0.0, 0.5, 0.5]).log(), torch.tensor(0.0)) == 1  # the least uniform draws no impossible token
    assert draw(torch.tensor([0.5, 0.5]).log(), torch.tensor(1.0)) == 1  # what float64 uniforms round to in float32


@pytest.mark.parametrize("place", [1, 2])
def test_draw_reaches_tokens_rarer_than_float32_can_add_up(place):
    """p = 2^-30, between two tokens of nearly 1/2 or after them: drawn by exactly the uniforms that it owns."""
    p = [0.5, 0.5]
    p.insert(place, 2.0**-30)
    log_p = torch.tensor(p).log()
    exact = [math.exp(x) for x in log_p.tolist()]
    start, end = sum(exact[:place]) / sum(exact), sum(exact[: place + 1]) / sum(exact)
    u = torch.tensor([start - 2**-32, start + 2**-32, end - 2**-32, min(end + 2**-32, 1 - 2**-53)], dtype=torch.float64)
    right = [place - 1, place, place, 2]
    assert draw(log_p.expand(4, -1), u).tolist() == right

    # the same in float32, where the middle one owns nothing and 1 - 2^-29 is 1
    assert torch.searchsorted(log_p.exp().cumsum(-1), u.float(), right=True).clamp(max=2).tolist() != right
    # Gumbel noise from float32 uniforms ends at 16.64: added to ln 2^-30 it stays below the worst of the others
    highest, lowest = -math.log(-math.log(1 - 2**-24)), -math.log(-math.log(2**-24))
    assert highest + log_p[place] < lowest + log_p[0]


# --- names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ORDERS)
def test_names_survive_being_printed(name):
    rule = ORDERS[name]
    assert Order(name, rule.knob) == parse_order(name)
    odd = [(1e6 if name != "dilated" else 9.5,), (0.1234567,)] if len(rule.knob) == 1 else []
    for knob in {rule.knob, *rule.sweep, *odd}:
        for block in ("", "@1", "@8"):
            for flag in ("", "+eos_last", "+finish", "+eos_last+finish"):
                text = ":".join([name, *map(str, knob)]) + block + flag
                order = parse_order(f" {text} ")
                assert order == Order(name, knob, int(block[1:] or 10**9), "eos" in flag, "finish" in flag) == parse_order(str(order))


@pytest.mark.parametrize("text, printed", [
    ("learned", "learned"), ("learned:0.50", "learned:0.5"), ("threshold", "threshold:0.9"), ("factor", "factor:1"),
    ("klass", "klass:0.9:0.01"), ("entropy_bound@4+eos_last", "entropy_bound:0.01@4+eos_last"),
    ("low_entropy:1e-3", "low_entropy:0.001"), ("confidence@08", "confidence@8")])
def test_a_printed_name_shows_its_knobs(text, printed):
    assert str(parse_order(text)) == printed


@pytest.mark.parametrize("text", ["", "best", "Learned", "@8", "+eos_last", ":0.5"])
def test_an_unknown_name_is_told_the_known_ones(text):
    with pytest.raises(UserError, match="unknown order .*: choose from " + ", ".join(ORDERS)):
        parse_order(text)


@pytest.mark.parametrize("text", [
    "learned 0.5", "confidence:3", "iid:0.5", "learned:0.5:0.5:0.5", "learned:0.5:", "confidence+finish+eos_last", "klass:0.9", "klass:0.9:0.01:2", "threshold:", "threshold:high",
    "dilated:0", "dilated:600", "threshold:nan", "threshold:inf", "threshold:-inf", "threshold:-0.1", "klass:0.9:nan", "confidence@", "confidence@0",
    "confidence@-2", "confidence@x", "confidence@2.5", "confidence@4@8", "confidence@8:0.5", "confidence+", "confidence+eos",
    "confidence+eos_last+eos_last", "confidence+eos_last@8"])
def test_a_malformed_name_is_shown_a_good_one(text):
    with pytest.raises(UserError) as error:
        parse_order(text)
    message = str(error.value)
    assert message.startswith(f"cannot read order {text!r}: write it like ")
    examples = message.split("write it like ")[1].replace(" or ", ", ").split(", ")
    assert len(examples) == 4 and all(parse_order(example) for example in examples)
