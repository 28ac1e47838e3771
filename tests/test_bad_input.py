"""Bad input gives one line and exit status 2, strange input the right result. Every case runs a script's main in
this process, in a folder that holds what `place` puts there."""

import gzip
import json
import os
import re
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_gsm8k
import sample
import train
from data import UserError, build_tokenizer, cli, decode
from model import load_checkpoint
from sample import encode_questions, generate

LONG, MEGABYTE, BROKEN = "x" * 5000, 2**20, "caf\udce9"  # the last: what argv holds for bytes that are not UTF-8
ITEM = '{"question": "Jo has 3, buys 4.", "answer": "<<3+4=7>> #### 7"}\n'
RESULT = {"meta": {"train_config": {"dataset": "toy", "seed": 0}, "args": {"split": "val", "metric": "accuracy"}}, "rows": []}
DEEP = "[" * 100_000


@pytest.fixture
def place(straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ckpt.pt", "control.pt"):
        os.link(straight / name, name)
    os.symlink("loop", "loop")
    for folder in ("folder", "folder.gif", "folder.json", "folder.pt"):
        os.mkdir(folder)
    for name, content in {"file": "", "text.json": "hello", "list.json": "[]", "empty.json": json.dumps(RESULT), "deep.json": DEEP,
                          "row.json": json.dumps({**RESULT, "rows": [{}]}), "order.json": json.dumps({**RESULT, "rows": [{"n": 1, "order": 3}]})}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "zip.pt").write_bytes(gzip.compress(b"hello"))
    other = torch.load(straight / "control.pt")
    torch.save({**other, "pieces": [*other["pieces"][:-1], "other"]}, "other.pt")
    shutil.copy(straight / "denoiser.pt", tmp_path / "folder" / "resume.pt")
    return tmp_path


def outcome(script, argv, capfd):
    """Exit status, stdout and stderr."""
    defaults = {sample: ["--ckpt", "ckpt.pt", "--num_samples", "1"], train: ["--out_dir", "new"],
                eval_gsm8k: ["--ckpt", "ckpt.pt", "--control", "control.pt", "--json", "eval.json", "--limit", "1", "--tune_items", "1"]}[script]
    status = 0
    capfd.readouterr()
    try:
        cli(lambda: script.main([*defaults, *argv]))
    except SystemExit as e:
        status = e.code
    return status, *capfd.readouterr()


