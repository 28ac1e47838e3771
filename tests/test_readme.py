"""What README.md, assets/results.md and assets/experiments.md say: commands run, lists and lengths
are complete, numbers are those of the JSON files."""

import json
import re
import shlex
import shutil
from pathlib import Path
from statistics import median

import pytest

import eval_gsm8k
import sample
import tools.bench
import tools.pack
import tools.plot
import tools.seeds
import train

ROOT = Path(__file__).parent.parent
README, RESULTS, EXPERIMENTS = ((ROOT / name).read_text() for name in (
    "README.md", "assets/results.md", "assets/experiments.md"))
TOY, TOY2 = RESULTS.split("\n## toy2")
SCRIPTS = {"train.py": train, "sample.py": sample, "eval_gsm8k.py": eval_gsm8k,
           "tools.bench": tools.bench, "tools.pack": tools.pack, "tools.plot": tools.plot,
           "tools.seeds": tools.seeds}


def commands():
    """Every `python SCRIPT FLAGS` in blocks and in sentences, on one line each."""
    text = "\n".join((README, RESULTS, EXPERIMENTS)).replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in spans]
    found = {command.strip() for line in lines for command in
             re.findall(r"python (?:-m )?((?:\w+\.py|tools\.\w+)[^&#;]*)", line)}
    return sorted(found)


def test_there_are_commands_of_every_script():
    assert {command.split()[0] for command in commands()} == set(SCRIPTS)


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, fast, straight, tmp_path, monkeypatch, capsys):
    """In a shortened form: flags of a tiny run follow those of the README and win."""
    data = fast[fast.index("--data_dir") + 1]
    script, *flags = [data if word == "DIR" else word.replace("$s", "0").replace("*", "0")
                      for word in shlex.split(command)]
    for name in {"out", *re.findall(r"\b(?:out2?_\w+|long_\d|ex)\b", " ".join(flags))}:
        shutil.copytree(straight, tmp_path / name)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    tiny = {"sample.py": ["--ckpt", "out/ckpt.pt", "--num_samples", "1"],
            "eval_gsm8k.py": ["--ckpt", "out/ckpt.pt", "--control", "out/denoiser.pt",
                              "--limit", "2", "--tune_items", "2", "--steps", "1,2",
                              "--json", "a.json"],
            "train.py": [*fast, "--out_dir", "out"],
            "tools.pack": [],
            "tools.plot": ["--out", "a.gif" if "gif" in flags else "a.png"],
            "tools.seeds": ["--limit", "2", "--tune_items", "2", "--json", "c.json"],
            "tools.bench": [*fast, "--steps", "1", "--sample", "1", "--json", "b.json"]}[script]
    if "--resume" in flags or "--help" in flags:
        tiny = []
    if script == "tools.plot":  # of evaluations that tools.seeds has left
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
    assert capsys.readouterr().out


def cell(values):
    return f"{median(values):.1f} ({min(values):.1f} - {max(values):.1f})"


@pytest.mark.parametrize("text, name", [
    (README, "toy"), (TOY, "toy"), (TOY2.split("\n## ")[0], "toy2")])
def test_the_toys_tables_are_those_of_the_json(text, name):
    """Coherent, accurate and mean steps of each order within each number of steps, over seeds."""
    runs = json.loads((ROOT / f"assets/{name}_seeds.json").read_text())["rows"]
    lines = re.findall(r"^\| \**([\w:.+]+)\**[^|]*\| (\d+) \| (.*) \| (.*) \| (.*) \|$",
                       text.split("\n## GSM8K")[0], re.M)
    assert len(lines) >= 8
    for order, steps, *cells in lines:
        numbers = [run["orders"][order][steps] for run in runs]
        coherent, accurate, used = zip(*numbers)
        assert cells == [cell(coherent), cell(accurate), f"{median(used):.2f}"], (order, steps)


def test_the_seeds_are_those_of_the_json():
    """One line a training run: bound, tied pairs, coherent by default and tuned, best rule."""
    runs = json.loads((ROOT / "assets/toy_seeds.json").read_text())["rows"]
    for run in runs:
        assert (f"| {run['seed']} | {run['val']:.2f} ± {run['val_se']:.2f} | "
                f"{100 * run['tied']:.1f} | {run['coherent']:.1f} | {run['accuracy']:.1f} | "
                f"{run['coherent_tuned']:.1f} in {run['steps_tuned']:.2f} | "
                f"{run['best_rule_coherent']:.1f} ({run['best_rule']}) | {run['sequential']:.1f} | "
                f"{run['minutes']:.1f} |") in RESULTS


def test_the_rows_of_gsm8k_are_those_of_the_json():
    """Accuracy with its interval and log p with its standard error, of the rows of README.md."""
    cells = set()
    for row in [row for name in ("steps4", "control")
                for row in json.loads((ROOT / f"assets/gsm8k/{name}.json").read_text())["rows"]]:
        low, high = (100 * bound for bound in eval_gsm8k.wilson(row["accuracy"], row["n"]))
        error = (row["ci95"][1] - row["ci95"][0]) / 2 / 1.96
        cells.add(f"{100 * row['accuracy']:.1f} ({low:.1f} - {high:.1f}) | "
                  f"{row['score']:.1f} ± {error:.1f}")
    section = README.split("\n## GSM8K")[1].split("\n## ")[0]
    lines = re.findall(r"^\| .* \| (\d.* \| -.*) \|$", section, re.M)
    assert len(lines) >= 6 and set(lines) <= cells


def test_every_departure_is_listed():
    marks = [line for script in ROOT.glob("*.py") for line in script.read_text().splitlines()
             if re.search(r"\[NEW\](?!:)", line)]
    listed = README.split("## Departures")[1].split("\n## ")[0]
    assert len(marks) == listed.count("\n- ")


def test_the_table_of_files_has_their_lengths():
    table = dict(re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M))
    assert table == {script.name: str(len(script.read_text().splitlines()))
                     for script in ROOT.glob("*.py")}


def test_the_readme_is_one_evening():
    lines = README.splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100
