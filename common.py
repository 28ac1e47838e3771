"""What every script needs and no reader has to read first: errors, printing, devices, files.

    UserError        something the user can mend, said in one line
    run_script       a script's main, ended in one line by Ctrl-C or a full disk
    say              print, which does not end a run whose terminal or pipe is gone
    pick_device      auto, cpu, cuda, mps
    process_rank     which of torchrun's processes is this, and how many are they
    write_atomically a reader sees the old file or the new one, never half of one
    save_state       a checkpoint: one file of plain types that says what made it
"""

import contextlib
import errno
import functools
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

SCHEMA = 6  # of checkpoint files


class UserError(SystemExit):
    """Something the user can mend: ends a script with this one line and status 1."""


# --- running and printing -------------------------------------------------------------------------

def run_script(main):
    """main(), ended in one line by Ctrl-C or a full disk. Neither a text that the terminal cannot
    encode nor a stream that is closed makes it fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the shell has closed it: >&-
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
        elif hasattr(stream, "reconfigure"):  # a notebook's stream has none
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        flush_stdout()
    except KeyboardInterrupt:
        raise UserError("stopped") from None
    except OSError as e:  # its text names the file
        raise UserError(f"stopped: {e}; files that were written are whole") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise UserError("out of memory: take smaller sizes or batches (train.py: more --chunks)"
                        ) from None
    finally:
        with contextlib.suppress(OSError):
            flush_stdout()


def flush_stdout():
    """OSError if what was printed cannot be written. A reader that has left is no error."""
    try:
        sys.stdout.flush()
    except ValueError:
        pass  # it is closed
    except OSError as e:
        # It keeps what it could not write, and would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno not in (errno.EPIPE, errno.EIO):  # the pipe's reader or the terminal is gone
            raise


def say(*words):
    """print, above a progress bar where there is one. What is printed is not worth the run: where
    the terminal or the pipe is gone, or the disk behind it full, the run goes on silently."""
    if sys.stdout is None:
        return
    try:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()
    except (OSError, ValueError):
        pass


# --- devices and processes ------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA or CPU. MPS has to be asked for: nobody has run this project on it."""
    found = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = "cuda" if found["cuda"] else "cpu"
    if not found.get(name, False):
        raise UserError(f"no device {name!r} here: take --device cpu")
    if name == "cuda":
        local_rank = from_torchrun("LOCAL_RANK", 0)
        if local_rank >= torch.cuda.device_count():
            raise UserError("torchrun's --nproc_per_node is more than the CUDA devices here")
        torch.cuda.set_device(local_rank)  # each process has its own
    return torch.device(name)


def precise(device: torch.device) -> torch.dtype:
    """float64 where there is one: MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def process_rank() -> tuple[int, int]:
    """(rank, world): which of torchrun's processes is this, and how many are they."""
    return from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)


def from_torchrun(name: str, default: int) -> int:
    """A number that torchrun has set. Without torchrun it is someone else's, and ignored."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return default
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, want the number that torchrun gives a process")
    return int(text)


# --- files ----------------------------------------------------------------------------------------

def path_of(text: str | Path) -> Path:
    """A path as it was typed: a shell leaves the ~ of `--out_dir=~/x` as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise UserError(f"{text}: whose home is that? Write the path without ~") from e


def path_to_write(text: str) -> Path:
    """The same, of a file that is to be written in the end: refused now if that cannot be."""
    path = path_of(text)
    if not path.name or path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{path} cannot be written: {parent} is a file, not a folder")
    return path


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a log.jsonl. Other lines, cut ones for example, are dropped."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_atomically(path: Path, content: bytes):
    """Into a temporary file first, which then takes the name of the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as e:  # that of a full disk names no file
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: dict):
    write_atomically(path, json.dumps(content).encode())


@functools.cache
def versions() -> dict:
    """Of this code: its commit ("+" if files differ from it; "" if it is not a repository of its
    own), of torch and of Python."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()

    commit = ""
    if shutil.which("git") and git("ls-files", "model.py") and not git("rev-parse", "--show-cdup"):
        commit = git("rev-parse", "--short", "HEAD")
        if git("diff", "HEAD"):
            commit += "+"
    return {"commit": commit, "torch": str(torch.__version__), "python": platform.python_version()}


def save_state(path: Path, state: dict):
    """Write a checkpoint: `state` is of plain types and tensors."""
    file = io.BytesIO()  # torch.save into a file that cannot grow raises no OSError
    torch.save({"schema": SCHEMA, "versions": versions(), **state}, file)
    write_atomically(path, file.getvalue())


def load_state(path: str | Path, device="cpu") -> dict:
    """A checkpoint's dict. Read as plain types: no code in the file is run."""
    path = path_of(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: pass a checkpoint in it, such as {path / 'ckpt.pt'}")
    if not path.exists():
        raise UserError(f"{path} not found: run `python train.py` first, or pass its path")
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']}, this code reads {SCHEMA}: train again")
        entries = {"model_config", "model", "pieces", "train_config", "stage", "step", "log",
                   "versions"}
        missing = entries - set(state)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as e:  # unpickling a foreign file raises almost anything
        raise not_a_checkpoint(path, e) from e
    return state


def not_a_checkpoint(path, reason: Exception) -> UserError:
    text = " ".join(str(reason).split())[:200]
    return UserError(f"{path} is not a checkpoint of this project: {text}")
