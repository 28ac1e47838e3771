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


def tables_of_gsm8k() -> tuple[list[str], list[str]]:
    """Lines of the section's table of orders at 4 steps, the likeliest first, and of its table of budgets."""
    rows = {}
    for path in sorted((ROOT / "assets" / "gsm8k").glob("*.json")):
        result = json.loads(path.read_text())
        config = result["meta"]["train_config"]
        for row in result["rows"]:
            order, note = re.sub(r"(:[\d.]+)+", "", row["asked"]), "" if config["augment"] else ", without other numbers"
            if order == "learned" and not config.get("plateau"):
                note = ", first form of q"
            if order != "learned" and "ckpt" in row["checkpoint"]:
                note = ", on the learned order's denoiser"
            rows[order, note, row["budget"]] = row
    bold = lambda name: f"**{name}**" if name.startswith("learned") else name
    four, budgets = [], []
    for (order, note, budget), row in sorted(rows.items(), key=lambda item: -item[1].get("nats", 0) * (item[0][0] != "oracle")):
        low, high = row["ci95"]
        if budget == 4 and order != "oracle":
            four.append(f"| {bold(row['order'])}{note} | {row['steps_mean']:.2f} | {100 * row['accuracy']:.1f} ({100 * low:.1f} - {100 * high:.1f}) | "
                        f"{100 * row['equations_true']:.1f} | {100 * row['format_failures']:.1f} | {row['nats']:.1f} |")
    for order, note in dict.fromkeys(key[:2] for key in sorted(rows, key=lambda key: (key[1], key[0] != "learned", key[0])) if key[2] != 4):
        cells = [rows.get((order, note, budget)) for budget in (2, 3, 4, 5, 8, 16, 64)]
        cells = [f"{100 * row['accuracy']:.1f}, {100 * row['equations_true']:.0f}, {100 * row['format_failures']:.0f}" if row else "–" for row in cells]
        budgets.append(f"| {bold(order)}{note} | {' | '.join(cells)} |")
    return four, budgets


def test_the_results_on_gsm8k_are_those_of_the_json():
    """Every line of both tables, and no line too few."""
    section, (four, budgets) = README.split("\n## GSM8K")[1].split("\n## ")[0], tables_of_gsm8k()
    assert section.split("at most 4 steps on average:\n\n")[1].split("\n\n")[0].splitlines()[2:] == four
    assert section.split("by budget:\n\n")[1].split("\n\n")[0].splitlines()[2:] == budgets
