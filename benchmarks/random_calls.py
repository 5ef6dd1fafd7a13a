"""Random calls of the module, and the text that names one: `bench_random` draws and repeats them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from fused_mha.benchmark.module_cells import Cell, Mode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = {"inference": False, "training": True}
# The words of each option, and what they set in a `Mode`; the empty word stands for none.
MASKS: dict[str, Mode] = {
    "": Mode(),
    "causal": Mode(causal=True),
    "padding": Mode(padding=0.5),
    "causal-padding": Mode(causal=True, padding=0.5),
    "bool-mask": Mode(attn_mask="bool"),
    "float-mask": Mode(attn_mask="float"),
    "bool-mask-per-head": Mode(attn_mask="bool per head"),
    "float-mask-per-head": Mode(attn_mask="float per head"),
}
WEIGHTS = {"": Mode(), "weights": Mode(weights=True), "weights-per-head": Mode(weights=True, per_head=True)}
LAYOUTS = {"": True, "sequence-first": False}

SEQUENCES, LENGTH = 256, 2048  # at most
ONES = 0.1
EMBEDDINGS = (  # E and H: head sizes of 16 to 128
    *((16, 1), (32, 2), (64, 1), (64, 4), (96, 3), (128, 2), (128, 4), (192, 6), (192, 12), (256, 4), (256, 8)),
    *((256, 16), (384, 6), (512, 8), (768, 12), (1024, 8), (1024, 16), (2048, 16), (2048, 32)),
)
# About 50 ms: of torch on two slow cores, which takes ten times as long in fp16.
WORK, QUICK_WORK = 2_000_000_000, 20_000_000
WORK_OF_SCORE = 60  # operations in the time of an exp, and of a score's ways through memory
SLOWNESS = {torch.float16: 8}


class RandomCall(NamedTuple):
    """A call of the module; as text it is what `--only` takes."""

    cell: Cell
    mode: Mode

    def __str__(self) -> str:
        mode = self.mode
        masks = Mode(padding=mode.padding, causal=mode.causal, attn_mask=mode.attn_mask)
        words = (
            str(self.cell),
            _word(DTYPES, mode.dtype),
            _word(STEPS, mode.training),
            _word(MASKS, masks),
            _word(WEIGHTS, Mode(weights=mode.weights, per_head=mode.per_head)),
            _word(LAYOUTS, mode.batch_first),
        )
        return " ".join(word for word in words if word)

    @property
    def work(self) -> int:
        """Operations of a call, in the time of multiply-adds of fp32."""
        N, L, S, E, H = self.cell
        scores = N * H * L * S
        forward = 4 * N * (L + S) * E**2 + 4 * N * L * S * E + WORK_OF_SCORE * scores
        return forward * (3 if self.mode.training else 1) * SLOWNESS.get(self.mode.dtype, 1)


def draw(generator: random.Random, most_work: int = WORK) -> RandomCall:
    """A call whose sizes are spread evenly over their logarithms, as far as the work allows."""
    mode = _mode(
        DTYPES[generator.choice(list(DTYPES))],
        STEPS[generator.choice(list(STEPS))],
        MASKS[generator.choice(list(MASKS))],
        WEIGHTS[generator.choice(list(WEIGHTS))],
        LAYOUTS[generator.choice(list(LAYOUTS))],
    )
    is_self_attention = generator.random() < 0.6
    while True:  # with the embedding anew too: a single row of a large one may be more than the work
        E, H = generator.choice(EMBEDDINGS)
        N, L, S = (_size(generator, most) for most in (SEQUENCES, LENGTH, LENGTH))
        call = RandomCall(Cell(N, L, L if is_self_attention else S, E, H), mode)
        if call.work <= most_work:
            return call


def _size(generator: random.Random, most: int) -> int:
    """Often one, as in decoding and pooling."""
    return 1 if generator.random() < ONES else round(most ** generator.random())


def parse(text: str) -> RandomCall:
    """The call that a text names; raises ValueError where it names none."""
    sizes, *words = text.split() or [""]
    match = re.fullmatch(r"(\d+)x(\d+)(?:->(\d+))?x(\d+)x(\d+)", sizes)
    if match is None:
        raise ValueError(f"a call starts with its sizes, such as 2x100->850x256x8 (NxL->SxExH); got {sizes!r}")
    N, L, S, E, H = (int(size) for size in match.groups(default=match[2]))  # without an arrow, S is L
    found = [_take(words, of) for of in (DTYPES, STEPS, MASKS, WEIGHTS, LAYOUTS)]
    if words:
        raise ValueError(f"{words[0]!r} is no word of a call, stands twice or in the wrong place in {text!r}")
    dtype, training, masks, weights, layout = found
    mode = _mode(DTYPES[dtype], STEPS[training], MASKS[masks], WEIGHTS[weights], LAYOUTS[layout])
    return RandomCall(Cell(N, L, S, E, H), mode)


def _mode(dtype: torch.dtype, training: bool, masks: Mode, weights: Mode, batch_first: bool) -> Mode:
    return masks._replace(
        dtype=dtype, training=training, weights=weights.weights, per_head=weights.per_head, batch_first=batch_first
    )


def _word(words: Mapping[str, object], value: object) -> str:
    return next(word for word, meaning in words.items() if meaning == value)


def _take(words: list[str], known: Mapping[str, object]) -> str:
    """The first word, taken off, if it is known; else the empty one, where there is one."""
    if words and words[0] in known:
        return words.pop(0)
    if "" in known:
        return ""
    raise ValueError(f"expected one of {', '.join(known)}; got {words[0] if words else 'nothing'}")
