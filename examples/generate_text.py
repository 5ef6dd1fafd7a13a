"""Train a small character model with rotary positions, and let it write with a key/value cache and without.

    python examples/generate_text.py            # some minutes on two cores
    python examples/generate_text.py --quick    # seconds, and a model that has learned little

The text and the training are those of `train_text_model.py`. The attention is one of today's language models: rotary
positions, grouped key heads, Q/K norm, and a window of `--context` characters, so that the text may be of any length.

The trained model writes twice from one seed: with a cache, which is given each new character alone, and by computing
all characters again for each new one. Out come the characters a second of both, the text, and in the folder `--out`
`generate_text.json` with every number. The exit status is 1 if the two texts differ. Ctrl-C ends the training early.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_mha

from train_text_model import (
    INTERRUPTED,
    NextLogits,
    Training,
    batches,
    exit_status,
    generate,
    output_folder,
    parse_with_quick,
    positive,
    seed_number,
    standard_library_text,
    train_in_turns,
    write_whole,
)

HEAD_DIM, QUERIES_OF_A_KEY_HEAD = 16, 2
QUICK = {"steps": 20, "batch_size": 8, "context": 32, "layers": 2, "heads": 4, "length": 100}


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm and added to its input."""

    def __init__(self, heads: int, context: int) -> None:
        super().__init__()
        E = heads * HEAD_DIM
        self.attention = fused_mha.MultiHeadAttention(
            E,
            heads,
            batch_first=True,
            num_kv_heads=heads // QUERIES_OF_A_KEY_HEAD,
            rope=fused_mha.RotaryEmbedding(HEAD_DIM),
            qk_norm="rms",
            window=(context - 1, 0),
        )
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(E), nn.RMSNorm(E)
        self.feed_forward = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E))

    def forward(self, x: Tensor, cache: fused_mha.KeyValueCache | None) -> Tensor:
        normed = self.attention_norm(x)
        attended, _ = self.attention(normed, normed, normed, need_weights=False, is_causal=True, cache=cache)
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x))


class RotaryTextModel(nn.Module):
    """Codes (N, L) to logits of the next character (N, L, vocabulary)."""

    def __init__(self, vocabulary_size: int, context: int, layers: int, heads: int) -> None:
        super().__init__()
        E = heads * HEAD_DIM
        self.characters = nn.Embedding(vocabulary_size, E)
        nn.init.normal_(self.characters.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(heads, context) for _ in range(layers))
        self.norm = nn.RMSNorm(E)
        self.next_character = nn.Linear(E, vocabulary_size)

    def new_caches(self) -> list[fused_mha.KeyValueCache]:
        """One for each layer, which keeps what the window reaches back to."""
        modules = [module for module in self.modules() if isinstance(module, fused_mha.MultiHeadAttention)]
        return [fused_mha.KeyValueCache(module, 1, ring=True) for module in modules]

    def forward(self, codes: Tensor, caches: Sequence[fused_mha.KeyValueCache] | None = None) -> Tensor:
        x = self.characters(codes)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, cache)
        return self.next_character(self.norm(x))


def with_cache(model: RotaryTextModel) -> NextLogits:
    """The logits behind a text that grows, of which the model is given what the cache does not have."""
    caches = model.new_caches()
    return lambda codes: model(codes[None, caches[0].length :], caches)[0, -1]


def recomputing(model: RotaryTextModel) -> NextLogits:
    """The same from the whole text."""
    return lambda codes: model(codes[None])[0, -1]


def timed(write: Callable[[], str]) -> tuple[str, float]:
    """A text, and how long it took."""
    start = time.perf_counter()
    return write(), time.perf_counter() - start


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=1500, help="of the training (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="(default: %(default)s)")
    parser.add_argument("--context", type=positive, default=64, help="characters seen (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--heads", type=positive, default=12, help=f"of {HEAD_DIM}; even (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=500, help="characters to write (default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of parameters, batches and text")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results (default: %(default)s)")
    options = parse_with_quick(parser, QUICK, arguments)
    if options.heads % QUERIES_OF_A_KEY_HEAD:
        parser.error(f"--heads must be even: two heads of the query read one of the key; got {options.heads}")
    output_folder(parser, options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write twice; returns the exit status."""
    options = parse_options(arguments)
    text = standard_library_text()
    torch.manual_seed(options.seed)
    model = RotaryTextModel(len(text.vocabulary), options.context, options.layers, options.heads)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model      {n_parameters:,} parameters, {options.layers} layers of {options.heads} heads", flush=True)
    training = Training("rotary", model, 2e-3, options.steps)
    next_batch = batches(text, options.batch_size, options.context, options.seed)
    finished = train_in_turns([training], next_batch, options.steps)
    if not training.losses:
        return INTERRUPTED
    model.eval()
    last = training.losses[-max(1, len(training.losses) // 10) :]
    print(f"loss       {training.losses[0]:.3f} at first, {statistics.fmean(last):.3f} in the last {len(last)} steps\n")

    ways = {"with a cache": with_cache(model), "recomputing": recomputing(model)}
    texts, speeds = [], {}
    for name, next_logits in ways.items():
        written, seconds = timed(
            lambda of=next_logits: generate(of, text, "\n    def ", options.length, 0.6, options.seed)
        )
        texts.append(written)
        speeds[name] = options.length / seconds
        print(f"{name:<13}{speeds[name]:10,.0f} characters a second", flush=True)
    is_same = texts[0] == texts[1]
    print("both wrote the same text:" if is_same else "FAILED: recomputing wrote another text than this, with a cache:")
    print("\n".join("  | " + line for line in texts[0].strip("\n").splitlines()))
    results = {
        "options": {**vars(options), "out": str(options.out)},
        "torch_version": torch.__version__,
        "fused_mha_version": fused_mha.__version__,
        "threads": torch.get_num_threads(),
        "losses": training.losses,
        "characters_per_second": speeds,
        "is_same": is_same,
        "texts": texts,
    }
    path = options.out / "generate_text.json"
    write_whole(path, lambda part: part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8"))
    print(f"wrote {path}")
    if not finished:
        return INTERRUPTED
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
