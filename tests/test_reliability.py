"""Nothing lost, nothing silent: runs that are killed, full disks, untrusted checkpoints, numbers that go wrong."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data import UserError
from eval_gsm8k import versions
from model import STATE, load_checkpoint

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ("denoiser.pt", "ckpt.pt", "control.pt")


def log(out):
    return [{k: v for k, v in json.loads(line).items() if k != "ktok/s"} for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Weights bit for bit, and the log: each (stage, step) once."""
    for name in CHECKPOINTS:
        one, two = (torch.load(out / name) for out in (a, b))
        for x, y in zip([one["model"], *one["posterior"]], [two["model"], *two["posterior"]], strict=True):
            assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), name
    assert log(a) == log(b)
    steps = [(record["stage"], record["step"]) for record in log(a)]
    assert len(set(steps)) == len(steps) == 15


def at_update(n, monkeypatch, act):
    """Call act(gradient norm) in place of the n-th clipping of gradients in a run; what it returns is the norm."""
    calls, clip = [0], torch.nn.utils.clip_grad_norm_

    def clip_and_act(*args):
        calls[0] += 1
        return act(clip(*args)) if calls[0] == n else clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_act)


# --- stopped and killed ------------------------------------------------------------------------------

@pytest.mark.parametrize("update", [3, 10, 20, 30, 50])
def test_ctrl_c_saves_and_the_run_goes_on_bit_for_bit(fast, straight, tmp_path, monkeypatch, capsys, update):
    """10 + 10 steps are 20 in every stage, and across the boundary of two (update 20 is the first one's last)."""
    at_update(update, monkeypatch, lambda norm: os.kill(os.getpid(), signal.SIGINT) or norm)
    with pytest.raises(SystemExit) as stopped:
        train.main([*fast, "--out_dir", str(tmp_path)])
    monkeypatch.undo()
    assert stopped.value.code == 130 and f"go on with: python train.py --resume --out_dir {tmp_path}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train.main(["--resume", "--out_dir", str(tmp_path)])
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("update", [9, 21, 30, 41])
def test_what_came_after_the_last_resume_point_is_done_again(fast, straight, tmp_path, monkeypatch, update):
    """The process dies: at 9 a log line is younger than the resume point, at 21 and 41 a stage has ended and the next
    has none yet. The dying process leaves half a line and half a file."""
    at_update(update, monkeypatch, lambda norm: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*fast, "--out_dir", str(tmp_path)])
    monkeypatch.undo()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": "order", "st')
    (tmp_path / "resume.tmp").write_bytes((tmp_path / "resume.pt").read_bytes()[:999])
    train.main(["--resume", "--out_dir", str(tmp_path)])
    assert_same_run(tmp_path, straight)
    assert {p.name for p in tmp_path.iterdir()} == {*CHECKPOINTS, "resume.pt", "log.jsonl"}


