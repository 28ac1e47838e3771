"""bench.py: the causal twin's cache, the counted FLOPs, and that a measured step is a step of train.py."""

import json
import time
from dataclasses import replace

import pytest
import torch

import bench
import train
from data import UserError
from model import ModelConfig, load_checkpoint
from test_scripts import TINY

TINY = [*TINY, "--dtype", "float32"]


@pytest.fixture
def run(tmp_path):
    return bench.make_run(train.parse_config([*TINY, "--out_dir", str(tmp_path)]))


def twin_and_prompt():
    """In float64, with prompts of 1 to 5 tokens."""
    torch.manual_seed(0)
    twin = bench.CausalTwin(ModelConfig(vocab_size=11, prompt_len=6, answer_len=7, n_layer=3, n_head=2, n_embd=16)).double()
    for p in twin.parameters():  # heads and output projections start at 0, which would hide everything
        torch.nn.init.normal_(p, std=0.6)
    return twin, torch.randint(9, (20, 5)).masked_fill(torch.arange(5) > torch.arange(20)[:, None] % 5, twin.config.pad)


def uncached_logits(twin, prompt, answer):
    """Logits (B, P' + n, V) of one whole pass through the blocks as they are, with a causal mask."""
    P, n, trunk = prompt.shape[1], answer.shape[1], twin.trunk
    place = torch.cat([torch.arange(P), twin.config.prompt_len + torch.arange(n)])
    tokens = torch.cat([prompt, answer], 1)
    seen = torch.cat([prompt != twin.config.pad, torch.ones_like(answer, dtype=torch.bool)], 1)[:, None, None, :]
    x = trunk.embed(tokens) + trunk.place(place)
    for block in trunk.blocks:
        cos, sin = trunk.cos[place], trunk.sin[place]
        x = block(x, cos, sin, block.keys_values(x, cos, sin), seen & torch.ones(P + n, P + n, dtype=torch.bool).tril())
    return twin.token_head(trunk.norm(x))


@torch.no_grad()
def test_the_cached_twin_gives_the_logits_of_the_uncached_causal_pass():
    twin, prompt = twin_and_prompt()
    answer, (B, P) = torch.randint(11, (len(prompt), 7)), prompt.shape
    want = uncached_logits(twin, prompt, answer)
    caches = [torch.full((B, 2, 2, P + 7, 8), torch.nan, dtype=torch.float64) for _ in range(3)]  # nothing is read before it is written
    seen = torch.cat([prompt != 10, torch.ones(B, 7, dtype=torch.bool)], 1)[:, None, None, :]
    got = [twin.go_on(prompt, 0, seen[..., :P] & torch.ones(P, P, dtype=torch.bool).tril(), caches)]
    got += [twin.go_on(answer[:, i : i + 1], 6 + i, seen[..., : P + i + 1], caches) for i in range(7)]
    got = twin.token_head(torch.cat(got, 1))
    written = seen.flatten(1)  # what padding would predict means nothing
    assert torch.allclose(got[written], want[written], atol=1e-12) and want[written].std() > 0.1


@torch.no_grad()
def test_each_row_of_the_twin_is_the_greedy_answer_to_its_prompt_alone():
    twin, prompt = twin_and_prompt()
    lengths = torch.randint(1, 8, (len(prompt),))
    out = twin.write(prompt, lengths)
    for row, n, tokens in zip(prompt, lengths.tolist(), out):
        alone, answer = row[row != 10][None], torch.zeros(1, 0, dtype=torch.long)
        for _ in range(n):
            answer = torch.cat([answer, uncached_logits(twin, alone, answer)[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens[:n], answer[0]) and (tokens[n:] == 10).all()


def test_counted_flops_are_those_of_the_formula(run):
    run = bench.make_run(train.parse_config([*TINY, "--n_layer", "2", "--out_dir", run.config.out_dir]))
    model, heads = train.build_stage("denoiser", run)[0], []
    model.token_head.register_forward_hook(lambda _, inputs, output: heads.append(len(inputs[0])))  # masked positions of a batch
    flops, tokens = bench.forward_size(run, model, n=3)
    B, L, D, V = run.config.batch_size, run.config.answer_len, run.config.n_embd, model.config.vocab_size
    want = 0
    for i in range(3):
        P = train.batch_at(run, "denoiser", i, B)[0].shape[1]
        block = lambda n, S: (2 + 2 + 8) * n * D * D + 2 * n * S * D  # kv; q and proj; MLP; scores and values, n positions that see S
        want += 2 * (B * (block(P, P) + 2 * P * D * D + 2 * block(L, P + L)) + heads[i] * D * V) / 3  # the last block: the prompt's kv alone
    assert flops == pytest.approx(want, rel=1e-12) and len(set(heads)) > 1
    assert tokens == pytest.approx(sum(train.batch_at(run, "denoiser", i, B)[0].shape[1] + L for i in range(3)) * B / 3)


def test_a_measured_step_is_a_step_of_train(run, monkeypatch):
    """Bit for bit, but for the schedules of the learning rate, the KL weight and tau, which cost nothing."""
    run = bench.make_run(train.parse_config([*TINY, "--out_dir", run.config.out_dir, "--kl_ramp", "0", "--tau_end", "0.1", "--max_steps_denoiser", "5", "--max_steps_order", "5"]))
    monkeypatch.setattr(train, "lr_factor", lambda *_: 1.0)
    for stage, batch_size, name in (("denoiser", 4, "denoiser.pt"), ("order", 4, "ckpt.pt"), ("control", 12, "control.pt")):
        made = train.build_stage(stage, run)
        assert train.size_of(stage, run.config)[1] == batch_size
        step, *_ = bench.training(stage, run, made)
        start = [p.clone() for p in made[0].parameters()]
        for _ in range(5):
            step()
        train.train_stage(stage, run, None)
        trained = load_checkpoint(run.path(name))[0]
        assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), trained.parameters()))
        assert not all(torch.equal(a, b) for a, b in zip(made[0].parameters(), start))


