"""Tiny configurations of models of transformers, each for something of its attention, and calls of them."""

import sys

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **SPECIAL)
GROUPED = dict(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
ENCODER_DECODER = dict(vocab_size=61, d_model=32, decoder_start_token_id=3, **SPECIAL)
GEMMA = dict(**GROUPED, sliding_window=4, attn_logit_softcapping=1.5, query_pre_attn_scalar=5)
GPT_OSS = dict(**GROUPED, sliding_window=4, num_local_experts=4, num_experts_per_tok=2)
WHISPER = dict(
    **ENCODER_DECODER,
    num_mel_bins=8,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_source_positions=12,
    max_target_positions=32,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
T5 = dict(**ENCODER_DECODER, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8)
MODELS = {  # with what is special in their attention
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", dict(**GROUPED, sliding_window=4)),  # a window
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),  # softcap, a window in every other layer
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),  # Q/K norm
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS),  # sinks, a window in every other layer
    "BERT": ("BertForMaskedLM", "BertConfig", SIZES),  # to both sides
    "ViT": ("ViTForImageClassification", "ViTConfig", dict(**SIZES, image_size=12, patch_size=4)),  # no mask
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),  # from a decoder to an encoder
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),  # a position bias
}
DECODERS = [name for name in MODELS if name not in ("BERT", "ViT")]
NO_DROPOUT = ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "dropout_rate")


def is_served(name: str) -> bool:
    """Whether this version of transformers has the model, and calls its AttentionInterface from it."""
    if not hasattr(transformers, MODELS[name][0]):
        return False
    modeling = sys.modules[getattr(transformers, MODELS[name][0]).__module__]
    return hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


def config_of(name: str, **others: object) -> transformers.PretrainedConfig:
    config = getattr(transformers, MODELS[name][1])(**MODELS[name][2])
    for of_dropout in NO_DROPOUT:
        if hasattr(config, of_dropout):
            setattr(config, of_dropout, 0.0)
    for field, value in others.items():
        setattr(config, field, value)
    return config


def build(name: str, implementation: str, dtype: torch.dtype = torch.float32, **others: object) -> torch.nn.Module:
    """A model of random weights, large enough that attention is far from even; the same for each implementation."""
    model_class = getattr(transformers, MODELS[name][0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class._from_config(config_of(name, **others), attn_implementation=implementation)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if hasattr(model, "set_experts_implementation"):  # the other one has no fp64
        model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def inputs_of(name: str, padding: str | None = None) -> dict[str, Tensor]:
    """Inputs of a model; `padding` of two batch elements' second: None, "left" or "right"."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 61, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.long)
    if padding is not None:
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
        tokens = tokens * mask
    of_mask = {} if padding is None else {"attention_mask": mask}
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    if name == "Whisper":
        of_mask = {f"decoder_{field}": x for field, x in of_mask.items()}
        return {
            "input_features": torch.randn(2, 8, 24, generator=generator),
            "decoder_input_ids": tokens[:, :7],
            **{field: x[:, :7] for field, x in of_mask.items()},
        }
    inputs = {"input_ids": tokens, **of_mask}
    if name == "T5":
        inputs["decoder_input_ids"] = torch.randint(4, 61, (2, 6), generator=generator)
    return inputs


class InDouble(TorchFunctionMode):
    """What models compute in fp32 whatever their dtype, as norms and softmax, in fp64: they are an oracle then."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def visible(inputs: dict[str, Tensor], N: int, L: int) -> Tensor:
    """Which of L positions are no padding, bool (N, L)."""
    for field in ("decoder_attention_mask", "attention_mask"):
        if field in inputs and inputs[field].shape == (N, L):
            return inputs[field].bool()
    return torch.ones(N, L, dtype=torch.bool)


def as_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {field: x.to(dtype) if x.is_floating_point() else x for field, x in inputs.items()}
