"""train.py and sample.py as a user runs them: end to end, stopped, killed, in parts, with bad
input."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, assert_same_weights, log, outcome, run

import sample
import posterior
import train
from data import UserError, run_script
from model import load_checkpoint
from tools import pack

CHECKPOINTS = set(train.STAGES.values())


def with_data(flags, folder):
    """The flags of `fast`, with other data."""
    return [*flags[: flags.index("--data_dir")], "--data_dir", str(folder)]


# --- end to end -----------------------------------------------------------------------------------

def test_train_writes_checkpoints_and_a_log_of_every_stage(straight):
    assert {p.name for p in straight.iterdir()} == CHECKPOINTS | {"resume.pt", "log.jsonl"}
    records = log(straight)
    assert [(r["stage"], r["step"], "val" in r) for r in records] == [
        (stage, step, step in (10, 20)) for stage in train.STAGES for step in (5, 10, 15, 20)]
    for record in records:
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
        if record["stage"] == "order":
            assert set(record) >= {"elbo", "recon", "kl", "q_entropy", "explained", "grad"}
            assert abs(record["elbo"] - (record["recon"] - record["kl"])) < 1e-2
    states = {name: torch.load(straight / name, weights_only=True) for name in CHECKPOINTS}
    start, *later = (states[name]["model"]["trunk.embed.weight"] for name in train.STAGES.values())
    assert not any(torch.equal(start, end) for end in later)
    for state in states.values():
        assert set(state["train_config"]) == set(train.Config.__dataclass_fields__)


def test_training_ends_in_a_table_and_the_next_command(straight):
    printed = straight.with_suffix(".txt").read_text()
    rows = [line.split() for line in printed.splitlines() if line.startswith(train.TABLE)]
    assert {row[0]: row[1] for row in rows} == {
        name: "ckpt" if name.startswith("learned") else "denoiser" for name in train.TABLE}
    assert all(1 <= float(row[4]) <= 4 for row in rows)  # mean steps
    assert printed.splitlines()[-1].endswith(
        f"next: python sample.py --steps 4 --ckpt {straight / 'ckpt.pt'}")


def test_training_says_what_does_not_fit_and_what_has_no_equation(fast, tmp_path, capsys):
    rows = [{"question": f"Jo has {n}.", "answer": f"<<{n}+1={n + 1}>> #### {n + 1}" if n % 2 else
             f"{n} + 1 = {n + 1} #### {n + 1}"} for n in range(20)]
    rows.append({"question": "long " * 200, "answer": "#### 1"})
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.prepare(train.parse_config(with_data(fast, tmp_path)))
    printed = capsys.readouterr().out
    for name in ("train", "val"):
        assert f"{name}: 20 of 21 items fit, 11 have no <<equation>>" in printed


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
    (tmp_path / "out/ckpt.pt").write_bytes((straight / "ckpt.pt").read_bytes())
    sample.main(["--num_samples", "1"])
    assert "assets/toy.pt" not in capsys.readouterr().out


def test_a_packed_checkpoint_answers_as_the_whole_one(straight, tmp_path):
    pack.main([str(straight / "ckpt.pt"), str(tmp_path / "toy.pt")])
    whole, packed = (load_checkpoint(path)[0] for path in (straight / "ckpt.pt",
                                                            tmp_path / "toy.pt"))
    for a, b in zip(whole.state_dict().values(), packed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "toy.pt").stat().st_size < 0.7 * (straight / "ckpt.pt").stat().st_size


def test_training_says_where_no_good_order_was_found(straight, monkeypatch, capsys):
    """The signs: a bound below stage 1's; on a toy, accurate answers that are not coherent."""
    state = torch.load(straight / "ckpt.pt", weights_only=True)
    config = train.Config(**{**state["train_config"], "out_dir": str(straight)})
    run = train.Run(config, torch.device("cpu"), state["pieces"], [], (), ())
    for dataset, bound, coherent, sign in (("gsm8k", -3, 0.1, ""), ("toy", -3, 0.75, ""),
                                           ("gsm8k", -5, 0.9, "below stage 1's, -4.00"),
                                           ("toy", -3, 0.7, "false equations")):
        row = {"accuracy": 0.9, "coherent": coherent, "n": 1}
        monkeypatch.setattr(train, "evaluate", lambda *_: dict(row))
        monkeypatch.setattr(train, "print_table", lambda *_: None)
        run.config = train.replace(config, dataset=dataset)
        run.log = [json.dumps({"stage": stage, "val": val})
                   for stage, val in (("denoiser", -4.0), ("order", bound))]
        train.final_table(run)
        printed = capsys.readouterr().out
        assert ("better order" in printed) == bool(sign) and sign in printed


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
    code = ("import sys, shlex, train, sample, eval_gsm8k\nfrom data import run_script\n"
            "for words in sys.argv[1:]:\n    script, *argv = shlex.split(words)\n"
            "    run_script(lambda: getattr(sys.modules[script], 'main')(argv))")
    commands = [
        ["train", *with_data(fast, folder), "--max_steps_denoiser", "2", "--max_steps_order", "2",
         "--stages", "denoiser,order", "--out_dir", f"{out}"],
        ["sample", "--ckpt", f"{out}/ckpt.pt", "--prompt", "Zoë 数 \udce9"],
        ["sample", "--ckpt", f"{out}/ckpt.pt"],
        ["eval_gsm8k", "--ckpt", f"{out}/ckpt.pt", "--control", "", "--steps", "2", "--orders",
         "confidence", "--json", f"{out}/é.json"],
        ["sample", "--ckpt", f"{folder}/absént.pt"]]
    done = run("-c", code, *map(shlex.join, commands), PYTHONIOENCODING="ascii",
               PYTHONPATH=str(ROOT))
    assert "Traceback" not in done.stderr and done.stderr.endswith("or pass its path\n")
    assert done.stdout.isascii() and done.stdout.count("question  Zo\\xeb") == 6
    assert json.loads((out / "é.json").read_text())["rows"] and done.returncode == 1