def test_jobs_run_in_turn_and_a_cold_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(bench, "AT_LEAST", 0.0)
    calls = []
    jobs = {"a": lambda: (time.sleep(0.3 * (not calls)), calls.append("a")), "b": lambda: (time.sleep(0.02), calls.append("b"))}
    seconds = bench.measure(jobs, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 3 and seconds["a"] < 0.1 and seconds["b"] >= 0.02


def test_memory_is_the_most_that_a_call_holds_at_a_time():
    def job():
        a = torch.ones(250_000)                # 1 MB each
        b = a + a
        del a
        b.add(b.clone())

    before = torch.ones(10**6)                 # does not count
    assert bench.peak_memory(job, torch.device("cpu")) == pytest.approx(3, abs=0.01) and len(before) == 10**6


def test_the_toy_and_random_data_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "AT_LEAST", 0.0)
    flags = [*TINY, "--rounds", "1", "--json", str(tmp_path / "b" / "bench.json")]
    bench.main([*flags, "--batches", "1,3", "--steps", "1,L"])
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "b" / "bench.json").read_text())
    assert set(result["sample"]) == {"1", "L"} and set(result["sample"]["L"]) == set(result["causal_twin"]) == {"1", "3"}
    assert result["sample_steps"] == {"1": {"1": 1, "3": 1}, "L": {"1": 60, "3": 60}}  # untrained gates are closed
    assert 0 < result["train_share"] < 1.5 and result["order_cost_ratio"] > 0 and result["matmul_gflops"] > 0
    assert result["train_share"] == pytest.approx(result["train"]["gflop_per_step"] / result["seconds_per_call"]["stage 1"] / result["matmul_gflops"])
    assert result["memory_mb"]["sample 1 3"] > result["memory_mb"]["sample 1 1"] > 0
    assert result["meta"]["config"]["n_embd"] == 16 and sum(line.startswith(("sample", "twin")) for line in printed.splitlines()) == 6
    bench.main([*flags, "--batches", "2", "--steps", "2", "--dataset", "gsm8k", "--answer_len", "9", "--dtype", "bfloat16"])
    result = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert 5 <= result["answer_tokens"] <= 9 and result["sample_steps"] == {"2": {"2": 2}} and result["meta"]["dtype"] == "bfloat16"


def test_costs_have_a_row_for_every_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "AT_LEAST", 0.0)
    bench.main([*TINY, "--rounds", "1", "--batches", "1", "--steps", "1", "--costs", "--json", str(tmp_path / "bench.json")])
    costs = json.loads((tmp_path / "bench.json").read_text())["costs"]
    assert list(costs) == ["as given", "answer_len 30", "answer_len 120", "K 4", "T 2", "T 8", "n_layer 2"]  # K 1 and n_layer 0 cannot be
    assert all(set(row) == {"denoiser", "order"} and min(row.values()) > 0 for row in costs.values())
    printed = capsys.readouterr().out.split("\ncosts ")[1].splitlines()[1:]
    assert [line[:18].strip() for line in printed] == list(costs) and printed[0].split()[-3::2] == ["1.00", "1.00"]


