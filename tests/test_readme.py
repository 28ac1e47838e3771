"""What the README says: its commands run, its notation is the code's, its tables of files and departures are complete."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import bench
import eval_gsm8k
import sample
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands():
    """Every `python SCRIPT.py FLAGS` of the README, in its blocks and in its sentences."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.S | re.M)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M))
    lines = [line for block in blocks for line in block.splitlines()] + [" ".join(span.split()) for span in spans]
    return sorted({command.strip() for line in lines for command in re.findall(r"python (\w+\.py[^&#]*)", line)})


def test_there_are_commands_of_every_script():
    assert {command.split()[0] for command in commands()} == {"train.py", "sample.py", "eval_gsm8k.py", "bench.py"}


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, fast, straight, tmp_path, monkeypatch, capsys):
    """In a shortened form: flags of a tiny run follow those of the README and win."""
    shutil.copytree(straight, tmp_path / "out")
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    script, *flags = [fast[-1] if word == "DIR" else word for word in shlex.split(command)]  # the folder of its data
    tiny = {"sample.py": ["--ckpt", "out/ckpt.pt", "--num_samples", "1", "--gif", "a.gif"],
            "eval_gsm8k.py": ["--ckpt", "out/ckpt.pt", "--control", "out/control.pt", "--limit", "2", "--tune_items", "2", "--steps", "1,2", "--json", "a.json"],
            "bench.py": [*fast, "--rounds", "1", "--batches", "1", "--steps", "1,2", "--json", "b.json"],
            "train.py": [*fast, "--out_dir", "out"]}[script]
    if "--plot" in flags or "--resume" in flags:
        tiny = []
    if "--help" in flags:
        with pytest.raises(SystemExit) as leave:
            train.main(flags)
        assert leave.value.code == 0
    else:
        {"sample.py": sample, "eval_gsm8k.py": eval_gsm8k, "bench.py": bench, "train.py": train}[script].main(flags + tiny)
    assert capsys.readouterr().out


def test_the_notation_is_that_of_the_code():
    notation = (ROOT / "posterior.py").read_text()
    assert notation.split("\nNOTATION\n")[1].split("\nEND NOTATION")[0] in README


def test_every_departure_is_listed():
    marks = [line for script in ROOT.glob("*.py") for line in script.read_text().splitlines() if "# DEVIATION:" in line or "# [NEW]" in line]
    assert len(marks) == README.split("## Departures")[1].split("\n## ")[0].count("\n- ")


def test_the_table_of_files_has_their_lengths():
    table = dict(re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M))
    assert table == {script.name: str(len(script.read_text().splitlines())) for script in ROOT.glob("*.py")}


def test_the_results_are_those_of_the_json():
    """Every cell of the results table, from the better denoiser of each of the three training runs."""
    runs = []
    for seed in range(3):
        rows = [row for more in ("", "_more") for row in json.loads((ROOT / "assets" / f"toy_seed{seed}{more}.json").read_text())["rows"]]
        runs.append({(row["asked"], row["budget"]): row for row in sorted(rows, key=lambda row: row["score"])})  # the best stays
    header, _, *lines = README.split("Coherent answers, %:\n\n")[1].split("\n\n")[0].splitlines()
    budgets = [int(cell.split()[0]) for cell in header.strip("| ").split(" | ")[1:]]
    assert budgets == [2, 3, 4, 8, 16] and len(lines) == 9
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        asked, key, unit = (name.split(" of ")[1], "steps_mean", "{:.2f}") if name.startswith("mean steps") else (name.strip("*"), "score", "{:.1%}")
        for budget, cell in zip(budgets, cells, strict=True):
            numbers = [unit.format(run[asked, budget][key]).rstrip("%") for run in runs if (asked, budget) in run]
            assert cell == (" / ".join(numbers) or "–")


def test_the_results_on_gsm8k_are_those_of_the_json():
    """Every line of the section's table of orders, and of its table of budgets."""
    rows = {}
    for path in sorted((ROOT / "assets" / "gsm8k").glob("*.json")):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            config = result["meta"]["train_config"]
            order = "learned" if row["asked"].startswith("learned") else row["asked"]  # the knob is chosen beforehand
            rows[config["augment"], config["max_steps_order"] if order == "learned" else 0, order, row["budget"]] = row
    section = README.split("\n## GSM8K")[1].split("\n## ")[0]
    _, _, *lines = section.split("at most 4 steps on average:\n\n")[1].split("\n\n")[0].splitlines()
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        order = "learned" if "learned" in name else name.split(",")[0]
        row = rows[0.0 if "without" in name else 0.5, (2400 if "2,400" in name else 1200) * (order == "learned"), order, 4]
        low, high = row["ci95"]
        assert cells == [f"{row['steps_mean']:.2f}", f"{100 * row['accuracy']:.1f} ({100 * low:.1f} - {100 * high:.1f})", f"{100 * row['equations_true']:.1f}",
                         f"{100 * row['format_failures']:.1f}", f"{row['nats']:.1f}"]
    header, _, *lines = section.split("by budget:\n\n")[1].split("\n\n")[0].splitlines()
    budgets = [64 if cell == "L" else int(cell) for cell in header.strip("| ").split(" | ")[1:]]
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        for budget, cell in zip(budgets, cells, strict=True):
            row = rows.get((0.5, 1200 * (name == "**learned**"), name.strip("*"), budget))
            assert cell == (f"{100 * row['accuracy']:.1f}, {100 * row['equations_true']:.1f}, {100 * row['format_failures']:.0f}" if row else "–")
