"""Data: a toy task that needs no download, the GSM8K loaders, one tokenizer, answer checking, and GSM8K with other numbers.

Everything here speaks GSM8K's form, {"question": str, "answer": str}, where the answer carries
calculator annotations `<<6+3=9>>` and ends in `#### n`. The model is trained on a *target* made
from the answer: the annotations joined by spaces and then `#### n` ("equations"), or the whole
text ("full").

    question  Max has 8 eggs, buys 1, splits 3, sells 2. Ann has 4, times 2, sells 5, buys 1. Together?
    target    <<1+8=9>> <<9/3=3>> <<3-2=1>> <<2*4=8>> <<8-5=3>> <<3+1=4>> <<4+1=5>> #### 5

The toy is built so that the order of generation matters (its numbers are in the README):
- each equation needs the result of the one before, and a shallow network cannot compute a long
  chain in one pass, so results have to be revealed over several steps;
- the two people do not depend on each other, so both chains can be written at the same time, which
  left to right cannot do;
- + and * write their operands in either order with probability 1/2: each operand alone is
  uncertain, together they are tied, so revealing both in the same step is wrong half of the time. A
  rule that looks at one position at a time cannot tell them from two that are uncertain but unrelated;
- answers have several lengths, so a fixed canvas ends in EOS and PAD, as GSM8K's does.

In toy2 each person's story is told forwards or backwards, a coin flip, and the equations follow the story:

    question  Max sells 2, splits 3, buys 1, has 8 eggs. Ann has 4, times 2, sells 5, buys 1. Together?
    target    <<3-2=1>> <<9/3=3>> <<1+8=9>> <<2*4=8>> <<8-5=3>> <<3+1=4>> <<4+1=5>> #### 5

so no fixed direction is right: what has to be written first depends on the question.

A sequence is `[question PAD .. PAD | answer EOS PAD .. PAD]`: the prompt is padded to `prompt_len`,
the canvas to `answer_len` (L). EOS and PAD of the canvas are ordinary tokens that the model has to
generate; PAD of the prompt is never attended to.
"""

import ast
import json
import operator
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import tiktoken
import torch


class UserError(Exception):
    """Something the user can mend. `cli` prints it as one line and exits with status 2."""


def cli(main):
    """Run a script's main(): a UserError becomes one line on stderr and exit status 2, whatever a name or
    a file that it quotes holds. Ctrl-C ends with status 130."""
    try:
        main()
    except UserError as e:
        print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(e)), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def replacing(path: str | Path, mode: str = "w"):
    """A file to write to that takes the place of `path` once it is complete and on the disk: after a kill,
    a power cut or a full disk there is the old file or the new one, never half of one. Raises UserError."""
    try:
        temporary = Path(path).with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as e:  # torch.save raises RuntimeError, a name with NUL ValueError
        with suppress(OSError, ValueError):  # give a full disk its space back
            Path(path).with_suffix(".tmp").unlink()
        raise UserError(f"cannot write {path}: {e}") from e


# --- the toy task ------------------------------------------------------------------------------

NAMES = ["Max", "Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Zoe"]
THINGS = ["eggs", "pens", "cups", "figs", "nuts", "toys", "caps", "keys"]
VERBS = {"+": "buys", "-": "sells", "*": "times", "/": "splits"}
DATASETS = ("toy", "toy2", "gsm8k", "gsm8k-aug")
TOY_LINKS = (2, 4)  # fewest and most operations of one person
TOY_SIZES = {"train": 50_000, "val": 1000, "test": 2000}


def equation(rng: random.Random, a: int, op: str, b: int, result: int) -> str:
    """`<<a op b=result>>`; the operands of + and * change places with probability 1/2."""
    a, b = (b, a) if op in "+*" and rng.random() < 0.5 else (a, b)
    return f"<<{a}{op}{b}={result}>>"