BAD = {
    train: [
        ("--stepz 3", "unrecognized arguments"), ("--T 0", "--T must be at least 1"), ("--T -3", "at least 1"), ("--T four", "invalid int"), ("--T 1e3", "invalid int"),
        ("--T 99999999999", "at most 10000"), ("--tau 0", "--tau must be above 0"), ("--tau nan", "above 0"), ("--tau inf", "finite"), ("--tau 0,1", "invalid float"),
        ("--K 1", "--K must be at least 2"), ("--K 1000000", "at most"), ("--n_layer 1000000000", "at most 1000"), ("--answer_len 1000000000000", "at most"),
        ("--n_embd 30", "multiple"), ("--lr_matrix inf", "finite"), ("--lr_other nan", "above 0"), ("--cooldown 2", "at most 1"), ("--kl_ramp nan", "shares"),
        ("--kl_ramp -1", "shares"), ("--plateau 1", "to 0.9999"), ("--start_gap inf", "start_gap"), ("--token_baseline -1", "token_baseline"), ("--save_minutes 0", "above 0"), ("--preset big", "choose from toy, toy2, gsm8k"), ("--stages control,order", "in this order"), ("--stages=", "in this order"), ("--stages order --out_dir absent", "denoiser.pt not found"), ("--dataset mnist", "choose from toy"),
        ("--target all", "choose from equations"), ("--dtype float16", "choose from auto"), ("--device tpu", "choose from auto"), ("--max_steps_order -1", "at least 0"),
        ("--train_items 10000000000", "at most"), ("--preset gsm8k --data_dir absent", "no train.jsonl or train.txt"), ("--preset gsm8k --data_dir file", "no train.jsonl"),
        ("--preset gsm8k --data_dir loop", "no train.jsonl"), (["--preset", "gsm8k", "--data_dir", "a\0b"], "no train.jsonl"), (["--preset", "gsm8k", "--data_dir", LONG], "no train.jsonl"),
        ("--resume --out_dir absent", "resume.pt not found"), ("--resume --out_dir loop", "resume.pt not found"), ("--resume --out_dir folder", "does not fit"),
        ("--resume --out_dir folder --tau 0.3", "leave out --tau"), ("--dry_run --n_embd 15", "--n_embd 15 must be"), ("--dry_run=1", "ignored explicit argument"),
        ("--dry_run --preset gsm8k --data_dir absent", "no train.jsonl"), ("--dry_run --resume --out_dir absent", "resume.pt not found")],
    sample: [
        ("--ckpt absent.pt", "absent.pt not found: run `python train.py`"), ("--ckpt folder.pt", "not found"), ("--ckpt loop", "not found"), (["--ckpt", "a\0b"], "not found"),
        (["--ckpt", LONG], "not found"), (["--ckpt", BROKEN], r"caf\udce9 not found"), (["--ckpt", "a\nb\x1b[31m\u202e"], r"a\nb\x1b[31m\u202e not found"),
        ("--ckpt zip.pt", "zip.pt is not a checkpoint"), ("--ckpt text.json", "not a checkpoint"), ("--steps 0", "steps must be"), ("--steps -1", "steps must be"),
        ("--steps four", "steps must be"), ("--steps 1.5", "steps must be"), ("--steps １", "steps must be"), (["--steps", ""], "steps must be"), (["--steps", "9" * 5000], "steps must be"),
        ("--order best", "unknown order 'best': choose from learned"), (["--order", ""], "unknown order ''"), (["--order", "\0"], r"unknown order '\x00'"), ("--order learned:nan", "cannot read order"),
        ("--order threshold:1e999", "cannot read order"), ("--order learned:0.5:1:1", "cannot read order"), ("--order confidence@0", "cannot read order"),
        ("--order confidence+eos", "cannot read order"), ("--order oracle", "true answer"), ("--compare learned,,iid", "unknown order ''"), (["--prompt", ""], "1 to 24 tokens"),
        (["--prompt", " \r\n\t "], "1 to 24 tokens"), (["--prompt", "word " * 999], "1 to 24 tokens"), (["--prompt", "x" * MEGABYTE], "1 to 24 tokens"),
        (["--prompt", "<|mask|>" * (MEGABYTE // 8)], "1 to 24 tokens"), ("--num_samples 0", "--num_samples"), ("--num_samples 1000000000000", "--num_samples"),
        (["--seed", "9" * 30], "--seed"), ("--seed x", "invalid int"), ("--temperature -1", "temperature"), ("--temperature nan", "temperature"), ("--temperature inf", "temperature"),
        ("--temperature 1e-300", "temperature"), ("--gif x.mp4", "must end in .gif"), ("--gif folder.gif", "cannot write folder.gif"), ("--gif file/x.gif", "cannot write"),
        ("--data_dir absent", "no train.jsonl")],
    eval_gsm8k: [
        ("--ckpt absent.pt", "not found"), ("--control absent.pt", "not found"), ("--control other.pt", "not from the same run"), ("--control zip.pt", "not a checkpoint"),
        ("--seeds 0", "--seeds"), ("--seeds 1000000000", "<= 10000"), ("--limit -1", "--limit"), ("--batch_size 0", "--batch_size"), ("--metric speed", "invalid choice"),
        ("--orders learned,best", "unknown order 'best'"), (["--orders", ""], "unknown order"), ("--orders threshold:high", "cannot read order"), ("--steps 1,,2", "steps must be"),
        ("--split val --tune_items 9999", "leaves no validation items"), ("--json folder.json", "want a file"), ("--json ckpt.pt", "ends in .json"), (["--json", ""], "ends in .json"),
        ("--json file/x.json", "cannot write"), (["--json", "a\0.json"], "cannot write"), (["--json", LONG + ".json"], "cannot write"), ("--plot --json absent.json", "absent.json not found"),
        ("--plot --json folder.json", "not a result"), ("--plot --json text.json", "text.json is not a result"), ("--plot --json list.json", "not a result"),
        ("--plot --json zip.pt", "not a result"), ("--plot --json deep.json", "not a result"), ("--plot --json empty.json", "at least one row"),
        ("--plot --json row.json", "row.json are not results"), ("--plot --json order.json", "not results")]}


@pytest.mark.parametrize("script, argv, message", [(script, *case) for script, cases in BAD.items() for case in cases], ids=lambda x: getattr(x, "__name__", str(x)[:40].encode("ascii", "replace").decode()))
def test_bad_arguments_give_one_line_and_status_2(place, capfd, script, argv, message):
    status, _, err = outcome(script, argv.split() if isinstance(argv, str) else argv, capfd)
    errors = [line for line in err.split("\n") if "error:" in line]
    assert status == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in err
    assert errors[0].isprintable() and err.endswith(errors[0] + "\n")


def test_ctrl_c_outside_of_training_ends_with_status_130():
    with pytest.raises(SystemExit) as stopped:
        cli(lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.value.code == 130


@pytest.mark.parametrize("out_dir", ["file/x", "loop", LONG, "a\0b", "/proc/absent"])
def test_an_unwritable_folder_gives_one_line_and_status_2(fast, place, capfd, out_dir):
    """Not by permissions, which root does not heed."""
    status, _, err = outcome(train, [*fast, "--out_dir", out_dir], capfd)
    assert status == 2 and err.startswith("error: cannot write") and err.count("\n") == 1


@pytest.mark.parametrize("content, message", [
    (b'{"question": "caf\xe9", "answer": "#### 1"}', "cannot read"), (gzip.compress(ITEM.encode()), "cannot read"), (b"", "no examples"), (b" \n\r\n", "no examples"),
    (b'{"question": "q", "question": "p", "answer": "#### 1"}', "line 1.*twice"), (b'{"question": "q"}', "line 1.*answer"), (b'{"question": "q", "answer": "7"}', "line 1.*####"),
    (ITEM.encode() + b'{"question": "q", "answ', "line 2: want JSON"), (ITEM.encode() + b"\0\0\0", "line 2"), (b'{"question": null, "answer": "#### 1"}', "must be strings"),
    (DEEP.encode(), "line 1"), (rb'{"question": "\ud83d", "answer": "#### 1"}', "line 1"), (b'{"question": ' + b"9" * 5000 + b"}", "line 1"), (b"3", "line 1"),
    (b'{"question": "a\x01b", "answer": "#### 1"}', "line 1.*control character"), (("word " * 10**5).join(['{"question": "', '", "answer": "#### 1"}']).encode(), "no item of train fits"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer")])
def test_a_bad_data_file_gives_one_line_and_status_2(fast, place, capfd, content, message):
    (place / "folder" / "train.jsonl").write_bytes(content)
    (place / "folder" / "test.jsonl").write_text(ITEM)
    status, _, err = outcome(train, [*fast, "--data_dir", "folder"], capfd)
    assert status == 2 and err.count("\n") == 1 and re.search(message, err)


def test_strange_data_files_are_read_as_they_are(fast, place, capfd):
    """A byte order mark, CRLF, blank lines, right-to-left text, emoji, names of special tokens, line separators inside
    of a string, and a checkpoint whose tokenizer was made from them."""
    questions = ["שלום 3", "🙂 \u202e3", "<|mask|> 3", "a\u2028b\x85c 3", "a\\u0000\\u001b[31m 3", "a\\nb\\r\\n3"]
    lines = [ITEM.replace("Jo has 3, buys 4.", question).strip() for question in questions]
    for name in ("train", "test"):
        (place / "folder" / f"{name}.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    status, out, _ = outcome(train, [*fast, "--data_dir", "folder", "--max_steps_denoiser", "1", "--max_steps_order", "1"], capfd)
    assert status == 0 and "train: 5 items, 0 longer" in out and "test: 6 items, 0 longer" in out
    status, out, _ = outcome(sample, ["--ckpt", "new/ckpt.pt"], capfd)
    assert status == 0 and any(json.loads(f'"{q}"')[:4] in out for q in questions)


@pytest.mark.parametrize("argv", [
    ["--prompt", "a\0b\x01\x1b[31m"], ["--prompt", "שלום עולם"], ["--prompt", "\u202eabc"], ["--prompt", "🙂👨‍👩‍👧"], ["--prompt", "<|mask|><|eos|>"], ["--prompt", BROKEN],
    ["--prompt", "a\r\nb"], ["--prompt", "\ud800"], ["--prompt", "\ufeffé́\u0301"], ["--prompt", "--steps 4"], ["--steps", "l"], ["--steps", "0004"], ["--steps", "999999999"],
    ["--temperature", "1e30"], ["--seed", "-5", "--temperature", "1"], ["--order", "confidence@99999999999999999999999"], ["--num_samples", "9999"],
    ["--prompt", BROKEN + "🙂\0$x_1^2$", "--gif", "new.gif"]], ids=ascii)
def test_strange_but_good_arguments(place, capfd, argv):
    status, out, err = outcome(sample, argv, capfd)
    assert status == 0 and "error" not in err
    last = [line for line in out.split("\n") if line.startswith("step ")][-1]
    assert "·" not in last and "number" in out


@pytest.fixture(scope="module")
def model(straight):
    return load_checkpoint(straight / "ckpt.pt")


@settings(derandomize=True, deadline=None, max_examples=500)
@given(prompt=st.text(max_size=40) | st.text(st.characters(), max_size=10) | st.lists(st.sampled_from(["<|mask|>", "<<", ">> #### ", "\0", "\udce9", "🙂", " 7"])).map("".join))
def test_any_prompt_is_refused_or_answered(model, prompt):
    denoiser, state = model
    enc = build_tokenizer(state["pieces"])
    try:
        encoded = encode_questions([prompt], enc, denoiser.config.prompt_len)
    except UserError as e:
        assert str(e) == "a prompt must have 1 to 24 tokens" and (not prompt or len(prompt.encode(errors="replace")) > 8)
        return
    tokens = generate(denoiser, encoded, 3).tokens[0].tolist()
    assert len(tokens) == 16 and all(0 <= token < denoiser.config.mask for token in tokens)
    decode(tokens, enc)
