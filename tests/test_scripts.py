"""train.py and sample.py as a user runs them: end to end, stopped, killed, in parts, with bad
input. And that training trains: what a step, a stage and a validation do, by hand."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, assert_same_weights, log, outcome, run, weights
from torch.overrides import TorchFunctionMode

import eval_gsm8k
import posterior
import sample
import train
from common import UserError, run_script
from data import build_tokenizer, toy_split
from model import denoiser_elbo, load_checkpoint

CHECKPOINTS = set(train.STAGES.values())
SHORT = ["--max_steps_denoiser", "2", "--max_steps_order", "2"]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")


def with_data(flags, folder):
    """The flags of `fast`, with other data."""
    return [*flags[: flags.index("--data_dir")], "--data_dir", str(folder)]


def contents(folder):
    """Every file of a folder, byte by byte."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- end to end -----------------------------------------------------------------------------------

def test_train_writes_checkpoints_and_a_log_of_every_stage(straight):
    assert {p.name for p in straight.iterdir()} == CHECKPOINTS | {"log.jsonl"}
    records = log(straight)
    expected = []
    for stage in train.STAGES:
        expected += [(stage, step, step in (10, 20)) for step in (5, 10, 15, 20)]
    assert [(r["stage"], r["step"], "val" in r) for r in records] == expected
    for record in records:
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
        in_order = record["stage"] == "order"
        if in_order:
            assert set(record) >= {"elbo", "recon", "kl", "grad"}
            assert record["elbo"] == pytest.approx(record["recon"] - record["kl"], abs=1e-2)
        assert ("val_2" in record and "val_8" in record) == (in_order and "val" in record)
        assert ("val_se" in record) == (record["step"] == 20)
    # Of a checkpoint the model alone, and what made it.
    for name in CHECKPOINTS:
        state = torch.load(straight / name, weights_only=True)
        assert set(state) == {"schema", "versions", "model_config", "model", "pieces",
                              "train_config", "stage", "step", "log"}
        assert set(state["train_config"]) == set(train.Config.__dataclass_fields__)
        assert train.STAGES[state["stage"]] == name and state["log"][-1]["stage"] == state["stage"]


def test_training_ends_in_a_table_and_the_next_command(straight):
    printed = straight.with_suffix(".txt").read_text()
    for order in sample.parse_orders(eval_gsm8k.CLOSING_ORDERS):
        assert f"\n{order} " in printed
    assert printed.splitlines()[-1].endswith(
        f"next: python sample.py --steps 4 --ckpt {straight / 'ckpt.pt'}")


def test_the_denoiser_alone_ends_in_a_command_that_trains_its_order(fast, tmp_path, capsys):
    """There is no ckpt.pt to sample from; after the order stage there is."""
    flags = [*fast, *SHORT]
    train.main([*flags, "--stages", "denoiser", "--out_dir", str(tmp_path / "it's")])
    hint = capsys.readouterr().out.split("; next: ")[1].strip()
    assert "ckpt.pt" not in hint
    command, constants = hint.split(" and the ")
    python, script, *argv = shlex.split(command)
    assert (python, script, constants) == ("python", "train.py", "constants of this run")
    train.main([*flags, *argv])
    hint = capsys.readouterr().out.split("; next: ")[1]
    sample.main(shlex.split(hint)[2:])
    assert "number" in capsys.readouterr().out


def test_training_says_what_does_not_fit_and_refuses_a_canvas_of_another_data_set(
        fast, tmp_path, capsys):
    rows = [{"question": f"Jo has {n}.", "answer": f"<<{n}+1={n + 1}>> #### {n + 1}"}
            for n in range(20)]
    rows.append({"question": "long " * 200, "answer": "#### 1"})
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = with_data(fast, tmp_path)
    train.prepare(train.parse_config(flags))
    printed = capsys.readouterr().out
    for name in ("train", "val"):
        assert f"{name}: 20 of 21 items fit --prompt_len 24 and --answer_len 16" in printed
    for too_short in (["--prompt_len", "3"], ["--answer_len", "8"]):
        with pytest.raises(UserError, match="^most train items do not fit: raise .* a --preset$"):
            train.prepare(train.parse_config([*flags, *too_short]))


def test_sample_prints_every_step_and_the_number(straight, capsys):
    sample.main(["--ckpt", str(straight / "ckpt.pt"), "--steps", "3", "--num_samples", "2",
                 "--order", "confidence"])
    lines = capsys.readouterr().out.splitlines()
    kinds = ["question", "truth", "step", "step", "step", "number"]
    assert [line.split()[0] for line in lines if line] == kinds * 2
    assert "·" in lines[2] and "·" not in lines[4] and "\033" not in lines[2]


def test_sample_shows_the_packed_checkpoint_where_none_was_trained(straight, tmp_path, monkeypatch,
                                                                   capsys):
    """assets/toy.pt: at most 2 MB, its answers are true; one of one's own comes first."""
    assert (ROOT / "assets/toy.pt").stat().st_size <= 2e6
    monkeypatch.chdir(tmp_path)
    sample.main(["--num_samples", "8"])
    note, *lines = capsys.readouterr().out.splitlines()
    assert "assets/toy.pt" in note
    words = [line.split() for line in lines if line]
    truth = [w[1] for w in words if w[0] == "truth"]
    number = [w[2] for w in words if w[0] == "number"]
    assert len(truth) == 8 and sum(map(str.__eq__, truth, number)) >= 6
    (tmp_path / "out").mkdir()
    shutil.copy(straight / "ckpt.pt", "out")
    sample.main(["--num_samples", "1"])
    assert "assets/toy.pt" not in capsys.readouterr().out


