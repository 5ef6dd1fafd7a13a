"""One token behind a thousand, against transformers with its own cache: `python benchmarks/run.py decoding`.

One attention layer of Llama: our module with its `KeyValueCache`, of the same weights, against transformers' layer on
`eager` and `sdpa`, whose angles are computed beforehand. And a Llama as a whole, by `register` and `cache`; beside it,
out of the ratio, the same with transformers' cache. Each call is followed by a crop, so that all are of one length.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fused_mha
from fused_mha.benchmark.harness import BAR, BenchCase, Contender, GroupBar
from fused_mha.integrations import transformers as integration
from fused_mha.testing import tolerance

CACHED = 1000
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
LAYERS = 6
LAYER, MODEL = "attention layer, a token behind 1000", "model, a token behind 1000"
GROUPS = {LAYER: GroupBar(1.2, 2.0), MODEL: GroupBar(1.2, 2.0)}


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Both groups with one sequence and with eight."""
    for N in (1, 8):
        for make in (_layer_case, _model_case):
            yield make(N, 40 if options.quick else CACHED)


def _config(implementation: str) -> Any:
    from transformers import LlamaConfig  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    integration.register()
    config = LlamaConfig(vocab_size=1000, num_hidden_layers=LAYERS, max_position_embeddings=2048, **SIZES)
    config._attn_implementation = implementation
    return config


def _case(group: str, name: str, N: int, cached: int, contenders: dict[str, Contender]) -> BenchCase:
    """Of "ours", "eager", "sdpa" and others, each of which returns what all have to agree on."""

    def verify() -> None:
        """Ours lies no farther from eager than sdpa by the rule of the tests."""
        results: dict[str, Any] = {name: contender() for name, contender in contenders.items()}
        eager = results.pop("eager")
        largest = float(eager.abs().max())
        errors = {name: float((x - eager).abs().max()) for name, x in results.items()}
        bound = tolerance(torch.float32, errors.pop("sdpa"), largest, terms=cached)
        assert max(errors.values()) <= bound, f"{errors} from eager, {bound:.1e} allowed"

    rest = dict(contenders)
    ours, baselines = rest.pop("ours"), {name: rest.pop(name) for name in ("eager", "sdpa")}
    return BenchCase(group, f"{N}x{cached + 1}, {name}", ours, baselines, BAR, verify, beside=rest)


def _layer_case(N: int, cached: int) -> BenchCase:
    from transformers import DynamicCache  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    from transformers.models.llama import modeling_llama as llama  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    x = torch.randn(N, cached + 1, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    prompt, token = x[:, :cached], x[:, cached:]
    torch.manual_seed(0)
    theirs = llama.LlamaAttention(_config("eager"), 0).eval()
    angles = llama.LlamaRotaryEmbedding(theirs.config)

    def with_implementation(implementation: str) -> Contender:
        layer, cache = copy.deepcopy(theirs), DynamicCache(config=theirs.config)
        layer.config = _config(implementation)
        name = _cache_name(layer.forward)

        def forward(x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
            return layer(x, positions, mask, **{name: cache})[0]

        with torch.inference_mode():
            at_prompt, at_token = (angles(x, torch.arange(*span)[None]) for span in ((cached,), (cached, cached + 1)))
            forward(prompt, at_prompt, torch.zeros(cached, cached).fill_(-torch.inf).triu(1)[None, None])
        return _cropped(lambda: forward(token, at_token, None), cache, cached)

    return _case(
        LAYER,
        "12 heads of 64",
        N,
        cached,
        {"ours": _our_layer(theirs, prompt, token), **{name: with_implementation(name) for name in ("eager", "sdpa")}},
    )


def _our_layer(theirs: Any, prompt: Tensor, token: Tensor) -> Contender:
    """Our module with the weights of a layer of Llama, behind its prompt."""
    E, H = SIZES["hidden_size"], SIZES["num_attention_heads"]
    rope = fused_mha.RotaryEmbedding(E // H)
    ours = fused_mha.MultiHeadAttention(E, H, bias=False, batch_first=True, rope=rope).eval()
    in_proj = torch.cat([getattr(theirs, f"{name}_proj").weight.detach() for name in "qkv"])
    ours.load_state_dict({"in_proj_weight": in_proj, "out_proj.weight": theirs.o_proj.weight.detach()})
    cached = prompt.shape[1]
    cache = fused_mha.KeyValueCache(ours, prompt.shape[0])
    with torch.inference_mode():
        ours(prompt, prompt, prompt, need_weights=False, is_causal=True, cache=cache)

    def run() -> Tensor:
        with torch.inference_mode():
            output, _ = ours(token, token, token, need_weights=False, is_causal=True, cache=cache)
            cache.truncate(cached)
        return output

    return run


def _model_case(N: int, cached: int) -> BenchCase:
    from transformers import DynamicCache, LlamaForCausalLM  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    tokens = torch.randint(1, 1000, (N, cached + 1), generator=torch.Generator().manual_seed(0))

    def with_implementation(implementation: str, new_cache: Callable[[Any], Any]) -> Contender:
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM._from_config(
            _config(implementation), attn_implementation=implementation
        ).eval()
        cache, name = new_cache(model.config), _cache_name(model.forward)

        def forward(tokens: Tensor) -> Tensor:
            return model(tokens, logits_to_keep=1, **{name: cache}).logits

        with torch.inference_mode():
            forward(tokens[:, :cached])
        return _cropped(lambda: forward(tokens[:, cached:]), cache, cached)

    contenders = {name: with_implementation(name, lambda of: DynamicCache(config=of)) for name in ("eager", "sdpa")}
    contenders |= {
        "ours": with_implementation("fused_mha", integration.cache),
        "ours with transformers' cache": with_implementation("fused_mha", lambda of: DynamicCache(config=of)),
    }
    return _case(MODEL, f"{LAYERS} layers of {SIZES['hidden_size']}", N, cached, contenders)


def _cache_name(forward: Callable[..., Any]) -> str:
    """From transformers 5.20 or so on, and before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _cropped(run: Callable[[], Tensor], cache: Any, length: int) -> Contender:
    """The call, after which each layer of the cache has its former tokens."""

    def cropped() -> Tensor:
        with torch.inference_mode():
            result = run()
            for layer in cache.layers:
                if layer.keys is not None:
                    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return result

    return cropped
