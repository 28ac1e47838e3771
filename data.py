"""Data: a toy task that needs no download, GSM8K, one tokenizer, and what counts as right.

Everything speaks GSM8K's form, {"question": str, "answer": str}, where the answer carries
calculator annotations `<<6+3=9>>` and ends in `#### n`. The model writes a *target* made from it,
the annotations joined by spaces and then `#### n`:

    question  Max has 8 eggs, buys 1, splits 3, sells 2. Ann has 4, times 2, buys 1. Together?
    target    <<1+8=9>> <<9/3=3>> <<3-2=1>> <<2*4=8>> <<8+1=9>> <<1+9=10>> #### 10

The toy is built so that the order of generation matters:
- each equation needs the result of the one before, and a shallow network cannot compute a long
  chain in one pass, so results have to be revealed over several steps;
- the two people do not depend on each other: both chains can be written at the same time, which
  left to right cannot do;
- + and * write their operands in either order with probability 1/2. Each operand alone is
  uncertain, together they are tied: revealing both in the same step is wrong half of the time,
  and a rule that looks at one position at a time cannot see it;
- answers have several lengths, so a fixed canvas ends in EOS and PAD, as GSM8K's does.
In toy2 each story is told forwards or backwards, a coin flip, and the equations follow the story:
no fixed direction is right, what has to be written first depends on the question.

A sequence is `[question PAD .. PAD | answer EOS PAD .. PAD]`: P prompt tokens, L of the canvas. EOS
and PAD of the canvas are tokens that the model has to write; PAD of the prompt is never seen.
"""

import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import tiktoken
import torch


class UserError(SystemExit):
    """Something the user can mend: ends a script with this one line and status 1."""