def test_sample_compares_orders_on_a_question_of_ones_own_into_any_stream(straight):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sample.main(["--ckpt", str(straight / "ckpt.pt"), "--steps", "2", "--num_samples", "1",
                     "--compare", "learned:0.5,confidence,iid", "--temperature", "1",
                     "--prompt", "Max <|mask|> 🙂."])
    words = [line.split() for line in out.getvalue().splitlines() if line]
    assert words[0] == ["question", "Max", "<|mask|>", "🙂."]
    assert [w[1] for w in words if w[0] == "number"] == ["learned:0.5", "confidence", "iid"]
    assert {w[2] for w in words if w[:2] == ["step", "1"]} == {"learned:0.5", "confidence", "iid"}


def test_no_text_fails_where_the_terminal_knows_ascii_alone(fast, tmp_path):
    """All three scripts in one process of their own, names and questions that are not ASCII."""
    folder = tmp_path / "dätä 数"
    folder.mkdir()
    for name in ("train", "test"):
        text = (Path(fast[-1]) / f"{name}.jsonl").read_text().replace("Jo has", "Zoë 🙂 has")
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    out = folder / "öut"
    code = ("import sys, shlex, train, sample, eval_gsm8k\nfrom common import run_script\n"
            "for words in sys.argv[1:]:\n    script, *argv = shlex.split(words)\n"
            "    run_script(lambda: getattr(sys.modules[script], 'main')(argv))")
    commands = [
        ["train", *with_data(fast, folder), *SHORT, "--stages", "denoiser,order",
         "--out_dir", f"{out}"],
        ["sample", "--ckpt", f"{out}/ckpt.pt", "--prompt", "Zoë 数 \udce9"],
        ["sample", "--ckpt", f"{out}/ckpt.pt"],
        ["eval_gsm8k", "--ckpt", f"{out}/ckpt.pt", "--control", "", "--steps", "2", "--orders",
         "confidence", "--json", f"{out}/é.json"],
        ["sample", "--ckpt", f"{folder}/absént.pt"]]
    done = run("-c", code, *map(shlex.join, commands), PYTHONIOENCODING="ascii",
               PYTHONPATH=str(ROOT))
    assert "Traceback" not in done.stderr and done.stderr.endswith("or pass its path\n")
    assert done.stdout.isascii() and done.stdout.count("question  Zo\\xeb") == 4
    assert json.loads((out / "é.json").read_text())["rows"] and done.returncode == 1


@posix
def test_training_outlives_the_reader_of_its_output(fast, tmp_path):
    words = [sys.executable, "-u", "train.py", *fast, *SHORT, "--out_dir", str(tmp_path)]
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{shlex.join(words)} 2>&1 | head -2"],
                          cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert set(contents(tmp_path)) == CHECKPOINTS | {"log.jsonl"}


@pytest.mark.parametrize("closed_by", ["the shell", "a notebook"])
def test_training_needs_no_output(fast, tmp_path, monkeypatch, closed_by):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None if closed_by == "the shell" else closed)
    run_script(lambda: train.main([*fast, *SHORT, "--out_dir", str(tmp_path)]))
    monkeypatch.undo()
    assert set(contents(tmp_path)) == CHECKPOINTS | {"log.jsonl"}


# --- stopped and killed ---------------------------------------------------------------------------

def at_update(update, act, monkeypatch):
    """Call act when the gradients of this update of a run are clipped."""
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def clip_and_act(*args):
        calls.append(1)
        if len(calls) == update:
            act()
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_act)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def stop_at(update, flags, out):
    """A run that Ctrl-C stops: the flags of the command that it names."""
    with pytest.MonkeyPatch.context() as patch:
        at_update(update, ctrl_c, patch)
        with pytest.raises(UserError, match="^stopped; go on with: [^\n]+$") as stopped:
            train.main([*flags, "--out_dir", str(out)])
    python, script, *argv = shlex.split(str(stopped.value).split("go on with: ")[1])
    assert (python, script, argv[0]) == ("python", "train.py", "--resume")
    return argv


@pytest.mark.parametrize("update", [21, 35, 60])
def test_ctrl_c_names_a_command_that_goes_on_bit_for_bit(fast, straight, tmp_path, update):
    """10 + 10 steps are 20 in every stage, and across the boundary of two."""
    out = tmp_path / "it's a run"
    train.main(stop_at(update, fast, out))
    assert_same_run(out, straight)
    assert not (out / "resume.pt").exists()


def test_a_run_may_be_stopped_twice(fast, straight, tmp_path):
    argv = stop_at(15, fast, tmp_path)
    assert stop_at(18, ["--resume"], tmp_path) == argv
    train.main(argv)
    assert_same_run(tmp_path, straight)


def test_ctrl_c_before_there_is_a_resume_point_says_so(fast, tmp_path, monkeypatch):
    at_update(3, ctrl_c, monkeypatch)
    with pytest.raises(UserError, match="^stopped before the first resume point$"):
        train.main([*fast, "--out_dir", str(tmp_path)])
    with pytest.raises(UserError, match="^stopped$"):
        run_script(ctrl_c)


