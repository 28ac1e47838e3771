"""data.py: the toy, loaders on small files made here, the tokenizer, what the final number is."""

import json
import re
from decimal import Decimal

import pytest

from data import (TOY_SIZES, UserError, build_tokenizer, decode, encode, final_number,
                  frequent_pieces, load_splits, to_target, toy_split)

OPERATORS = {"buys": "+", "sells": "-", "times": "*", "splits": "/"}


@pytest.mark.parametrize("either_way", [False, True])
def test_toy_answers_are_true_and_follow_from_the_question(either_way):
    """Every equation holds and uses a running total and the question's operand; the last adds the
    totals up. In toy2 half of the stories are told backwards, and their equations with them."""
    lengths, swapped, backwards = set(), 0, 0
    for item in toy_split("train", 500, either_way=either_way):
        expected, totals = [], []
        for sentence in item["question"].split(".")[:2]:
            start = re.search(r"has (\d)", sentence)
            turned, total, person = start.start() > 10, int(start[1]), []
            told = re.findall(r"(buys|sells|times|splits) (\d)", sentence)
            for verb, b in told[::-1] if turned else told:
                op, a, b = OPERATORS[verb], total, int(b)
                total = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
                person.append((a, op, b, total))
                assert 1 <= total <= 9
            expected += person[::-1] if turned else person
            totals.append(total)
            backwards += turned
        expected.append((totals[0], "+", totals[1], sum(totals)))
        equations = re.findall(r"<<(\d)([-+*/])(\d)=(\d+)>>", item["answer"])
        for (left, op, right, result), (a, *rest) in zip(equations, expected, strict=True):
            found = [op, int(right), int(result)]
            if (turned := (int(left), *found) != (a, *rest)):
                assert op in "+*" and (int(right), op, int(left), int(result)) == (a, *rest)
            swapped += turned
        assert final_number(item["answer"]) == sum(totals)
        lengths.add(len(equations))
    assert lengths == set(range(5, 10)) and swapped > 400
    assert 400 < backwards < 600 if either_way else backwards == 0


def test_toy_is_seeded_and_splits_share_no_question():
    assert toy_split("train", 50, seed=1) == toy_split("train", 50, seed=1)
    assert toy_split("train", 50, seed=1) != toy_split("train", 50, seed=2)
    splits = load_splits("toy", toy_sizes={**TOY_SIZES, "train": 3000})
    train, val, test = ({item["question"] for item in splits[name]} for name in TOY_SIZES)
    assert not train & test and not train & val and not val & test and len(splits["test"]) == 2000
    assert load_splits("toy", seed=5, toy_sizes={"test": 2000})["test"] == splits["test"]


# --- loaders --------------------------------------------------------------------------------------

ITEM = {"question": "Jo has 3 + 4?", "answer": "It is 3+4=<<3+4=7>>7.\n#### 7"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_validation_items_are_held_out_of_train_whatever_the_seed(tmp_path):
    write(tmp_path / "train.jsonl", *({**ITEM, "question": f"q{i}"} for i in range(100)))
    write(tmp_path / "test.jsonl", ITEM)
    splits = load_splits("gsm8k", str(tmp_path))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [90, 10, 1]
    assert len({item["question"] for item in splits["train"] + splits["val"]}) == 100
    assert load_splits("gsm8k", str(tmp_path), seed=3) == splits


def test_aug_text_and_copies_with_the_steps_in_a_field_of_their_own(tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes(
        b"\xef\xbb\xbfq one||<<1+1=2>> <<2*2=4>> #### 4\r\n\r\nq two|| #### 9\n")
    write(tmp_path / "valid.jsonl", {"question": "q one", "steps": ["<<1+1=2>>"], "answer": "2"})
    write(tmp_path / "test.jsonl", {"question": "q", "cot": "<<5-1=4>>", "answer": "4"})
    splits = load_splits("gsm8k-aug", str(tmp_path))
    assert splits["train"] == [{"question": "q one", "answer": "<<1+1=2>> <<2*2=4>> #### 4"},
                               {"question": "q two", "answer": "#### 9"}]
    assert splits["val"][0]["answer"] == "<<1+1=2>> #### 2"
    assert splits["test"][0]["answer"] == "<<5-1=4>> #### 4"
    assert "1 validation or test questions also stand in train" in capsys.readouterr().out


def lines(*answers):
    return "\n".join(json.dumps({"question": "q", "answer": answer}) for answer in answers)


@pytest.mark.parametrize("content, place, wanted", [
    *[(lines("#### 1", f"#### {number}"), "line 2", "must end in #### and a number") for number in
      ("1/2", "1e3", "1 000", "five", "+-5", "", "18.", "5 eggs", "--5", "$", "1.2.3", "٣", "inf")],
    (lines("no number"), "line 1", "must end in #### and a number"),
    *[(lines("#### 1") + "\n\n" + line, "line 3", "want the texts question and answer") for line in
      ('{"question": "q", "solution": "#### 1"}', '{"question": 3, "answer": "#### 1"}', "[1]",
       "a question without bars #### 3")],
    *[(line, "line 1", "") for line in
      ('{"question": "q", "answ', "\0", '{"question": "q", "steps": [3], "answer": "7"}',
       '{"question": "q", "steps": 3, "answer": "7"}')],
    ("", "valid.jsonl", "no items"), (" \n\r\n", "valid.jsonl", "no items"),
    (b"caf\xe9", "valid.jsonl", "cannot read")])
def test_a_bad_line_is_told_with_file_and_line_and_what_is_wanted(tmp_path, content, place, wanted):
    write(tmp_path / "train.jsonl", ITEM)
    write(tmp_path / "test.jsonl", ITEM)
    path = tmp_path / "valid.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as told:
        load_splits("gsm8k", str(tmp_path))
    message = str(told.value)
    assert str(path) in message and place in message and wanted in message
    assert "\n" not in message and len(message) < 300 + len(str(path))


# --- tokenizer and canvas -------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "Max has 8 eggs, buys 1.", "<<1+8=9>> <<9/3=3>> #### 3", "naïve 日本 🙂 \u202eabc\x00 \t\n",
    "<|mask|> <|eos|> a_b c__d", "", "  ", "é́ ½ ²"])
