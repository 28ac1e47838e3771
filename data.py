"""Data: a toy task that needs no download, GSM8K, pairs of your own, and one tokenizer for all.

An item is a dict of three texts. The model reads the `question` and has to write the `target`,
which is made from the data set's `answer`.

    question  Max has 8 eggs, buys 1, splits 3, sells 2. Ann has 4, times 2, buys 1. Together?
    target    <<1+8=9>> <<9/3=3>> <<3-2=1>> <<2*4=8>> <<8+1=9>> <<1+9=10>> #### 10

    toy, toy2          made below, in GSM8K's form; the target is the whole answer
    gsm8k, gsm8k-aug   an answer is prose with calculator annotations `<<6+3=9>>`, and ends in
                       `#### n`; the target is the annotations and `#### n`, joined by spaces
    pairs              files of your own; the target is the whole answer, whatever it says

The toy is built so that the order of generation matters:
- Each equation needs the result of the one before. A shallow network cannot compute a long chain in
  one pass, so results have to be revealed over several steps.
- The two people do not depend on each other. Both chains can be written at the same time, which
  left to right cannot do.
- + and * write their operands in either order with probability 1/2. Each operand alone is
  uncertain, together they are tied. Revealing both in the same step is wrong half of the time, and
  a rule that looks at one position at a time cannot see it.
- Answers have several lengths, so a fixed canvas ends in EOS and PAD, as GSM8K's does.
In toy2 each story is told forwards or backwards, a coin flip, and the equations follow the story.
In few steps no fixed direction is right: what comes first depends on the question.

A sequence is `[question PAD .. PAD | target EOS PAD .. PAD]`: P prompt tokens, L of the canvas. EOS
and PAD of the canvas are tokens that the model has to write; PAD of the prompt is never seen.
"""

import json
import random
import re
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import tiktoken
import torch

from common import UserError, path_of, say


# --- the toy task ---------------------------------------------------------------------------------

NAMES = ["Max", "Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Zoe"]
THINGS = ["eggs", "pens", "cups", "figs", "nuts", "toys", "caps", "keys"]
VERBS = {"+": "buys", "-": "sells", "*": "times", "/": "splits"}
TOY_SIZES = {"train": 50_000, "val": 1000, "test": 2000}


def equation(rng: random.Random, a: int, op: str, b: int, result: int) -> str:
    """`<<a op b=result>>`. The operands of + and * change places with probability 1/2."""
    if op in "+*" and rng.random() < 0.5:
        return f"<<{b}{op}{a}={result}>>"
    return f"<<{a}{op}{b}={result}>>"