def run_script(main):
    """main(), ended in one line by Ctrl-C, a full disk or a closed pipe; no text that the terminal
    cannot encode makes it fail."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise UserError("stopped") from None
    except OSError as e:  # its text names the file
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what print has kept would fail once more
        raise UserError(f"stopped: {e}; files that were written are whole") from None


# --- the toy task ---------------------------------------------------------------------------------

NAMES = ["Max", "Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Zoe"]
THINGS = ["eggs", "pens", "cups", "figs", "nuts", "toys", "caps", "keys"]
VERBS = {"+": "buys", "-": "sells", "*": "times", "/": "splits"}
TOY_SIZES = {"train": 50_000, "val": 1000, "test": 2000}


def equation(rng: random.Random, a: int, op: str, b: int, result: int) -> str:
    """`<<a op b=result>>`; the operands of + and * change places with probability 1/2."""
    a, b = (b, a) if op in "+*" and rng.random() < 0.5 else (a, b)
    return f"<<{a}{op}{b}={result}>>"


def toy_person(rng: random.Random, either_way: bool) -> tuple[list[str], list[str], int]:
    """One person's 2-4 operations on a total that stays within 1..9: story, equations, total."""
    total = rng.randint(1, 9)
    story, equations = [f"has {total}"], []
    for _ in range(rng.randint(2, 4)):
        operands = {  # that keep the total whole and within 1..9
            "+": range(1, min(5, 9 - total) + 1),
            "-": range(1, min(5, total - 1) + 1),
            "*": range(2, min(3, 9 // total) + 1),
            "/": [b for b in (2, 3) if total % b == 0],
        }
        op = rng.choice([op for op, choices in operands.items() if choices])
        b = rng.choice(operands[op])
        result = {"+": total + b, "-": total - b, "*": total * b, "/": total // b}[op]
        story.append(f"{VERBS[op]} {b}")
        equations.append(equation(rng, total, op, b, result))
        total = result
    if either_way and rng.random() < 0.5:
        story, equations = story[::-1], equations[::-1]
    return story, equations, total


def toy_example(rng: random.Random, either_way: bool = False) -> dict:
    """Two people's running totals, then their sum."""
    names, thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    story, equations, total = toy_person(rng, either_way)
    story2, equations2, total2 = toy_person(rng, either_way)
    story = [f"{part} {thing}" if part.startswith("has") else part for part in story]
    question = f"{names[0]} {', '.join(story)}. {names[1]} {', '.join(story2)}. Together?"
    equations += equations2 + [equation(rng, total, "+", total2, total + total2)]
    return {"question": question, "answer": " ".join(equations) + f" #### {total + total2}"}


def toy_split(split: str, n: int, seed: int = 0, either_way: bool = False) -> list[dict]:
    """n examples of "train", "val" or "test". A question belongs to one split for ever: its
    checksum decides, so no seed and no n lets a test question into train."""
    rng, items = random.Random(f"toy-{split}-{seed}"), []
    while len(items) < n:
        item = toy_example(rng, either_way)
        bucket = zlib.crc32(item["question"].encode()) % 8
        if {0: "val", 1: "test"}.get(bucket, "train") == split:
            items.append(item)
    return items


# --- GSM8K ----------------------------------------------------------------------------------------

HUB = {"gsm8k": ("openai/gsm8k", "main"), "gsm8k-aug": ("whynlp/gsm8k-aug",)}
DATASETS = ("toy", "toy2", *HUB)


def to_item(row: dict) -> dict:
    """A row of any GSM8K copy. Copies that keep the equations in a field of their own (`steps` or
    `cot`) hold the bare number in `answer`. ValueError: what is missing."""
    fields = row if isinstance(row, dict) else {}
    if not all(isinstance(fields.get(name), str) for name in ("question", "answer")):
        raise ValueError(f"want the texts question and answer, got {[*fields] or row}")
    answer, steps = row["answer"], row.get("steps", row.get("cot"))
    if steps is not None:
        answer = f"{steps if isinstance(steps, str) else ' '.join(steps)} #### {answer}"
    number = answer.rpartition("####")[2].strip()
    if "####" not in answer or not re.fullmatch(NUMBER, number):
        raise ValueError(f"the answer must end in #### and a number, got {number[:40]!r}")
    return {"question": row["question"].strip(), "answer": answer.strip()}


def to_items(rows, where: str) -> list[dict]:
    """to_item of every (place, row), or one line that says which row of `where` is not one."""
    items = []
    for place, row in rows:
        try:
            if isinstance(row, str):  # of a file: JSON, or question||<<..>> <<..>> #### n
                row = json.loads(row) if row.startswith("{") else \
                    dict(zip(("question", "answer"), row.split("||")))
            items.append(to_item(row))
        except (TypeError, ValueError) as e:
            raise UserError(f"{where}, line {place}: {e}") from e
    if not items:
        raise UserError(f"{where} has no items")
    return items


def read_file(path: Path) -> list[dict]:
    """train.jsonl or the like, or GSM8K-Aug's text form, one item a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    return to_items([(i, line) for i, line in enumerate(lines, 1) if line.strip()], str(path))


def load_splits(dataset: str, data_dir: str = "", seed: int = 0, toy_sizes=TOY_SIZES) -> dict:
    """Lists of items: "train", "val", "test". GSM8K comes from `data_dir` (train.jsonl, test.jsonl,
    or .txt) or from the hub. Only the toy's train split depends on `seed`."""
    if dataset.startswith("toy"):
        return {split: toy_split(split, n, seed * (split == "train"), dataset == "toy2")
                for split, n in toy_sizes.items()}
    if data_dir:
        files = {p.stem: p for kind in ("*.txt", "*.jsonl") for p in Path(data_dir).glob(kind)}
        if not {"train", "test"} <= set(files):
            raise UserError(f"want train.jsonl and test.jsonl (or .txt) in --data_dir {data_dir}")
        splits = {split: read_file(files[split]) for split in ("train", "valid", "test")
                  if split in files}
    else:
        import datasets  # only here: it takes seconds to import and the toy does not need it
        try:
            hub = datasets.load_dataset(*HUB[dataset])
        except Exception as e:  # the hub's client raises a dozen types for "no network"
            raise UserError(f"cannot load {HUB[dataset][0]} ({str(e).splitlines()[0][:80]}): pass "
                            "--data_dir with train.jsonl and test.jsonl, or check the net") from e
        splits = {"valid" if split == "validation" else split:
                  to_items(enumerate(rows, 1), f"{HUB[dataset][0]}, {split}")
                  for split, rows in hub.items()}
    train, val = splits["train"], splits.get("valid")
    if val is None:  # held out of train, always the same items
        train = random.Random("gsm8k-val").sample(train, len(train))
        n = min(500, max(1, len(train) // 10))
        train, val = train[n:] or train, train[:n]
    seen = {item["question"] for item in train}
    overlap = sum(item["question"] in seen for item in val + splits["test"])
    if overlap:
        print(f"warning: {overlap} validation or test questions also stand in train")
    return {"train": train, "val": val, "test": splits["test"]}


def to_target(answer: str) -> str:
    """What the model writes: the annotations, then `#### n`."""
    number = answer.rpartition("####")[2].strip()
    return " ".join([*re.findall(r"<<[^<>]*>>", answer), f"#### {number}"])


# --- tokenizer ------------------------------------------------------------------------------------

# a digit is always one token
PATTERN = r">> <<|>> #### | ?#### ?| ?<<|>>| ?[^\W\d_]+| ?\d| ?[^\w\s]|[\s\S]"


def build_tokenizer(pieces: list[str]) -> tiktoken.Encoding:
    """256 bytes, then `pieces`, then EOS, PAD, MASK. tiktoken takes a piece that stands in its
    table whole and falls back to bytes, so nothing is trained and any text can be encoded."""
    ranks = {bytes([i]): i for i in range(256)}
    for piece in pieces:
        ranks.setdefault(piece.encode(), len(ranks))
    special = {name: len(ranks) + i for i, name in enumerate(("<|eos|>", "<|pad|>", "<|mask|>"))}
    return tiktoken.Encoding("learned-orders", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def frequent_pieces(items: list[dict], n: int = 2048) -> list[str]:
    """The n most frequent pieces of two bytes or more in the training text."""
    counts = Counter()
    for item in items:
        counts.update(re.findall(PATTERN, item["question"]))
        counts.update(re.findall(PATTERN, to_target(item["answer"])))
    return sorted((p for p in counts if len(p.encode()) > 1), key=lambda p: (-counts[p], p))[:n]


def encode(items: list[dict], enc: tiktoken.Encoding, P: int, L: int):
    """prompt (N, P) and x0 (N, L) of the items that fit, and which ones do: the others are dropped
    from training and counted as wrong in evaluation."""
    eos, pad = enc.n_vocab - 3, enc.n_vocab - 2
    prompts, answers, fitting = [], [], []
    for i, item in enumerate(items):
        prompt = enc.encode_ordinary(item["question"])
        answer = enc.encode_ordinary(to_target(item["answer"])) + [eos]
        if 0 < len(prompt) <= P and len(answer) <= L:
            prompts.append(prompt + [pad] * (P - len(prompt)))
            answers.append(answer + [pad] * (L - len(answer)))
            fitting.append(i)
    return torch.tensor(prompts).view(-1, P), torch.tensor(answers).view(-1, L), fitting


def decode(tokens: list[int], enc: tiktoken.Encoding) -> str:
    """Text of a canvas up to its first EOS or PAD."""
    end = next((i for i, token in enumerate(tokens) if token >= enc.n_vocab - 3), len(tokens))
    return enc.decode(tokens[:end])


# digits with commas, decimals, or .5; a sign before or after a dollar sign
NUMBER = r"(?:[-+]?\$?|\$[-+])(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"


def final_number(text: str) -> Decimal | None:
    """The number right after the last `####`, or None; "$1,234.00" equals 1234."""
    _, marker, tail = text.rpartition("####")
    match = re.match(rf"\s*({NUMBER})", tail) if marker else None
    return Decimal(re.sub(r"[$,]", "", match[1])) if match else None