def test_a_start_that_comes_to_nothing_leaves_the_log_of_what_is_there(
        fast, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "out")
    before = contents(tmp_path / "out")
    at_update(3, ctrl_c, monkeypatch)
    with pytest.raises(UserError, match="before the first resume point"):
        train.main([*fast, "--seed", "5", "--out_dir", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == before


def test_a_stopped_run_is_not_replaced_and_is_resumed_as_it_was(fast, tmp_path):
    """Whatever is refused leaves every file as it was."""
    argv = stop_at(15, fast, tmp_path / "out")
    before = contents(tmp_path / "out")
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "Other?", "answer": "#### 1"}')
    hint = f"go on with `python train.py {shlex.join(argv)}`, or delete it, or take another"
    for flags, reason in (
            (fast, hint), ([*fast, "--stages", "order"], hint),
            ([*fast, "--stages", "order", "--n_layer", "3"], hint),
            (["--resume", "--tau", "0.3", "--K", "3"], "leave out --K, --tau$"),
            (["--resume", "--data_dir", str(tmp_path)], "other data"),
            (["--resume", "--data_dir", str(tmp_path / "absent")], "want train.jsonl")):
        with pytest.raises(UserError, match=reason) as told:
            train.main([*flags, "--out_dir", str(tmp_path / "out")])
        assert str(told.value).isprintable()
        assert contents(tmp_path / "out") == before


def test_a_resume_point_of_another_version_is_one_line(fast, tmp_path):
    """Of one that had a constant which is gone, or not yet one of today's."""
    stop_at(15, fast, tmp_path)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    of_today = state["train_config"]
    for constants in (of_today | {"kl_ramp": 0.1}, {k: of_today[k] for k in of_today if k != "K"}):
        torch.save(state | {"train_config": constants}, tmp_path / "resume.pt")
        with pytest.raises(UserError, match="^resume.pt is of another version of train.py"):
            train.main(["--resume", "--out_dir", str(tmp_path)])


def test_a_refused_start_leaves_a_finished_run_as_it_was(fast, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    for flags in (["--n_layer", "3"], ["--chunks", "3"], ["--prompt_len", "3"],
                  ["--data_dir", str(tmp_path)], ["--budgets", "2,99"]):
        with pytest.raises(UserError):
            train.main([*fast, "--out_dir", str(tmp_path / "out"), "--stages", "order", *flags])
        assert contents(tmp_path / "out") == contents(straight)


@pytest.mark.parametrize("size, file", [(30_000, "resume.pt"), (300, "log.jsonl")])
def test_a_full_disk_ends_in_one_line_and_keeps_the_last_resume_point(
        fast, straight, tmp_path, monkeypatch, size, file):
    """From the 12th update on no file may grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))

    at_update(12, fill, monkeypatch)
    try:
        with pytest.raises(UserError) as stopped:
            train.main([*fast, "--out_dir", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    monkeypatch.undo()
    reason, command = str(stopped.value).split("; go on with: ")
    assert reason.startswith("stopped: ") and reason.endswith(f"{tmp_path / file}'")
    assert set(contents(tmp_path)) == {"resume.pt", "log.jsonl"}
    assert log(tmp_path)  # every line of it is whole
    train.main(shlex.split(command)[2:])
    assert_same_run(tmp_path, straight)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 of POSIX")
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(fast, tmp_path, monkeypatch):
    """kill -9 of real processes after random times, until 4 have died and one came to its end. Each
    is forked from a server that has imported train.py, so that it starts in milliseconds."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # the optimizers import the second
    rng = random.Random(0)
    flags = [*fast, "--max_steps_denoiser", "8", "--max_steps_order", "8", "--log_every", "1",
             "--eval_every", "1"]

    def start(out, *flags):
        process = context.Process(target=train.main, args=([*flags, "--out_dir", str(out)],))
        process.start()
        return process

    start(tmp_path, "--resume").join()  # fails, but the server has started by then
    began = time.perf_counter()
    start(tmp_path / "straight", *flags).join()
    seconds = time.perf_counter() - began
    out = tmp_path / "killed"
    kills = 0
    status = None
    while kills < 4 or status != 0:
        if status == 0:
            shutil.rmtree(out)  # it was too fast for us
        process = start(out, *(["--resume"] if (out / "resume.pt").exists() else flags))
        process.join(rng.uniform(0, 0.6 * seconds) if kills < 4 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
        status = process.exitcode
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
    assert_same_run(out, tmp_path / "straight")
    assert len(log(out)) == 24


@posix
def test_the_tests_set_what_they_rely_on():
    """Some of them, started by a script in the background, from a shell that has set everything."""
    names = "ctrl_c_before or shared_out or folders_may or (bad_input and steps)"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
             "tests/test_scripts.py", "-k", names]
    done = subprocess.run(
        ["bash", "-c", f"trap '' INT; {shlex.join(words)}"], cwd=ROOT, text=True, timeout=300,
        capture_output=True, env={
            **os.environ, "RANK": "7", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x",
            "LOCAL_RANK": "gold", "COLUMNS": "9", "MPLBACKEND": "module://absent",
            "NO_COLOR": "1", "TZ": "Asia/Kolkata", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stdout[-2000:]


# --- what must not change the result --------------------------------------------------------------

def test_logging_and_validating_more_often_changes_no_weights(fast, straight, tmp_path):
    """And a line of the log holds means since the line before."""
    train.main([*fast, "--out_dir", str(tmp_path), "--log_every", "1", "--eval_every", "3",
                "--eval_items", "4"])
    assert_same_weights(tmp_path, straight)
    each = [record["elbo"] for record in log(tmp_path)]
    means = [sum(each[i : i + 5]) / 5 for i in range(0, len(each), 5)]
    assert [record["elbo"] for record in log(straight)] == pytest.approx(means, rel=1e-4)


def test_stages_trained_one_by_one_are_those_of_a_whole_run(fast, straight, tmp_path):
    for stage in train.STAGES:
        train.main([*fast, "--out_dir", str(tmp_path), "--stages", stage])
    assert_same_run(tmp_path, straight)


def test_a_stage_trained_again_replaces_its_lines_and_drops_those_that_are_none(
        fast, straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    whole = (straight / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text("\n\n[1]\n3\n\x00\x00\n" + whole + whole[:100])
    train.main([*fast, "--out_dir", str(tmp_path), "--stages", "order"])
    expected = []
    for stage in ("denoiser", "control", "order"):
        expected += [record for record in log(straight) if record["stage"] == stage]
    assert log(tmp_path) == expected


def assert_close(a, b):
    """Two runs, the same but for rounding."""
    assert_same_weights(a, b, close=1e-4)
    for one, two in zip(log(a), log(b), strict=True):
        assert one.pop("stage") == two.pop("stage") and one == pytest.approx(two, rel=1e-3)


def test_parts_in_turn_are_the_whole_batch(fast, tmp_path):
    """With T = 1 the order stage draws nothing, so that only rounding may differ."""
    flags = [*fast, "--budgets", "1", "--max_steps_denoiser", "3", "--max_steps_order", "3"]
    train.main([*flags, "--out_dir", str(tmp_path / "start"), "--stages", "denoiser,control"])
    for chunks in ("4", "2", "1"):
        shutil.copytree(tmp_path / "start", tmp_path / chunks)
        train.main([*flags, "--out_dir", str(tmp_path / chunks), "--stages", "order",
                    "--chunks", chunks])
        assert_close(tmp_path / chunks, tmp_path / "4")


def test_two_processes_train_as_one(fast, tmp_path):
    """torchrun with two gloo processes, against one that computes both parts of a batch in turn."""
    flags = [*fast, "--chunks", "2", "--max_steps_denoiser", "5", "--max_steps_order", "5"]
    train.main([*flags, "--out_dir", str(tmp_path / "one")])
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
               *flags, "--out_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(tmp_path / "one", tmp_path / "two")


def test_a_process_that_is_gone_is_one_line(ready, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Connection closed by peer")
    monkeypatch.setattr(train.dist, "all_reduce", refuse)
    networks, optimizers = train.build_stage("order", ready)
    with pytest.raises(UserError, match="^another process has ended, or has not answered for 60 s"):
        train.train_step("order", replace(ready, world=2), networks, optimizers, 0)


def test_a_run_of_two_processes_goes_on_with_one(fast, tmp_path):
    """One of two is killed: the other says so in one line, and --resume needs no second."""
    flags = [*fast, "--chunks", "2", "--max_steps_denoiser", "200", "--max_steps_order", "5"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = []
    for rank in (0, 1):
        env = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": "2",
               "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        both.append(subprocess.Popen(
            [sys.executable, "train.py", *flags, "--out_dir", str(tmp_path / "two")], cwd=ROOT,
            env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True))
    until = time.time() + 100
    while not (tmp_path / "two" / "resume.pt").is_file() and time.time() < until:
        time.sleep(0.01)
    both[1].kill()
    both[1].communicate()
    _, err = both[0].communicate(timeout=100)
    assert both[0].returncode == 1, err[-2000:]
    assert err.splitlines()[-1].startswith("another process has ended")
    assert "Traceback" not in err

    train.main(["--resume", "--out_dir", str(tmp_path / "two")])
    assert CHECKPOINTS <= set(contents(tmp_path / "two"))
    steps = [record["step"] for record in log(tmp_path / "two") if record["stage"] == "denoiser"]
    assert steps == list(range(5, 201, 5))


def test_parts_must_be_shared_out_evenly(fast, monkeypatch):
    for name, text in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match="^--chunks 2 must be a multiple of 3 processes$"):
        train.main([*fast, "--chunks", "2"])


# --- what training does ---------------------------------------------------------------------------

@pytest.fixture
def ready(fast, straight):
    """A run whose stage 1 is done."""
    return train.prepare(train.parse_config([*fast, "--out_dir", str(straight)]))


def test_a_batch_is_found_from_its_step_alone_and_an_epoch_has_every_row_once(ready):
    epochs = []
    for start in (0, 9):  # of 36 rows
        batches = [train.batch_at(ready, "order", step, 4)[1] for step in range(start, start + 9)]
        epochs.append(torch.cat(batches))
    rows = sorted(ready.train[1].tolist())
    assert [sorted(epoch.tolist()) for epoch in epochs] == [rows, rows]
    assert torch.equal(train.batch_at(ready, "order", 8, 4)[1], epochs[0][-4:])
    # In another order each time, in every stage, and never in that of the file.
    drawn = [ready.train[1], *epochs, torch.cat([train.batch_at(ready, "control", step, 4)[1]
                                                 for step in range(9)])]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert (one == other).all(-1).float().mean() < 0.5


def test_the_control_sees_as_many_states_as_the_order_stage(ready):
    steps, size = train.stage_size("order", ready.config)
    steps_of_control, size_of_control = train.stage_size("control", ready.config)
    assert steps * size * (1 + ready.config.K) == steps_of_control * size_of_control
    assert size == ready.config.batch_size_order and steps == ready.config.max_steps_order


def test_a_bound_is_of_the_step_budgets_in_turn(ready, monkeypatch):
    seen = []
    draw = train.draw_orders_and_steps
    monkeypatch.setattr(train, "draw_orders_and_steps",
                        lambda scores, K, T, *rest: seen.append(T) or draw(scores, K, T, *rest))
    networks, optimizers = train.build_stage("order", ready)
    for step in range(7):
        train.train_step("order", ready, networks, optimizers, step)
    assert seen == [2, 3, 4, 6, 8, 2, 3]
    assert train.budget_at(9, replace(ready.config, budgets="5,7")) == 7


def test_tau_falls_over_the_order_stage(ready, monkeypatch):
    """What the objective is given at the beginning, in the middle and at the end."""
    drawn = []
    judged = []
    monkeypatch.setattr(train, "draw_orders_and_steps", lambda *args: drawn.append(args[3]) or
                        posterior.draw_orders_and_steps(*args))
    monkeypatch.setattr(train, "objective", lambda *args: judged.append(args[7]) or
                        posterior.objective(*args))
    networks, _ = train.build_stage("order", ready)
    batch = train.batch_at(ready, "order", 0, 4)
    for progress in (0.0, 0.05, 0.5, 1.0):
        train.stage_objective(ready, networks, *batch, progress, 4, None)
    taus = [0.67 * (0.05 / 0.67) ** x for x in (0, 0.05**0.5, 0.5**0.5, 1)]
    assert drawn == pytest.approx(taus)
    assert judged == pytest.approx(taus)


def test_another_seed_is_another_run(ready, monkeypatch):
    """In its weights, its batches and its draws."""
    seeds = []
    real = train.stage_objective
    monkeypatch.setattr(train, "stage_objective",
                        lambda *args: seeds.append(args[-1].initial_seed()) or real(*args))
    seen = []
    for run in (ready, replace(ready, config=replace(ready.config, seed=1))):
        networks, optimizers = train.build_stage("denoiser", run)
        _, x0 = train.batch_at(run, "order", 0, 4)
        seen.append((networks.model.trunk.token.weight.clone(), x0))
        train.train_step("denoiser", run, networks, optimizers, 0)
    assert not any(torch.equal(a, b) for a, b in zip(*seen)) and seeds[0] != seeds[1]


def test_init_stands_for_the_denoiser_unless_that_is_trained_here(fast):
    config = train.parse_config([*fast, "--init", "x.pt", "--stages", "denoiser,order"])
    assert train.start_of("denoiser", config) == Path("x.pt")
    assert train.start_of("order", config) == Path(config.out_dir) / "denoiser.pt"
    config = train.parse_config([*fast, "--init", "x.pt", "--stages", "order,control"])
    assert train.start_of("order", config) == train.start_of("control", config) == Path("x.pt")


@pytest.mark.parametrize("stage", ["order", "control"])
def test_a_later_stage_starts_from_the_denoisers_weights(ready, straight, stage):
    networks, _ = train.build_stage(stage, ready)
    stored = weights(straight / "denoiser.pt")
    for name, p in networks.model.state_dict().items():
        assert torch.equal(p, stored[name]), name
    # For other budgets its gates are new: they were not trained anyway.
    ready.config = replace(ready.config, budgets="2,3")
    networks, _ = train.build_stage(stage, ready)
    assert networks.model.gate_head.steps_bias.shape == (3,)
    for name, p in networks.model.state_dict().items():
        assert name.startswith("gate_head.") or torch.equal(p, stored[name]), name


@pytest.mark.parametrize("stage", train.STAGES)
def test_steps_move_every_parameter_that_they_should_and_no_other(ready, stage):
    """Blocks start as the identity, so it takes a few steps to reach all."""
    networks, optimizers = train.build_stage(stage, ready)
    assert len(list(networks)) == (2 if stage == "order" else 1)
    named = []
    for network in networks:
        named += network.named_parameters()
    before = [p.clone() for _, p in named]
    steps = 1 if stage == "order" else 4
    for step in range(steps):
        train.train_step(stage, ready, networks, optimizers, step)
    if stage == "order":  # one step reaches the last layer of each network
        moved = {name for (name, p), old in zip(named, before) if not torch.equal(p, old)}
        assert moved >= {"score_head.weight", "gate_head.weight", "token_head.weight",
                         "trunk.blocks.0.proj.weight"}
        for step in range(1, 4):
            train.train_step(stage, ready, networks, optimizers, step)
    for (name, p), old in zip(named, before):
        trained = stage == "order" or not name.startswith("gate_head.")
        assert torch.equal(p, old) != trained, name


def test_a_rate_warms_up_stays_in_stage_1_and_falls_in_the_others(ready):
    for step, factor in ((0, 0.05), (9, 0.5), (19, 1), (400, 1), (700, 0.5), (970, 0.05)):
        assert train.rate_factor("order", step, 1000) == pytest.approx(factor)
        assert train.rate_factor("control", step, 1000) == pytest.approx(factor)
        assert train.rate_factor("denoiser", step, 1000) == pytest.approx(min(1, (step + 1) / 20))
    networks, optimizers = train.build_stage("order", ready)
    groups = []
    for optimizer in optimizers:
        groups += optimizer.param_groups
    peaks = {}
    for group in groups:
        peaks |= {id(p): group["lr"] for p in group["params"]}
    for network in networks:
        assert {peaks[id(p)] for p in network.parameters()} == {0.01, 3e-3}
    for step, factor in ((0, 0.05), (15, 5 / 20 / 0.6)):
        train.train_step("order", ready, networks, optimizers, step)
        for group in groups:
            assert group["lr"] == pytest.approx(group["peak_lr"] * factor)


def test_a_step_climbs_the_bound_per_token_clipped_at_1(ready, monkeypatch):
    """The gradients of a step, by hand. Times 1000, so that there is something to clip."""
    stage_objective = train.stage_objective

    def objective(*args):
        value, logs = stage_objective(*args)
        return 1000 * value, logs

    networks, optimizers = train.build_stage("order", ready)
    step = 2  # of 20, with the third budget, 4
    generator = torch.Generator().manual_seed(train.seed_of(0, "order", step))
    prompt, x0 = train.batch_at(ready, "order", step, 4)
    value, _ = objective(ready, networks, prompt, x0, step / 20, 4, generator)
    loss = -value.sum() / 4 / 16  # of 4 examples, 16 positions
    parameters = networks.parameters()
    by_hand = torch.autograd.grad(loss, parameters)
    norm = sum(g.square().sum() for g in by_hand).sqrt()

    monkeypatch.setattr(train, "stage_objective", objective)
    _, _, grad, _ = train.train_step("order", ready, networks, optimizers, step)
    assert grad.item() == pytest.approx(norm.item(), rel=1e-4) and norm > 1
    for p, g in zip(parameters, by_hand, strict=True):
        torch.testing.assert_close(p.grad, g / norm, rtol=1e-3, atol=1e-5)


def test_every_step_and_part_and_stage_has_draws_of_its_own(ready, monkeypatch):
    seeds = []
    stage_objective = train.stage_objective
    monkeypatch.setattr(train, "stage_objective", lambda *args: seeds.append(
        args[-1].initial_seed()) or stage_objective(*args))
    ready.config = replace(ready.config, chunks=2)
    for stage in train.STAGES:
        networks, optimizers = train.build_stage(stage, ready)
        for step in range(3):
            train.train_step(stage, ready, networks, optimizers, step)
    assert len(seeds) == len(set(seeds)) == 3 * 3 * 2


def test_a_prompt_is_read_once_and_a_canvas_in_each_of_its_states(ready):
    """What ktok/s counts."""
    for stage, states in (("denoiser", 1), ("order", 1 + ready.config.K), ("control", 1)):
        networks, optimizers = train.build_stage(stage, ready)
        prompt, x0 = train.batch_at(ready, stage, 0, train.stage_size(stage, ready.config)[1])
        *_, read = train.train_step(stage, ready, networks, optimizers, 0)
        assert read == prompt.numel() + states * x0.numel()


def test_a_line_s_seconds_are_those_since_the_line_before(ready, tmp_path, monkeypatch):
    """Without those of validation. A clock that is a second later each time it is read."""
    clock = types.SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "validate", lambda *_: clock.perf_counter() and {})
    ready.config = replace(ready.config, out_dir=str(tmp_path))
    train.train_stage("denoiser", ready, None)
    assert [record["seconds"] for record in ready.log] == [1] * 4


def test_the_tokenizer_is_made_from_training_texts_alone(fast, tmp_path):
    for name, thing in (("train", "pens"), ("val", "cups"), ("test", "figs")):
        row = {"question": f"Jo has 1 {thing}.", "answer": "#### 1"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    pieces = train.prepare(train.parse_config(with_data(fast, tmp_path))).pieces
    assert " pens" in pieces and not {" cups", " figs"} & set(pieces)


# --- validation -----------------------------------------------------------------------------------

def bound_by_hand(run, networks, prompt, x0, T, generator):
    """Each item's bound at the end of a stage, by one draw."""
    if T is None:
        return denoiser_elbo(networks.model, prompt, x0, generator)
    scores = networks.posterior(prompt, x0)
    tau = run.config.tau_end
    orders, t = posterior.draw_orders_and_steps(scores, run.config.K, T, tau, generator)
    _, logs = posterior.objective(networks.model, scores, prompt, x0, orders, t, T, tau)
    return logs["elbo"]


@pytest.mark.parametrize("stage", ["denoiser", "order"])
@torch.no_grad()
def test_a_stage_ends_in_the_bound_of_all_items_with_its_standard_error(ready, stage):
    """By hand: 70 items, so 64 and 6 at a time."""
    ready.val = tuple(part.repeat(18, 1)[:70] for part in ready.val)
    prompts, x0s = ready.val
    networks, _ = train.build_stage(stage, ready)
    expected = {}
    names = {"val": None} if stage == "denoiser" else {"val_2": 2, "val": 4, "val_8": 8}
    for name, T in names.items():
        bounds = []
        for part in (slice(0, 64), slice(64, 70)):
            seed = train.seed_of(0, "validate", part.start)
            bounds += bound_by_hand(ready, networks, prompts[part], x0s[part], T,
                                    torch.Generator().manual_seed(seed)).tolist()
        mean = sum(bounds) / 70
        variance = sum((bound - mean) ** 2 for bound in bounds) / 69
        expected[name] = mean
        expected[name.replace("val", "val_se")] = (variance / 70) ** 0.5
    assert train.validate(ready, networks, 1) == pytest.approx(expected, rel=1e-5)


def test_before_its_end_a_stage_is_validated_on_the_first_items_by_one_draw(ready, monkeypatch):
    seen = []

    def stage_objective(run, networks, prompt, x0, progress, T, generator):
        seen.append((len(x0), progress, T))
        return None, {"elbo": x0[:, 0].float()}

    ready.val[1][:, 0] = torch.arange(4)
    networks, _ = train.build_stage("order", ready)
    monkeypatch.setattr(train, "stage_objective", stage_objective)
    assert train.validate(ready, networks, 0.5) == {"val_2": 0.5, "val": 0.5, "val_8": 0.5}
    assert seen == [(2, 0.5, 2), (2, 0.5, 4), (2, 0.5, 8)]
    # A canvas that is shorter than a budget has no more steps than positions.
    ready.config = replace(ready.config, answer_len=3, budgets="2")
    assert set(train.validate(ready, networks, 0.5)) == {"val_2", "val", "val_8"}
    assert seen[3:] == [(2, 0.5, 2), (2, 0.5, 3), (2, 0.5, 3)]


class NoFloat64OnTheDevice(TorchFunctionMode):
    """MPS, as far as float64 goes: making it is an error, but for tensors that were taken to the
    CPU, or begin there because they name no device, and what is computed from these alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        values = [kwargs.get("device")]
        for value in args:
            values += value if isinstance(value, (list, tuple)) else [value]  # cat takes a list
        to_the_device = any(isinstance(value, torch.device) for value in values)
        from_the_cpu = all(getattr(value, "on_cpu", False) for value in values
                           if isinstance(value, torch.Tensor))
        if func is torch.Tensor.cpu:
            result = result.clone()
            from_the_cpu = True
        if result.dtype == torch.float64 and (to_the_device or not from_the_cpu):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result.on_cpu = from_the_cpu and not to_the_device
        return result


def test_nothing_is_float64_on_a_device_that_has_none(fast, tmp_path, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(sample, "precise", lambda _: torch.float32)  # what it is for MPS
    with NoFloat64OnTheDevice():
        x = torch.ones(3, device=device)
        for act in (x.double, torch.cat([x, x]).double, lambda: x.to(torch.float64),
                    lambda: x.cpu().double().to(device),
                    lambda: torch.zeros(3, dtype=torch.float64, device=device)):
            with pytest.raises(TypeError, match="MPS"):
                act()
        assert (x + 1).cpu().double().sum().item() == 6

        train.main([*fast, *SHORT, "--out_dir", str(tmp_path)])
        sample.main(["--ckpt", str(tmp_path / "ckpt.pt"), "--temperature", "1",
                     "--compare", "learned,iid", "--num_samples", "1"])
        model, state = load_checkpoint(tmp_path / "ckpt.pt")
        enc = build_tokenizer(state["pieces"])
        items = [{"question": "Jo has 1.", "target": "<<1+2=3>> #### 3"}]
        order = sample.parse_order("iid")
        eval_gsm8k.evaluate(model, enc, items, order, 2, "nats", "gsm8k")
        eval_gsm8k.pairs_by_equation(model, enc, items, 2)


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    ["--n_embd", "32"], ["--answer_len", "18"], ["--n_layer", "2"], ["--dataset", "gsm8k-aug"],
    ["data"]])
def test_a_denoiser_of_other_sizes_or_data_is_refused(fast, straight, tmp_path, change):
    flags = [*fast, *change]
    reason = f"was trained with {change[0]} "
    if change == ["data"]:
        for name in ("train", "test"):
            text = (Path(fast[-1]) / f"{name}.jsonl").read_text()
            (tmp_path / f"{name}.jsonl").write_text(text.replace("pens", "cups"))
        flags = with_data(fast, tmp_path)
        reason = "was trained on other text"
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(straight / "denoiser.pt", out)
    for stage in ("order", "control"):
        with pytest.raises(UserError, match=reason):
            train.main([*flags, "--out_dir", str(out), "--stages", stage])
    assert set(contents(out)) == {"denoiser.pt"}


def test_a_denoiser_of_another_seed_and_rate_is_taken(fast, straight, tmp_path):
    """Sizes, data and pieces are all that has to be the same."""
    shutil.copy(straight / "denoiser.pt", tmp_path)
    train.main([*fast, *SHORT, "--out_dir", str(tmp_path), "--stages", "order,control",
                "--seed", "7", "--lr_other", "0.001", "--budgets", "2,5", "--batch_size", "2",
                "--n_layer_posterior", "2"])
    assert contents(tmp_path)["denoiser.pt"] == contents(straight)["denoiser.pt"]
    assert weights(tmp_path / "ckpt.pt")["gate_head.steps_bias"].shape == (5,)
    assert "val_8" in log(tmp_path)[0]  # a budget that it was not trained for


def test_the_toys_order_is_trained_with_another_seed_too(tmp_path):
    """Its training texts are others then, and so would be the tokenizer."""
    flags = ["--out_dir", str(tmp_path), "--train_items", "200", "--n_embd", "16", "--n_head", "2",
             "--max_steps_denoiser", "1", "--eval_items", "1"]
    train.main([*flags, "--stages", "denoiser"])
    config = train.parse_config([*flags, "--stages", "order", "--seed", "1"])
    run = train.prepare(config)
    assert run.pieces != train.frequent_pieces(toy_split("train", 200, 1), config.n_pieces)
    train.load_denoiser(tmp_path / "denoiser.pt", run)


@pytest.mark.parametrize("stage", ["denoiser", "order"])
def test_a_run_starts_from_any_checkpoint_of_equal_sizes(fast, straight, tmp_path, stage):
    """With its weights and its tokenizer, on other data; the stages after it go on from there."""
    for name in ("train", "test"):
        text = (Path(fast[-1]) / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(text.replace("pens", "cups"))
    flags = [*with_data(fast, tmp_path), *SHORT, "--out_dir", str(tmp_path / "out"), "--dataset",
             "gsm8k-aug", "--init", str(straight / "ckpt.pt"), "--stages", f"{stage},control"]
    _, theirs = load_checkpoint(straight / "ckpt.pt")
    run = train.prepare(train.parse_config(flags))
    (model, *_), _ = train.build_stage(stage, run)
    assert run.pieces == theirs["pieces"]
    for name, value in theirs["model"].items():
        assert torch.equal(model.state_dict()[name], value), name

    train.main(flags)  # into a new folder: the order's table needs no denoiser.pt there
    if stage == "denoiser":
        train.main([*flags, "--init", "", "--stages", "order"])  # from its own denoiser.pt
    made = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert made["pieces"] == theirs["pieces"]
    with pytest.raises(UserError, match="was trained with --n_embd 16"):
        train.main([*flags, "--n_embd", "32"])


NO_CUDA = [("--device cuda", "no device 'cuda' here")] * (not torch.cuda.is_available())
BAD = {
    train: [
        *NO_CUDA, ("--stepz 3", "unrecognized arguments"), ("--T 4", "unrecognized arguments"),
        ("--budgets 0", "--budgets 0: want numbers of steps, 1 to --answer_len 16"),
        ("--budgets 2,17", "--budgets 2,17"), ("--budgets 2,,4", "--budgets"),
        ("--budgets=", "--budgets"), ("--budgets four", "--budgets four"),
        ("--K two", "invalid int"), ("--K 1", "--K must be 2 to"), ("--tau nan", "--tau"),
        ("--n_embd 30", "--n_embd 30 must be a multiple"), ("--tau 0", "--tau"),
        ("--tau_end 0", "--tau_end"), ("--lr_other inf", "--lr_other"), ("--lr_other 1e30", "NaN"),
        ("--tau 1e-40", "--tau must be 0.001 to"), ("--K 9000000000000", "--K must be 2 to"),
        ("--lr_matrix 1e308", "--lr_matrix"), ("--chunks 0", "--chunks must be 1 to"),
        ("--chunks 64 --batch_size 64 --batch_size_order 64", "more than the training items"),
        ("--preset big", "invalid choice"),
        ("--dataset mnist", "no such data set"), ("--stages first", "no such data set or stage"),
        ("--device tpu", "no device 'tpu' here"), ("--dtype float16", "--dtype"),
        ("--stages order", "denoiser.pt not found"), ("--resume", "resume.pt not found"),
        ("--resume --out_dir empty", "no run was stopped there"),
        ("--resume --out_dir folder", "not a checkpoint"), ("--out_dir text/x", "Not a directory"),
        ("--resume --out_dir other", "is no resume point"),
        ("--answer_len 4 --budgets 2", "most train items do not fit"),
        ("--data_dir absent", "absent does not exist: want train.jsonl and test.jsonl"),
        ("--data_dir text", "text is a file, not a folder"),
        ("--preset toy", "toy reads no files, but --data_dir"),
        ("--preset toy2 --data_dir absent", "toy2 reads no files, but --data_dir absent is given"),
        ("--dataset pairs --data_dir=", "--dataset pairs is read from files"),
        ("--chunks 3", "--chunks"), ("--init absent.pt", "absent.pt not found"),
        ("--init text", "text is not a checkpoint")],
    sample: [
        *NO_CUDA, ("--ckpt absent.pt", "absent.pt not found: run `python train.py` first"),
        ("--ckpt folder", "folder is a folder: pass a checkpoint in it"),
        ("--ckpt text", "text is not a checkpoint"),
        ("--ckpt other/denoiser.pt", "learned:0.5 wants trained gates"),
        ("--steps 0", "want a whole number of at least 1"), ("--order best", "cannot read order"),
        ("--compare iid,", "cannot read order ''"), ("--num_samples 0", "whole number"),
        ("--temperature -1", "--temperature"), ("--temperature nan", "--temperature"),
        ("--temperature 1e-40", "--temperature must be 0, the likeliest token, or at least"),
        ("--prompt " + "7" * 999, "the question has 999 tokens, not 1 to 24"),
        ("--prompt=", "the question has 0 tokens"), ("--data_dir absent", "want train.jsonl"),
        ("--prompt 1 --data_dir absent", "--prompt needs no --data_dir")]}


CASES = [(train, *case) for case in BAD[train]] + [(sample, *case) for case in BAD[sample]]


@pytest.mark.parametrize("script, argv, message", CASES,
                         ids=lambda x: getattr(x, "__name__", str(x)[:30]))
def test_bad_input_ends_in_one_line(fast, straight, tmp_path, monkeypatch, capfd, script, argv,
                                    message):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "other", "empty"):
        os.mkdir(name)
    for name in ("text", "folder/resume.pt"):
        Path(name).write_text("hello")
    shutil.copy(straight / "ckpt.pt", "other/resume.pt")  # a checkpoint that is no resume point
    shutil.copy(straight / "denoiser.pt", "other")
    given = ["--ckpt", str(straight / "ckpt.pt")]
    if script is train:
        given = [*fast, "--max_steps_denoiser", "2"]
    if "--resume" in argv:
        given = []
    status, _, err = outcome(script, [*given, *argv.split()], capfd)
    assert status != 0 and message in err and "Traceback" not in err
    assert err.endswith("\n") and err.count("\n") == 1
    assert not Path("out/resume.pt").exists() and not Path("out/log.jsonl").exists()


def test_folders_may_begin_with_a_tilde(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    config = train.parse_config(["--out_dir=~/x", "--data_dir=~/y"])
    assert (config.out_dir, config.data_dir) == (str(tmp_path / "x"), str(tmp_path / "y"))