def toy_person(rng: random.Random, things: str, either_way: bool) -> tuple[list, list, int]:
    """One person's 2-4 operations on a total that stays within 1..9: story, equations, total."""
    total = rng.randint(1, 9)
    story = [f"has {total}{things}"]
    equations = []
    for _ in range(rng.randint(2, 4)):
        # Of each operation, the operands that keep the total whole and within 1..9.
        operands = {
            "+": range(1, min(5, 9 - total) + 1),
            "-": range(1, min(5, total - 1) + 1),
            "*": range(2, min(3, 9 // total) + 1),
            "/": [b for b in (2, 3) if total % b == 0],
        }
        op = rng.choice([op for op in operands if operands[op]])
        b = rng.choice(operands[op])
        result = {"+": total + b, "-": total - b, "*": total * b, "/": total // b}[op]

        story.append(f"{VERBS[op]} {b}")
        equations.append(equation(rng, total, op, b, result))
        total = result

    # toy2: the equations follow the story, so the last one may come first.
    if either_way and rng.random() < 0.5:
        story.reverse()
        equations.reverse()
    return story, equations, total


def toy_example(rng: random.Random, either_way: bool = False) -> dict:
    """Two people's running totals, then their sum."""
    name1, name2 = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    story1, equations1, total1 = toy_person(rng, f" {thing}", either_way)
    story2, equations2, total2 = toy_person(rng, "", either_way)
    both = total1 + total2
    last = equation(rng, total1, "+", total2, both)

    question = f"{name1} {', '.join(story1)}. {name2} {', '.join(story2)}. Together?"
    answer = " ".join([*equations1, *equations2, last, f"#### {both}"])
    return {"question": question, "answer": answer, "target": answer}


def toy_split(split: str, n: int, seed: int = 0, either_way: bool = False) -> list[dict]:
    """n examples of "train", "val" or "test". A question belongs to one split for ever: its
    checksum decides, so no seed and no n lets a test question into train."""
    split_of_bucket = {0: "val", 1: "test"}  # 2..7: train
    rng = random.Random(f"toy-{split}-{seed}")
    items = []
    while len(items) < n:
        item = toy_example(rng, either_way)
        bucket = zlib.crc32(item["question"].encode()) % 8
        if split_of_bucket.get(bucket, "train") == split:
            items.append(item)
    return items


# --- items of GSM8K and of pairs ------------------------------------------------------------------

# 12, 1,200, 1.5 or .5; a sign before or after a dollar sign
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = rf"(?:[-+]?\$?|\$[-+])(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)"


def to_target(answer: str) -> str:
    """What the model writes of a GSM8K answer: the annotations, then `#### n`."""
    annotations = re.findall(r"<<[^<>]*>>", answer)
    number = answer.rpartition("####")[2].strip()
    return " ".join([*annotations, f"#### {number}"])


def text_of(row: dict, name: str) -> str:
    """A field that has to be a text with something in it. ValueError says what is wrong."""
    if name not in row:
        raise ValueError(f"there is no {name}, only {', '.join(row) or 'an empty row'}")
    text = row[name]
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be a text, got {text!r:.40}")
    if not text.strip():
        raise ValueError(f"the {name} is blank")
    text.encode()  # a ValueError, too, where it holds half of a character
    return text.strip()


def gsm8k_answer(row: dict) -> str:
    """The answer of a row of any GSM8K copy. Some copies have the number alone in `answer`, and
    the equations in a field of their own: `steps` or `cot`, a text or a list of texts."""
    answer = text_of(row, "answer")
    steps = row.get("steps")
    if steps is None:
        steps = row.get("cot")

    # An answer that has its equations already needs no second copy of them.
    if steps is not None and "<<" not in answer:
        if isinstance(steps, str):
            steps = [steps]
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise ValueError(f"steps must be a text or a list of texts, got {steps!r:.40}")
        number = answer.rpartition("####")[2].strip()
        answer = " ".join([*steps, f"#### {number}"]).strip()

    _, marker, number = answer.rpartition("####")
    if not marker or not re.fullmatch(NUMBER, number.strip()):
        raise ValueError(f"the answer must end in #### and a number, got {number.strip()!r:.40}")
    return answer


def to_item(row: dict, dataset: str) -> dict:
    """A row of a file or of the hub as an item. ValueError says what is wrong with it."""
    question = text_of(row, "question")
    if dataset == "pairs":
        answer = text_of(row, "answer")
        return {"question": question, "answer": answer, "target": answer}
    answer = gsm8k_answer(row)
    return {"question": question, "answer": answer, "target": to_target(answer)}


def parse_line(line: str) -> dict:
    """A line of a file: a JSON object, or GSM8K-Aug's text form, `question||answer`."""
    if line.lstrip().startswith("{"):
        try:
            return json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"no JSON: {e.msg}, column {e.colno}") from e
    question, bars, answer = line.partition("||")
    if not bars:
        raise ValueError(f'want {{"question": .., "answer": ..}}, got {line!r:.40}')
    return {"question": question, "answer": answer}


def to_items(rows, where: str, dataset: str) -> list[dict]:
    """Items of (line number, row) pairs, or one line that says which row of `where` is not one."""
    items = []
    for number, row in rows:
        try:
            if isinstance(row, str):
                row = parse_line(row)
            items.append(to_item(row, dataset))
        except ValueError as e:
            raise UserError(f"{where}, line {number}: {e}") from e
    if not items:
        raise UserError(f"{where} has no items")
    return items


# --- where items come from ------------------------------------------------------------------------

HUB = {"gsm8k": ("openai/gsm8k", "main"), "gsm8k-aug": ("whynlp/gsm8k-aug",)}
DATASETS = ("toy", "toy2", *HUB, "pairs")
SPLITS = {"train": "train", "test": "test",  # by the names that files and the hub give them
          "val": "val", "valid": "val", "validation": "val", "dev": "val"}
FILES = "train.jsonl and test.jsonl (or .txt) in --data_dir"


def read_folder(folder: Path, dataset: str) -> dict:
    """Items of each split that `folder` has a file of, train.jsonl or train.txt and so on."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a folder: want {FILES}")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: want {FILES}")
    files = {}
    for path in sorted(folder.iterdir()):
        split = SPLITS.get(path.stem.lower())
        if split is None or path.suffix.lower() not in (".jsonl", ".txt"):
            continue
        if split in files:
            raise UserError(f"{folder} has both {files[split].name} and {path.name}: keep one")
        files[split] = path
    return {split: read_file(path, dataset) for split, path in files.items()}


def read_file(path: Path, dataset: str) -> list[dict]:
    """The items of a file, one a line. Blank lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return to_items(rows, str(path), dataset)


def read_hub(dataset: str) -> dict:
    """Items of each split of a data set of the hub."""
    name = HUB[dataset][0]
    try:
        import datasets  # only here: it takes seconds to import and the toy does not need it
        hub = datasets.load_dataset(*HUB[dataset])
    except Exception as e:  # the hub's client raises a dozen types for "no network"
        reason = " ".join(str(e).split())[:80] or type(e).__name__
        raise UserError(f"cannot load {name} ({reason}): check the net, or pass {FILES}") from e
    splits = {}
    for split, rows in hub.items():
        if split in SPLITS:
            splits[SPLITS[split]] = to_items(enumerate(rows, 1), f"{name}, {split}", dataset)
    return splits


def load_splits(dataset: str, data_dir: str = "", seed: int = 0, toy_sizes=TOY_SIZES) -> dict:
    """Lists of items: "train", "val", "test". Only the toy's train split depends on `seed`.

    GSM8K comes from the files of `data_dir` or from the hub. Pairs always come from files, of lines
    {"question": .., "answer": ..}. The model writes their answers whole, and eval_gsm8k.judge takes
    a text as right that equals item["target"].
    """
    if dataset not in DATASETS:
        raise UserError(f"no data set {dataset!r}: want one of {', '.join(DATASETS)}")
    if dataset in ("toy", "toy2"):
        if data_dir:
            raise UserError(f"{dataset} reads no files, but --data_dir {data_dir} is given: leave "
                            "it out, or name its data with --preset gsm8k or --dataset pairs")
        splits = {}
        for split, n in toy_sizes.items():
            split_seed = seed if split == "train" else 0
            splits[split] = toy_split(split, n, split_seed, either_way=dataset == "toy2")
        return splits

    if data_dir:
        splits = read_folder(path_of(data_dir), dataset)
    elif dataset in HUB:
        splits = read_hub(dataset)
    else:
        raise UserError(f"--dataset {dataset} is read from files: want {FILES}")
    for split in ("train", "test"):
        if split not in splits:
            raise UserError(f"{data_dir or HUB[dataset][0]} has no {split} split: want {FILES}")

    # Without a validation split of its own, some of train are held out: always the same items.
    if "val" not in splits:
        train = splits["train"]
        shuffled = random.Random("gsm8k-val").sample(train, len(train))
        n = min(500, max(1, len(train) // 10))
        splits["val"] = shuffled[:n]
        splits["train"] = shuffled[n:] or shuffled

    seen = {item["question"] for item in splits["train"]}
    overlap = sum(item["question"] in seen for item in splits["val"] + splits["test"])
    if overlap:
        say(f"warning: {overlap} validation or test questions also stand in train")
    return splits


# --- tokenizer ------------------------------------------------------------------------------------

# a digit is always one token
PATTERN = r">> <<|>> #### | ?#### ?| ?<<|>>| ?[^\W\d_]+| ?\d| ?[^\w\s]|[\s\S]"


def build_tokenizer(pieces: list[str]) -> tiktoken.Encoding:
    """256 bytes, then `pieces`, then EOS, PAD, MASK. tiktoken takes a piece that stands in its
    table whole and falls back to bytes, so nothing is trained and any text can be encoded."""
    ranks = {bytes([i]): i for i in range(256)}
    for piece in pieces:
        ranks.setdefault(piece.encode(), len(ranks))
    special = {}
    for name in ("<|eos|>", "<|pad|>", "<|mask|>"):
        special[name] = len(ranks) + len(special)
    return tiktoken.Encoding("learned-orders", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def frequent_pieces(items: list[dict], n: int = 2048) -> list[str]:
    """The n most frequent pieces of two bytes or more in the training text."""
    counts = Counter()
    for item in items:
        counts.update(re.findall(PATTERN, item["question"]))
        counts.update(re.findall(PATTERN, item["target"]))
    pieces = [piece for piece in counts if len(piece.encode()) > 1]
    pieces.sort(key=lambda piece: (-counts[piece], piece))
    return pieces[:n]


def encode(items: list[dict], enc: tiktoken.Encoding, P: int, L: int):
    """prompt (N, P) and x0 (N, L) of the items that fit, and which ones do: the others are dropped
    from training and counted as wrong in evaluation."""
    eos = enc.n_vocab - 3
    pad = enc.n_vocab - 2
    prompts, targets, fitting = [], [], []
    for i, item in enumerate(items):
        prompt = enc.encode_ordinary(item["question"])
        target = enc.encode_ordinary(item["target"]) + [eos]
        if 0 < len(prompt) <= P and len(target) <= L:
            prompts.append(prompt + [pad] * (P - len(prompt)))
            targets.append(target + [pad] * (L - len(target)))
            fitting.append(i)
    return torch.tensor(prompts).view(-1, P), torch.tensor(targets).view(-1, L), fitting


def decode(tokens: list[int], enc: tiktoken.Encoding) -> str:
    """Text of a canvas up to its first EOS or PAD."""
    written = []
    for token in tokens:
        if token >= enc.n_vocab - 3:
            break
        written.append(token)
    return enc.decode(written)


def final_number(text: str) -> Decimal | None:
    """The number right after the last `####`: "$1,234.00" equals 1234, "18 eggs" 18. None where
    there is none, or where the text goes on to another number: 3/4 is not 3, nor is 3,4 34."""
    _, marker, tail = text.rpartition("####")
    number = re.match(rf"\s*({NUMBER})", tail)
    if not marker or not number:
        return None
    goes_on = re.sub(r"^[\s.,eExX=^*/:×·÷⁄+−'_-]+", "", tail[number.end() :])
    if goes_on[:1].isnumeric():
        return None
    return Decimal(re.sub(r"[$,]", "", number[1]))
