"""Draw what the heads of a trained attention layer look at.

    python examples/attention_map.py            # one to two minutes
    python examples/attention_map.py --quick    # seconds, and a head that has learned little

A small causal Transformer, converted with `fused_mha.convert`, learns to write pieces of the Python standard library's
source backwards: it reads some characters and a separator, then writes the characters from the last to the first. A
head can do that only by looking, for each character that it writes, at the mirrored place of the text: its attention
weights form a stripe from the top right to the bottom left.

Out come the share of characters that the model writes correctly, each head's weight on the mirrored place, and in the
folder `--out` the picture `attention_map.png`: the head with the clearest stripe, with its characters, and beside it
every head of the model. The exit status is 1 if torch's own module, from the same parameters, has other weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_mha

from train_text_model import (
    INTERRUPTED,
    Text,
    TextModel,
    Training,
    exit_status,
    output_folder,
    parse_with_quick,
    positive,
    seed_number,
    standard_library_text,
    train_in_turns,
    write_whole,
)

SEPARATOR = 0  # the text's code for rare characters, which is otherwise left out here
IGNORED = -100  # a target that cross_entropy passes over
VISIBLE = {" ": "\N{MIDDLE DOT}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}
DRAWN_TEXT = "    def __init__(self, name, *, default=None):\n        self.name = name\n"
WEIGHTS_LIMIT = 1e-5

QUICK = {"steps": 40, "length": 10, "batch_size": 32}


def backwards_task(pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets (N, 2 n) for pieces of text (N, n): read the piece, then write it from its end."""
    length = pieces.shape[1]
    separator = torch.full_like(pieces[:, :1], SEPARATOR)
    sequence = torch.cat([pieces, separator, pieces.flip(1)], dim=1)
    inputs, targets = sequence[:, :-1], sequence[:, 1:].clone()
    targets[:, :length] = IGNORED
    return inputs, targets


@torch.no_grad()
def attention_weights(model: TextModel, codes: Tensor) -> Tensor:
    """The attention weights of every head for one sequence, codes (L): (layers, H, L, L).

    `nn.TransformerEncoderLayer` asks its attention for no weights; a forward pre-hook on the attention asks for them
    and a forward hook keeps them.
    """
    kept: list[Tensor] = []

    def ask(module: nn.Module, args: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**arguments, "need_weights": True, "average_attn_weights": False}

    def keep(module: nn.Module, args: Any, result: tuple[Tensor, Tensor]) -> None:
        kept.append(result[1][0])

    handles = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            handles += [module.register_forward_pre_hook(ask, with_kwargs=True), module.register_forward_hook(keep)]
    model.eval()
    try:
        model(codes.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept)