def test_killed_twenty_times_at_any_moment(fast, tmp_path, monkeypatch):
    """kill -9 of real processes after random times, until 20 have died. Each is forked from a server that has
    imported train.py, so that it starts in milliseconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "pytest", "torch._dynamo"])  # the last: what an optimizer imports at its first step

    def start(out, *flags):
        process = context.Process(target=train.main, args=([*flags, "--out_dir", str(out)],))
        process.start()
        return process

    often = ["--save_every", "1"]
    for name in ("warm-up", "straight"):  # the first starts the server
        began = time.monotonic()
        process = start(tmp_path / name, *fast, *often)
        process.join()
        assert process.exitcode == 0
    seconds, rng, kills, runs = time.monotonic() - began, random.Random(0), 0, [tmp_path / "0"]
    while kills < 20 or process.exitcode != 0:
        out = runs[-1]
        process = start(out, *(["--resume"] if (out / "resume.pt").exists() else [*fast, *often]))
        process.join(rng.uniform(0, 0.7 * seconds) if kills < 20 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        else:
            assert process.exitcode == 0
            runs.append(tmp_path / str(len(runs)))
    for out in runs[:-1]:
        assert_same_run(out, tmp_path / "straight")


def test_evaluating_logging_and_saving_more_often_changes_nothing(fast, straight, tmp_path):
    train.main([*fast, "--out_dir", str(tmp_path), "--eval_every", "1", "--log_every", "1", "--eval_items", "4", "--save_every", "100", "--save_minutes", "1e-9"])
    last = lambda out: [(r["stage"], r["elbo"], r["grad"]) for r in log(out) if r["step"] == 20]
    assert last(tmp_path) == last(straight) and len(log(tmp_path)) == 60
    for name in CHECKPOINTS:
        one, two = (torch.load(out / name)["model"] for out in (tmp_path, straight))
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("flags, saves", [
    (["--save_every", "100"], [20]), (["--save_every", "7"], [7, 14, 20]), (["--save_every", "100", "--save_minutes", "1e-9"], [*range(1, 21)])])
def test_resume_points_are_written_by_steps_and_by_minutes(fast, tmp_path, monkeypatch, flags, saves):
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, file) or saved.append((state["stage"], state["step"], len(state["optimizers"]) > 0)))
    train.main([*fast, "--out_dir", str(tmp_path), *flags])
    assert [step for stage, step, resume in saved if stage == "order" and resume] == saves
    assert [stage for stage, _, resume in saved if not resume] == list(train.STAGES)


@pytest.mark.parametrize("limit, file", [(300, "log.jsonl"), (4096, "resume.pt")])
def test_a_full_disk_keeps_the_last_resume_point(fast, straight, tmp_path, monkeypatch, capsys, limit, file):
    """No file may grow beyond the limit from the 7th update on. The log breaks off in the middle of a line."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_update(7, monkeypatch, lambda norm: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1])) or norm)
    try:
        with pytest.raises(UserError, match=f"cannot write .*{file}"):
            train.main([*fast, "--out_dir", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "resume.pt")[1]["step"] == 5 and {p.name for p in tmp_path.iterdir()} == {"resume.pt", "log.jsonl"}
    assert (tmp_path / "log.jsonl").read_bytes().endswith(b"\n") == (file != "log.jsonl")
    train.main(["--resume", "--out_dir", str(tmp_path)])
    assert_same_run(tmp_path, straight)


def test_a_new_run_does_not_take_up_an_old_resume_point(fast, tmp_path, monkeypatch):
    (tmp_path / "resume.pt").write_bytes(b"an earlier run's")
    at_update(2, monkeypatch, lambda norm: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*fast, "--out_dir", str(tmp_path)])
    assert (tmp_path / "resume.old.pt").read_bytes() == b"an earlier run's"
    with pytest.raises(UserError, match="not found"):
        train.main(["--resume", "--out_dir", str(tmp_path)])


def test_checkpoints_say_where_they_come_from(straight):
    for name in (*CHECKPOINTS, "resume.pt"):
        state = load_checkpoint(straight / name)[1]
        assert state["versions"] == versions() and set(versions()) == {"commit", "torch", "python"} and versions()["torch"] == torch.__version__
        assert set(state["train_config"]) == set(train.Config.__dataclass_fields__) and state["train_config"]["seed"] == 0


# --- numbers that go wrong -------------------------------------------------------------------------------

def test_a_diverging_run_stops_with_one_line(fast, tmp_path):
    with pytest.raises(UserError, match=r"stage denoiser, step \d+: objective .*, gradient norm .*, training rows \[\d+, \d+, \d+, \d+\]; last resume point: none yet"):
        train.main([*fast, "--out_dir", str(tmp_path), "--lr_other", "1e38"])
    assert not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stops_the_run_and_the_last_resume_point_is_good(fast, straight, tmp_path, monkeypatch, bad):
    at_update(28, monkeypatch, lambda norm: norm * bad)
    with pytest.raises(UserError, match=rf"stage order, step 8: .* gradient norm {bad}, training rows .*; last resume point: {tmp_path}/resume.pt \(stage order, step 5\)") as stopped:
        train.main([*fast, "--out_dir", str(tmp_path)])
    monkeypatch.undo()
    rows = json.loads("[" + str(stopped.value).split("training rows [")[1].split("]")[0] + "]")
    run = train.prepare(train.parse_config([*fast, "--out_dir", str(tmp_path)]))
    assert rows == train.rows_at(run, "order", 7, 4).tolist()
    train.main(["--resume", "--out_dir", str(tmp_path)])
    assert_same_run(tmp_path, straight)


