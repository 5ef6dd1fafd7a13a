"""The faults of modules, of conversion, of options and caches, and of the parity kit; `faults` joins them."""

from fault import PACKAGE, Fault

OPTIONS = "tests/module/test_options_inside_torch.py"
CACHE = "tests/module/test_cache.py"
EXPORT = "tests/test_onnx_dynamo.py"
SDPA = "tests/integrations/test_sdpa.py"
CONVERT = "tests/test_convert.py"
ONE_CALL = "tests/test_one_call.py"
SMALL_CALLS = "tests/test_one_call_small.py"

FAULTS = [
    Fault(
        "one call: a small call is taken for one with another dropout",
        PACKAGE + "module/one_call.py",
        "(*flags, *sizes, *is_one, dropout_p, cpu.LIBRARY.isa))",
        "(*flags, *sizes, *is_one, cpu.LIBRARY.isa))",
        SMALL_CALLS,
    ),
    Fault(
        "one call: a small call does not look at padding",
        PACKAGE + "module/one_call.py",
        "or not query.is_cpu or padding is not None or",
        "or not query.is_cpu or",
        SMALL_CALLS,
    ),
    # Flags and hooks through convert and revert.
    Fault(
        "revert loses the training flag",
        PACKAGE + "convert.py",
        "        module.__class__ = TorchAttention\n",
        "        module.__class__ = TorchAttention\n        module.training = True\n",
        CONVERT,
    ),
    Fault(
        "revert loses batch_first",
        PACKAGE + "convert.py",
        "        module.__class__ = TorchAttention\n",
        "        module.__class__ = TorchAttention\n        module.batch_first = False\n",
        CONVERT,
    ),
    Fault(
        "revert loses hooks of users",
        PACKAGE + "convert.py",
        "        module.__class__ = TorchAttention\n",
        "        module.__class__ = TorchAttention\n        module._forward_hooks.clear()\n",
        CONVERT,
    ),
    Fault(
        "convert unfreezes parameters",
        PACKAGE + "convert.py",
        "        module.__class__ = MultiHeadAttention\n",
        "        module.__class__ = MultiHeadAttention\n        module.requires_grad_()\n",
        CONVERT,
    ),
    Fault(
        "revert unfreezes parameters",
        PACKAGE + "convert.py",
        "        module.__class__ = TorchAttention\n",
        "        module.__class__ = TorchAttention\n        module.requires_grad_()\n",
        CONVERT,
    ),
    # Layouts beside options.
    Fault(
        "unbatched weights keep their batch",
        PACKAGE + "module/steps.py",
        "if weights is not None and not is_batched:",
        "if weights is not None and not is_batched and inputs.average_attn_weights:",
        ONE_CALL + "::test_any_call_gives_the_bits_of_the_composition",
    ),
    Fault(
        "hidden keys of a sequence-first batch",
        PACKAGE + "module/steps.py",
        "hidden = hidden.transpose(0, 1)",
        "hidden = hidden.transpose(0, 1) & False",
        "tests/test_deviations_masking.py",
    ),
    Fault(
        "values that learn alone record the weights",
        PACKAGE + "ops/autograd.py",
        "*((weights, lse) if needed <= _OF_VALUES else ())",
        "",
        "tests/test_requires_grad.py",
    ),
    Fault(
        "dropout in evaluation",
        PACKAGE + "module/multi_head_attention.py",
        "dropout_p = self.dropout if self.training else 0.0",
        "dropout_p = self.dropout",
        "tests/test_multi_head_attention.py " + ONE_CALL,
    ),
    Fault(
        "a mask that is changed before the backward",
        PACKAGE + "ops/module_autograd.py",
        "saved[i] = schema.own_mask(inputs[i], inputs[0])",
        "saved[i] = inputs[i]",
        "tests/test_changes_before_backward.py",
    ),
    Fault(
        "a large mask of inference mode is saved as it is",
        PACKAGE + "ops/schema.py",
        "is_small or is_of_inference else mask",
        "is_small else mask",
        "tests/test_changes_before_backward.py",
    ),
    # torch's function on the fused core.
    Fault(
        "sdpa: True in a mask ignores",
        PACKAGE + "integrations/sdpa.py",
        "attn_mask = attn_mask.logical_not()",
        "pass",
        SDPA,
    ),
    Fault(
        "sdpa: a mask of three dimensions is one of heads, also without heads",
        PACKAGE + "integrations/sdpa.py",
        "if dims == attn_mask.dim() == 3:",
        "if False:",
        SDPA,
    ),
    Fault(
        "sdpa: heads are grouped unasked",
        PACKAGE + "integrations/sdpa.py",
        "if not enable_gqa and key.shape[2] != query.shape[2]:",
        "if False:",
        SDPA,
    ),
    Fault(
        "sdpa: what was imported by name is left",
        PACKAGE + "integrations/sdpa.py",
        "                setattr(module, NAME, wanted)",
        "                setattr(torch.nn.functional, NAME, wanted)",
        SDPA,
    ),
    # The parity kit.
    Fault(
        "parity: a nested result is not compared",
        PACKAGE + "testing/parity.py",
        'yield from _named_outputs(item, f"{name}.{key}" if name else str(key))',
        "yield str(key), item if isinstance(item, Tensor) else None",
        "tests/test_parity_model.py",
    ),
    Fault(
        "parity: a model in inference is compared in evaluation",
        PACKAGE + "parity/model.py",
        'with torch.no_grad() if mode == "inference" else contextlib.nullcontext():',
        "with contextlib.nullcontext():",
        "tests/test_parity_model.py",
    ),
    # Options and cache.
    Fault(
        "a gate of queries that are not finite",
        PACKAGE + "module/steps.py",
        "return Projected(q, k, v, query, key_padding_mask)",
        "return Projected(q, k, v, arguments.query, key_padding_mask)",
        OPTIONS,
    ),
    Fault(
        "a rotation by angles of fp32",
        PACKAGE + "module/rotary.py",
        "positions.unsqueeze(-1).to(torch.float64) * frequencies",
        "positions.unsqueeze(-1).to(torch.float32) * frequencies.float()",
        "tests/module/test_rotary.py",
    ),
    Fault(
        "a norm in half precision",
        PACKAGE + "core/heads.py",
        "x = x.float()",
        "pass",
        "tests/module/test_heads.py",
    ),
    Fault(
        "a failed call's tokens are kept",
        PACKAGE + "module/steps.py",
        "    result = finish(module, prepared.inputs, prepared.embedded, prepared.is_batched)\n",
        "    cache and prepared.extended and cache.commit(module, prepared.extended)\n"
        "    result = finish(module, prepared.inputs, prepared.embedded, prepared.is_batched)\n    return result\n",
        CACHE,
    ),
    Fault(
        "a later call writes to what autograd has saved",
        PACKAGE + "module/cache.py",
        "if torch.is_grad_enabled():  # what autograd",
        "if False:  # what autograd",
        CACHE,
    ),
    Fault(
        "padding before the first token is seen",
        PACKAGE + "module/cache.py",
        "hidden = before if self._hidden is None else before | self._hidden.gather(1, source)",
        "hidden = before if self._hidden is None else self._hidden.gather(1, source)",
        CACHE,
    ),
    Fault(
        "a cache keeps the slots that no element needs",
        PACKAGE + "module/cache.py",
        "fewest = _number(torch.maximum(last.min(), behind.min() - self._dropped).clamp(max=stored))",
        "fewest = 0",
        "tests/module/test_cache_changes.py",
    ),
    Fault(
        "a token behind a cache drops no weights in training",
        PACKAGE + "module/decoding.py",
        " or (module.training and module.dropout):",
        ":",
        "tests/module/test_decoding.py",
    ),
    # Exported models, and calls without data.
    Fault(
        "Dynamo does not notice the export to ONNX",
        PACKAGE + "core/modes.py",
        "@constant_for_dynamo  # which takes torch's question for False",
        "# which takes torch's question for False",
        EXPORT,
    ),
    Fault(
        "a row of a mask stands for all queries in ONNX",
        PACKAGE + "backends/sdpa.py",
        "if mask is not None and in_onnx:",
        "if False:",
        EXPORT,
    ),
    Fault(
        "a cache keeps what an export traces",
        PACKAGE + "module/cache.py",
        "if is_exported() or torch.jit.is_tracing():",
        "if False:",
        EXPORT,
    ),
    Fault(
        "an exported causal alignment is tied to its lengths",
        PACKAGE + "core/inputs.py",
        "are_numbers = type(L) is type(S) is int",
        "are_numbers = True",
        EXPORT,
    ),
    Fault(
        "packed sequences have the FLOPs of one in the module's operator",
        PACKAGE + "ops/module.py",
        "return 2 * E * (N * (2 * L * E + S * of_keys) + 2 * scores)",
        "return 2 * E * (N * (2 * L * E + S * of_keys) + 2 * N * L * S)",
        "tests/native/test_module_operators.py",
    ),
    Fault(
        "packed sequences on meta are read",
        PACKAGE + "core/reference.py",
        "bounds = [0, rows] if offsets.is_meta else offsets.tolist()",
        "bounds = offsets.tolist()",
        "tests/test_varlen.py",
    ),
    # The rule itself.
    Fault(
        "a tolerance of one part in a thousand",
        PACKAGE + "testing/tolerances.py",
        "max(FLOOR[dtype] * oracle_magnitude, rounding_error)",
        "max(FLOOR[dtype] * oracle_magnitude, rounding_error, 1e-3 * oracle_magnitude)",
        "tests/test_tolerances.py",
    ),
]