def toy_person(rng: random.Random, either_way: bool) -> tuple[list[str], list[str], int]:
    """One person's operations on a running total that stays within 1..9: story, equations, total. `either_way`:
    the story is told backwards with probability 1/2, and the equations stand in the order of the story."""
    total = rng.randint(1, 9)
    story, equations = [f"has {total}"], []
    for _ in range(rng.randint(*TOY_LINKS)):
        operands = {  # that keep the total whole and within 1..9; large ones would give the result away
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
    (story, equations, total), (story2, equations2, total2) = toy_person(rng, either_way), toy_person(rng, either_way)
    story = [f"{part} {thing}" if part.startswith("has") else part for part in story]
    question = f"{names[0]} {', '.join(story)}. {names[1]} {', '.join(story2)}. Together?"
    equations += equations2 + [equation(rng, total, "+", total2, total + total2)]
    return {"question": question, "answer": "\n".join(equations) + f"\n#### {total + total2}"}


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


# --- GSM8K: from files or from the hub -----------------------------------------------------------

def read_lines(path: Path) -> list[tuple[int, str]]:
    """Non-blank lines with their numbers. Raises UserError for unreadable files and LFS pointers."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if text.startswith("version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` where it came from")
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def fields_of(pairs: list[tuple]) -> dict:
    """An object of JSON. Python would silently take the last of two fields of one name."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field stands there twice")
    return dict(pairs)


def read_jsonl(path: Path) -> list[dict]:
    items = []
    for i, line in read_lines(path):
        try:
            items.append(to_item(json.loads(line, object_pairs_hook=fields_of)))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{path}, line {i}: want JSON with question and answer ({type(e).__name__}: {e})") from e
    return items


def read_aug_text(path: Path) -> list[dict]:
    """GSM8K-Aug lines: `question||<<16-3-4=9>> <<9*2=18>> #### 18`."""
    items = []
    for i, line in read_lines(path):
        question, bar, answer = line.partition("||")
        if not bar or "####" not in answer:
            raise UserError(f"{path}, line {i}: want `question||<<..>> <<..>> #### n`")
        items.append({"question": question.strip(), "answer": answer.strip()})
    return items