def test_a_skipped_update_is_counted_and_changes_nothing_else(fast, tmp_path, monkeypatch):
    def nan_and_keep_the_state(norm):
        shutil.copy(tmp_path / "resume.pt", tmp_path / "19.pt")
        return norm * float("nan")

    at_update(20, monkeypatch, nan_and_keep_the_state)
    train.main([*fast, "--out_dir", str(tmp_path), "--skip_nonfinite", "--save_every", "1", "--max_steps_order", "0"])
    assert [r.get("skipped") for r in log(tmp_path)] == [None, None, None, None, 1.0]
    before, after = torch.load(tmp_path / "19.pt")["model"], torch.load(tmp_path / "denoiser.pt")["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("objective, grad, fit", [(-3.0, 1.0, True), (float("inf"), 1.0, False), (float("nan"), 1.0, False), (-3.0, float("inf"), False)])
def test_objective_and_gradient_must_both_be_finite(objective, grad, fit):
    run = SimpleNamespace(config=train.Config(skip_nonfinite=True))
    assert train.fit_to_apply("denoiser", run, 0, 4, dict(train.COUNTS), torch.tensor(objective), torch.tensor(grad), {}) is fit


def test_weights_that_are_not_finite_are_never_saved(fast, tmp_path, monkeypatch):
    """The update itself overflows: gradients are fine, the step is not."""
    step = torch.optim.AdamW.step

    def overflow(self, *args):
        step(self, *args)
        if len(log(tmp_path)) == 2:  # after step 8
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(UserError, match="stage denoiser, step (9|10): .*last resume point: .*step 5"):
        train.main([*fast, "--out_dir", str(tmp_path)])
    assert load_checkpoint(tmp_path / "resume.pt")[1]["step"] == 5


def test_the_share_of_clipped_steps_is_logged(fast, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)) or norms[-1])
    train.main([*fast, "--out_dir", str(tmp_path), "--max_steps_order", "0", "--seed", "1"])
    shares = [r["clipped"] for r in log(tmp_path)]
    assert shares == [sum(norm.item() > 1 for norm in norms[i : i + 4]) / 4 for i in range(0, 20, 4)] and len({*shares}) > 1


def test_collapse_of_the_order_is_reported_once(fast, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "COLLAPSE", 8)
    collapsing = [*fast, "--max_steps_denoiser", "0", "--out_dir", str(tmp_path)]
    train.main([*collapsing, "--tau", "1e6"])
    assert capsys.readouterr().out.count("start anew with a smaller --tau, then a longer --kl_ramp") == 1
    for fine in (["--tau", "0.1"], ["--tau", "1e6", "--T", "1"]):  # with one step there is nothing to collapse
        train.main([*collapsing, *fine])
        assert "collapsed" not in capsys.readouterr().out


# --- checkpoints are untrusted ------------------------------------------------------------------------------

GONE = object()


def changed(state, change):
    """`state` with one entry changed: (key, .., key, value), the value a function of the old one, or GONE."""
    *path, key, value = change
    part = state
    for name in path:
        part = part[name]
    if value is GONE:
        del part[key]
    else:
        part[key] = value(part[key]) if callable(value) else value
    return state


EMBED = "trunk.embed.weight"
BAD_CHECKPOINTS = [((name, GONE), f"no {name}") for name in STATE] + [((name, 3.5), f"no {name}, or not a") for name in STATE] + [
    (("schema", GONE), "no schema"), (("schema", "3"), "no schema"), (("schema", 4), "schema 4, this code reads 3: update the code"), (("schema", 1), "train again"),
    (("model", EMBED, GONE), "missing or unknown: trunk.embed.weight"), (("model", "extra", torch.zeros(1)), "missing or unknown: extra"),
    (("model", EMBED, lambda t: t.T), "trunk.embed.weight is not torch.float32 of shape"), (("model", EMBED, lambda t: t[:-1]), "of shape"),
    (("model", EMBED, lambda t: t.double()), "float32"), (("model", EMBED, [1.0]), "float32"), (("model", EMBED, lambda t: t * float("nan")), "NaN"),
    (("model", EMBED, lambda t: t.to_sparse()), "checkpoint"),
    *[(("model_config", name, value), f"{name} .*whole number") for name in ("n_layer", "n_head", "n_embd", "answer_len") for value in (-1, 0, 2.0, "2", True, None)],
    (("model_config", "n_layer", 10**9), "n_layer 1000000000 has no tensors"), (("model_config", "n_layer", 2), "missing or unknown"),
    (("model_config", "answer_len", 10**12), "larger than the file"), (("model_config", "n_embd", 2**40), "not a checkpoint"),
    (("model_config", "n_embd", 18), "multiple"), (("model_config", "vocab_size", 10**12), "pieces and vocab_size"),
    (("model_config", "n_layer", GONE), "not complete"), (("model_config", "depth", 3), "depth"),
    (("pieces", [1, 2]), "checkpoint"), (("pieces", 0, "x"), "pieces"), (("pieces", 0, ""), "pieces"), (("pieces", []), "pieces"),
    (("train_config", "dataset", GONE), "no dataset"), (("train_config", "target", 3), "no target")]


