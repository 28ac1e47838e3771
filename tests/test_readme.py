"""What README.md and the texts of assets say: commands and recipes run, numbers are those of the
JSON files."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from statistics import median

import pytest
import torch

import eval_gsm8k
import posterior
import sample
import tools.bench
import tools.plot
import tools.seeds
import train
from data import TOY_SIZES, toy_split

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "assets/results.md").read_text()
EXPERIMENTS = (ROOT / "assets/experiments.md").read_text()
SCRIPTS = {"train.py": train, "sample.py": sample, "eval_gsm8k.py": eval_gsm8k,
           "tools.bench": tools.bench, "tools.plot": tools.plot, "tools.seeds": tools.seeds}


def commands():
    """Every `python SCRIPT FLAGS` in blocks and in sentences, on one line each. Sections about an
    earlier version name commands that are no more: "(commit" in their heading says so."""
    text = "\n".join((README, RESULTS, EXPERIMENTS)).replace("\\\n", " ")
    sections = re.split(r"^(?=#+ )", text, flags=re.M)
    text = "".join(section for section in sections if "(commit" not in section.split("\n")[0])
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in spans]
    found = set()
    for line in lines:
        for command in re.findall(r"python (?:-m )?((?:\w+\.py|tools\.\w+)[^&#;]*)", line):
            found.add(command.strip())
    return sorted(found)


def test_there_are_commands_of_every_script():
    assert {command.split()[0] for command in commands()} == set(SCRIPTS)


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, fast, straight, tmp_path, monkeypatch, capsys):
    """In a shortened form: flags of a tiny run follow those of the README and win."""
    data = fast[fast.index("--data_dir") + 1]
    stands_for = {"DIR": data, "CKPT": "out/ckpt.pt"}
    words = [word.replace("$s", "0").replace("*", "0") for word in shlex.split(command)]
    script, *flags = [stands_for.get(word, word) for word in words]
    for name in {"out", *re.findall(r"\b(?:out2?\w*_\w+|ex)\b", " ".join(flags))}:
        shutil.copytree(straight, tmp_path / name)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    tiny = {
        "tools.seeds": [],
        "sample.py": ["--ckpt", "out/ckpt.pt", "--num_samples", "1"],
        "eval_gsm8k.py": ["--ckpt", "out/ckpt.pt", "--control", "out/denoiser.pt", "--limit", "2",
                          "--tune_items", "2", "--steps", "1,2", "--json", "a.json"],
        "train.py": [*fast, "--out_dir", "out"],
        "tools.plot": ["--out", "a.gif" if "gif" in flags else "a.png"],
        "tools.bench": [*fast, "--steps", "1", "--sample", "1", "--json", "b.json"],
    }[script]
    if "out_mine" in command or "right_to_left" in command or "--resume" in flags:
        return  # the recipes' own tests run it, and test_scripts.py stops a run and goes on with it
    if script == "tools.seeds":  # it wants runs of a toy: test_tools.py has one
        assert tools.seeds.parse_args(flags).json.name.endswith("_seeds.json")
        return
    if "--help" in flags:
        tiny = []
    if script == "tools.plot" and "seeds" not in flags:  # of evaluations that tools.seeds has left
        eval_gsm8k.main(["--ckpt", "out/ckpt.pt", "--control", "out/denoiser.pt", "--limit", "2",
                         "--tune_items", "2", "--steps", "4", "--json", "e.json",
                         "--orders", "learned:0.5,entropy_bound,left_to_right"])
        for path in filter(lambda flag: flag.endswith(".json"), flags):
            shutil.copy("e.json", path)
    if "--help" in flags:
        with pytest.raises(SystemExit) as leave:
            SCRIPTS[script].main(flags)
        assert leave.value.code == 0
    else:
        SCRIPTS[script].main(flags + tiny)
    assert capsys.readouterr().out or script == "tools.plot"


# --- recipes: the blocks after <!-- recipe: NAME --> ----------------------------------------------

def recipe(name: str) -> dict:
    """The names that the block defines."""
    block = README.split(f"<!-- recipe: {name} -->\n```python\n")[1].split("```")[0]
    names = {}
    exec(block, names)
    return names


def test_the_recipe_of_a_rule_runs(straight, monkeypatch, capsys):
    monkeypatch.setattr(sample, "ORDERS", dict(sample.ORDERS))
    recipe("rule")
    sample.main(["--ckpt", str(straight / "ckpt.pt"), "--num_samples", "1", "--steps", "3",
                 "--compare", "right_to_left,confidence"])
    steps = [line for line in capsys.readouterr().out.splitlines() if "right_to_left" in line]
    canvas = steps[0].split("right_to_left")[1].strip()
    assert canvas.startswith("·") and not canvas.endswith("·")


def test_the_recipe_of_a_posterior_runs(fast, tmp_path, monkeypatch):
    """It trains, and one step of it opens a single position where scores lie far apart."""
    monkeypatch.setattr(posterior, "log_gate_probs", posterior.log_gate_probs)
    gates = recipe("posterior")["log_gate_probs"]
    assert posterior.log_gate_probs is gates
    log_q = gates(torch.tensor([[0.0, 9.0, 3.0]]), torch.tensor([[True, True, True]]), 2, 0.01)
    assert log_q.exp().tolist() == [[0.0, 1.0, 0.0]]
    train.main([*fast, "--stages", "denoiser,order", "--max_steps_order", "5",
                "--out_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/ckpt.pt").is_file()


class Pretrained(torch.nn.Module):
    """A stand-in: its own width, its own ids of PAD (0) and MASK (5), a tied output."""

    def __init__(self, V, D=24):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, D)
        self.position = torch.nn.Parameter(torch.randn(16, D))
        self.layer = torch.nn.TransformerEncoderLayer(D, 3, 48, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        return self.layer(self.embedding(tokens) + self.position[: tokens.shape[1]])


def test_the_recipe_of_a_denoiser_trains_and_writes():
    """From a pretrained network of other sizes and ids: the bound rises, and generate() writes."""
    torch.manual_seed(0)
    names = recipe("denoiser")
    network = Pretrained(V=9)
    config = names["Theirs"](9, prompt_len=4, answer_len=6, n_embd=24, max_steps=4)
    model = names["Adapted"](network, network.embedding.weight, config)
    batches = []
    for _ in range(90):
        prompt = torch.randint(6, 9, (8, 4))
        batches.append((prompt, torch.cat([prompt, torch.tensor([[1, 0]]).expand(8, 2)], 1)))
    before = network.layer.linear1.weight.clone()
    bounds = list(names["train_order"](model, batches, lr=1e-2))
    assert sum(bounds[-9:]) > sum(bounds[:9]) + 9 * 10
    assert not torch.equal(before, network.layer.linear1.weight)
    assert len(list(model.parameters())) == len(set(model.parameters()))  # tied: once
    out = sample.generate(model.eval(), prompt, 3)
    assert (out.tokens != config.mask).all() and out.steps.max() <= 3
    assert (out.tokens == batches[-1][1]).float().mean() > 0.8


def test_the_recipe_of_ones_own_data_runs(tmp_path, monkeypatch, capsys):
    """The README's line, in a file, through its three commands."""
    line = next(line for line in README.splitlines() if line.startswith('{"question"'))
    for name in ("train", "test"):
        rows = [line.replace("a b c", f"a b {n}").replace("c b a", f"{n} b a") for n in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    block = README.split(line)[1].split("```")[2].replace("DIR", str(tmp_path))
    tiny = {"train.py": "--max_steps_denoiser 30 --max_steps_order 10 --n_embd 16 --n_head 2 "
                        "--n_layer 1 --n_layer_posterior 1 --batch_size 4 --batch_size_order 4 "
                        "--device cpu",
            "sample.py": "--num_samples 1", "eval_gsm8k.py": "--limit 2 --tune_items 1 --steps 2"}
    for command in block.strip().splitlines():
        _, script, *flags = shlex.split(command)
        SCRIPTS[script].main(flags + tiny[script].split())
    assert json.loads((tmp_path / "out_mine/eval.json").read_text())


# --- numbers --------------------------------------------------------------------------------------

def cell(values):
    return f"{median(values):.1f} ({min(values):.1f} - {max(values):.1f})"


def tables(text: str):
    """(header, rows) of each Markdown table, as lists of cells without marks."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        lines = [[cell.strip(" *") for cell in line.strip("|").split("|")]
                 for line in block.splitlines()]
        yield lines[0], lines[2:]


def score(run, order, steps):
    return run["orders"][order][steps][0]


def best_published(run, steps):
    """p's first order is a rule, too, but nobody has published it."""
    rules = [order for order in run["orders"] if not order.startswith("learned")]
    return max(score(run, rule, steps) for rule in rules if rule != "first_order")


def runs_of(name: str):
    return json.loads((ROOT / f"assets/{name}_seeds.json").read_text())["rows"]


def section(name: str):
    """What stands in the results under `## NAME`, or `## NAME, ...`."""
    return re.split(rf"\n## {name}\b.*\n", RESULTS)[1].split("\n## ")[0]


TOYS = {"The toy": "toy", "toy2": "toy2"}  # sections of the results, and their JSON


@pytest.mark.parametrize("title", ["README", *TOYS])
def test_a_toys_table_is_that_of_the_json(title):
    """Coherent answers of each order within each number of steps, over seeds."""
    runs = runs_of(TOYS.get(title, "toy"))
    text = README if title == "README" else section(title)
    [(header, rows)] = [table for table in tables(text) if table[0][0] == "order, coherent %"]
    budgets = [re.match(r"\d+", name)[0] for name in header[1:]]
    assert len(rows) >= 5
    for name, *cells in rows:
        order = name.split(",")[0]
        for steps, shown in zip(budgets, cells, strict=True):
            if order == "best published rule":
                values = [best_published(run, steps) for run in runs]
            else:
                values = [score(run, order, steps) for run in runs]
            assert shown == cell(values), (order, steps)


def test_the_learned_order_with_the_control_s_tokens_is_that_of_the_json():
    """Of runs that were measured so: with its own tokens, with the control's, first_order."""
    runs = [run for run in runs_of("toy") if "control_tokens_by_steps" in run]
    [(header, rows)] = [table for table in tables(section("The toy"))
                        if table[0][0] == "order and tokens, coherent %"]
    budgets = [re.match(r"\d+", name)[0] for name in header[1:]]
    for row, name in zip(rows, ("coherent_by_steps", "control_tokens_by_steps")):
        assert row[1:] == [cell([run[name][steps] for run in runs]) for steps in budgets]
    assert rows[2][1:] == [cell([score(run, "first_order", steps) for run in runs])
                           for steps in budgets]
    values = [run["control_tokens_by_steps"]["4"] for run in runs]
    text = " ".join(README.split())
    assert f"{median(values):.1f} % in 4 steps ({min(values):.0f} to {max(values):.0f}, six" in text


@pytest.mark.parametrize("title", TOYS)
def test_the_leads_are_those_of_the_json(title):
    """Of each seed: the best published rule, and p's first order."""
    runs = runs_of(TOYS[title])

    def first(run, steps):
        return score(run, "first_order", steps)

    [(header, rows)] = [table for table in tables(section(title)) if table[0][:2] == ["", "2"]]
    steps = header[1:]
    learned = [median(score(run, "learned:0.5", n) for run in runs) for n in steps]
    expected = [learned]
    for other in (best_published, first):
        expected.append([median(other(run, n) for run in runs) for n in steps])
        expected.append([min(score(run, "learned:0.5", n) - other(run, n) for run in runs)
                         for n in steps])
    assert [row[1:] for row in rows] == [[f"{value:.1f}" for value in row] for row in expected]


@pytest.mark.parametrize("title", TOYS)
def test_the_seeds_are_those_of_the_json(title):
    """One line a training run: bound, coherent and pairs that meet by steps, best rule."""
    for run in runs_of(TOYS[title]):
        coherent = ", ".join(f"{value:.1f}" for value in run["coherent_by_steps"].values())
        meet = ", ".join(f"{value:.1f}" for value in run["same_step_by_steps"].values())
        assert (f"| {run['seed']} | {run['val']:.2f} ± {run['val_se']:.2f} | {coherent} | {meet} | "
                f"{run['best_rule_coherent']:.1f} ({run['best_rule']}) | {run['sequential']:.1f} | "
                f"{run['minutes']:.1f} |") in section(title)


def mean_and_error(values, sign=""):
    values = torch.tensor(values, dtype=torch.float64)
    error = values.std(correction=0) / len(values) ** 0.5
    return f"{values.mean():{sign}.1f} ± {error:.1f}"


@pytest.mark.parametrize("file, first, table, less, with_accuracy", [
    ("eval", "learned:0.5", "order", "learned:0.5 less", True),
    ("draws", "learned", "order, mixtures", "learned, 32 orders, less", False)])
def test_the_tables_of_gsm8k_are_those_of_the_json(file, first, table, less, with_accuracy):
    """Each order on its best checkpoint: log p, its standard error, accuracy; and what the learned
    order has more, item by item."""
    best = {}
    for row in json.loads((ROOT / f"assets/gsm8k/{file}.json").read_text())["rows"]:
        of = row["asked"], str(row["budget"])
        if of not in best or row["score"] > best[of]["score"]:
            best[of] = row

    shown = {header[0]: (header, rows) for header, rows in tables(section("GSM8K"))}
    header, rows = shown[table]
    budgets = [re.match(r"\d+", name)[0] for name in header[1:]]
    for name, *cells in rows:
        for steps, cell in zip(budgets, cells, strict=True):
            row = best[name.split(",")[0], steps]
            accuracy = f", {100 * row['accuracy']:.1f} %" if with_accuracy else ""
            assert cell == mean_and_error(row["nats"]) + accuracy
    header, others = shown[less]
    for name, *cells in others:
        for steps, cell in zip(budgets, cells, strict=True):
            learned = best[first, steps]["nats"]
            other = best[name.split(",")[0], steps]["nats"]
            assert cell == mean_and_error([a - b for a, b in zip(learned, other)], "+")
    assert len(rows) == len(others) + 1 == 6


def test_what_the_toy_leaves_open_is_ln_2_a_pair_that_may_change_places():
    """No bound on log p can be above it: the best that the results are compared with."""
    floors = {}
    for split in ("val", "test"):
        items = toy_split(split, TOY_SIZES[split])
        pairs = 0
        for item in items:
            for a, b in re.findall(r"<<(\d+)[+*](\d+)=", item["target"]):
                pairs += a != b
        floors[split] = -math.log(2) * pairs / len(items)
    text = " ".join(RESULTS.split())
    assert f"is {floors['val']:.3f} nats on them and {floors['test']:.3f} on test" in text


@pytest.mark.owner
def test_every_departure_is_listed():
    marks = [line for script in ROOT.glob("*.py") for line in script.read_text().splitlines()
             if re.search(r"\[NEW\]", line)]
    listed = README.split("## Departures")[1].split("\n## ")[0]
    assert len(marks) - 1 == listed.count("\n- ")  # one line says what the mark means


@pytest.mark.owner
def test_lines_are_of_the_width_of_a_screen():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path.name
