"""A model of transformers on the fused core: one call of `register`, and its name as `attn_implementation`.

    pip install ".[transformers]"
    python examples/use_in_transformers.py

A small Llama of random weights reads a prompt and continues it, once on transformers' own `sdpa` and once on
`fused_mha`. Printed are the largest difference of the logits, whether both write the same tokens, and tokens a second,
of reading and of writing. The exit status is 1 if the logits differ by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

from fused_mha.integrations import transformers as integration
from fused_mha.testing import tolerance

SIZES = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}


def load(implementation: str) -> Any:
    """As `from_pretrained(path, attn_implementation=...)`, of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, initializer_range=0.1, eos_token_id=None)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def timed(model: Any, prompt: Tensor, written: int) -> tuple[Tensor, Tensor, float, float]:
    """Logits of the prompt, the tokens that follow, and how many tokens a second were read and written."""
    with torch.inference_mode():
        model(prompt)  # warm up
        start = time.perf_counter()
        logits = model(prompt).logits
        read = time.perf_counter()
        tokens = model.generate(prompt, max_new_tokens=written, do_sample=False, pad_token_id=0)
        end = time.perf_counter()
    reading = prompt.numel() / (read - start)
    return logits, tokens[:, prompt.shape[1] :], reading, written * prompt.shape[0] / (end - read)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS", help="of the prompt (default: 512)")
    parser.add_argument("--write", type=int, default=64, metavar="TOKENS", help="to write (default: 64)")
    options = parser.parse_args(arguments)

    integration.register()  # once in a process
    prompt = torch.randint(1, 1000, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    results = {name: timed(load(name), prompt, options.write) for name in ("sdpa", "fused_mha")}
    for name, (_, _, reading, writing) in results.items():
        print(f"{name:<9}  reads {reading:9.0f} tokens a second, writes {writing:7.1f}")
    (theirs, their_tokens, *_), (ours, our_tokens, *_) = results.values()
    difference = float((ours - theirs).abs().max())
    largest = float(theirs.abs().max())
    allowed = tolerance(torch.float32, 0.0, largest, terms=SIZES["intermediate_size"])
    print(f"largest difference of the logits {difference:.1e}, of {largest:.1f} ({allowed:.1e} is rounding)")
    is_same = torch.equal(our_tokens, their_tokens)
    print("both write the same tokens" if is_same else "they write other tokens from some step on")
    return 0 if difference <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