DEEP = [*TINY, "--n_layer", "3", "--n_layer_posterior", "4"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_costs_of_one_and_two_blocks_tell_those_of_the_whole(tmp_path, monkeypatch, dtype):
    """FLOPs exactly, and bytes too: they grow evenly with blocks, and no weight is among them."""
    monkeypatch.setattr(bench, "AT_LEAST", 0.0)  # one example, and one call
    run = bench.make_run(train.parse_config([*DEEP, "--dtype", dtype]))
    for stage in ("denoiser", "order"):
        found = bench.per_example(stage, run, 4)
        built = bench.fresh(stage, run)
        if stage == "order":
            shallow = replace(run, config=replace(run.config, n_layer=1, n_layer_posterior=1))
            built[1].load_state_dict(bench.fresh(stage, shallow)[1].state_dict(), strict=False)  # the same orders
        _, gradients, _ = bench.training(stage, run, built)
        assert found["measured"] == 1 and found["kept_bytes"] == bench.kept_bytes(lambda: gradients(0, 1))
        with bench.sdpa_kernel(bench.SDPBackend.MATH), bench.FlopCounterMode(display=False) as counter:
            gradients(0, 1)
        assert found["flops"] == counter.get_total_flops() and min(found["seconds"], found["update_seconds"]) > 0


def test_no_weights_are_among_the_bytes_kept_for_backward():
    layer, x = torch.nn.Linear(50, 40, bias=False), torch.randn(3, 50)
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        def job():
            with torch.autocast("cpu", torch.bfloat16, enabled=width == 2):
                layer(x).square().sum()
        assert bench.kept_bytes(job) == width * (3 * 50 + 3 * 40)


def test_a_dry_runs_flops_are_three_forward_passes_and_muons_products(tmp_path):
    """Of stage 1, by hand: a forward pass (see above), twice that for backward; five Newton-Schulz steps per matrix."""
    run = bench.make_run(train.parse_config([*DEEP, "--out_dir", str(tmp_path)]))
    model, D = train.build_stage("denoiser", run)[0], run.config.n_embd
    want = 3 * bench.forward_size(run, model, n=1)[0] / run.config.batch_size
    assert bench.per_example("denoiser", run, 4)["flops"] == pytest.approx(want, rel=1e-12)
    tokens = train.batch_at(run, "denoiser", 0, 4)[0].shape[1] + run.config.answer_len
    assert 0.5 < want / (6 * tokens * 12 * D * D * 3) < 2  # 6 per weight and token, about: here attention and heads are large
    blocks = sum(2 * D**3 * (2 * k + 1) for k in (1, 2, 1, 4, 4)) * 5 * 3
    assert bench.held("denoiser", run)["update_flops"] == blocks


def test_a_dry_run_names_what_a_run_takes_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "AT_LEAST", 0.0)
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--dataset", "gsm8k", "--answer_len", "9", "--augment", "0.5", "--chunks", "2"]):
        train.main([*TINY, "--dry_run", *flags])
        printed = capsys.readouterr().out
        assert not list(tmp_path.iterdir()) and ("no data on disk" in printed) == bool(flags)
        run = bench.make_run(train.parse_config([*TINY, *flags]))
        model, posterior, _ = train.build_stage("order", run, train.build_stage("denoiser", run)[0])
        size = [sum(p.numel() for p in module.parameters()) for module in (model, posterior)]
        assert f"denoiser {size[0]:,} parameters, posterior {size[1]:,};" in printed
        rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.startswith((*train.STAGES, "total"))}
        rows = {stage: row for stage, row in rows.items() if row[1] != f"{size[0]:,}"}
        assert [rows[stage][1:4] for stage in train.STAGES] == [["12", "4", "4"], ["12", "4", "12"], ["12", "12", "12"]] and "total" in rows
        assert float(rows["denoiser"][8]) == pytest.approx(16 * size[0] / 1e6, abs=0.3)  # weight, gradient, one or two states
        assert all(float(x) > 0 for stage in train.STAGES for x in rows[stage][4:5] + rows[stage][7:11])  # GFLOP may be printed as 0.00, the PFLOP in all not


def test_a_dry_run_is_no_constant_of_a_run():
    assert not hasattr(train.Config(), "dry_run")
    with pytest.raises(UserError, match="n_embd 15"):
        train.main(["--dry_run", "--n_embd", "15"])


def test_bad_flags_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="--rounds and --batches"):
        bench.main(["--batches", "1,x"])
    with pytest.raises(UserError, match="steps must be"):
        bench.main(["--steps", "0"])
    with pytest.raises(UserError, match="--n_embd 15 must be"):
        bench.main(["--n_embd", "15"])
    run = bench.make_run(train.parse_config([*TINY, "--out_dir", str(tmp_path)]))
    train.train_stage("denoiser", run, None)
    with pytest.raises(UserError, match="has other sizes"):
        bench.main([*TINY, "--n_embd", "32", "--ckpt", str(tmp_path / "denoiser.pt")])
