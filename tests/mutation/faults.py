"""The faults of `run.py`: a text that is once in a file, what takes its place, and the tests that should notice."""

from typing import NamedTuple

GENERIC = "src/fused_mha/csrc/generic/"
PACKAGE = "src/fused_mha/"
CHUNKS = "tests/native/test_several_chunks.py"
CORE = "tests/native/test_forward.py tests/native/test_backward.py"
OPTIONS = "tests/module/test_options_inside_torch.py"
CACHE = "tests/module/test_cache.py"
SDPA = "tests/integrations/test_sdpa.py"
CONVERT = "tests/test_convert.py"
PRODUCT = "tests/native/test_product.py::test_products_match_fp64"
ONE_CALL = "tests/test_one_call.py"
CUDA = PACKAGE + "backends/triton/"
CUDA_MODULE = "tests/triton_kernels/test_module.py"
RING = PACKAGE + "parallel/ring.py"
RING_TESTS = "tests/parallel/test_ring.py"
HEADS_TESTS = "tests/parallel/test_tensor.py"
INTERPRETED = "tests/triton_kernels/test_interpreted.py"


class Fault(NamedTuple):
    """One fault; `tests` are arguments of pytest."""

    name: str
    file: str
    text: str
    replacement: str
    tests: str


FAULTS = [
    # Many keys beside every option.
    Fault(
        "delta without dropout's factor",
        GENERIC + "attention_delta.h",
        "reduce_add(total) * (attention.kept_factor() / sum)",
        "reduce_add(total) * (T(1) / sum)",
        CHUNKS,
    ),
    Fault(
        "delta without dropout's mask",
        GENERIC + "attention_delta.h",
        "if (attention.drops()) attention.draw(seed, n, h, first, rows, panel, kept);",
        "",
        CHUNKS,
    ),
    Fault(
        "delta without the padding's values",
        GENERIC + "attention_delta.h",
        "if (attention.masking.adds_padding()) attention.masking.padding_values(n, panels[p].first, padding);",
        "for (T& x : padding) x = 0;",
        CHUNKS,
    ),
    Fault(
        "delta without the gradient of the log-sum-exp",
        GENERIC + "attention_delta.h",
        "deltas[i] = delta.of_output(n, h, i) - delta.of_lse(n, h, i);",
        "deltas[i] = delta.of_output(n, h, i);",
        CHUNKS,
    ),
    Fault(
        "delta of many keys without the output's part",
        GENERIC + "backward_rows.h",
        "(plan.sees_all_keys ? 0 : plan.delta.of_output(n, h, i))",
        "T(0)",
        CHUNKS,
    ),
    Fault(
        "query's gradient of the last chunk alone",
        GENERIC + "attention_backward.h",
        "if (chunk.index == 0) memset(total, 0, size_t(size) * sizeof(T));",
        "memset(total, 0, size_t(size) * sizeof(T));",
        CHUNKS,
    ),
    Fault(
        "gradient of padding in the first chunk alone",
        GENERIC + "attention_backward.h",
        "row[panel + c] = sums[p * COLUMNS + c];",
        "row[panel + c] = chunk.index == 0 ? sums[p * COLUMNS + c] : T(0);",
        CHUNKS,
    ),
    Fault(
        "gradient of a dropped value",
        GENERIC + "backward_rows.h",
        "store(s + i, is_dropped ? Vec<T>{} : x);",
        "store(s + i, is_dropped ? -x : x);",
        CHUNKS,
    ),
    Fault(
        "value's gradient without dropout's factor",
        GENERIC + "backward_keys.h",
        "write_key(is_visible ? value_sums + row : nullptr, j, attention.D_v, attention.kept_factor(),",
        "write_key(is_visible ? value_sums + row : nullptr, j, attention.D_v, T(1),",
        CHUNKS,
    ),
    Fault(
        "mask's gradient in a ragged last panel",
        GENERIC + "attention_backward.h",
        "const int64_t real = min(masking.S - panel.first, COLUMNS);",
        "const int64_t real = min(masking.S - panel.first, COLUMNS) & ~int64_t(1);",
        CHUNKS,
    ),
    Fault(
        "virtual keys hidden by the band",
        GENERIC + "masking.h",
        "if (first + COLUMNS > S && keys > S) return true;",
        "",
        CHUNKS + " " + CORE,
    ),
    # Ragged tails, and rows that are hidden.
    Fault(
        "a maximum that rises rescales the sum alone",
        GENERIC + "online_softmax.h",
        "store(output + v * W, load(output + v * W) * splat(ratio));",
        "store(output + v * W, load(output + v * W));",
        CORE,
    ),
    Fault(
        "lse without the scale",
        GENERIC + "online_softmax.h",
        "tile.row_max[r] * masking.score_factor + std::log(sum)",
        "tile.row_max[r] + std::log(sum)",
        CORE,
    ),
    Fault(
        "bottom right is top left for bool masks",
        GENERIC + "masking.h",
        "uint32_t hidden = ~column_bits(position + a.first_visible, position + a.last_visible, COLUMNS);",
        "uint32_t hidden = ~column_bits(position + a.first_visible, position + !tests_keys * a.last_visible, COLUMNS);",
        CORE + " " + CHUNKS,
    ),
    Fault(
        "padding of the first element for all",
        GENERIC + "masking.h",
        "const int64_t index = n * mask.stride[0] + first * mask.stride[1];",
        "const int64_t index = first * mask.stride[1];",
        CORE,
    ),
    Fault(
        "few keys: what the masks hide",
        GENERIC + "few_keys.h",
        "mark(hidden, r, mask.kind == mask.HIDDEN ? ~uint32_t(0) : mask.hidden[r]);",
        ";",
        CORE,
    ),
    Fault(
        "few keys: dropout of the first row for all",
        GENERIC + "few_keys.h",
        "mark(dropped, r, ~kept[r]);",
        "mark(dropped, r, ~kept[0]);",
        "tests/native/test_dropout.py",
    ),
    Fault(
        "few keys: the values of the first head for all",
        GENERIC + "few_keys.h",
        "if (i == 0 || lane[i].head % attention.group == 0) pack_values",
        "if (i == 0) pack_values",
        CORE,
    ),
    Fault(
        "few keys: the mean of the last head alone",
        GENERIC + "few_keys.h",
        "store(at, load(scores + j * COLUMNS + v * W) * share + load(at));",
        "store(at, load(scores + j * COLUMNS + v * W) * share);",
        CORE,
    ),
    Fault(
        "one query: the last panel of features",
        GENERIC + "single_query.h",
        "sums[i] = sums[i] + load(query_of(i) + c) * load_some<T, Data>(key + c, columns - c);",
        "sums[i] = sums[i] + load(query_of(i) + c) * load_some<T, Data>(key + c, min(columns - c, W - 1));",
        "tests/native/test_single_query.py",
    ),
    Fault(
        "halves are rounded up at a tie",
        "src/fused_mha/csrc/simd/vec.h",
        "+ 0xfff + ((bits >> 13) & 1)) >> 13",
        "+ 0x1000) >> 13",
        "tests/native/test_column_sums.py",
    ),
    Fault(
        "column sums of more than one block of rows",
        GENERIC + "column_sums.h",
        "first += ROWS_OF_SUM) {",
        "first += 2 * ROWS_OF_SUM) {",
        "tests/native/test_column_sums.py",
    ),
    Fault(
        "a product's ragged last panel",
        GENERIC + "product.h",
        "rows[c] = j < of.N ? of.right(j) : nullptr;",
        "rows[c] = j + 1 < of.N || of.N % COLUMNS == 0 ? of.right(min(j, of.N - 1)) : nullptr;",
        PRODUCT,
    ),
    Fault(
        "a product's later chunks along K forget the earlier ones",
        GENERIC + "product.h",
        "COLUMNS, result, block, at > 0};",
        "COLUMNS, result, block, done > 0};",
        PRODUCT,
    ),
    Fault(
        "a product's tiles share one sum of an earlier chunk",
        GENERIC + "product.h",
        "result += keeps_results ? RESULT_SIZE : 0",
        "result += 0",
        PRODUCT,
    ),
    Fault(
        "a product's later blocks along K begin a row early",
        GENERIC + "product.h",
        "for (int64_t r = 0; r < count; ++r) rows[r] = matrix(first + r);",
        "for (int64_t r = 0; r < count; ++r) rows[r] = matrix(first + r - (first > 0));",
        PRODUCT,
    ),
    Fault(
        "a group's masks are those of the first",
        GENERIC + "module.h",
        "a.attn_mask = part(a.attn_mask);",
        "",
        ONE_CALL + "::test_every_number_of_threads_gives_the_same_bits",
    ),
    Fault(
        "a group's padding is that of the first",
        GENERIC + "module.h",
        "a.key_padding_mask = part(a.key_padding_mask);",
        "",
        ONE_CALL + "::test_every_number_of_threads_gives_the_same_bits",
    ),
    # A few rows.
    Fault(
        "few rows: the last term of a ragged K",
        GENERIC + "few_rows.h",
        "Terms<P, Data>::load_some(weights[c] + k, of.K - k)",
        "Terms<P, Data>::load_some(weights[c] + k, of.K - k - 1)",
        PRODUCT,
    ),
    Fault(
        "few rows: dot products without the ragged last block of rows",
        GENERIC + "few_rows.h",
        "const int64_t blocks = rows / R;",
        "const int64_t blocks = max(count / R, 1);",
        PRODUCT,
    ),
    Fault(
        "few rows: sums without the ragged last block of rows",
        GENERIC + "few_rows.h",
        "for (int64_t r = 0; r < rows; r += R) {",
        "for (int64_t r = 0; r < max(count / R, 1) * R; r += R) {",
        PRODUCT,
    ),
    Fault(
        "few rows: the bias of the first task",
        GENERIC + "few_rows.h",
        "load(sums + c) + bias_at<Data>(first + c, columns - c)",
        "load(sums + c) + bias_at<Data>(c, columns - c)",
        PRODUCT,
    ),
    Fault(
        "few rows: outer products without the bias",
        GENERIC + "few_rows.h",
        "const Vec<T> bias = bias_at<Data>(column + v * W, of.N - column - v * W);",
        "const Vec<T> bias{};",
        PRODUCT,
    ),
    Fault(
        "few rows: a row of a block of the outer products is its neighbour",
        GENERIC + "few_rows.h",
        "dy[b] = few.left + min(m + b, end - 1);",
        "dy[b] = few.left + min(m + b - b / 3, end - 1);",
        PRODUCT,
    ),
    Fault(
        "few rows: threads share the sums of one",
        GENERIC + "few_rows.h",
        "Arena arena{workers + uintptr_t(worker * worker_bytes())};",
        "Arena arena{workers};",
        "tests/native/test_product.py::test_threads_change_no_bit_of_products_of_a_few_rows",
    ),
    Fault(
        "few rows: fp32 weights beside bf16 keep their bits",
        GENERIC + "few_rows.h",
        "with_weight<T>(dtype, f);",
        "with_weight<T>(dtype == ROUNDED_TO_BFLOAT16 ? int64_t(FUSED_MHA_FLOAT32) : dtype, f);",
        "tests/native/test_module_operators.py::test_fp32_weights_beside_bf16_are_rounded_as_they_are_read",
    ),
    Fault(
        "few rows beside an AMX processor's tiles are those of others",
        PACKAGE + "module/linear.py",
        "few = _FEW_BESIDE_TILES if dtype in cpu.LIBRARY.tile_dtypes else _FEW_ROWS",
        "few = _FEW_ROWS",
        "tests/test_linear.py",
    ),
    Fault(
        "the number of rows becomes part of a compiled graph",
        PACKAGE + "module/linear.py",
        "cpu.LIBRARY.isa not in _HAS_VECTORS or not is_eager():",
        "cpu.LIBRARY.isa not in _HAS_VECTORS:",
        "tests/test_linear.py",
    ),
    # Groups of a module's batch.
    Fault(
        "a group draws dropout as the first does",
        GENERIC + "module.h",
        "Forward<P>(g.core, groups.begin(index)).run();",
        "Forward<P>(g.core, 0).run();",
        ONE_CALL + "::test_groups_of_the_batch_give_the_bits_of_the_composition",
    ),
    Fault(
        "workers share the memory of one",
        GENERIC + "module.h",
        "const Group g = group(index, of_workers + uintptr_t(worker * of_worker));",
        "const Group g = group(index, of_workers);",
        ONE_CALL + "::test_every_number_of_threads_gives_the_same_bits",
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
        "mask.clone() if mask.dim() <= 2 or is_small or mask.is_inference() else mask",
        "mask.clone() if mask.dim() <= 2 or is_small else mask",
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
    # Modules and kinds of calls on CUDA, and their kernels under Triton's interpreter.
    Fault(
        "cuda: hidden rows stay as they are",
        CUDA + "module.py",
        "if padding is not None and product.is_of_keys:",
        "if padding is not None and product.is_of_keys and False:",
        CUDA_MODULE,
    ),
    Fault(
        "cuda: a backward does not look at what was saved",
        CUDA + "module.py",
        "if saved is None or self._saved is None or saved[:read] != self._saved[:read]:",
        "if False:",
        CUDA_MODULE,
    ),
    Fault(
        "cuda: gradients of the weights alone",
        CUDA + "module.py",
        "grad_heads = torch.zeros_like(heads)",
        "grad_heads = torch.ones_like(heads)",
        CUDA_MODULE,
    ),
    Fault(
        "cuda: results of a module are views",
        CUDA + "module.py",
        "weights = weights.view(self._weights_shape).clone()",
        "weights = weights.view(self._weights_shape)",
        CUDA_MODULE,
    ),
    Fault(
        "cuda: a recent kind at another address",
        PACKAGE + "core/plans.py",
        "and [x.data_ptr() & 15 for x in given] == self._addresses",
        "and self._addresses is not None",
        "tests/triton_kernels/test_plans.py",
    ),
    Fault(
        "cuda: which tensors of a recent kind are one",
        PACKAGE + "core/plans.py",
        "may_learn, *roles, *[x.shape for x in given])",
        "may_learn, *[x.shape for x in given])",
        "tests/triton_kernels/test_plans.py",
    ),
    Fault(
        "cuda: that nothing serves a kind is found out at every call",
        PACKAGE + "module/one_call.py",
        "plans.remember(call.kind, _BY_STEPS if served is None else served)",
        "plans.remember(call.kind, served)",
        CUDA_MODULE + " -k projected_once",
    ),
    Fault(
        "cuda: torch serves what has a window",
        PACKAGE + "backends/delegation.py",
        "lambda inputs: inputs.window is not None,",
        "lambda inputs: False,",
        "tests/triton_kernels/test_delegation.py",
    ),
    Fault(
        "cuda: the values' gradient without dropout's factor",
        CUDA + "backward.py",
        "grad_v *= call.kept_factor",
        "grad_v *= 1.0",
        INTERPRETED + " -k dropout",
    ),
    Fault(
        "cuda: rows that see nothing",
        CUDA + "scores.py",
        'shift = tl.where(row_sum == 0.0, float("inf"), shift * _factor(call, TILE) + tl.log2(row_sum))',
        "shift = shift * _factor(call, TILE) + tl.where(row_sum == 0.0, 0.0, tl.log2(row_sum))",
        INTERPRETED,
    ),
    Fault(
        "cuda: batch elements beside each other",
        CUDA + "tiles.py",
        "return sequence // heads * call.together + element, sequence % heads, rest % blocks",
        "return sequence // heads * call.together, sequence % heads, rest % blocks",
        INTERPRETED + " -k mask",
    ),
    Fault(
        "cuda: softcap is no part of the gradient",
        CUDA + "scores.py",
        "grad = grad * (1.0 - share * share)",
        "grad = grad * 1.0",
        INTERPRETED + " -k softcap",
    ),
    Fault(
        "cuda: softcap of small scores",
        CUDA + "scores.py",
        "above = (above * square + 3.54162887e-3) * square + 1.34195895e-1",
        "above = (above * square + 3.54162887e-3) * square + 1.34196895e-1",
        INTERPRETED + " -k tanh",
    ),
    Fault(
        "cuda: ALiBi counts to virtual keys",
        CUDA + "scores.py",
        "return tl.where(columns < call.S, found, 0.0) if TILE.VIRTUAL and KIND == EDGE else found",
        "return found",
        INTERPRETED + " -k ALiBi",
    ),
    Fault(
        "cuda: ALiBi from the first key",
        CUDA + "preparation.py",
        "S - L if arguments.bottom_right else 0",
        "0",
        INTERPRETED + " -k ALiBi",
    ),
    Fault(
        "cuda: a sink is a score of rows that see nothing",
        CUDA + "forward.py",
        "row_sum = tl.where(is_hidden, 0.0, row_sum * rescaling",
        "row_sum = tl.where(is_hidden, 1.0, row_sum * rescaling",
        INTERPRETED + " -k nan_that_comes_back",
    ),
    Fault(
        "cuda: a sink in other units than the scores",
        CUDA + "scores.py",
        "return logit if TILE.NATURAL else logit / call.scale",
        "return logit",
        INTERPRETED + " -k sinks",
    ),
    Fault(
        "cuda: a sink's gradient where a row sees nothing else",
        CUDA + "backward.py",
        "return tl.where(factor == 0.0, of_hidden, -probabilities * delta)",
        "return tl.where(factor == 0.0, 0.0, -probabilities * delta)",
        INTERPRETED + " -k sinks",
    ),
    Fault(
        "cuda: rows behind the last add to the gradient of slopes",
        CUDA + "backward.py",
        "tl.store(at, tl.sum(tl.where(rows < call.L, values, 0.0), 0))",
        "tl.store(at, tl.sum(values, 0))",
        INTERPRETED + " -k slopes",
    ),
    Fault(
        "cuda: torch's flash kernel serves what has a softcap",
        CUDA + "launch.py",
        "if any(x is not None for x in a[3:TENSORS]) or a.softcap is not None:",
        "if any(x is not None for x in a[3:TENSORS]):",
        INTERPRETED + " -k flash",
    ),
    Fault(
        "cuda: slopes that need no gradient",
        CUDA + "eager.py",
        "slopes_grad=any(of_heads[1:]))",
        "slopes_grad=True)",
        "tests/triton_kernels/test_eager.py -k slopes",
    ),
    Fault(
        "fp32 on cuda: rows that see nothing",
        PACKAGE + "backends/sdpa.py",
        "return result._replace(output=result.output.masked_fill(empty.transpose(1, 2), 0.0))",
        "return result",
        "tests/test_sdpa.py",
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
    # Several processes.
    Fault(
        "ring: a row's sum does not follow its log-sum-exp",
        RING,
        "torch.where(is_taken, stats[1] / of_new, total / of_former)",
        "torch.where(is_taken, stats[1], total)",
        RING_TESTS,
    ),
    Fault(
        "ring: rows that have seen no key are NaN",
        RING,
        "((x - merged).exp_().masked_fill_(is_empty, 0.0) for x in (all_lse, lse))",
        "((x - merged).exp_() for x in (all_lse, lse))",
        RING_TESTS,
    ),
    Fault(
        "ring: sinks are in every part of the keys",
        RING,
        "sinks=sinks if block.keys[0] == 0 else None,",
        "sinks=sinks,",
        RING_TESTS,
    ),
    Fault(
        "ring: the gradients of keys do not come home",
        RING,
        "at_home = [grad.add_(away) for grad, away in zip(at_home, following.received(), strict=True)]",
        "following.received()",
        RING_TESTS,
    ),
    Fault(
        "ring: the chunks' places do not reach dropout",
        RING,
        "schema.placed_seed(seed[:2], block.first_query, block.first_key, *self.heads)",
        "schema.placed_seed(seed[:2], block.first_query, 0, *self.heads)",
        RING_TESTS,
    ),
    Fault(
        "ring: a small block's deltas are its own",
        GENERIC + "backward_plan.h",
        "sees_all_keys(chunks == 1 && !call.grad_lse.data),",
        "sees_all_keys(chunks == 1),",
        RING_TESTS,
    ),
    Fault(
        "context: rope counts from 0 on every rank",
        PACKAGE + "parallel/context.py",
        "positions = positions_of(rank, size, length, query.device)",
        "positions = None",
        "tests/parallel/test_context.py",
    ),
    Fault(
        "heads: a shared norm's gradient is of one rank's heads",
        PACKAGE + "parallel/tensor.py",
        "own[name] = _ToRanks.apply(shard, self.shards.mesh) if dim is None else shard",
        "own[name] = shard",
        HEADS_TESTS,
    ),
    Fault(
        "heads: every rank drops as the first",
        PACKAGE + "parallel/tensor.py",
        "with heads_of_a_longer_call(self.shards.first_head, self.shards.options.num_heads):",
        "with heads_of_a_longer_call(0, self.shards.options.num_heads):",
        HEADS_TESTS,
    ),
    Fault(
        "heads: slopes of the first heads on every rank",
        PACKAGE + "parallel/tensor.py",
        "options.alibi_slopes[first : first + heads]",
        "options.alibi_slopes[:heads]",
        HEADS_TESTS,
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
