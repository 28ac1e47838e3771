"""data.py: the toy, loaders on small files made here, the tokenizer, what the final number is."""

import json
import random
import re
import sys
import types
import zlib
from decimal import Decimal

import pytest

import data
from common import UserError
from data import (DATASETS, TOY_SIZES, build_tokenizer, decode, encode, final_number,
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
        assert item["target"] == item["answer"] == to_target(item["answer"])
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
    assert load_splits("toy", seed=5, toy_sizes={"train": 9})["train"] != splits["train"][:9]


@pytest.mark.parametrize("either_way", [False, True])
@pytest.mark.parametrize("split, buckets", [("val", {0}), ("test", {1}), ("train", {*range(2, 8)})])
def test_the_questions_checksum_decides_its_split(split, buckets, either_way):
    """Not a random number and not the answer's: the same question is never in two splits."""
    for seed in (0, 1):
        items = toy_split(split, 300, seed, either_way)
        assert {zlib.crc32(item["question"].encode()) % 8 for item in items} == buckets


def test_operands_change_places_half_of_the_time():
    rng = random.Random(0)
    for op, result in (("+", 3), ("*", 2)):
        swapped = sum(data.equation(rng, 1, op, 2, result) == f"<<2{op}1={result}>>"
                      for _ in range(4000))
        assert abs(swapped - 2000) < 4 * 4000**0.5 / 2
    assert data.equation(rng, 6, "-", 2, 4) == "<<6-2=4>>"
    assert data.equation(rng, 6, "/", 2, 3) == "<<6/2=3>>"


@pytest.mark.parametrize("name", ["toy", "toy2"])
def test_a_toy_does_not_ignore_files(name, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"^{name} reads no files, but --data_dir .* leave it "
                                            "out, or .*--preset gsm8k or --dataset pairs$"):
            load_splits(name, str(folder))
    with pytest.raises(UserError, match=f"no data set 'mnist': want one of {', '.join(DATASETS)}"):
        load_splits("mnist")


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
    answer = "<<1+1=2>> <<2*2=4>> #### 4"
    assert splits["train"] == [{"question": "q one", "answer": answer, "target": answer},
                               {"question": "q two", "answer": "#### 9", "target": "#### 9"}]
    assert splits["val"][0]["answer"] == "<<1+1=2>> #### 2"
    assert splits["test"][0]["answer"] == "<<5-1=4>> #### 4"
    assert "1 validation or test questions also stand in train" in capsys.readouterr().out


@pytest.mark.parametrize("row, target", [
    # the equations stand in the answer already, in full or in the steps' words
    ({"answer": "<<3+4=7>> #### 7", "steps": ["<<3+4=7>>"]}, "<<3+4=7>> #### 7"),
    ({"answer": "3+4=<<3+4=7>>7.\n#### 7", "steps": "<<3+4=7>>"}, "<<3+4=7>> #### 7"),
    ({"answer": "<<3+4=7>> #### 7", "cot": "<<3+4=7>>"}, "<<3+4=7>> #### 7"),
    ({"answer": "<<3+4=7>> #### 7", "steps": 5}, "<<3+4=7>> #### 7"),
    # only the steps have them
    ({"answer": "Seven. #### 7", "steps": ["<<3+4=7>>"]}, "<<3+4=7>> #### 7"),
    ({"answer": "7", "steps": ["<<3+4=7>>", "<<7*1=7>>"]}, "<<3+4=7>> <<7*1=7>> #### 7"),
    ({"answer": "7", "cot": "<<3+4=7>> #### 7"}, "<<3+4=7>> #### 7"),
    ({"answer": "7", "steps": None, "cot": "<<3+4=7>>"}, "<<3+4=7>> #### 7"),
    ({"answer": "7", "steps": []}, "#### 7")])
def test_equations_are_taken_once_wherever_they_stand(row, target, tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", {"question": "q", **row})
    item = load_splits("gsm8k", str(tmp_path))["test"][0]
    assert item["target"] == target and item["answer"].count("<<") == target.count("<<")


@pytest.mark.parametrize("name", ["valid.jsonl", "validation.jsonl", "val.jsonl", "dev.jsonl",
                                  "val.txt", "Validation.JSONL"])
def test_a_validation_file_is_taken_by_any_of_its_names(name, tmp_path):
    write(tmp_path / "train.jsonl", *({**ITEM, "question": f"q{i}"} for i in range(20)))
    write(tmp_path / "test.jsonl", ITEM)
    write(tmp_path / name, {**ITEM, "question": "v"})
    splits = load_splits("gsm8k", str(tmp_path))
    assert [item["question"] for item in splits["val"]] == ["v"] and len(splits["train"]) == 20


@pytest.mark.parametrize("one, two", [("val.jsonl", "valid.jsonl"), ("train.jsonl", "train.txt"),
                                      ("dev.txt", "validation.jsonl")])
def test_of_two_files_of_a_split_none_is_ignored(one, two, tmp_path):
    for name in {"train.jsonl", "test.jsonl", one, two}:
        write(tmp_path / name, ITEM)
    with pytest.raises(UserError, match=f"has both {one} and {two}: keep one$"):
        load_splits("gsm8k", str(tmp_path))


def test_a_data_dir_that_is_none_is_called_what_it_is(tmp_path, monkeypatch):
    wanted = "want train.jsonl and test.jsonl"
    path = tmp_path / "train.jsonl"
    write(path, ITEM)
    for folder, problem in ((path, "is a file, not a folder"), (tmp_path, "has no test split"),
                            (tmp_path / "absent", "does not exist")):
        with pytest.raises(UserError, match=f"^{folder} {problem}: {wanted}"):
            load_splits("gsm8k", str(folder))
    write(tmp_path / "test.jsonl", {**ITEM, "question": "t"})
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path.parent))
    assert load_splits("gsm8k", f"~/{tmp_path.name}")["test"][0]["question"] == "t"


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_splits_of_the_hub(monkeypatch):
    splits = {"train": [ITEM], "validation": [{**ITEM, "question": "v"}], "test": [ITEM], "x": [1]}
    asked = []
    hub(monkeypatch, lambda *words: asked.append(words) or splits)
    assert load_splits("gsm8k")["val"][0]["question"] == "v"
    assert load_splits("gsm8k-aug")["test"][0]["target"] == "<<3+4=7>> #### 7"
    assert asked == [("openai/gsm8k", "main"), ("whynlp/gsm8k-aug",)]
    for left_out in ("train", "test"):
        hub(monkeypatch, lambda *_: {k: v for k, v in splits.items() if k != left_out})
        with pytest.raises(UserError, match=f"^openai/gsm8k has no {left_out} split: want train"):
            load_splits("gsm8k")
    hub(monkeypatch, lambda *_: {**splits, "test": [ITEM, {"question": "q"}]})
    with pytest.raises(UserError, match="^openai/gsm8k, test, line 2: there is no answer"):
        load_splits("gsm8k")