def mirrored_weights(weights: Tensor) -> Tensor:
    """How much each head looks at the place of the character that it has to write, on average: (layers, H)."""
    writing = weights[:, :, weights.shape[-1] // 2 :]  # (layers, H, n, 2 n): the queries that write
    return writing.flip(-2).diagonal(dim1=-2, dim2=-1).mean(-1)  # the last query wants the first character


@torch.no_grad()
def share_correct(model: TextModel, inputs: Tensor, targets: Tensor) -> float:
    model.eval()
    asked = targets != IGNORED
    return float((model(inputs).argmax(-1) == targets)[asked].float().mean())


def draw(weights: Tensor, inputs: str, written: str, correct: float, path: Path) -> None:
    """The head with the clearest stripe large, with characters; beside it every head, small."""
    from matplotlib import colormaps  # noqa: PLC0415  (of the extra `bench`)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    n_layers, n_heads = weights.shape[:2]
    length = len(written)
    stripes = mirrored_weights(weights)
    best_layer, best_head = divmod(int(stripes.argmax()), n_heads)
    appearance: dict[str, Any] = {
        "cmap": colormaps["Blues"].with_extremes(bad="0.88"),
        "vmin": 0.0,
        "vmax": 1.0,
        "aspect": "auto",
        "interpolation": "nearest",
    }
    future = torch.ones(length, 2 * length, dtype=torch.bool).triu(length + 1)
    maps = weights[:, :, length:].masked_fill(future, float("nan"))  # (layers, H, n, 2 n): the rows that write

    figure = Figure(figsize=(18, 8), layout="constrained")
    FigureCanvasAgg(figure)
    large, small = figure.subfigures(1, 2, squeeze=False, width_ratios=(3, 1.25))[0]
    panel = large.add_subplot()
    image = panel.imshow(maps[best_layer, best_head].numpy(), **appearance)
    for i in range(length):
        panel.add_patch(Rectangle((length - 1.5 - i, i - 0.5), 1, 1, fill=False, edgecolor="tab:orange", linewidth=1.5))
    for side in (-0.5, 0.5):
        panel.axvline(length + side, color="0.6", linewidth=0.8)
    labels = [VISIBLE.get(character, character) for character in inputs]
    labels[length] = "|"
    panel.set_xticks(range(len(labels)), labels, family="monospace", fontsize=11)
    panel.set_yticks(range(length), [VISIBLE.get(x, x) for x in written], family="monospace", fontsize=11)
    panel.tick_params(length=0)
    panel.set_xlabel("looks at: the text that it reads, the separator |, what it has written so far")
    panel.set_ylabel("writes")
    panel.set_title(
        f"Layer {best_layer + 1}, head {best_head + 1}: to write the next character (row), it looks at that character "
        "in the text\n"
        f"(outlined: the mirrored place, {stripes.max():.0%} of the weight; grey: not yet written)",
        fontsize=12,
    )
    large.colorbar(image, ax=panel, label="attention weight", shrink=0.6, pad=0.01)

    grid = small.subplots(n_heads, n_layers, squeeze=False)
    for layer in range(n_layers):
        for head in range(n_heads):
            panel = grid[head, layer]
            panel.imshow(maps[layer, head].numpy(), **appearance)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_title(f"layer {layer + 1}, head {head + 1}: {stripes[layer, head]:.0%}", fontsize=9)
    small.suptitle("Every head, and its weight on the mirrored place", fontsize=11)
    figure.suptitle(
        f"Attention of a model that writes Python source backwards ({correct:.0%} of the characters correct)",
        fontsize=15,
    )
    write_whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Text]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=300, help="of training (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=24, help="characters of a piece (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=48, help="(default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of parameters and batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture (default: %(default)s)")
    options = parse_with_quick(parser, QUICK, arguments)
    if options.length > len(DRAWN_TEXT):
        parser.error(f"--length must be at most {len(DRAWN_TEXT)}, the text that is drawn; got {options.length}")
    output_folder(parser, options.out)
    try:
        text = standard_library_text(max_characters=1_000_000)
    except OSError as error:
        parser.error(str(error))
    return options, text


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, draw; returns the exit status."""
    options, text = parse_options(arguments)
    torch.manual_seed(options.seed)
    model = TextModel(len(text.vocabulary), 2 * options.length, layers=2, embed_dim=64, heads=4)
    fused_mha.convert(model)
    training = Training("converted", model, 3e-3, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    codes = text.codes[text.codes != SEPARATOR]
    offsets = torch.arange(options.length)

    def next_batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(codes) - options.length, (options.batch_size, 1), generator=generator)
        return backwards_task(codes[starts + offsets])

    print(f"learning to write {options.length} characters backwards, {options.steps} steps", flush=True)
    finished = train_in_turns([training], next_batch, options.steps)
    if not finished:
        print(f"\ninterrupted after {len(training.losses)} of {options.steps} steps; nothing was drawn")
        return INTERRUPTED

    correct = share_correct(model, *next_batch())
    drawn = text.encode(DRAWN_TEXT.lstrip()[: options.length])
    inputs, targets = backwards_task(drawn.unsqueeze(0))
    weights = attention_weights(model, inputs[0])
    fused_mha.revert(model)
    difference = float((attention_weights(model, inputs[0]) - weights).abs().max())

    print(f"\n{correct:.1%} of the characters written correctly in a new batch")
    print(f"{'weight on the mirrored place':<30}" + "".join(f"{f'head {head + 1}':>9}" for head in range(4)))
    for layer, row in enumerate(mirrored_weights(weights).tolist(), start=1):
        print(f"{f'  layer {layer}':<30}" + "".join(f"{weight:>9.1%}" for weight in row))
    print(f"largest difference from the weights of torch's module: {difference:.1e} (allowed: {WEIGHTS_LIMIT:g})")
    picture = options.out / "attention_map.png"
    draw(weights, text.decode(inputs[0]), text.decode(targets[0, options.length :]), correct, picture)
    print(f"wrote {picture}")
    if not difference <= WEIGHTS_LIMIT:
        print("FAILED: the weights differ from those of torch's module", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
