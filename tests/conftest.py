"""A tiny run that several test files look at."""

import json

import pytest

import train

FAST = ("--preset gsm8k --prompt_len 24 --answer_len 16 --n_layer 1 --n_embd 16 --n_head 2 --n_layer_posterior 1 --n_pieces 50 --max_steps_denoiser 20 "
        "--max_steps_order 20 --batch_size 4 --batch_size_order 4 --K 2 --log_every 4 --eval_every 8 --save_every 5 --eval_items 2 --table_items 1 --device cpu").split()


@pytest.fixture(scope="session")
def fast(tmp_path_factory):
    """Flags of a run of about a second, on 36 + 4 questions of its own."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"question": f"Jo has {n} pens, buys {n}.", "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n}"}) for n in range(40)]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return [*FAST, "--data_dir", str(folder)]


@pytest.fixture(scope="session")
def straight(fast, tmp_path_factory):
    """The folder of such a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight")
    train.main([*fast, "--out_dir", str(out)])
    return out
