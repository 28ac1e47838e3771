"""data.py: the toy, loaders on small files made here, the tokenizer, answer checking."""

import json
import random
import re
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (TOY_SIZES, UserError, augment, build_tokenizer, decode, encode_prompt, encode_split, final_number, frequent_pieces, is_correct,
                  load_splits, to_target, toy_example, toy_split, value_of)


@pytest.mark.parametrize("either_way", [False, True])
def test_toy_answers_are_true_and_follow_from_the_question(either_way):
    """Every equation holds and uses a running total and the question's operand; the last adds the totals up. In toy2,
    half of the stories are told backwards, and their equations with them."""
    operators, lengths, swapped, backwards = {"buys": "+", "sells": "-", "times": "*", "splits": "/"}, set(), 0, 0
    for item in toy_split("train", 500, either_way=either_way):
        equations = re.findall(r"<<(\d)([-+*/])(\d)=(\d+)>>", item["answer"])
        expected, totals = [], []
        for sentence in item["question"].split(".")[:2]:
            start, total = re.search(r"has (\d)", sentence), int(re.search(r"has (\d)", sentence)[1])
            told, person = re.findall(r"(buys|sells|times|splits) (\d)", sentence), []
            turned = start.start() > 10
            for verb, b in told[::-1] if turned else told:
                result = {"+": total + int(b), "-": total - int(b), "*": total * int(b), "/": total / int(b)}[operators[verb]]
                person.append((total, operators[verb], int(b), result))
                total = result
                assert 1 <= total <= 9
            expected += person[::-1] if turned else person
            totals.append(total)
            backwards += turned
        expected.append((totals[0], "+", totals[1], sum(totals)))
        assert len(equations) == len(expected)
        for (left, op, right, result), (a, expected_op, b, expected_result) in zip(equations, expected):
            assert op == expected_op and int(result) == expected_result
            assert (int(left), int(right)) == (a, b) or (op in "+*" and (int(left), int(right)) == (b, a))
            swapped += (int(left), int(right)) != (a, b)
        assert final_number(item["answer"]) == sum(totals)
        lengths.add(len(equations))
    assert lengths == set(range(5, 10)) and swapped > 400 and (400 < backwards < 600 if either_way else backwards == 0)


def test_toy_is_seeded_and_splits_share_no_question():
    assert toy_split("train", 50, seed=1) == toy_split("train", 50, seed=1) != toy_split("train", 50, seed=2)
    splits = load_splits("toy", toy_sizes={**TOY_SIZES, "train": 3000})
    questions = {name: {item["question"] for item in items} for name, items in splits.items()}
    assert not questions["train"] & questions["test"] and not questions["train"] & questions["val"] and not questions["val"] & questions["test"]
    assert len(splits["test"]) == 2000 and load_splits("toy", seed=5, toy_sizes={"test": 2000})["test"] == splits["test"]


# --- loaders ---------------------------------------------------------------------------------------

ITEM = {"question": "Jo has 3 + 4?", "answer": "It is 3+4=<<3+4=7>>7.\n#### 7"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_jsonl_folder_with_a_validation_split_held_out(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{**ITEM, "question": f"q{i}"} for i in range(100)])
    write_jsonl(tmp_path / "test.jsonl", [ITEM])
    splits = load_splits("gsm8k", str(tmp_path))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [90, 10, 1]
    assert len({item["question"] for item in splits["train"] + splits["val"]}) == 100
    assert load_splits("gsm8k", str(tmp_path), seed=3)["val"] == splits["val"]