@pytest.mark.parametrize("change, message", BAD_CHECKPOINTS)
def test_a_wrong_checkpoint_says_what_is_wrong(straight, tmp_path, change, message):
    torch.save(changed(torch.load(straight / "ckpt.pt"), change), tmp_path / "x.pt")
    with pytest.raises(UserError, match=message) as refused:
        load_checkpoint(tmp_path / "x.pt")
    assert "x.pt" in str(refused.value) and len(str(refused.value)) < 300


def test_a_tensor_cannot_stand_for_more_than_the_file_holds(straight, tmp_path):
    """One number, repeated by a stride of 0, would become gigabytes in a network."""
    state = torch.load(straight / "ckpt.pt")
    state["model_config"]["answer_len"] = 2**40
    state["model"]["trunk.place.weight"] = torch.zeros(1, 1).expand(24 + 2**40, 16)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="larger than the file"):
        load_checkpoint(tmp_path / "x.pt")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x1f\x8b" + bytes(99), pickle.dumps(Payload()), pickle.dumps({"schema": 3}), "half", "payload"])
def test_foreign_files_are_refused_and_run_nothing(straight, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content == "payload":
        torch.save({**torch.load(straight / "ckpt.pt"), "pieces": Payload()}, "x.pt")
    else:
        Path("x.pt").write_bytes((straight / "ckpt.pt").read_bytes()[:5000] if content == "half" else content)
    with pytest.raises(UserError, match="x.pt is not a checkpoint") as refused:
        load_checkpoint("x.pt")
    assert not Path("executed").exists() and "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def stopped(fast, tmp_path_factory):
    """A run that was stopped after step 10 of the order stage."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_update(30, patch, lambda norm: os.kill(os.getpid(), signal.SIGINT) or norm)
        train.main([*fast, "--out_dir", str(out)])
    return out


@pytest.mark.parametrize("change, message", [
    (("step", -1), "step -1"), (("step", 21), "step or counts"), (("counts", "steps", GONE), "step or counts"), (("counts", "steps", -1), "step or counts"),
    (("counts", "steps", "1"), "step or counts"), (("stage", "third"), "other data"), (("data", 5), "other data"), (("pieces", 0, "zzzz"), "other data"),
    (("posterior", []), "does not fit"), (("posterior", 0, EMBED, GONE), "missing or unknown"), (("posterior", 0, EMBED, lambda t: t.T), "shape"),
    (("optimizers", 0, GONE), "does not fit"), (("optimizers", 0, [1]), "does not fit"), (("optimizers", 0, 999, {}), "does not fit"),
    (("optimizers", 0, 0, "exp_avg", GONE), "missing or unknown: exp_avg"), (("optimizers", 0, 0, "exp_avg", lambda t: t.T), "shape"),
    (("optimizers", 1, 0, "momentum_buffer", 3), "momentum_buffer"), (("train_config", "tau", GONE), "written by other code"),
    (("train_config", "new", 1), r"other code \(commit"), (("train_config", "tau", "0.1"), "tau '0.1' is not of type float"),
    (("train_config", "n_layer", 10**9), "at most 1000")])
def test_a_wrong_resume_point_says_what_is_wrong(stopped, tmp_path, change, message):
    """What only --resume looks at."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    torch.save(changed(torch.load(stopped / "resume.pt"), change), tmp_path / "resume.pt")
    with pytest.raises(UserError, match=message):
        train.main(["--resume", "--out_dir", str(tmp_path)])
    assert (tmp_path / "log.jsonl").read_text() == (stopped / "log.jsonl").read_text()


def test_resuming_with_other_data_or_another_size(fast, stopped, tmp_path):
    """Data that changed in one number, and a denoiser.pt that is another run's."""
    shutil.copytree(stopped, tmp_path / "out")
    shutil.copytree(fast[-1], tmp_path / "data")
    rows = (tmp_path / "data" / "train.jsonl").read_text()
    (tmp_path / "data" / "train.jsonl").write_text(rows.replace("buys 7", "buys 8"))
    with pytest.raises(UserError, match="other data"):
        train.main(["--resume", "--out_dir", str(tmp_path / "out"), "--data_dir", str(tmp_path / "data")])
    train.main([*fast, "--out_dir", str(tmp_path / "wide"), "--n_embd", "32", "--max_steps_denoiser", "0", "--max_steps_order", "0"])
    shutil.copy(tmp_path / "wide" / "denoiser.pt", tmp_path / "out" / "denoiser.pt")
    with pytest.raises(UserError, match="denoiser.pt has other sizes"):
        train.main(["--resume", "--out_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="leave out --n_embd"):
        train.main(["--resume", "--out_dir", str(tmp_path / "out"), "--n_embd", "32"])