@pytest.mark.parametrize("error, reason", [
    (ConnectionError(), "ConnectionError"), (ConnectionError(""), "ConnectionError"),
    (ValueError("\n\n"), "ValueError"), (ValueError("two\nlines"), "two lines"),
    (OSError("long " * 99), "long long")])
def test_no_hub_is_one_line_that_says_what_to_do(error, reason, monkeypatch):
    def load(*_):
        raise error

    hub(monkeypatch, load)
    with pytest.raises(UserError) as told:
        load_splits("gsm8k")
    message = str(told.value)
    assert message.startswith(f"cannot load openai/gsm8k ({reason}")
    assert message.isprintable() and len(message) < 250 and "--data_dir" in message


# --- pairs ----------------------------------------------------------------------------------------

PAIRS = [{"question": "bonjour", "answer": "hello"},
         {"question": "2 + 2", "answer": " a <<b>>\n3/4 "}]


def test_pairs_are_written_whole_and_need_no_number(tmp_path):
    """From the file over target, tokens and canvas back to the text."""
    write(tmp_path / "train.jsonl", *PAIRS)
    write(tmp_path / "test.jsonl", {**PAIRS[0], "question": "salut"})
    write(tmp_path / "valid.jsonl", {**PAIRS[1], "question": "3 + 1", "steps": ["not used"]})
    splits = load_splits("pairs", str(tmp_path))
    assert splits["train"] == [
        {"question": "bonjour", "answer": "hello", "target": "hello"},
        {"question": "2 + 2", "answer": "a <<b>>\n3/4", "target": "a <<b>>\n3/4"}]
    assert [len(splits[name]) for name in ("train", "val", "test")] == [2, 1, 1]
    enc = build_tokenizer(frequent_pieces(splits["train"]))
    _, x0, fitting = encode(splits["train"], enc, 10, 12)
    assert fitting == [0, 1]
    assert [decode(row, enc) for row in x0.tolist()] == ["hello", "a <<b>>\n3/4"]


def test_pairs_come_from_files(tmp_path):
    with pytest.raises(UserError, match="^--dataset pairs is read from files: want train.jsonl "
                                        "and test.jsonl .*in --data_dir$"):
        load_splits("pairs")
    write(tmp_path / "train.jsonl", *PAIRS)
    write(tmp_path / "test.jsonl", {"question": "q", "answer": "  "})
    with pytest.raises(UserError, match="test.jsonl, line 1: the answer is blank$"):
        load_splits("pairs", str(tmp_path))


# --- bad lines ------------------------------------------------------------------------------------

def lines(*answers):
    return "\n".join(json.dumps({"question": "q", "answer": answer}) for answer in answers)


