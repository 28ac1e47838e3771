"""common.py: streams that are closed or full, files that are whole, torchrun's numbers, paths."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import (UserError, load_state, path_of, pick_device, process_rank, read_json_lines,
                    run_script, save_state, say, write_atomically, write_json)

ROOT = Path(__file__).parent.parent
# Scripts of a folder of their own. The first says 2000 lines before it does its work.
LONG = """
def main():
    for i in range(2000):
        say("line", i)
    Path("done").write_text("work")
"""
HELP = """
def main():
    print("help")
    sys.exit(0)
"""


def shell(main, redirect, folder, flags=""):
    """Run a script by a shell that redirects its streams."""
    (folder / "script.py").write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from common import run_script, say\n{main}\nrun_script(main)\n")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} {flags} script.py {redirect}"],
        cwd=folder, text=True, capture_output=True, timeout=300,
        env={**os.environ, "PYTHONUNBUFFERED": ""})


# --- running and printing -------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="shells and pipes of another kind")


@posix
def test_a_run_outlives_the_reader_of_its_pipe(tmp_path):
    done = shell(LONG, "2>&- | head -3", tmp_path, flags="-u")
    assert (done.returncode, done.stdout) == (0, "line 0\nline 1\nline 2\n")
    assert (tmp_path / "done").read_text() == "work"


@posix
def test_a_run_needs_no_streams(tmp_path):
    done = shell(LONG, "<&- >&- 2>&-", tmp_path)
    assert done.returncode == 0 and (tmp_path / "done").read_text() == "work"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_run_outlives_a_full_disk_under_its_output_and_says_so(tmp_path):
    done = shell(LONG, "> /dev/full", tmp_path)
    assert (tmp_path / "done").read_text() == "work"
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@posix
def test_help_into_a_pipe_that_closes_is_no_failure(tmp_path):
    done = shell(HELP, "| true", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@posix
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_what_nobody_reads_any_more_is_no_failure(kind, monkeypatch):
    """stdout is a pipe without a reader, EPIPE, or a terminal whose other side is closed, EIO."""
    here, there = os.pipe() if kind == "pipe" else pytest.importorskip("pty").openpty()
    os.close(here)
    ran = []
    with open(there, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        run_script(lambda: ran.append([say("line", i) for i in range(2000)]))
    assert ran


def test_what_is_said_arrives(capsys):
    say("a", 1, None)
    say()
    assert capsys.readouterr().out == "a 1 None\n\n"


@pytest.mark.parametrize("stream", [None, "closed", "text"])
def test_streams_of_notebooks_and_services_are_enough(stream, monkeypatch):
    """None where there is none, one that is closed while main runs, or one without reconfigure."""
    given = io.StringIO() if stream == "text" else open(os.devnull, "w")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if stream is None else given)

    def main():
        if stream == "closed":
            given.close()
        say("now")

    say("before")
    run_script(main)
    if stream == "text":
        assert given.getvalue() == "before\nnow\n"
    given.close()


def test_ctrl_c_is_one_line():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="^stopped$"):
        run_script(main)


# --- files ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def no_file_above(size):
    """A disk on which no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_too_little_memory_is_one_line(error):
    def main():
        raise error
    with pytest.raises(UserError, match="^out of memory: .*--chunks"):
        run_script(main)


def test_lines_that_are_no_objects_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe bad\n\n[3]\nnull\n{"step": 2}\n{"step"')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_full_disk_names_the_file_and_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "folder" / "resume.pt"
    write_atomically(path, b"old")
    with no_file_above(1000):
        with pytest.raises(OSError) as told:
            write_atomically(path, b"x" * 5000)
        with pytest.raises(UserError, match="^stopped: .*resume.pt.*; files that were written are"):
            run_script(lambda: save_state(path, {"model": torch.zeros(5000)}))
        with pytest.raises(OSError, match="rows.json"):
            write_json(tmp_path / "rows.json", {"rows": list(range(5000))})
    assert str(path) in str(told.value) and ".tmp" not in str(told.value)
    assert [p.name for p in path.parent.iterdir()] == ["resume.pt"] and path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.pt", tmp_path / "folder"):
        with pytest.raises(OSError, match="file|folder"):
            write_atomically(path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_is_replaced_whole(tmp_path):
    for content in ({"rows": [1, 2]}, {}):
        write_json(tmp_path / "a" / "b.json", content)
    assert [(p.name, p.read_text()) for p in (tmp_path / "a").iterdir()] == [("b.json", "{}")]


def test_a_home_is_found_where_the_shell_leaves_the_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert path_of("~/x/y") == tmp_path / "x" / "y" and path_of("~") == tmp_path
    assert path_of("a/~b") == Path("a/~b") and path_of(tmp_path) == tmp_path
    with pytest.raises(UserError, match="whose home"):
        path_of("~nobody-has-this-name/x")
    with pytest.raises(UserError, match=f"{tmp_path}/x.pt not found: run `python train.py` first"):
        load_state("~/x.pt")


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is a folder: pass a checkpoint in it"):
        load_state(tmp_path)
    with pytest.raises(UserError, match="absent.pt not found: run `python train.py` first"):
        load_state(str(tmp_path / "absent.pt"))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"schema": 0}, tmp_path / "old.pt")
    torch.save([1], tmp_path / "list.pt")
    for name in ("text", "empty", "old", "list"):
        with pytest.raises(UserError, match=f"{name}.pt is not a checkpoint of this proj") as told:
            load_state(tmp_path / f"{name}.pt")
        assert str(told.value).isprintable()


# --- devices and processes ------------------------------------------------------------------------

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")


def set_numbers(monkeypatch, **given):
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    for name, text in given.items():
        monkeypatch.setenv(name, text)


def test_the_shells_rank_is_not_torchruns(monkeypatch):
    set_numbers(monkeypatch)
    assert process_rank() == (0, 1)
    set_numbers(monkeypatch, RANK="gold", WORLD_SIZE="8", LOCAL_RANK="x")
    assert process_rank() == (0, 1)
    set_numbers(monkeypatch, RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none")
    assert torch.distributed.is_torchelastic_launched()  # the variable is torch's own
    assert process_rank() == (1, 2)


@pytest.mark.parametrize("name, text", [("RANK", "gold"), ("WORLD_SIZE", ""), ("RANK", "-1"),
                                        ("WORLD_SIZE", "2.0")])
def test_torchruns_rank_is_a_number_or_one_line(monkeypatch, name, text):
    numbers = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", name: text}
    set_numbers(monkeypatch, **numbers)
    with pytest.raises(UserError, match=f"^{name} is {text!r}, want the number that torchrun"):
        process_rank()


def test_auto_takes_cuda_or_the_cpu_and_mps_has_to_be_asked_for(monkeypatch):
    set_numbers(monkeypatch, LOCAL_RANK="gold")
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu" and pick_device("mps").type == "mps"
    for name in ("cuda", "tpu"):
        with pytest.raises(UserError, match=f"^no device '{name}' here: take --device cpu$"):
            pick_device(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda" and taken == [0]
    set_numbers(monkeypatch, LOCAL_RANK="1", TORCHELASTIC_RUN_ID="none")
    assert pick_device("auto").type == "cuda" and taken == [0, 1]
    set_numbers(monkeypatch, LOCAL_RANK="2", TORCHELASTIC_RUN_ID="none")
    with pytest.raises(UserError, match="more than the CUDA devices here"):
        pick_device("auto")