def to_item(row: dict) -> dict:
    """A row of any GSM8K copy as {"question", "answer"}. Copies that keep the equations in a field
    of their own (`steps` or `cot`) hold the bare number in `answer`."""
    question, answer = row["question"], row["answer"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError("question and answer must be strings")
    steps = row.get("steps", row.get("cot"))
    if steps is not None:
        answer = f"{steps if isinstance(steps, str) else ' '.join(steps)} #### {answer}"
    if "####" not in answer:
        raise ValueError("answer has no `#### n`")
    (question + answer).encode()  # ValueError for half of a surrogate pair, which no tokenizer can encode
    return {"question": question.strip(), "answer": answer.strip()}


def load_gsm8k(dataset: str, data_dir: str | None) -> dict[str, list[dict]]:
    """Splits of "gsm8k" or "gsm8k-aug" from `data_dir` (train.jsonl, test.jsonl, or the same with
    .txt lines of GSM8K-Aug; valid.* where there is one), or from the hub."""
    splits = {}
    if data_dir:
        for split in ("train", "test", "valid"):
            found = [p for p in (Path(data_dir) / f"{split}.jsonl", Path(data_dir) / f"{split}.txt") if os.path.isfile(p)]
            if found:
                splits[split] = read_jsonl(found[0]) if found[0].suffix == ".jsonl" else read_aug_text(found[0])
            elif split != "valid":
                raise UserError(f"no {split}.jsonl or {split}.txt in --data_dir {data_dir}")
    else:
        import datasets  # only here: it takes seconds to import and the toy does not need it
        name = {"gsm8k": ("openai/gsm8k", "main"), "gsm8k-aug": ("whynlp/gsm8k-aug",)}[dataset]
        try:
            hub = datasets.load_dataset(*name)
        except Exception as e:  # the hub client raises a dozen types for "no network"
            reason = str(e).split("\n")[0][:120]
            raise UserError(f"cannot load {name[0]} from the hub ({reason}): "
                            "check the network, or pass --data_dir with train.jsonl and test.jsonl") from e
        splits = {("valid" if s == "validation" else s): [to_item(r) for r in rows] for s, rows in hub.items()}
    if not splits["train"] or not splits["test"]:
        raise UserError(f"no examples in {data_dir or dataset}: train and test must hold at least one each")
    return splits


def load_splits(dataset: str, data_dir: str | None = None, seed: int = 0, toy_sizes: dict = TOY_SIZES) -> dict[str, list[dict]]:
    """Lists of items by split: "train", "val", "test". `toy_sizes` says which of the toy's splits to
    make; only its train split depends on `seed`."""
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}")
    if dataset.startswith("toy"):
        return {split: toy_split(split, n, seed if split == "train" else 0, either_way=dataset == "toy2") for split, n in toy_sizes.items()}
    splits = load_gsm8k(dataset, data_dir)
    train, val = splits["train"], splits.get("valid")
    if val is None:  # held out of train, always the same items: `seed` must not move them
        train = random.Random("gsm8k-val").sample(train, len(train))
        n_val = min(500, max(1, len(train) // 10))
        train, val = train[n_val:] or train, train[:n_val]
    seen = {item["question"] for item in train}
    overlap = sum(item["question"] in seen for item in val + splits["test"])
    if overlap:
        print(f"warning: {overlap} validation or test questions also stand in train")
    return {"train": train, "val": val, "test": splits["test"]}


def to_target(answer: str, target: str) -> str:
    """The text to generate: "equations" (annotations, then `#### n`) or "full" (all of it)."""
    if target == "full":
        return answer
    return " ".join(re.findall(r"<<[^<>]*>>", answer) + ["#### " + answer.rpartition("####")[2].strip()])


# --- tokenizer -----------------------------------------------------------------------------------

PATTERN = r">> <<|>> #### | ?#### ?| ?<<|>>| ?[^\W\d_]+| ?\d| ?[^\w\s]|[\s\S]"  # a digit is always one token
SPECIALS = ["<|eos|>", "<|pad|>", "<|mask|>"]


def build_tokenizer(pieces: list[str]) -> tiktoken.Encoding:
    """256 bytes, then `pieces`, then EOS, PAD, MASK. tiktoken takes a piece that stands in its table
    whole and falls back to bytes, so nothing is trained and any text can be encoded."""
    ranks = {bytes([i]): i for i in range(256)}
    for piece in pieces:
        ranks.setdefault(piece.encode(), len(ranks))
    special = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("learned-orders", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def frequent_pieces(items: list[dict], target: str, n: int = 2048) -> list[str]:
    """The n most frequent pieces of two bytes or more in the training text."""
    counts = Counter()
    for item in items:
        counts.update(re.findall(PATTERN, item["question"]))
        counts.update(re.findall(PATTERN, to_target(item["answer"], target)))
    frequent = sorted((p for p in counts if len(p.encode()) > 1), key=lambda p: (-counts[p], p))
    return frequent[:n]


# --- tensors -------------------------------------------------------------------------------------

@dataclass
class Split:
    """Encoded items. `fits` says which of the original items are here; the others are longer than
    the prompt or the canvas: dropped from training, counted as wrong in evaluation."""
    prompt: torch.Tensor  # (N, P) question tokens, PAD to the end
    x0: torch.Tensor      # (N, L) answer, EOS, PAD
    fits: list[bool]      # one per original item


def encode_prompt(question: str, enc: tiktoken.Encoding, prompt_len: int) -> list[int] | None:
    """Question tokens, padded to prompt_len; None if they do not fit."""
    ids = enc.encode_ordinary(question)
    return ids + [enc.n_vocab - 2] * (prompt_len - len(ids)) if len(ids) <= prompt_len else None


def encode_split(items: list[dict], enc: tiktoken.Encoding, prompt_len: int, answer_len: int, target: str) -> Split:
    eos, pad = enc.n_vocab - 3, enc.n_vocab - 2
    prompts, answers, fits = [], [], []
    for item in items:
        prompt = encode_prompt(item["question"], enc, prompt_len)
        answer = enc.encode_ordinary(to_target(item["answer"], target)) + [eos]
        fits.append(prompt is not None and len(answer) <= answer_len)
        if fits[-1]:
            prompts.append(prompt)
            answers.append(answer + [pad] * (answer_len - len(answer)))
    return Split(torch.tensor(prompts).view(-1, prompt_len), torch.tensor(answers).view(-1, answer_len), fits)


def decode(tokens: list[int], enc: tiktoken.Encoding) -> str:
    """Text of a canvas up to its first EOS or PAD."""
    end = next((i for i, token in enumerate(tokens) if token >= enc.n_vocab - 3), len(tokens))
    return enc.decode(tokens[:end])


# --- checking answers ----------------------------------------------------------------------------

NUMBER = re.compile(r"\s*([-+]?\$?\d[\d,]*(?:\.\d+)?)", re.ASCII)


def final_number(text: str) -> Decimal | None:
    """The number right after the last `####`, or None. `$` and `,` are ignored, so that
    "#### $1,234.00" equals "#### 1234"."""
    _, marker, tail = text.rpartition("####")
    match = NUMBER.match(tail) if marker else None
    return Decimal(match[1].replace("$", "").replace(",", "")) if match else None


def is_correct(generated: str, answer: str) -> bool:
    """Strict accuracy: both final numbers exist and are equal as numbers."""
    number = final_number(generated)
    return number is not None and number == final_number(answer)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.UAdd: operator.pos, ast.USub: operator.neg}


@lru_cache(maxsize=10_000)
def value_of(expression: str) -> Fraction | None:
    """Exact value of an expression of numbers, + - * / ( ) and %, or None if it is no such thing or has more than
    200 characters. Python's grammar reads it; nothing is executed, and there is no operator whose result could grow
    without bound. Models write strange things: never an exception."""
    def walk(node):
        match node:
            case ast.Constant():
                return Fraction(text[node.col_offset : node.end_col_offset])  # as written: a float would round it
            case ast.UnaryOp():
                return OPERATORS[type(node.op)](walk(node.operand))
            case ast.BinOp():
                return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError

    text = re.sub(r"([\d.]+)%", r"(\1/100)", expression.replace(",", "").strip()) if len(expression) <= 200 else ""
    if not re.fullmatch(r"[\d.+\-*/() ]{1,200}", text, re.ASCII):
        return None
    try:
        return walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, MemoryError, RecursionError):
        return None


# --- number augmentation -------------------------------------------------------------------------

# [NEW] Numbers that a question brings in by words (1, 2 and 100: always): an equation may use them, and they stay.
CONSTANTS = {1: "", 2: "", 100: "", 3: "three|third|triple", 4: "four|quarter|month", 5: "five|fifth", 6: "six", 7: "seven|week|day|daily",
             8: "eight", 9: "nine", 10: "ten", 12: "twelve|dozen|year|month|annual|feet|foot|inches", 20: "twenty", 24: "day|daily|hour",
             30: "thirty|month", 52: "year|week", 60: "hour|minute|second", Fraction(1, 2): "half", Fraction(1, 4): "quarter"}
NUMERAL = re.compile(r"(?:[1-9]\d{0,2}(?:,\d{3}){1,4}|[1-9]\d{0,14}|0)(?:\.\d{1,6})?|\.\d{1,6}", re.ASCII)
EQUATION = re.compile(rf"(?:=\s*[$€£]?\s*)?<<([^<>=]*)=({NUMERAL.pattern})>>")
# A numeral stays where it is part of a name, word, fraction, time or year, or of "5 days a week", "8 ounces in a cup".
FIXED_BEFORE = re.compile(r"([\w/:.#-]|\b[A-Z][\w'’.]* |\d )$")
FIXED_AFTER = re.compile(r"\w|[/:-]\d| \d|,? ?[ap]\.?m\b|(?<=[^$]\b(19|20)\d\d)"
                         r"|[ -](day|hour|minute|week|month)s?[ -](\w+ )?(a|an|per|each|every|in|of)\b| \w+ in (an?|one|1)\b", re.I)


def kind(value: Fraction) -> tuple:
    return value > 0, value < 1, value.denominator == 1


def redrawn(value: Fraction, numeral: str, taken: list, rng: random.Random) -> Fraction:
    """A number of the same kind, half to twice as large and as round; below 100, as percentages are, if `value` is."""
    unit = Fraction(1, 10 ** len(numeral.partition(".")[2]))
    unit = max(u for i in range(14) if (u := unit * 5 ** (i % 2) * 10 ** (i // 2)) and (i == 0 or value % u == 0 and value >= 4 * u))
    draws = (rng.randint(int(value / unit + 1) // 2, int(2 * value / unit)) * unit for _ in range(20))
    return next((v for v in draws if kind(v) == kind(value) and (v < 100) == (value < 100) and v not in taken), value)


def rewritten(text: str, values: list[Fraction]) -> str:
    """`text` with these for its numerals, with as many decimals or more, and commas, where the old had them."""
    for m, value in reversed(list(zip(NUMERAL.finditer(text), values))):
        number, decimals = Decimal(value.numerator) / value.denominator, len(m[0].partition(".")[2])
        new = f"{number:{',' * (',' in m[0])}.{max(decimals, -number.as_tuple().exponent)}f}"
        text = text if value == value_of(m[0]) else text[: m.start()] + new + text[m.end() :]
    return text


def augment(item: dict, rng: random.Random, tries: int = 20) -> dict | None:
    """The same problem with other numbers: numerals of the question are redrawn and the equations, a small program, computed
    anew. The answer becomes its equations and `#### n`: the text around them could not be kept true. None where that is not
    safe (a step without annotation; an operand that comes from nowhere, or from a result and something else; a numeral or
    result without use: it may be a threshold, or only compared) or where no draw keeps the kind of every result."""
    question, numerals, equations = item["question"], list(NUMERAL.finditer(item["question"])), EQUATION.findall(item["answer"])
    old = [value_of(m[0]) for m in numerals]  # then the constants, then the results
    old += [value for value, words in CONSTANTS.items() if re.search(rf"\b({words})(s|d|th|ly)?(?!\w)", question, re.I)]
    n, sources, operands = len(old), defaultdict(list), []
    percent = [(i, Fraction(1, 100)) for i, m in enumerate(numerals) if re.match(r" ?(%|percent|cent)", question[m.end() :])]
    for i, factor in [*((i, 1) for i in range(n)), *percent]:  # where an operand can come from: (place in `old`, factor)
        sources[old[i] * factor].append((i, factor))
    unclear = {i for source in sources.values() if len(source) > 1 for i, _ in source}
    for left, right in equations:
        operands.append([sources[value_of(numeral)][:] for numeral in NUMERAL.findall(left)])
        if value_of(left) != value_of(right) or any(not s or s[1:] and s[-1][0] >= n for s in operands[-1]):
            return None
        sources[value_of(left)].append((len(old), 1))
        old.append(value_of(left))
    uses = [i for operand in operands for source in operand for i, _ in source]
    idle = {*range(len(numerals)), *range(n, len(old) - 1)} - {*uses}
    free = [i for i, m in enumerate(numerals) if i not in unclear and (uses.count(i) == 1 or old[i] > 9)  # the 3 pens, or the 3 friends?
            and not FIXED_BEFORE.search(question[: m.start()]) and not FIXED_AFTER.match(question, m.end())]
    if idle or not free or "=" in EQUATION.sub("", item["answer"]) or old[-1] != final_number(item["answer"]):
        return None
    for _ in range(tries):
        new, program = [redrawn(v, numerals[i][0], old, rng) if i in free else v for i, v in enumerate(old[:n])], []
        for (left, right), operand in zip(equations, operands):
            left = rewritten(left, [new[i] * factor for *_, (i, factor) in operand])
            new.append(value_of(left) or Fraction(1, 3))  # none, or 0: a third cannot be written, so is never accepted
            program.append(f"<<{left}={rewritten(right, new[-1:])}>>")
        if new != old and all(kind(a) == kind(b) and (100 * a).denominator == 1 for a, b in zip(new[n:], old[n:])):
            return {"question": rewritten(question, new), "answer": f"{' '.join(program)} #### {rewritten('0', new[-1:])}"}
    return None