def test_any_text_survives_the_tokenizer(text):
    enc = build_tokenizer(frequent_pieces(toy_split("train", 20)))
    tokens = enc.encode_ordinary(text)
    assert enc.decode(tokens) == text and all(token < enc.n_vocab - 3 for token in tokens)


def test_a_target_has_digits_as_single_tokens_and_marks_as_one():
    enc = build_tokenizer(frequent_pieces(toy_split("train", 200)))
    target = to_target("It is 12+8=<<12+8=20>>20. Half is <<2/2=1>>1.\n#### 1")
    pieces = [enc.decode([i]) for i in enc.encode_ordinary(target)]
    assert pieces == ["<<", *"12+8=20", ">> <<", *"2/2=1", ">> #### ", "1"]


def test_canvas_holds_answer_eos_and_pad_and_what_does_not_fit_is_dropped():
    items = [{"question": "a " * 50, "answer": "#### 2"},
             {"question": "a b", "answer": "<<1+1=2>> #### 2"},
             {"question": "a", "answer": "<<1+1=2>> " * 9 + "#### 2"},
             {"question": "", "answer": "#### 2"}]
    enc = build_tokenizer(frequent_pieces(items))
    eos, pad = enc.n_vocab - 3, enc.n_vocab - 2
    prompt, x0, fitting = encode(items, enc, 10, 12)
    assert fitting == [1] and prompt.shape == (1, 10) and x0.shape == (1, 12)
    row = x0[0].tolist()
    end = row.index(eos)
    assert row[end:] == [eos] + [pad] * (11 - end) and decode(row, enc) == "<<1+1=2>> #### 2"
    assert prompt[0, 2:].tolist() == [pad] * 8 and enc.decode(prompt[0, :2].tolist()) == "a b"
    assert [part.shape for part in encode([], enc, 10, 12)[:2]] == [(0, 10), (0, 12)]


# --- the final number -----------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [
    ("<<1+1=2>> #### 2", "2"), ("#### 18.00", "18"), ("####18", "18"), ("#### $1,234", "1234"),
    ("#### -5", "-5"), ("#### -$5.5", "-5.5"), ("#### $-5", "-5"), ("#### 3 #### 4", "4"),
    ("#### 10%", "10"), ("#### 18.", "18"), ("#### 1,000,000 eggs", "1000000"), ("#### +7", "7"),
    ("#### .5", "0.5"), ("#### 1,080.00", "1080"), ("####\u00a018", "18"), ("#### -.5", "-0.5"),
    ("18", None), ("", None), ("####", None), ("#### x 3", None), ("#### ,", None),
    ("#### ٣", None), ("#### +-5", None)])
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("number", [".5", "$5", "-$5.5", "$-5", "1,080.00", "\u00a018", "-3"])
def test_a_gold_answer_that_is_a_number_is_right_where_it_is_generated(tmp_path, number):
    """From the file over target, tokens and canvas back to a number: nothing is lost on the way."""
    write(tmp_path / "train.jsonl", {"question": "q", "answer": f"#### {number}"})
    write(tmp_path / "test.jsonl", ITEM)
    item, = load_splits("gsm8k", str(tmp_path))["train"]
    enc = build_tokenizer([])
    canvas = encode([item], enc, 9, 32)[1][0].tolist()
    assert final_number(decode(canvas, enc)) == final_number(item["answer"])
    assert final_number(item["answer"]) == Decimal(re.sub(r"[$,\s]", "", number))
