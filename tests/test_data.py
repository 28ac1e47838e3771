"""data.py: the toy, loaders on small files made here, the tokenizer, answer checking."""

import json
import random
import re
import time
from decimal import Decimal
from fractions import Fraction

import pytest

from data import (TOY_SIZES, UserError, build_tokenizer, decode, encode_prompt, encode_split, final_number, frequent_pieces, is_correct,
                  load_splits, to_target, toy_example, toy_split, value_of)


def test_toy_answers_are_true_and_follow_from_the_question():
    """Every equation holds and uses a running total and the question's operand; the last adds the totals up."""
    operators, lengths, swapped = {"buys": "+", "sells": "-", "times": "*", "splits": "/"}, set(), 0
    for item in toy_split("train", 500):
        equations = re.findall(r"<<(\d)([-+*/])(\d)=(\d+)>>", item["answer"])
        expected, totals = [], []
        for sentence in item["question"].split(".")[:2]:
            total = int(re.search(r"has (\d)", sentence)[1])
            for verb, b in re.findall(r"(buys|sells|times|splits) (\d)", sentence):
                expected.append((total, operators[verb], int(b)))
                total = {"+": total + int(b), "-": total - int(b), "*": total * int(b), "/": total / int(b)}[operators[verb]]
                expected[-1] += (total,)
                assert 1 <= total <= 9
            totals.append(total)
        expected.append((totals[0], "+", totals[1], sum(totals)))
        assert len(equations) == len(expected)
        for (left, op, right, result), (a, expected_op, b, expected_result) in zip(equations, expected):
            assert op == expected_op and int(result) == expected_result
            assert (int(left), int(right)) == (a, b) or (op in "+*" and (int(left), int(right)) == (b, a))
            swapped += (int(left), int(right)) != (a, b)
        assert final_number(item["answer"]) == sum(totals)
        lengths.add(len(equations))
    assert lengths == set(range(5, 10)) and swapped > 400


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