@pytest.mark.parametrize("content, place, wanted", [
    *[(lines("#### 1", f"#### {number}"), "line 2", "must end in #### and a number") for number in
      ("1/2", "1e3", "1 000", "five", "+-5", "", "18.", "5 eggs", "--5", "$", "1.2.3", "٣", "inf")],
    (lines("no number"), "line 1", "must end in #### and a number"),
    *[(lines("#### 1") + "\n\n" + line, "line 3", wanted) for line, wanted in (
        ('{"question": "q", "solution": "#### 1"}', "there is no answer, only question, solution"),
        ('{"answer": "#### 1"}', "there is no question, only answer"),
        ("{}", "there is no question"),
        ('{"question": 3, "answer": "#### 1"}', "the question must be a text, got 3"),
        ('{"question": "q", "answer": 3}', "the answer must be a text, got 3"),
        ('{"question": "q", "answer": null}', "the answer must be a text, got None"),
        ('{"question": "q", "answer": 7, "steps": ["<<3+4=7>>"]}', "must be a text, got 7"),
        ('{"question": " ", "answer": "#### 1"}', "the question is blank"),
        ('{"question": "", "answer": "#### 1"}', "the question is blank"),
        (" || #### 3", "the question is blank"),
        ('{"question": "q", "answer": ""}', "the answer is blank"),
        (r'{"question": "\ud83d", "answer": "#### 1"}', "surrogates not allowed"),
        ("[1]", 'want {"question": .., "answer": ..}, got'),
        ("a question without bars #### 3", 'want {"question": .., "answer": ..}, got'),
        ('{"question": "q", "steps": [3], "answer": "7"}', "steps must be a text or a list of t"),
        ('{"question": "q", "steps": 3, "answer": "7"}', "steps must be a text or a list of t"))],
    ('{"question": "q", "answ', "line 1", "no JSON: "), ("\0", "line 1", "want "),
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
    items = [{"question": "a " * 50, "target": "#### 2"},
             {"question": "a b", "target": "<<1+1=2>> #### 2"},
             {"question": "a", "target": "<<1+1=2>> " * 9 + "#### 2"},
             {"question": "", "target": "#### 2"}]
    enc = build_tokenizer(frequent_pieces(items))
    eos, pad = enc.n_vocab - 3, enc.n_vocab - 2
    prompt, x0, fitting = encode(items, enc, 10, 12)
    assert fitting == [1] and prompt.shape == (1, 10) and x0.shape == (1, 12)
    row = x0[0].tolist()
    end = row.index(eos)
    assert row[end:] == [eos] + [pad] * (11 - end) and decode(row, enc) == "<<1+1=2>> #### 2"
    assert prompt[0, 2:].tolist() == [pad] * 8 and enc.decode(prompt[0, :2].tolist()) == "a b"
    assert [part.shape for part in encode([], enc, 10, 12)[:2]] == [(0, 10), (0, 12)]


def test_an_item_that_just_fits_is_kept():
    enc = build_tokenizer([])  # a token for each byte
    item = {"question": "1+1", "target": "#### 2"}
    for P, L, fitting in ((3, 7, [0]), (2, 7, []), (3, 6, [])):  # EOS needs a place
        assert encode([item], enc, P, L)[2] == fitting
    eos, pad = enc.n_vocab - 3, enc.n_vocab - 2
    for end in (eos, pad):
        assert decode([*b"#### 2", end, *b"3", eos], enc) == "#### 2"


def test_pieces_are_the_most_frequent_of_the_training_text_that_have_two_bytes():
    """Of equals the first in the alphabet: the same text gives the same tokenizer."""
    items = [{"question": "cup cup cup fig", "target": "9 9 9 9"}]
    assert data.frequent_pieces(items, 9) == [" 9", " cup", " fig", "cup"]
    assert data.frequent_pieces(items, 1) == [" 9"] and data.frequent_pieces(items, 0) == []


# --- the final number -----------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [
    ("<<1+1=2>> #### 2", "2"), ("#### 18.00", "18"), ("####18", "18"), ("#### $1,234", "1234"),
    ("#### -5", "-5"), ("#### -$5.5", "-5.5"), ("#### $-5", "-5"), ("#### 3 #### 4", "4"),
    ("#### 10%", "10"), ("#### 18.", "18"), ("#### 1,000,000 eggs", "1000000"), ("#### +7", "7"),
    ("#### .5", "0.5"), ("#### 1,080.00", "1080"), ("####\u00a018", "18"), ("#### -.5", "-0.5"),
    ("#### 5e", "5"), ("#### 3 = three", "3"), ("#### 18.\nIt is", "18"), ("#### 7>> 5", "7"),
    ("#### 18 <<9+9=18>>", "18"),
    ("18", None), ("", None), ("####", None), ("#### x 3", None), ("#### ,", None),
    ("#### ٣", None), ("#### +-5", None),
    *[(f"#### {other}", None) for other in
      ("3/4", "3 / 4", "-3/4", "$3/4", "3 1/2", "3½", "3:4", "3-4", "3 + 4", "3*4", "3^2", "1e3",
       "1E3", "1.2.3", "1 000", "1e+3", "3=3", "3\u00a0000", "3٣", "3,4", "1,2345", "3x4", "3−4",
       "3⁄4", "1_000", "1'000")]])
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
