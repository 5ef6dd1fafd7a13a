"""Models of transformers on `fused_mha` against their own `eager` and `sdpa`: `python benchmarks/run.py transformers`.

Llamas of random weights: the prefill of a prompt, and a training step; `bench_decoding.py` has what follows a prompt.
Each contender is a model of its own with the same weights. All of a model counts, so that attention is only a part.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_mha.benchmark.harness import BAR, BenchCase, GroupBar
from fused_mha.integrations.transformers import register
from fused_mha.testing import tolerance


class Kind(NamedTuple):
    """A group of calls of one model; `start` makes what is timed."""

    bar: GroupBar
    model: dict[str, int]
    sizes: tuple[tuple[int, int], ...]  # N, tokens
    start: Callable[[nn.Module, Tensor], Callable[[], Tensor]]


def prefill(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(tokens, logits_to_keep=1).logits

    return run


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    model.train()

    def run() -> Tensor:
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss

    return run


def result_of(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """What has to agree: the gradients of a training step, or the logits."""
    output = run()
    if not model.training:
        return output.clone()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


LAYERS = 6
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 2}
KINDS = {
    "prefill": Kind(GroupBar(1.3, 1.8), SMALL, ((1, 1024),), prefill),
    "training step": Kind(GroupBar(1.3, 1.8), SMALL, ((1, 1024),), training_step),
}
GROUPS = {group: kind.bar for group, kind in KINDS.items()}


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every kind at every size."""
    for group, kind in KINDS.items():
        for N, length in ((1, 40),) if options.quick else kind.sizes:
            yield _case(group, kind, N, length)


def _case(group: str, kind: Kind, N: int, length: int) -> BenchCase:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (N, length), generator=generator)
    contenders = models(kind.model)
    runs = {name: kind.start(model, tokens) for name, model in contenders.items()}

    def verify() -> None:
        """Ours lies no farther from eager than sdpa by the rule of the tests."""
        ours, eager, sdpa = (result_of(contenders[name], runs[name]) for name in ("ours", "eager", "sdpa"))
        error, sdpa_error = (float((x - eager).abs().max()) for x in (ours, sdpa))
        bound = tolerance(torch.float32, sdpa_error, float(eager.abs().max()), terms=length)
        assert error <= bound, f"{error:.1e} from eager, {bound:.1e} allowed"

    baselines: dict[str, Any] = {"eager": runs["eager"], "sdpa": runs["sdpa"]}
    name = f"{N}x{length}, {LAYERS} layers of {kind.model['hidden_size']}"
    return BenchCase(group, name, runs["ours"], baselines, BAR, verify)


def models(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """The same Llama on each attention."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    register()
    config = LlamaConfig(vocab_size=1000, num_hidden_layers=LAYERS, max_position_embeddings=2048, **sizes)
    made: dict[str, nn.Module] = {}
    for name, implementation in (("ours", "fused_mha"), ("eager", "eager"), ("sdpa", "sdpa")):
        torch.manual_seed(0)
        made[name] = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    return made
