"""The faults of the CUDA core, under Triton's interpreter; `faults` joins them."""

from fault import PACKAGE, Fault

CUDA = PACKAGE + "backends/triton/"
CUDA_MODULE = "tests/triton_kernels/test_module.py"
INTERPRETED = "tests/triton_kernels/test_interpreted.py"

FAULTS = [
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
]
