"""The tools: what bench measures is what it says, every figure is drawn, a table of runs is of what
it says, and bad flags are told at the start."""

import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import outcome
from conftest import run as run_process
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval_gsm8k
import sample
import train
from common import UserError
from data import TOY_SIZES, build_tokenizer, frequent_pieces, toy_split
from model import MDM, ModelConfig, load_checkpoint, save_checkpoint
from optim import make_optimizers
from posterior import OrderPosterior
from tools import bench, plot, seeds

TINY = ModelConfig(vocab_size=40, prompt_len=5, answer_len=7, n_layer=2, n_head=2, n_embd=16)


def random_model(config=TINY):
    model = MDM(config)
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


# --- bench ----------------------------------------------------------------------------------------

@torch.no_grad()
def test_cached_twin_is_one_causal_pass():
    model = random_model()
    prompt = torch.randint(38, (3, 5))
    logits = bench.write_causally(model, prompt, 7)
    x, rotation = model.trunk.embed(torch.cat([prompt, logits.argmax(-1)[:, :-1]], 1), 0)
    causal = torch.ones(11, 11).bool().tril()
    for block in model.trunk.blocks:
        x = block(x, rotation, block.keys_values(x, rotation), causal)
    whole = model.token_head(model.trunk.norm(x))[:, 4:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert logits.argmax(-1).unique().numel() > 3


@torch.no_grad()
def test_flops_are_those_that_run():
    model = random_model(replace(TINY, n_layer=3))
    prompt = torch.randint(38, (2, 4))
    z = torch.randint(40, (2 * 3, 7))  # 3 states a prompt
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.log_p(model(model.encode_prompt(prompt), z)[:, :5])  # 6 states, 5 positions of each
    assert counter.get_total_flops() == bench.forward_flops(model.config, 2, 4, 3, 30)


@pytest.fixture(scope="module")
def run(fast, straight):
    """The tiny run of conftest.py, prepared."""
    return train.prepare(train.parse_config([*fast, "--out_dir", str(straight)]))


@pytest.mark.parametrize("stage", ["denoiser", "order"])
def test_measured_steps_are_training_steps(run, stage, monkeypatch):
    """The gradients of the first two, of which each has its own budget in the order stage."""
    built = []
    real = train.build_stage
    monkeypatch.setattr(train, "build_stage", lambda *a: built.append(real(*a)) or built[-1])
    jobs, part = bench.training(stage, run, batch=10**9)
    gradient, update = jobs.values()
    gradient()
    update()
    gradient()
    (measured, _), = built
    networks, optimizers = real(stage, run)
    monkeypatch.setattr(train, "rate_factor", lambda *_: 0.01)
    for step in range(2):
        train.train_step(stage, run, networks, optimizers, step)
    assert part == 4
    for ours, theirs in zip(measured.parameters(), networks.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:  # train_step has clipped it
            torch.testing.assert_close(F.normalize(ours.grad.flatten(), dim=0),
                                       F.normalize(theirs.grad.flatten(), dim=0))


def saved_bytes(job, *networks):
    """What backward keeps, each storage once, without weights and tables."""
    weights = {t.untyped_storage().data_ptr() for network in networks
               for t in [*network.parameters(), *network.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        job()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layers, D", [(1, 64), (3, 64), (2, 128)])
def test_kept_activations_are_foretold(layers, D, half):
    config = ModelConfig(300, 20, 30, n_layer=layers, n_head=4, n_embd=D)
    model = MDM(config)
    prompt = torch.randint(200, (4, 20))
    z = torch.randint(300, (4 * 3, 30))

    def job():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model.log_p(model(model.encode_prompt(prompt), z))

    foretold = bench.activation_bytes(config, 4, 20, states=3, written=360, half=half)
    assert foretold == pytest.approx(saved_bytes(job, model), rel=0.1)


def test_update_flops_are_those_that_run():
    model = MDM(TINY)
    _, muon = make_optimizers(model, 1e-2, 1e-2)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == bench.update_flops(model)


def n_parameters(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


SMALL = ("--preset gsm8k --prompt_len 12 --answer_len 8 --n_layer 2 --n_embd 16 --n_head 2 "
         "--n_layer_posterior 1 --n_pieces 10 --batch_size 6 --batch_size_order 4 --K 2 "
         "--budgets 2,4 --device cpu").split()


def test_bench_reports_a_preset_without_data(tmp_path):
    path = tmp_path / "bench.json"
    bench.main([*SMALL, "--steps", "1", "--batch", "2", "--sample", "1,3", "--json", str(path)])
    result = json.loads(path.read_text())
    config = ModelConfig(256 + 10 + 2, 12, 8, n_layer=2, n_head=2, n_embd=16, max_steps=4)
    posterior = OrderPosterior(replace(config, n_layer=1))
    denoiser = n_parameters(MDM(config))
    assert result["train"]["parameters"] == denoiser
    assert result["order"]["parameters"] == denoiser + n_parameters(posterior)
    assert result["train"]["part"] == result["order"]["part"] == 2
    assert result["train"]["tokens"] == 6 * 20 and result["order"]["tokens"] == 4 * (12 + 3 * 8)
    for row in (result["train"], result["order"]):
        assert row["hours"] == pytest.approx(row["steps"] * row["seconds"] / 3600)
        used = row["share_of_matmul"] * row["seconds"] * result["matmul_gflops"]
        assert used == pytest.approx(row["gradient_gflop"] + row["update_gflop"])
        assert row["memory_mb"] > 50
    assert result["causal_twin"].keys() == result["sample"]["L"].keys() == {"1", "3"}


def test_what_a_preset_costs_needs_no_data_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "clock", None)
    path = tmp_path / "bench.json"
    bench.main(["--preset", "gsm8k_aug", "--tflops", "400", "--json", str(path)])
    result = json.loads(path.read_text())
    for row in (result["train"], result["order"]):
        work = row["steps"] * (row["gradient_gflop"] + row["update_gflop"]) * 1e9
        assert row["pflop_in_all"] * 1e15 == pytest.approx(work)
        assert row["hours"] * 3600 * 400e12 == pytest.approx(work)
        assert 12 * row["parameters"] < row["state_gb"] * 1e9 < 16 * row["parameters"]
    assert 120e6 < result["train"]["parameters"] < 140e6  # "near the paper's size"


def test_a_step_is_all_its_parts_and_one_update(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "clock", lambda job, device: 1.0)
    path = tmp_path / "bench.json"
    bench.main([*SMALL, "--steps", "1", "--batch", "2", "--sample", "1,3", "--json", str(path)])
    result = json.loads(path.read_text())
    assert (result["train"]["seconds"], result["order"]["seconds"]) == (6 / 2 + 1, 4 / 2 + 1)
    assert result["sample"]["4"] == {"1": 8, "3": 8}  # 8 answers in a second, whatever the batch


def test_answers_are_written_in_batches_of_the_size_that_is_named(tmp_path, monkeypatch):
    """At least 8 of them, by each of the numbers of steps, and by the twin."""
    written = []
    monkeypatch.setattr(bench, "generate", lambda model, prompt, steps, order:
                        written.append((steps, len(prompt))))
    monkeypatch.setattr(bench, "write_causally", lambda model, prompt, n, dtype:
                        written.append(("causal", len(prompt))))
    run = bench.make_run(train.parse_config(["--out_dir", str(tmp_path)]))
    autocast = torch.autocast("cpu", enabled=False)
    jobs, _ = bench.sampling(run, MDM(run.sizes), [1, 12], autocast, torch.float32)
    for (T, B), job in jobs.items():
        written.clear()
        job()
        steps = T if T == "causal" else sample.parse_steps(T)
        assert written == ([(steps, 1)] * 8 if B == 1 else [(steps, 12)])
    assert set(jobs) == set(itertools.product(["1", "4", "16", "L", "causal"], [1, 12]))


def test_memory_is_unknown_where_there_is_no_resource_module(monkeypatch):
    """Windows has none."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(bench.peak_memory(torch.device("cpu")))


# --- plot -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def evaluated(straight, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "eval.json"
    eval_gsm8k.main(["--ckpt", str(straight / "ckpt.pt"), "--json", str(path), "--control", "",
                     *"--steps 2,4 --tune_items 1 --orders learned:0.5,iid,left_to_right".split()])
    return path


def results_of_runs(n, orders):
    """What tools.seeds writes."""
    rows = []
    for seed in range(n):
        by_steps = {steps: [10.0 * seed, 50.0, float(steps)] for steps in ("2", "4")}
        rows.append({"run": f"out_{seed}", "seed": seed,
                     "orders": {order: by_steps for order in orders}})
    return {"args": {"split": "test", "limit": 300}, "rows": rows}


def assert_drawn(path, frames=1):
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == frames
        assert len(image.convert("RGB").getcolors(10**6)) > 20


def test_plots(evaluated, straight, tmp_path):
    ckpt = ["--ckpt", straight / "ckpt.pt"]
    log = straight / "log.jsonl"
    orders = ["learned:0.5", "learned", "iid", "entropy_bound", "entropy_bound+eos_last"]
    (tmp_path / "seeds.json").write_text(json.dumps(results_of_runs(3, orders)))
    for name, words, frames in (
            ("curve", [evaluated], 1),
            ("seeds", [tmp_path / "seeds.json"], 1),
            ("order", [evaluated, *ckpt, "--orders", "learned,iid"], 1),
            ("gif", [*ckpt, "--steps", 3, "--order", "left_to_right"], 4),  # steps 0 .. 3
            ("log", [f"one={log}", f"two={log},{log}"], 1)):
        out = tmp_path / "figures" / f"{name}.{'gif' if name == 'gif' else 'png'}"
        plot.main([name, *map(str, words), "--out", str(out)])
        assert_drawn(out, frames)


def test_any_number_of_rules_and_runs_can_be_drawn(evaluated, straight, tmp_path, monkeypatch):
    """A rule that was added as README.md says, twenty of them; eleven runs; nine groups of logs."""
    content = json.loads(evaluated.read_text())
    runs = tmp_path / "runs"
    runs.mkdir()
    names = [f"mine{i}" for i in range(20)]
    for name in names:
        monkeypatch.setitem(sample.ORDERS, name, (sample.confidence, None, []))
    [like] = [row for row in content["rows"] if row["asked"] == "iid" and row["budget"] == 4]
    for i in range(11):
        rows = json.loads(json.dumps(content["rows"]))
        rows += [{**json.loads(json.dumps(like)), "asked": name, "order": name} for name in names]
        for row in rows:
            row["of"]["checkpoint"] = i
        meta = {**content["meta"], "checkpoints": {"ckpt": i}}
        (runs / f"{i}.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    drawn = []
    monkeypatch.setattr(plot, "draw_curves", lambda curves, title, *rest, f=plot.draw_curves:
                        drawn.append((curves, title)) or f(curves, title, *rest))
    plot.main(["curve", *map(str, runs.iterdir()), "--out", str(tmp_path / "curve.png")])
    curves, title = drawn[0]
    assert set(curves) == {"learned", "iid", "left_to_right", *names}
    assert title.endswith("training runs: 11")

    (tmp_path / "seeds.json").write_text(json.dumps(results_of_runs(11, ["learned:0.5", *names])))
    plot.main(["seeds", str(tmp_path / "seeds.json"), "--out", str(tmp_path / "seeds.png")])
    look, points = drawn[1][0]["learned:0.5"]
    assert look["color"] == "black" and points == [(2, 50, 0, 100), (4, 50, 0, 100)]

    groups = [f"{i}={straight / 'log.jsonl'}" for i in range(9)]
    plot.main(["log", *groups, "--out", str(tmp_path / "log.png")])
    for name in ("curve", "seeds", "log"):
        assert_drawn(tmp_path / f"{name}.png")


def test_a_curve_is_of_the_last_evaluation_in_the_file(evaluated, tmp_path, monkeypatch):
    """Rows of another number of items stand beside."""
    path = tmp_path / "eval.json"
    content = json.loads(evaluated.read_text())
    other = json.loads(json.dumps(content["rows"][0]))
    other["of"]["reported"]["n"] = 3
    other["score"] = 7.0
    path.write_text(json.dumps({**content, "rows": [other, *content["rows"]]}))
    drawn = []
    monkeypatch.setattr(plot, "draw_curves", lambda curves, *rest: drawn.append(curves))
    plot.main(["curve", str(path), "--out", str(tmp_path / "curve.png")])
    scores = [value for _, points in drawn[0].values() for _, value, _, _ in points]
    assert len(scores) == 6 and max(scores) <= 100


def test_a_notebook_s_backend_is_no_hindrance(straight, tmp_path):
    done = run_process("-m", "tools.plot", "log", f"a={straight / 'log.jsonl'}", "--out",
                       tmp_path / "a.png", MPLBACKEND="module://not_installed_here")
    assert done.returncode == 0, done.stderr
    assert_drawn(tmp_path / "a.png")


# --- seeds ----------------------------------------------------------------------------------------

PIECES = frequent_pieces(toy_split("train", 500))


def write_run(out, seed):
    """The folder of a run on a toy whose weights are random."""
    n_vocab = build_tokenizer(PIECES).n_vocab
    sizes = ModelConfig(n_vocab - 1, prompt_len=36, answer_len=60, n_layer=1, n_head=2, n_embd=8)
    config = {"dataset": "toy", "data_dir": "", "answer_len": 60}
    for i, (name, stage) in enumerate((("denoiser", "denoiser"), ("ckpt", "order"))):
        torch.manual_seed(10 * seed + i)
        model = MDM(sizes)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        save_checkpoint(out / f"{name}.pt", model, pieces=PIECES, stage=stage, step=9, log=[],
                        train_config=config)
    records = [{"stage": "denoiser", "step": 9, "val": -9.0, "seconds": 1.0},
               {"stage": "order", "step": 5, "val": -7.0, "seconds": 30.0},
               {"stage": "order", "step": 9, "val": -6.0 - seed, "val_se": 0.1, "seconds": 60.0}]
    (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module", autouse=True)
def few_toy_items():
    """The first of the real ones: making thousands takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOY_SIZES, "val", 20)
        patch.setitem(TOY_SIZES, "test", 20)
        yield


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (3, 4):
        write_run(folder / f"out_{seed}", seed)
    return folder


@pytest.fixture(scope="module")
def seeds_table(toy_runs):
    """Flags, and what the table of the first run is."""
    path = toy_runs / "seeds.json"
    argv = ["--limit", "3", "--tune_items", "1", "--steps", "2,4", "--json", str(path)]
    seeds.main([*argv, "--runs", str(toy_runs / "out_3")])
    return argv, path, json.loads(path.read_text())


def test_a_run_is_a_row(seeds_table, toy_runs):
    [row] = seeds_table[2]["rows"]
    assert (row["run"], row["seed"], row["val"], row["val_se"]) == ("out_3", 3, -9.0, 0.1)
    assert row["minutes"] == 1.5
    orders = row["orders"]
    assert set(orders) == {"learned:0.5", "learned", *seeds.RULES}
    assert [row["coherent"], row["accuracy"], row["steps_mean"]] == orders["learned:0.5"]["4"]
    for steps in ("2", "4"):
        default = orders["learned:0.5"][steps]
        assert row["coherent_by_steps"][steps] == default[0]
        assert row["accuracy_by_steps"][steps] == default[1] and default[2] <= int(steps)
        best = max(orders[rule][steps][0] for rule in seeds.RULES)
        assert row["best_rule_coherent_by_steps"][steps] == best
        assert orders[row["best_rule_by_steps"][steps]][steps][0] == best
    assert row["best_rule"] == row["best_rule_by_steps"]["4"]
    assert row["best_rule_coherent"] == row["best_rule_coherent_by_steps"]["4"]
    assert 0 <= row["sequential"] <= 100

    # The pairs that meet, of the items that are reported on.
    model, state = load_checkpoint(toy_runs / "out_3" / "ckpt.pt")
    items = toy_split("test", 3)
    for steps, share in row["same_step_by_steps"].items():
        met = eval_gsm8k.pairs_that_meet(model, build_tokenizer(PIECES), items, int(steps))
        assert share == 100 * met


def test_a_rule_s_best_checkpoint_and_the_best_rule_are_told_from_the_others(toy_runs, monkeypatch):
    def made_up(args):
        rows = []
        for order in map(str, args.orders):
            for path in filter(None, [args.ckpt, *args.control.split(",")]):
                score = 0.25 + 0.25 * (order == "margin") + 0.25 * path.endswith("ckpt.pt")
                for budget in args.steps:
                    rows.append({"asked": order, "budget": budget, "score": score,
                                 "checkpoint": Path(path).stem, "coherent": score,
                                 "accuracy": 0.9, "steps": [1.5, 1, 2]})
        return rows, rows, {}

    monkeypatch.setattr(seeds, "run_evaluation", made_up)
    row = seeds.row_of(toy_runs / "out_3", seeds.parse_args(["--steps", "2,4", "--limit", "3"]))
    assert row["best_rule"] == "margin" and row["orders"]["margin"]["4"] == [75, 90, 1.5]


def test_rules_are_taken_on_the_best_of_all_checkpoints(seeds_table, toy_runs):
    [row] = seeds_table[2]["rows"]
    rows = json.loads((toy_runs / "out_3" / "test.json").read_text())["rows"]
    tuned = {row["asked"] for row in rows if row["of"]["tuned_on"]}
    assert tuned == {"dilated", "threshold", "entropy_bound", "entropy_bound+eos_last"}
    for rule in seeds.RULES:
        mine = [row for row in rows if row["asked"] == rule and row["budget"] == 4]
        assert {row["checkpoint"] for row in mine} == {"ckpt", "denoiser"}
        assert row["orders"][rule]["4"][0] == 100 * max(row["coherent"] for row in mine)


def test_rows_of_other_runs_stay_and_what_is_there_is_not_measured_again(
        seeds_table, toy_runs, capsys, monkeypatch):
    argv, path, first = seeds_table
    seeds.main([*argv, "--runs", str(toy_runs / "out_4")])
    both = json.loads(path.read_text())["rows"]
    assert [row["run"] for row in both] == ["out_3", "out_4"] and both[0] == first["rows"][0]
    monkeypatch.setattr(eval_gsm8k, "evaluate", None)
    seeds.main([*argv, "--runs", f"{toy_runs / 'out_4'},{toy_runs / 'out_3'}"])
    assert json.loads(path.read_text())["rows"] == both
    printed = capsys.readouterr().out
    assert "median of 2 runs" in printed and "out_4: bound -10.00" in printed


def test_the_best_published_rule_is_taken_in_each_run_and_first_order_is_none(capsys):
    def row(learned, first_order, iid, margin):
        orders = {rule: {"4": [0.0]} for rule in seeds.RULES}
        orders |= {"first_order": {"4": [first_order]}, "iid": {"4": [iid]},
                   "margin": {"4": [margin]}}
        return {"coherent_by_steps": {"4": learned}, "same_step_by_steps": {"4": 1.0},
                "orders": orders}

    seeds.show_medians([row(90.0, 80.0, 30.0, 10.0), row(96.0, 70.0, 20.0, 60.0)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.split(r"  +", line) == ["4", "93.0 (90.0 - 96.0)", "45.0 (30.0 - 60.0)",
                                      "75.0 (70.0 - 80.0)", "1.0 (1.0 - 1.0)"]


def test_a_row_without_rules_is_shown_and_not_written(toy_runs, tmp_path, capsys, monkeypatch):
    asked = []
    real = eval_gsm8k.evaluate
    monkeypatch.setattr(eval_gsm8k, "evaluate",
                        lambda *a: asked.append(str(a[3])) or real(*a))
    seeds.main(["--runs", str(toy_runs / "out_3"), "--limit", "2", "--steps", "4",
                "--json", str(tmp_path / "none.json"), "--learned_only"])
    assert set(asked) == {"learned:0.5", "learned"} and not (tmp_path / "none.json").exists()
    assert "pairs that meet" in capsys.readouterr().out


def test_pairs_that_meet_are_of_the_items_that_are_reported_on(toy_runs, monkeypatch):
    seen = []
    monkeypatch.setattr(seeds, "pairs_that_meet",
                        lambda model, enc, items, *rest: seen.append(items) or 0.0)
    args = seeds.parse_args(["--limit", "3", "--tune_items", "2", "--steps", "2,4"])
    seeds.pairs_by_steps(toy_runs / "out_3", args)
    assert seen == [toy_split("test", 3)] * 2


def test_gates_of_one_model_and_tokens_of_another():
    """Along a true answer the order is that of the gates. In one step there are only tokens."""
    gates = random_model()
    tokens = MDM(TINY)
    for i, p in enumerate(tokens.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(100 + i))
    both = seeds.TokensOf(gates, tokens)
    prompt = torch.randint(38, (9, 5))
    x0 = torch.randint(38, (9, 7))

    forced = [sample.generate(model, prompt, 4, x0=x0) for model in (both, gates, tokens)]
    assert torch.equal(forced[0].reveal_step, forced[1].reveal_step)
    assert not torch.equal(forced[0].reveal_step, forced[2].reveal_step)
    at_once = [sample.generate(model, prompt, 1, x0=x0) for model in (both, gates, tokens)]
    assert torch.equal(at_once[0].log_p, at_once[2].log_p)
    assert not torch.equal(at_once[0].log_p, at_once[1].log_p)

    same = sample.generate(seeds.TokensOf(gates, gates), prompt, 4)
    alone = sample.generate(gates, prompt, 4)
    assert torch.equal(same.tokens, alone.tokens)
    assert torch.equal(same.log_p, alone.log_p)


def test_a_run_with_a_control_has_the_learned_order_with_its_tokens(toy_runs, tmp_path,
                                                                    monkeypatch):
    out = tmp_path / "out_3"
    shutil.copytree(toy_runs / "out_3", out)
    assert "control_tokens_by_steps" not in seeds.row_of(out, seeds.parse_args(
        ["--limit", "2", "--steps", "4", "--learned_only"]))
    shutil.copy(toy_runs / "out_4" / "denoiser.pt", out / "control.pt")

    def made_up(model, enc, items, order, cap, metric, dataset):
        for name, part in (("ckpt", model.gates), ("control", model.tokens)):
            saved, _ = load_checkpoint(out / f"{name}.pt")
            for weights, others in zip(part.parameters(), saved.parameters()):
                assert torch.equal(weights, others)
        assert (items, str(order), metric) == (toy_split("test", 2), "learned:0.5", "coherent")
        return {"coherent": cap / 10}

    monkeypatch.setattr(eval_gsm8k, "evaluate", made_up)
    args = seeds.parse_args(["--limit", "2", "--steps", "2,4"])
    assert seeds.control_tokens_by_steps(out, args) == {"2": 20, "4": 40}


def test_one_token_a_step_is_of_the_denoiser_that_is_best_at_the_longest_budget(
        toy_runs, monkeypatch):
    """Here ckpt is best in 2 steps, denoiser in 4 and with one token a step."""
    def made_up(args):
        rows = []
        for order, path in itertools.product(args.orders, [args.ckpt, *args.control.split(",")]):
            for budget in args.steps if path else ():
                score = 0.75 if path.endswith("ckpt.pt") == (budget == 2) else 0.25
                rows.append({"asked": str(order), "budget": budget, "score": score,
                             "checkpoint": Path(path).stem, "coherent": score,
                             "accuracy": 0.9, "steps": [1.5, 1, 2]})
        return rows, rows, {}

    monkeypatch.setattr(seeds, "run_evaluation", made_up)
    args = seeds.parse_args(["--steps", "2,4", "--limit", "3"])
    assert seeds.row_of(toy_runs / "out_3", args)["sequential"] == 75


# --- bad flags ------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    ("--runs absent_0", "not found"), ("--runs out0", "NAME_SEED"), ("--runs ,", "NAME_SEED"),
    ("--runs empty_1", "not found"), ("--runs gsm8k_1", "was trained on gsm8k"),
    ("--runs nolog_1", "log.jsonl"), ("--runs cut_1", "no end of an order stage"),
    ("--steps 2,3", "must have 4"), ("--steps 4,x", "whole number"), ("--steps 4,61", "60 tokens"),
    ("--limit 0", "whole number"), ("--split train", "invalid choice"),
    ("--json text", "no results of this tool"), ("--json .", "is a folder"),
    ("--json text/x.json", "text is a file"),
    ("--limit 7", "made with")])
def test_seeds_refuses_at_the_start(argv, message, seeds_table, toy_runs, straight, tmp_path,
                                    monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seeds, "run_evaluation", None)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty_1").mkdir()
    for name, source in (("gsm8k_1", straight), ("nolog_1", toy_runs / "out_3"),
                         ("cut_1", toy_runs / "out_3")):
        (tmp_path / name).mkdir()
        for file in ("ckpt.pt", "denoiser.pt"):
            (tmp_path / name / file).write_bytes((source / file).read_bytes())
    (tmp_path / "cut_1" / "log.jsonl").write_text('{"stage": "order", "step": 1}\n')
    before = seeds_table[1].read_text()
    argv = ["--runs", str(toy_runs / "out_3"), *seeds_table[0], *argv.split()]
    status, _, err = outcome(seeds, argv, capfd)
    assert status != 0 and message in err and err.count("\n") == 1 and err[:-1].isprintable()
    assert seeds_table[1].read_text() == before


@pytest.mark.parametrize("words, message", [
    ("curve none.json", "cannot read"), ("curve log.jsonl", "no results"),
    ("seeds none.json", "cannot read"), ("seeds log.jsonl", "cannot read"),
    ("seeds eval.json", "cannot read"), ("seeds norows.json", "no runs"),
    ("log one=none.jsonl", "cannot read"), ("log one=eval.json", "no bound"),
    ("log log.jsonl", "want LABEL=FILE"), ("curve log.jsonl --out log.jsonl/c.png", "is a file"),
    ("curve", "required"), ("curve log.jsonl --out c.jpgx", "--out c.jpgx"),
    ("gif --out c.png", "--out c.png"), ("curve log.jsonl --out folder.png", "is a folder"),
    ("order log.jsonl --steps L", "whole number"), ("gif --steps 0", "whole number"),
    ("gif --ckpt none.pt", "none.pt not found"), ("gif --ckpt denoiser.pt", "trained gates"),
    ("gif --ckpt denoiser.pt --order best", "cannot read order"), ("curve x --item 3", "--item")])
def test_plot_says_what_it_cannot_draw(words, message, straight, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("log.jsonl", "denoiser.pt"):
        (tmp_path / name).write_bytes((straight / name).read_bytes())
    (tmp_path / "eval.json").write_text("{}")
    (tmp_path / "norows.json").write_text('{"args": {"split": "val", "limit": 3}, "rows": []}')
    (tmp_path / "folder.png").mkdir()
    status, _, err = outcome(plot, words.split(), capfd)
    assert status != 0 and message in err and err.count("\n") == 1 and err[:-1].isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, message", [
    ("--sample 0", "--sample"), ("--sample 1,x", "--sample"), ("--steps L", "whole number"),
    ("--batch 0", "whole number"), ("--json .", "is a folder"), ("--presett toy", "--presett"),
    ("--n_embd 15", "--n_embd"), ("--tflops 0", "--tflops"), ("--tflops nan", "--tflops")])
def test_bench_refuses_at_the_start(words, message, capfd, monkeypatch):
    monkeypatch.setattr(bench, "bench", None)
    status, _, err = outcome(bench, words.split(), capfd)
    assert status != 0 and message in err and err.count("\n") == 1


def test_answers_are_not_drawn_with_another_run_s_tokenizer(evaluated, straight, tmp_path):
    state = torch.load(straight / "ckpt.pt")
    torch.save({**state, "seed": 9}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is of other checkpoints than"):
        plot.main(["order", str(evaluated), "--ckpt", str(tmp_path / "ckpt.pt"), "--out",
                   str(tmp_path / "a.png")])


def test_an_order_that_was_not_evaluated_is_one_line(evaluated, straight, tmp_path):
    with pytest.raises(UserError, match="no such orders at --steps 3, but none at all"):
        plot.main(["order", str(evaluated), "--ckpt", str(straight / "ckpt.pt"), "--steps", "3",
                   "--out", str(tmp_path / "a.png")])
    with pytest.raises(UserError, match="no such orders at --steps 4, but .*iid"):
        plot.main(["order", str(evaluated), "--ckpt", str(straight / "ckpt.pt"), "--orders",
                   "margin", "--out", str(tmp_path / "a.png")])