# --- stopped and killed ---------------------------------------------------------------------------

def at_update(update, act, monkeypatch):
    """Call act when the gradients of this update of a run are clipped."""
    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_act(*args):
        calls.append(1)
        if len(calls) == update:
            act()
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_act)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("update", [15, 21, 35, 60])
def test_ctrl_c_names_a_command_that_goes_on_bit_for_bit(fast, straight, tmp_path, monkeypatch,
                                                         update):
    """10 + 10 steps are 20 in every stage, and across the boundary of two."""
    out = tmp_path / "it's a run"
    at_update(update, ctrl_c, monkeypatch)
    with pytest.raises(UserError, match="^stopped; go on with: [^\n]+$") as stopped:
        train.main([*fast, "--out_dir", str(out)])
    monkeypatch.undo()
    python, script, *argv = shlex.split(str(stopped.value).split("go on with: ")[1])
    assert (python, script, argv[0]) == ("python", "train.py", "--resume")
    train.main(argv)
    assert_same_run(out, straight)


def test_ctrl_c_before_there_is_a_resume_point_says_so(fast, tmp_path, monkeypatch):
    (tmp_path / "resume.pt").write_bytes(b"an earlier run's")  # is not taken up
    at_update(3, ctrl_c, monkeypatch)
    with pytest.raises(UserError, match="^stopped before the first resume point$"):
        train.main([*fast, "--out_dir", str(tmp_path)])
    with pytest.raises(UserError, match="^stopped$"):
        run_script(ctrl_c)


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_resume_point(fast, straight, tmp_path,
                                                                      monkeypatch, capfd):
    """From the 12th update on no file may grow beyond 30 kB; a resume point takes more."""
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, unlimited[1]))

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_update(12, fill, monkeypatch)
    try:
        status, _, err = outcome(train, [*fast, "--out_dir", str(tmp_path)], capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    monkeypatch.undo()
    assert status == 1 and err.splitlines()[-1].startswith("stopped: ")
    train.main(["--resume", "--out_dir", str(tmp_path)])
    assert_same_run(tmp_path, straight)


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(fast, tmp_path, monkeypatch):
    """kill -9 of real processes after random times, until 4 have died and one came to its end. Each
    is forked from a server that has imported train.py, so that it starts in milliseconds."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["train", "torch._dynamo"])  # the optimizers import the second
    flags = [*fast, "--max_steps_denoiser", "8", "--max_steps_order", "8", "--log_every", "1",
             "--eval_every", "1"]

    def start(out, *flags):
        process = context.Process(target=train.main, args=([*flags, "--out_dir", str(out)],))
        process.start()
        return process

    start(tmp_path, "--resume").join()  # fails, but the server has started by then
    began = time.perf_counter()
    start(tmp_path / "straight", *flags).join()
    seconds, out, kills, status = time.perf_counter() - began, tmp_path / "killed", 0, None
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


def test_a_resumed_run_is_the_same_run(straight, tmp_path):
    with pytest.raises(UserError, match="leave out --tau$"):
        train.main(["--resume", "--out_dir", str(straight), "--tau", "0.3"])
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "Other?", "answer": "#### 1"}')
    with pytest.raises(UserError, match="other data"):
        train.main(["--resume", "--out_dir", str(straight), "--data_dir", str(tmp_path)])


# --- what must not change the result --------------------------------------------------------------

def test_logging_and_validating_more_often_changes_no_weights(fast, straight, tmp_path):
    train.main([*fast, "--out_dir", str(tmp_path), "--log_every", "1", "--eval_every", "3",
                "--eval_items", "4"])
    assert_same_weights(tmp_path, straight)


def test_stages_trained_one_by_one_are_those_of_a_whole_run(fast, straight, tmp_path):
    for stage in train.STAGES:
        train.main([*fast, "--out_dir", str(tmp_path), "--stages", stage])
    assert_same_weights(tmp_path, straight)


def test_tau_falls_and_the_kl_weight_grows_over_the_order_stage(fast, straight, monkeypatch):
    """What bound hands on at the beginning, in the middle and at the end."""
    run, seen = train.prepare(train.parse_config([*fast, "--out_dir", str(straight)])), []
    monkeypatch.setattr(train, "draw_orders_and_steps", lambda s, K, T, tau, g: seen.append(tau) or
                        posterior.draw_orders_and_steps(s, K, T, tau, g))
    monkeypatch.setattr(train, "objective", lambda *args: seen.append(args[-2:]) or
                        posterior.objective(*args))
    model, q, _ = train.build_stage("order", run)
    for progress in (0.0, 0.05, 0.5, 1.0):
        train.stage_objective(run, model, q, *train.batch_at(run, "order", 0, 4), progress, None)
    taus, handed = seen[::2], seen[1::2]
    assert taus == pytest.approx([0.67 * (0.05 / 0.67) ** x for x in (0, 0.0025, 0.25, 1)])
    assert [tau for tau, _ in handed] == taus
    assert [weight for _, weight in handed] == pytest.approx([0.1, 0.55, 1.0, 1.0])


def assert_close(a, b):
    """Two runs, the same but for rounding."""
    assert_same_weights(a, b, close=1e-4)
    for one, two in zip(log(a), log(b), strict=True):
        assert one.pop("stage") == two.pop("stage") and one == pytest.approx(two, rel=1e-3)


def test_parts_in_turn_are_the_whole_batch(fast, tmp_path):
    """With T = 1 the order stage draws nothing, so that only rounding may differ."""
    flags = [*fast, "--T", "1", "--max_steps_denoiser", "3", "--max_steps_order", "3"]
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


def test_a_batch_is_found_from_its_step_alone_and_an_epoch_has_every_row_once(fast):
    run = train.prepare(train.parse_config(fast))
    epochs = [[train.batch_at(run, "order", step, 4)[1] for step in range(start, start + 9)]
              for start in (0, 9)]  # of 36 rows
    assert torch.equal(train.batch_at(run, "order", 8, 4)[1], epochs[0][-1])
    rows = [sorted(torch.cat(epoch).tolist()) for epoch in epochs]
    assert rows[0] == rows[1] == sorted(run.train[1].tolist())
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_is_torchs_but_for_its_rounding(shape):
    torch.manual_seed(0)
    start, gradients, ends = torch.randn(shape), torch.randn(5, *shape), []
    for kind in (torch.optim.Muon, train.Muon):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.1, weight_decay=0.0)
        for p.grad in gradients:
            optimizer.step()
        ends.append(p.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    ["--seed", "1"], ["--n_embd", "32"], ["--answer_len", "18"], ["--batch_size", "3"],
    ["--max_steps_denoiser", "3"], ["--dataset", "gsm8k-aug"], ["data"]])
def test_a_denoiser_of_another_run_is_refused(fast, straight, tmp_path, change):
    shutil.copy(straight / "denoiser.pt", tmp_path)
    for name in ("train", "test"):
        text = (Path(fast[-1]) / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(text.replace("pens", "cups"))
    flags = with_data(fast, tmp_path) if change == ["data"] else [*fast, *change]
    for stage in ("order", "control"):
        with pytest.raises(UserError, match=rf"another run's \({change[0].lstrip('-')}\)"):
            train.main([*flags, "--out_dir", str(tmp_path), "--stages", stage])


NO_CUDA = [("--device cuda", "no device 'cuda' here")] * (not torch.cuda.is_available())
BAD = {
    train: [
        *NO_CUDA, ("--stepz 3", "unrecognized arguments"), ("--T 0", "--T must be at least 1"),
        ("--T four", "invalid int"), ("--K 1", "--K must be at least 2"), ("--tau nan", "--tau"),
        ("--n_embd 30", "--n_embd 30 must be a multiple"), ("--tau 0", "--tau"),
        ("--tau_end 0", "--tau_end"), ("--lr_other inf", "--lr_other"), ("--lr_other 1e38", "NaN"),
        ("--chunks 0", "--chunks must be at least 1"), ("--preset big", "invalid choice"),
        ("--dataset mnist", "no such data set"), ("--stages first", "no such data set or stage"),
        ("--device tpu", "no device 'tpu' here"), ("--dtype float16", "--dtype"),
        ("--stages order", "denoiser.pt not found"), ("--resume", "resume.pt not found"),
        ("--resume --out_dir folder", "not a checkpoint"), ("--out_dir text/x", "Not a directory"),
        ("--resume --out_dir other", "resume.pt"), ("--answer_len 2", "nothing to train on"),
        ("--data_dir absent", "want train.jsonl and test.jsonl"), ("--chunks 3", "--chunks")],
    sample: [
        *NO_CUDA, ("--ckpt absent.pt", "absent.pt not found: run `python train.py` first"),
        ("--ckpt folder", "folder not found"), ("--ckpt text", "text is not a checkpoint"),
        ("--steps 0", "want a whole number of at least 1"), ("--order best", "cannot read order"),
        ("--compare iid,", "cannot read order ''"), ("--num_samples 0", "whole number"),
        ("--temperature -1", "--temperature"), ("--temperature nan", "--temperature"),
        ("--prompt " + "7" * 999, "the question has 999 tokens, not 1 to 24"),
        ("--prompt=", "the question has 0 tokens"), ("--data_dir absent", "want train.jsonl")]}


@pytest.mark.parametrize("script, argv, message",
                         [(script, *case) for script, cases in BAD.items() for case in cases],
                         ids=lambda x: getattr(x, "__name__", str(x)[:30]))
def test_bad_input_ends_in_one_line(fast, straight, tmp_path, monkeypatch, capfd, script, argv,
                                    message):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "other"):
        os.mkdir(name)
    for name in ("text", "folder/resume.pt"):
        Path(name).write_text("hello")
    shutil.copy(straight / "ckpt.pt", "other/resume.pt")  # a checkpoint that is no resume point
    shutil.copy(straight / "denoiser.pt", "other")
    given = [*fast, "--max_steps_denoiser", "2"] if script is train else [
        "--ckpt", str(straight / "ckpt.pt")]
    status, _, err = outcome(script, [*given, *argv.split()] if "--resume" not in argv else
                             argv.split(), capfd)
    assert status != 0 and message in err and "Traceback" not in err
    line = err.splitlines()[-1] if message in ("NaN", "--tau_end") else err[:-1]  # below a bar
    assert line.isprintable()


def test_parts_must_be_shared_out_evenly_and_the_script_ends_in_one_line(fast, tmp_path):
    done = run("train.py", *fast, "--chunks", "2", "--out_dir", tmp_path, WORLD_SIZE="3")
    assert (done.returncode, done.stderr) == (1, "--chunks 2 must be a multiple of 3 processes\n")


def test_gates_start_as_a_rule_by_place_that_parts_neighbours(fast, tmp_path):
    """place_gates: a bias each, of -6 to 4; next places differ by 2, those two apart by 1, so that
    no tied pair starts alike; a bias moves the logit of its own place only."""
    flags = [*fast, "--place_gates", "--answer_len", "40", "--max_steps_denoiser", "1",
             "--out_dir", str(tmp_path)]
    train.main([*flags, "--stages", "denoiser"])
    model, *_ = train.build_stage("order", train.prepare(train.parse_config(flags)))
    bias = model.gate_head.bias.data
    assert -6 <= bias.min() and bias.max() <= 4 and len(bias) == 40
    assert (bias[1:] - bias[:-1]).abs().min() >= 2 - 1e-5
    assert (bias[2:] - bias[:-2]).abs().min() >= 1 - 1e-5
    h = torch.zeros(1, 40, model.config.n_embd)
    before = model.gate_logits(h)
    bias[7] += 1
    assert (model.gate_logits(h) != before).nonzero().tolist() == [[0, 7]]