def test_aug_text_and_copies_with_a_steps_field(tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes(b"q one||<<1+1=2>> <<2*2=4>> #### 4\r\n\r\nq two|| #### 9\n")
    write_jsonl(tmp_path / "valid.jsonl", [{"question": "q one", "steps": ["<<1+1=2>>"], "answer": "2"}])
    write_jsonl(tmp_path / "test.jsonl", [{"question": "q", "cot": "<<5-1=4>>", "answer": "4"}])
    splits = load_splits("gsm8k-aug", str(tmp_path))
    assert splits["train"] == [{"question": "q one", "answer": "<<1+1=2>> <<2*2=4>> #### 4"}, {"question": "q two", "answer": "#### 9"}]
    assert splits["val"][0]["answer"] == "<<1+1=2>> #### 2" and splits["test"][0]["answer"] == "<<5-1=4>> #### 4"
    assert "1 validation or test questions also stand in train" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [
    (b'{"question": "q"}\n', "line 1.*answer"), (b'\n{"question": "q", "answer": "#### 1"}\nnot json\n', "line 3"),
    (b'{"question": "q", "answer": "no number"}\n', "line 1.*####"), (b'[1]\n', "line 1"), (b'{"question": 3, "answer": "#### 1"}\n', "line 1"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer"), (b"\xff\xfe\x00", "cannot read"), (b"", "no examples")])
def test_bad_files_say_what_is_wrong(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    write_jsonl(tmp_path / "test.jsonl", [ITEM])
    with pytest.raises(UserError, match=message):
        load_splits("gsm8k", str(tmp_path))


def test_missing_files_and_bad_aug_lines(tmp_path):
    with pytest.raises(UserError, match="no train.jsonl"):
        load_splits("gsm8k", str(tmp_path))
    (tmp_path / "train.txt").write_text("a question without bars #### 3\n")
    with pytest.raises(UserError, match="line 1"):
        load_splits("gsm8k-aug", str(tmp_path))


def test_targets():
    assert to_target(ITEM["answer"], "equations") == "<<3+4=7>> #### 7"
    assert to_target(ITEM["answer"], "full") == ITEM["answer"]
    assert to_target("no steps\n#### 1,000", "equations") == "#### 1,000"


# --- tokenizer and canvas ---------------------------------------------------------------------------

TEXTS = ["Max has 8 eggs, buys 1.", "<<1+8=9>> <<9/3=3>> #### 3", "naïve 日本 🙂 \u202eabc\x00 \t\n", "<|mask|> <|eos|> a_b c__d", "", "  ", "é́ ½ ²"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(text):
    enc = build_tokenizer(frequent_pieces(toy_split("train", 20), "equations"))
    ids = enc.encode_ordinary(text)
    assert enc.decode(ids) == text and all(i < enc.n_vocab - 3 for i in ids)


def test_digits_are_single_tokens_and_equations_are_short():
    enc = build_tokenizer(frequent_pieces(toy_split("train", 200), "equations"))
    pieces = [enc.decode([i]) for i in enc.encode_ordinary("<<12+8=20>> <<2/2=1>> #### 1")]
    assert pieces == ["<<", "1", "2", "+", "8", "=", "2", "0", ">> <<", "2", "/", "2", "=", "1", ">> #### ", "1"]


def test_canvas_holds_answer_eos_and_pad_and_what_does_not_fit_is_counted():
    items = [{"question": "a b", "answer": "<<1+1=2>> #### 2"}, {"question": "a " * 50, "answer": "#### 2"}, {"question": "a", "answer": "<<1+1=2>> " * 9 + "#### 2"}]
    enc = build_tokenizer(frequent_pieces(items, "equations"))
    eos, pad = enc.n_vocab - 3, enc.n_vocab - 2
    split = encode_split(items, enc, 10, 12, "equations")
    assert split.fits == [True, False, False] and split.prompt.shape == (1, 10) and split.x0.shape == (1, 12)
    row = split.x0[0].tolist()
    assert row.count(eos) == 1 and row[row.index(eos) + 1 :] == [pad] * (11 - row.index(eos))
    assert decode(row, enc) == "<<1+1=2>> #### 2"
    assert split.prompt[0, 2:].tolist() == [pad] * 8 and enc.decode(split.prompt[0, :2].tolist()) == "a b"
    assert encode_prompt("a " * 50, enc, 10) is None


# --- answers ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [
    ("<<1+1=2>> #### 2", "2"), ("#### 18.00", "18"), ("####18", "18"), ("#### $1,234", "1234"), ("#### -5", "-5"), ("#### -$5", "-5"),
    ("#### 3 #### 4", "4"), ("#### 10%", "10"), ("#### 18.", "18"), ("#### 1,000,000 eggs", "1000000"), ("#### +7", "7"),
    ("#### .5", None), ("18", None), ("", None), ("####", None), ("#### x 3", None), ("#### ,", None), ("#### ٣", None)])
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("generated, answer, right", [
    ("#### 18.00", "#### 18", True), ("#### 18", "#### 1,8", True), ("#### 17", "#### 18", False), ("18", "#### 18", False),
    ("", "#### 18", False), ("no number", "no number", False)])
def test_strict_accuracy(generated, answer, right):
    assert is_correct(generated, answer) is right


def test_the_question_of_an_example_names_every_operation():
    item = toy_example(random.Random(0))
    assert item["question"].count(",") == item["answer"].count("<<") - 1


@pytest.mark.parametrize("expression, value", [
    ("1+2*3", 7), ("(1+2)*3", 9), ("-4/8", "-1/2"), ("2--3", 5), ("50%*20", 10), ("20*(5%)", 1), ("1,000/4", 250), (".5+0.25", "3/4"), ("0.1+0.2", "3/10"),
    (" 7 ", 7), ("", None), ("1/0", None), ("x+1", None), ("2**9", None), ("7//2", None), ("(2)(3)", None), ("(1", None), ("1e5", None), ("9" * 300, None),
    ("(" * 150 + "1" + ")" * 150, None), ("__import__('os')", None), ("٣+1", None), ("1_0", None), ("1 2", None), ("...", None), ("5.", 5),
    ("12345678901234567.89", "1234567890123456789/100")])
def test_expressions_are_valued_exactly_and_never_run(expression, value):
    assert value_of(expression) == (None if value is None else Fraction(value))


@pytest.mark.parametrize("expression", [
    "(" * 200, "(" * 100 + "1" + ")" * 100, "(" * 95 + "1" + ")" * 95, "-" * 199 + "1", "-" * 200, "-(" * 60 + "1" + ")" * 60, "1" + "/7" * 99, "1+" * 99 + "1",
    "9" * 200, "9" * 200 + "*" + "9" * 200, "9" * 99 + "*" + "9" * 100, "9*" * 99 + "9", "9" * 10**6, "1%" * 100, "." * 200, "%" * 200, "\x00", "1" + "\n" * 150])
def test_no_expression_is_too_much(expression):
    """A value or None, in no time and without an exception, also where little of the stack is left."""
    def deep(frames):
        return value_of.__wrapped__(expression) if frames == 0 else deep(frames - 1)

    start = time.perf_counter()
    for frames in (0, 400, 800):
        value = deep(frames)
        assert value is None or isinstance(value, Fraction) and max(abs(value.numerator), value.denominator) < 10**201
    assert time.perf_counter() - start < 0.5


# --- number augmentation ----------------------------------------------------------------------------

def example(question, *equations, final=None):
    """An item whose text repeats each equation, as GSM8K's does."""
    lines = [f"So it is {e.split('=')[0]} = $<<{e}>>{e.split('=')[1]} now." for e in equations]
    return {"question": question, "answer": "\n".join([*lines, f"#### {final or equations[-1].split('=')[1]}"])}


AUGMENTABLE = [
    example("Ann has 48 clips and buys half as many. How many has she?", "48/2=24", "48+24=72"),
    example("A $1,200 phone is 20% off. Tax is $35.50. What is the price?", "1200*20/100=240", "1200-240=960", "960+35.50=995.5"),
    example("Jo has 80 balls, 25% are red, and 3 more are added. How many are red?", "80*.25=20", "20+3=23"),
    example("Jo has 80 balls, 25% are red, and 3 more are added. How many are red?", "25%*80=20", "(20 + 3)=23"),
    example("A car goes 60 miles in 1.5 hours. How far in 4 hours?", "60/1.5=40", "40*4=160"),
    example("Eggs cost $0.45 each. He buys 20 and a $6.00 cake, and pays with $100. The change?", "20*.45=9.00", "9+6=15.00", "100-15=85"),
    example("A rope of 9 m is cut into 4 parts. How long is each?", "9/4=2.25"),
    example("Jo has 80 m of rope and uses 25%. Left?", "1-.25=0.75", "80*.75=60"),
    example("Jo has 8 pens, sells 5, buys 2. How many?", "8-5=3", "3+2=5"), example("Jo has 5 pens, sells 4. How many?", "5-4=1"),
    example("The Boeing 747 flew 2/5 of 900 miles with 747 people. Those left?", "2/5*900=360", "747-360=387")]


def check_augmented(item, new):
    """`new` is `item` with other numbers, and true. Shares no code with augment."""
    numeral = r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+"
    shape, value = lambda text: re.sub(numeral, "N", text), lambda text: Fraction(text.replace(",", ""))
    assert shape(new["question"]) == shape(item["question"])
    pairs = [[value(n) for n in both] for both in zip(*(re.findall(numeral, each["question"]) for each in (item, new)))]
    changed = {a: b for a, b in pairs if a != b}
    assert changed and not {0, 1, 100} & set(changed)
    for a, b in changed.items():  # the old number stood once and is gone; the new one is of its kind
        assert [x for x, _ in pairs].count(a) == 1 and a not in [y for _, y in pairs]
        assert (a.denominator == 1) == (b.denominator == 1) and (a < 1) == (b < 1) and (a < 100) == (b < 100) and a / 2 <= b <= 2 * a
    hundredths, results = {a / 100: b / 100 for a, b in changed.items() if re.search(rf"(?<![\d.,]){a}( ?%| percent| cent)", item["question"])}, {}
    equations = [re.findall("<<(.*?)=(.*?)>>", each["answer"]) for each in (item, new)]
    assert len(equations[0]) == len(equations[1])
    for (left, result), (new_left, new_result) in zip(*equations):
        assert shape(left) == shape(new_left)
        for a, b in zip(*(map(value, re.findall(numeral, side)) for side in (left, new_left))):
            assert not (a in results and a in changed)
            assert b == results.get(a, changed.get(a, hundredths.get(a, a)))
        exact = eval(re.sub(numeral, lambda m: f"Fraction('{m[0]}')", re.sub(rf"({numeral})%", r"(\1/100)", new_left)))
        assert exact == value(new_result) > 0 and (value(result).denominator == 1) <= (exact.denominator == 1)
        assert (100 * exact).denominator == 1
        results[value(result)] = exact
    assert Fraction(final_number(new["answer"])) == exact
    assert new["answer"] == " ".join(f"<<{left}={result}>>" for left, result in equations[1]) + f" #### {final_number(new['answer'])}"


@pytest.mark.parametrize("item", AUGMENTABLE)
def test_an_augmented_item_is_the_same_problem_with_other_numbers_and_true(item):
    made = [new for new in (augment(item, random.Random(seed)) for seed in range(40)) if new]
    for new in made:
        check_augmented(item, new)
    assert len({new["question"] for new in made}) > 3
    assert augment(item, random.Random(7)) == augment(item, random.Random(7))  # seeded


def test_numbers_keep_their_style_and_follow_through_the_equations():
    new = next(new for seed in range(99) if (new := augment(AUGMENTABLE[1], random.Random(seed))) and "$2," in new["question"])
    price, percent, tax = re.fullmatch(r"A \$(2,\d{3}) phone is (\d+)% off. Tax is \$(\d\d\.\d0). What is the price\?", new["question"]).groups()
    price, saved = int(price.replace(",", "")), int(price.replace(",", "")) * int(percent) // 100
    final = (price - saved) + float(tax)
    assert new["answer"] == f"<<{price}*{percent}/100={saved}>> <<{price}-{saved}={price - saved}>> <<{price - saved}+{tax}={final}>> #### {final}"


@pytest.mark.parametrize("question, equations, why", [
    ("Jo has 3 pens and 3 cups.", ["3+3=6"], "one value, two roles"),
    ("Jo has 12 pens and buys 3, then sells 4.", ["12/3=4", "4+4=8"], "a result or the question's 4?"),
    ("Jo has 12 pens and buys 6, sells 8 of them.", ["12-6=6", "6+8=14"], "a result or the question's 6?"),
    ("Jo has 8 pens, sells 5, gets 4, sells 1.", ["8-5=3", "4-1=3", "3+3=6"], "which 3?"),
    ("Jo has 9 pens.", ["9+17=26"], "17 comes from nowhere"),
    ("Jo has 100 pens and two cups.", ["100+2=102"], "100 stays"),
    ("Jo has 1 pen and 2 cups.", ["1+2=3"], "they stay"), ("Jo has 3 pens and triple.", ["3+100=103"], "which 3 is the word?"), ("Three friends, 3 pens each.", ["3*3=9"], "which 3 is the word?"),
    ("There are 8 ounces in a cup.", ["8+1=9"], "a fact"),
    ("Orders over 20 pens are free. Jo has 40 pens and buys 7.", ["40+7=47"], "20 may be a threshold"),
    ("A bus is $30 and $4 tip, a cab $45 and $5 tip. The cheaper one?", ["45+5=50", "30+4=34"], "a result that is only compared"),
    ("Jo drives on Route 66.", ["66+1=67"], "a name"), ("Jo saw Apollo 13.", ["13+1=14"], "a name"), ("Born in 1995.", ["1995+1=1996"], "a year"),
    ("It is at 7 pm.", ["7-1=6"], "a time"), ("On the 5th floor.", ["5+1=6"], "an ordinal"), ("He works 6 days a week.", ["6*1=6"], "a rate of the calendar"),
    ("Jo has 9 pens for 2 men.", ["9/2=4"], "false"), ("Jo has 9 pens for 7 men.", ["9/7=1.29"], "rounded"), ("Jo sells all 9 pens.", ["9-9=0"], "nothing left"), ("Jo has 3 pens.", ["3+1=4", "4+1=5", "5+1=6"], "2 to 6 are taken"),
    ("Jo has 5 pens.", ["x=5"], "algebra"), ("Jo has 5 pens.", ["5+1=6=6"], "two ="), ("Jo has 5 pens.", ["6=5+1"], "backwards"), ("Jo has 5 pens.", [], "none")])
def test_what_is_not_safe_is_rejected(question, equations, why):
    item = example(question, *equations, final=None if equations else "6")
    assert all(augment(item, random.Random(seed)) is None for seed in range(20)), why


def test_a_small_number_that_is_used_twice_stays():
    """3 may be the boxes and, unwritten, the people; what is drawn besides is still consistent."""
    item = example("Jo, Al and Di give $30 each for 3 boxes at $6. Left for each?", "30*3=90", "6*3=18", "90-18=72", "72/3=24")
    made = [new for new in (augment(item, random.Random(seed)) for seed in range(40)) if new]
    assert made and all("for 3 boxes" in new["question"] and "$30" not in new["question"] for new in made)


def test_steps_without_annotation_and_other_final_numbers_are_rejected():
    good = {"question": "Jo has 48 pens and buys 5, sells 9.", "answer": "48+5 = <<48+5=53>>53. Then 53-9 = <<53-9=44>>44\n#### 44"}
    assert augment(good, random.Random(0))
    for answer in (good["answer"].replace("#### 44", "#### 45"), good["answer"].replace("=44>>", "=45>>"), good["answer"].replace("#### 44", "#### 53"), "48 + 5 = 53, <<53-9=44>>44\n#### 44",
                   good["answer"].replace("#### 44", "then 2 * 22 = 44\n#### 44"), good["answer"].replace("44\n#### 44", "44\n#### "), ""):
        assert augment({**good, "answer": answer}, random.Random(0)) is None


def test_draws_that_change_a_results_kind_are_rejected():
    """Never negative, never a part of what was whole, and None where no draw can do."""
    shared = example("Jo has 24 pens for 8 friends and gives away 2.", "24-2=22", "24/8=3", "22+3=25")
    made = [new for new in (augment(shared, random.Random(seed)) for seed in range(60)) if new]
    assert made and all("." not in new["answer"] and "-" not in re.sub(r"\d-\d", "", new["answer"]) for new in made)
    assert all(augment(example("Jo has 7 pens.", "7*100-650+0=50"), random.Random(seed)) is None for seed in range(5))


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789.,%$/:-+*()<>=# ax", max_size=40), st.text("0123456789.,%/-+*()<>=# ax", max_size=40))
def test_no_text_makes_augment_fail(question, answer):
    for item in ({"question": question, "answer": answer}, {"question": question, "answer": f"<<{answer}>> #### {answer}"}):
        augment(item, random.Random(0))
