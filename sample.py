"""Generate answers from a trained model in few steps, in the learned order or by a rule.

    python sample.py --steps 4
    python sample.py --steps 4 --compare learned,confidence,left_to_right
    python sample.py --steps 4 --prompt "Max has 8 eggs, buys 1, splits 3. Ann has 4, sells 2, times 3. Together?"
    python sample.py --steps 4 --gif out/order.gif

Generation starts from a canvas of MASKs. Each step is one forward pass for all positions at once:

    gates    an order (orders.py) picks which masked positions to reveal now, at least one
    tokens   each revealed position takes its most probable token, independently of the others
             (or, with a temperature, a token drawn from p^(1/temperature))

and the last allowed step reveals whatever is left. The order is the only thing that differs between
the learned sampler and the rules it is compared with.

Each row has its own noise, made from its own seed before the first step, so a row's sample depends
neither on the rows beside it nor on when they finish. Rows that are done leave the batch.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from data import UserError, build_tokenizer, cli, decode, encode_prompt, final_number, load_splits
from model import MDM, load_checkpoint, pick_device, trim
from orders import ORDERS, Order, State, draw, parse_order, precise

# --- generation ------------------------------------------------------------------------------------

@dataclass
class Generation:
    tokens: torch.Tensor       # (B, L) finished answers, no MASK
    steps: torch.Tensor        # (B,) forward passes made while the row was unfinished
    reveal_step: torch.Tensor  # (B, L) the step, from 1, that revealed each position
    log_p: torch.Tensor        # (B,) nats: sum of log p(token) at the steps that revealed them


def row_noise(seeds: list[int], T: int, L: int, device):
    """Uniform noise (B, T + 2, L + 1), row b from seeds[b] alone: per step L gates and one draw more,
    then one line that stays for the whole row, then one for the tokens."""
    rows = [torch.rand(T + 2, L + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).to(device, precise(device))


@torch.no_grad()
def generate(model: MDM, prompt, steps: int, order: str | Order = "learned", *, temperature: float = 0.0,
             seeds: list[int] | None = None, x0=None, forced: bool = False, first=None) -> Generation:
    """Answers for prompts (B, P') in at most `steps` forward passes per row, on the prompts' device.

    A budget above L counts as L. `seeds`: one per row, 0..B-1 by default; with temperature 0 they only
    matter to orders that draw. `x0` (B, L): true answers, for the oracle and for `forced`, which writes their tokens
    along the order instead of the model's own. If the order draws nothing and does not look at x0, log_p is then
    log p(x0) of the sampler that takes the same order and draws each token from p. `first` (B, L, D): the model's hidden states at the
    all-MASK canvas, where they are at hand (the step is counted all the same).
    Raises UserError for an unknown order, steps < 1, a negative temperature or an oracle without x0."""
    order = parse_order(order) if isinstance(order, str) else order
    if steps < 1 or not (temperature == 0 or 1e-6 <= temperature < float("inf")):  # below, log p / temperature overflows
        raise UserError(f"need steps >= 1, and temperature 0 or >= 1e-6, got {steps} and {temperature}")
    if order.name == "oracle" and x0 is None:
        raise UserError("the oracle looks at the true answer: it runs in eval_gsm8k.py only")
    L, T = model.config.answer_len, min(steps, model.config.answer_len)
    seeds = list(range(len(prompt))) if seeds is None else seeds
    noise = row_noise(seeds, T, L, prompt.device)
    z = torch.full((len(prompt), L), model.config.mask, device=prompt.device)
    reveal_step, total = torch.zeros_like(z), torch.zeros(len(z), device=z.device, dtype=precise(z.device))
    prompt = trim(prompt, model.config.pad)
    read = model.read(prompt)                                               # once for all steps
    rows, past = torch.arange(len(prompt), device=prompt.device), []        # unfinished; log_p of the last two steps
    for t in range(1, T + 1):
        if len(rows) == 0:
            break
        h = first if t == 1 and first is not None else model(prompt[rows], z[rows], read[rows])
        log_p, masked, u = model.log_p(h), z[rows] == model.config.mask, noise[rows]
        tokens = log_p.argmax(-1) if temperature == 0 else draw((log_p / temperature).log_softmax(-1), u[:, T + 1, :L])
        state = State(log_p, tokens, model.gate_logits(h), masked, t, T, u[:, t - 1, :L], u[:, t - 1, L], u[:, T, :L], past,
                      x0[rows] if x0 is not None else None)
        reveal = masked & order(state, model.config.eos) if t < T else masked
        written = x0[rows] if forced else tokens
        z[rows] = torch.where(reveal, written, z[rows])
        total[rows] += (log_p.gather(-1, written[..., None]).squeeze(-1) * reveal).sum(-1)
        reveal_step[rows] = torch.where(reveal, t, reveal_step[rows])
        unfinished, past = (masked & ~reveal).any(-1), [log_p, *past[:1]]
        if not unfinished.all():
            rows, past = rows[unfinished], [p[unfinished] for p in past]
    return Generation(z, reveal_step.amax(-1), reveal_step, total)


# --- showing it ------------------------------------------------------------------------------------

COLORS = [196, 208, 226, 118, 51, 75, 141, 213]  # of the 256-colour terminal; step 1 is red


@lru_cache(maxsize=2)  # of the tokenizers of earlier runs none is kept alive
def token_texts(enc) -> list[str]:
    """What is shown for each token of a tokenizer."""
    ends = {enc.n_vocab - 3: "∎", enc.n_vocab - 2: "_"}
    return [ends.get(token) or enc.decode([token]).replace("\n", " ") for token in range(enc.n_vocab)]


def token_text(token: int, enc) -> str:
    return token_texts(enc)[token]


def render(tokens, reveal_step, t: int, enc, color: bool) -> str:
    """The canvas after step t: "·" still masked, "∎" EOS, "_" PAD; coloured by the revealing step."""
    parts = []
    for token, step in zip(tokens, reveal_step):
        text = "·" if step > t else token_text(token, enc)
        parts.append(f"\033[38;5;{COLORS[(step - 1) % len(COLORS)]}m{text}\033[0m" if color and step <= t else text)
    return "".join(parts)


def show(item: dict, runs: list[tuple[str, list[int], list[int]]], enc):
    """One question under several orders: (name, tokens, reveal_step) each, step by step, one below the other."""
    width = max(len(name) for name, *_ in runs)
    print(f"question  {item['question']}" + (f"\ntruth     {final_number(item['answer'])}" if item["answer"] else ""))
    for t in range(1, max(max(reveal_step) for *_, reveal_step in runs) + 1):
        running = [run for run in runs if t <= max(run[2])]
        for label, (name, tokens, reveal_step) in zip([f"step {t}"] + [""] * len(runs), running):
            print(f"{label:<10}{name:<{width}}  {render(tokens, reveal_step, t, enc, sys.stdout.isatty())}")
    for label, (name, tokens, reveal_step) in zip(["number"] + [""] * len(runs), runs):
        print(f"{label:<10}{name:<{width}}  {final_number(decode(tokens, enc))} in {max(reveal_step)} steps")
    print()


def save_gif(path: str, question: str, tokens, reveal_step, enc, columns: int = 20):
    """An animation of one generation: a cell per position, coloured by the step that reveals it."""
    import textwrap
    from pathlib import Path

    from matplotlib import colormaps
    from matplotlib.animation import PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines, last = -(-len(tokens) // columns), max(reveal_step)
    figure = Figure(figsize=(columns * 0.45, lines * 0.45 + 0.8))
    FigureCanvasAgg(figure)
    writer = PillowWriter(fps=1)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with writer.saving(figure, path, dpi=100):
            for t in [*range(last + 1), last, last]:  # the finished answer stays for a while
                figure.clear()
                text = textwrap.fill(question, columns * 5).encode(errors="replace").decode()  # argv may hold broken UTF-8
                figure.text(0.01, 0.98, text, va="top", parse_math=False)
                figure.text(0.99, 0.02, f"step {t} of {last}", ha="right")
                axes = figure.add_axes((0, 0.11, 1, lines * 0.45 / figure.get_figheight()), xlim=(0, columns), ylim=(lines, 0))
                axes.axis("off")
                for i, (token, step) in enumerate(zip(tokens, reveal_step)):
                    row, column = divmod(i, columns)
                    shade = colormaps["viridis"](0.95 - 0.6 * (step - 1) / max(last - 1, 1)) if step <= t else "0.85"
                    axes.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, color=shade))
                    if step <= t:
                        text = token_text(token, enc).strip()
                        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=min(9, 42 / len(text or " ")),
                                  color="white" if 2 * step > last else "black", parse_math=False)
                writer.grab_frame()
    except OSError as e:
        raise UserError(f"cannot write {path}: {e}") from e


def parse_steps(text: str) -> int:
    """A step budget: a whole number, or L for as many steps as the canvas has positions."""
    if text.upper() == "L":
        return 10**9
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise UserError(f"steps must be a whole number of at least 1, or L, got {text!r}")
    return int(text)


def encode_questions(questions: list[str], enc, prompt_len: int) -> torch.Tensor:
    """Prompts (B, P) of any texts. Raises UserError for an empty question or one that does not fit."""
    prompts = [encode_prompt(question, enc, prompt_len) for question in questions]
    if None in prompts or not questions or not all(questions):
        raise UserError(f"a prompt must have 1 to {prompt_len} tokens")
    return torch.tensor(prompts)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Show answers as they form.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py")
    parser.add_argument("--steps", default="4", help="step budget, or L, the length of the canvas")
    parser.add_argument("--order", default="learned:0.5:1+finish", help=f"NAME[:KNOB][@BLOCK][+eos_last][+finish], NAME one of {', '.join(name for name in ORDERS if name != 'oracle')}")
    parser.add_argument("--compare", help="several orders, comma-separated, side by side")
    parser.add_argument("--prompt", help="a question of your own; validation questions otherwise")
    parser.add_argument("--num_samples", type=int, default=3, help="validation questions, or samples of --prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the gates' and tokens' draws")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--gif", help="write an animation of the first answer to this file")
    parser.add_argument("--data_dir", help="where the GSM8K files are, if not where training found them")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)

    device, steps = pick_device(args.device), parse_steps(args.steps)
    orders = [parse_order(text) for text in (args.compare.split(",") if args.compare else [args.order])]
    if args.gif and not args.gif.endswith(".gif"):
        raise UserError(f"--gif {args.gif}: the name must end in .gif")
    model, state = load_checkpoint(args.ckpt, device)
    enc, config = build_tokenizer(state["pieces"]), state["train_config"]
    if not 1 <= args.num_samples <= 10_000 or not abs(args.seed) < 2**62:
        raise UserError(f"need 1 <= --num_samples <= 10000 and -2^62 < --seed < 2^62, got {args.num_samples} and {args.seed}")
    if args.prompt is None:
        splits = load_splits(config["dataset"], args.data_dir or config["data_dir"], toy_sizes={"val": args.num_samples})
        fitting = [item for item in splits["val"] if encode_prompt(item["question"], enc, model.config.prompt_len)]
        items = fitting[: args.num_samples]
    else:
        items = [{"question": args.prompt.strip(), "answer": None}] * args.num_samples
    prompt = encode_questions([item["question"] for item in items], enc, model.config.prompt_len).to(device)

    sys.stdout.reconfigure(errors="replace")  # terminals that cannot show "∎"
    seeds = [args.seed + i for i in range(len(items))]
    outs = [generate(model, prompt, steps, order, temperature=args.temperature, seeds=seeds) for order in orders]
    for i, item in enumerate(items):
        show(item, [(str(order), out.tokens[i].tolist(), out.reveal_step[i].tolist()) for order, out in zip(orders, outs)], enc)
    if args.gif:
        save_gif(args.gif, items[0]["question"], outs[0].tokens[0].tolist(), outs[0].reveal_step[0].tolist(), enc)
        print(f"wrote {args.gif}")


if __name__ == "__main__":
    cli(main)
