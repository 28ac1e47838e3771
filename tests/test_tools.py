"""The tools: what bench measures is what it says, and every figure is drawn."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval_gsm8k
import train
from data import UserError
from model import MDM, ModelConfig, load_checkpoint
from tools import bench, plot

TINY = ModelConfig(vocab_size=40, prompt_len=5, answer_len=7, n_layer=2, n_head=2, n_embd=16)


def random_model(config=TINY):
    model = MDM(config)
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


@torch.no_grad()
def test_cached_twin_is_one_causal_pass():
    model, prompt = random_model(), torch.randint(38, (3, 5))
    logits, causal = bench.write_causally(model, prompt, 7), torch.ones(11, 11).bool().tril()
    x, cos, sin = model.trunk.enter(torch.cat([prompt, logits.argmax(-1)[:, :-1]], 1), 0)
    for block in model.trunk.blocks:
        x = block(x, cos, sin, block.keys_values(x, cos, sin), causal)
    whole = model.token_head(model.trunk.norm(x))[:, 4:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert logits.argmax(-1).unique().numel() > 3


@torch.no_grad()
def test_flops_are_those_that_run():
    model = random_model(replace(TINY, n_layer=3))
    prompt, z = torch.randint(38, (2, 4)), torch.randint(40, (2 * 3, 7))  # 3 states a prompt
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.log_p(model(model.read(prompt), z)[:, :5])  # 6 states, 5 positions of each
    assert counter.get_total_flops() == bench.forward_flops(model.config, 2, 4, 3, 30)


@pytest.fixture(scope="module")
def run(fast, straight):
    return train.prepare(train.parse_config([*fast, "--out_dir", str(straight)]))


@pytest.mark.parametrize("stage", ["denoiser", "order"])
def test_a_measured_step_is_a_training_step(run, stage, monkeypatch):
    built, real = [], train.build_stage
    monkeypatch.setattr(train, "build_stage", lambda *a: built.append(real(*a)) or built[-1])
    job, facts = bench.training(stage, run, batch=10**9)
    job()
    *networks, optimizers = real(stage, run)
    train.train_step(stage, run, *networks, optimizers, 0)
    ours, theirs = built[0][0].state_dict(), networks[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert facts["parts"] == 1


def test_bench_reports_a_preset_without_data(tmp_path):
    sizes = ("--preset gsm8k --prompt_len 12 --answer_len 8 --n_layer 2 --n_embd 16 --n_head 2 "
             "--n_layer_posterior 1 --n_pieces 10 --batch_size 6 --batch_size_order 4 --K 2 "
             "--device cpu").split()
    path = tmp_path / "bench.json"
    bench.main([*sizes, "--steps", "1", "--batch", "2", "--sample", "1,3", "--json", str(path)])
    result = json.loads(path.read_text())
    D, V, S = 16, 256 + 10 + 2, 12 + 8
    trunk, block = (V + 1 + S) * D + D, 12 * D * D + 2 * D  # embeddings and norms
    denoiser = trunk + 2 * block + V * D + D + 8            # token head, gate head with places
    assert result["train"]["parameters"] == denoiser
    critic = (2 * D + 1) * D + (D + 1) * 4**2       # T = 4
    assert result["order"]["parameters"] == denoiser + trunk + block + D + critic
    assert (result["train"]["parts"], result["order"]["parts"]) == (3, 2)
    assert result["train"]["tokens"] == 6 * 20 and result["order"]["tokens"] == 4 * (12 + 3 * 8)
    for row in (result["train"], result["order"]):
        assert row["hours"] == pytest.approx(row["steps"] * row["seconds"] / 3600)
        used = row["share_of_matmul"] * row["seconds"] * result["matmul_gflops"]
        assert used == pytest.approx(row["gflop"])
    assert result["causal_twin"].keys() == result["sample"]["L"].keys() == {"1", "3"}


@pytest.fixture(scope="module")
def evaluated(straight, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "eval.json"
    eval_gsm8k.main(["--ckpt", str(straight / "ckpt.pt"), "--json", str(path), "--control", "",
                     *"--steps 2,4 --tune_items 1 --orders learned:0.5,iid,left_to_right".split()])
    return path


def test_plots(evaluated, straight, tmp_path):
    ckpt, log = ["--ckpt", straight / "ckpt.pt"], straight / "log.jsonl"
    other = json.loads(evaluated.read_text())
    other["meta"]["checkpoints"] = "of another run"
    (tmp_path / "other.json").write_text(json.dumps(other))
    for name, words, frames in (
            ("curve", [evaluated, tmp_path / "other.json"], 1),
            ("order", [evaluated, *ckpt, "--orders", "learned,iid"], 1),
            ("gif", [*ckpt, "--steps", 3, "--order", "left_to_right"], 4),  # steps 0 .. 3
            ("log", [f"one={log}", f"two={log},{log}"], 1)):
        out = tmp_path / "figures" / f"{name}.{'gif' if name == 'gif' else 'png'}"
        plot.main([name, *map(str, words), "--out", str(out)])
        with Image.open(out) as image:
            assert getattr(image, "n_frames", 1) == frames
            assert len(image.convert("RGB").getcolors(10**6)) > 20


@pytest.mark.parametrize("words, reason", [
    ("curve none.json", "cannot read"), ("curve log.jsonl", "one data set"),
    ("log one=none.jsonl", "cannot read"), ("log one=eval.json", "no bound")])
def test_plot_says_what_it_cannot_draw(words, reason, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.jsonl").write_bytes((straight / "log.jsonl").read_bytes())
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(UserError, match=reason):
        plot.main([*words.split(), "--out", "a.png"])
