"""`assert_parity`: whether two modules compute the same, judged against an fp64 oracle of the second.

Users call it in their own tests; `python -m fused_mha.parity` and the project's tests are built on it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_mha.core.dispatch import backend
from fused_mha.module.multi_head_attention import MultiHeadAttention
from fused_mha.testing.tolerances import FLOOR, rounding_errors, tolerance

_ROLES = ("query", "key", "value")  # what a module's first inputs are called, by position or by keyword


class Comparison(NamedTuple):
    """One quantity of two modules: `error` and `torch_error` are the largest distances from the fp64 oracle.

    Examples:
        >>> print(fused_mha.testing.Comparison("output", 1e-6, 2e-6, 5e-6, (0, 3)))
        output: largest error 1.000e-06 at [0, 3], tolerance 5.000e-06 (torch's own error 2.000e-06)
    """

    quantity: str
    error: float
    torch_error: float
    tolerance: float
    where: tuple[int, ...]  # the index of `error`
    problem: str | None = None  # what can't be expressed as an error: another shape, dtype, missing

    @property
    def agrees(self) -> bool:
        """Whether the error is within the tolerance; an error of NaN is not."""
        return self.problem is None and self.error <= self.tolerance

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.quantity}: {self.problem}"
        return (
            f"{self.quantity}: largest error {self.error:.3e} at {list(self.where)}, tolerance {self.tolerance:.3e} "
            f"(torch's own error {self.torch_error:.3e})"
        )


class _Run(NamedTuple):
    outputs: dict[str, Tensor | None]
    gradients: dict[str, Tensor | None]


def assert_parity(
    ours: nn.Module, theirs: nn.Module, *inputs: Tensor, seed: int = 0, **forward_arguments: Any
) -> list[Comparison]:
    """Assert that two modules have one state_dict and compute the same outputs, weights and gradients.

    Each result of ``ours`` may be twice as far from the oracle, ``theirs`` in fp64 from the same rounded inputs and
    parameters, as the result of ``theirs``, plus what rounding moves in the oracle (`tolerance`). Gradients (of the
    inputs, of the parameters, and of the tensors among ``forward_arguments`` that require one) are compared unless grad
    mode is off; their cotangents are drawn from ``seed``, and so is dropout. Dropout of weights is compared on the
    reference core, which draws as torch does. Neither module is changed.

    Args:
        ours: the module under test.
        theirs: the module to agree with, on the same device and in the same mode (training or evaluation).
        *inputs: positional arguments of both modules, floating tensors.
        seed: of the cotangents and of dropout.
        **forward_arguments: keyword arguments of both modules.

    Returns:
        The comparisons, all of which agree.

    Raises:
        TypeError: there is no tensor among the arguments, or among the results.
        AssertionError: something differs; the text names each quantity, its largest error and where it is, the
            tolerance and the seed.

    Examples:
        >>> theirs = torch.nn.MultiheadAttention(16, 4)
        >>> ours = copy.deepcopy(theirs)
        >>> report = fused_mha.convert(ours)
        >>> x = torch.randn(5, 2, 16)
        >>> comparisons = fused_mha.testing.assert_parity(ours, theirs, x, x, x, need_weights=False)
    """
    comparisons = compare(ours, theirs, *inputs, seed=seed, **forward_arguments)
    different = [str(comparison) for comparison in comparisons if not comparison.agrees]
    if different:
        raise AssertionError(
            f"{len(different)} of {len(comparisons)} quantities differ (seed {seed}):\n  " + "\n  ".join(different)
        )
    return comparisons


def compare(
    ours: nn.Module, theirs: nn.Module, *inputs: Tensor, seed: int = 0, **forward_arguments: Any
) -> list[Comparison]:
    """Like `assert_parity`, but returns what differs too instead of raising.

    Args:
        ours: the module under test.
        theirs: the module to agree with.
        *inputs: positional arguments of both modules.
        seed: of cotangents and dropout.
        **forward_arguments: keyword arguments of both modules.

    Returns:
        Every comparison, those that do not agree among them.

    Examples:
        >>> ours, theirs = fused_mha.MultiHeadAttention(16, 4), torch.nn.MultiheadAttention(16, 4)
        >>> x = torch.randn(5, 2, 16)
        >>> [c.quantity for c in fused_mha.testing.compare(ours, theirs, x, x, x) if not c.agrees][:2]
        ['state_dict', 'output']
    """
    comparisons = [_compare_state_dicts(ours, theirs)]
    if ours.training != theirs.training:
        problem = f"ours.training is {ours.training}, theirs.training is {theirs.training}"
        return [*comparisons, Comparison("mode", 0.0, 0.0, 0.0, (), problem)]
    tensors = [x for x in (*inputs, *forward_arguments.values()) if isinstance(x, Tensor)]
    if not tensors:
        raise TypeError("assert_parity needs the modules' input: no tensor among the arguments")
    given = [x.clone() for x in tensors]
    buffers = {buffer: buffer.clone() for module in (ours, theirs) for buffer in module.buffers()}
    with _core_that_draws_as_torch(ours, theirs):
        try:
            our_run = _run(ours, inputs, forward_arguments, seed)
            if not all(map(_same_bits, tensors, given)):
                problem = "ours changed a tensor that it was given"
                return [*comparisons, Comparison("arguments", 0.0, 0.0, 0.0, (), problem)]
            their_run = _run(theirs, inputs, forward_arguments, seed)
        finally:
            with torch.no_grad():
                for buffer, before in buffers.items():  # such as running statistics, which a forward updates
                    buffer.copy_(before)
        # Under autocast, gradients in fp32 carry the error of the half type in which the output was computed.
        outputs = [tensor for tensor in their_run.outputs.values() if tensor is not None]
        if not outputs:
            raise TypeError("assert_parity compares what the modules return: no tensor among the results")
        dtypes = {tensor.dtype for tensor in outputs}
        dtype = max(dtypes & FLOOR.keys() or {torch.float32}, key=lambda candidate: FLOOR[candidate])
        run_oracle = functools.partial(_run_oracle, theirs, inputs, forward_arguments, seed)
        with torch.autocast(tensors[0].device.type, enabled=False):
            exact = run_oracle()
            rounded = rounding_errors(run_oracle, exact, dtype)
    named_inputs = [*inputs, *(forward_arguments[role] for role in _ROLES if role in forward_arguments)]
    named_inputs = [x for x in named_inputs if isinstance(x, Tensor)]
    rows = max(map(_rows, named_inputs), default=1)
    columns = max((x.shape[-1] for x in (*named_inputs, *theirs.parameters()) if x.dim()), default=1)
    mine, yours = (run.outputs | run.gradients for run in (our_run, their_run))
    for name in {**yours, **mine}:
        our_result, result, expected = mine.get(name), yours.get(name), exact.get(name)
        problem = _mismatch(our_result, result, expected)
        if problem is not None or our_result is None or result is None or expected is None or not expected.numel():
            comparisons.append(Comparison(name, 0.0, 0.0, 0.0, (), problem))
            continue
        distance = _distance(our_result, expected)
        largest = int(distance.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(largest), distance.shape))
        torch_error = float(_distance(result, expected).max())
        bound = tolerance(dtype, torch_error, _magnitude(expected), max(rows, columns, 1), rounded[name])
        comparisons.append(Comparison(name, float(distance.flatten()[largest]), torch_error, bound, where))
    return comparisons


def _rows(x: Tensor) -> int:
    """Over how many rows of an input a gradient is summed; integers are indices, each of a row."""
    return x.numel() // max(x.shape[-1], 1) if x.is_floating_point() and x.dim() else x.numel()


def _core_that_draws_as_torch(*modules: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The reference core where attention weights are dropped: the others draw from a generator of their own."""
    attentions = (part for module in modules for part in module.modules() if isinstance(part, MultiHeadAttention))
    drops = any(part.training and part.dropout > 0.0 for part in attentions)
    return backend("reference") if drops else contextlib.nullcontext()


@contextlib.contextmanager
def _dropout_in_the_order_of_the_indices() -> Iterator[None]:
    """Let torch's dropout of one seed drop the same entries of equal tensors, however they lie in memory.

    Torch draws in the order of memory, and an attention's output may be a transpose in one module and not in the other.
    """
    dropout = functional.dropout

    def ordered(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return dropout(input if inplace else input.contiguous(), p, training, inplace)

    functional.dropout = ordered
    try:
        yield
    finally:
        functional.dropout = dropout


def _compare_state_dicts(ours: nn.Module, theirs: nn.Module) -> Comparison:
    mine, yours = ours.state_dict(), theirs.state_dict()
    problem = None
    if list(mine) != list(yours):
        problem = f"keys {list(mine)}, expected {list(yours)}"
    elif different := [name for name in mine if not _same_bits(mine[name], yours[name])]:
        problem = f"values or dtypes differ in {different}"
    return Comparison("state_dict", 0.0, 0.0, 0.0, (), problem)


def _same_bits(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def _mismatch(ours: Tensor | None, theirs: Tensor | None, oracle: Tensor | None) -> str | None:
    """What keeps two results from being compared by number."""
    mine, yours = (None if x is None else (x.shape, x.dtype) for x in (ours, theirs))
    if mine != yours:
        return f"{_describe(ours)}, expected {_describe(theirs)}"
    if theirs is not None and oracle is not None and bool((oracle.isfinite() != theirs.isfinite()).any()):
        is_theirs = bool((oracle.isfinite() & ~theirs.isfinite()).any())
        here, there = (str(theirs.dtype), "fp64") if is_theirs else ("fp64", str(theirs.dtype))
        return f"nothing to compare with: theirs is not finite in {here} where it is in {there}"
    return None


def _magnitude(tensor: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _distance(result: Tensor, oracle: Tensor) -> Tensor:
    distance = (result.double() - oracle).abs()
    same = (result == oracle) | (result.isnan() & oracle.isnan())  # inf - inf = NaN where both are inf
    return distance.masked_fill(same, 0.0).nan_to_num(nan=float("inf"))


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"shape {tuple(tensor.shape)} {tensor.dtype}"


def _run_oracle(
    module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any], seed: int
) -> dict[str, Tensor | None]:
    """`_run` of a copy in fp64, outputs and gradients; one tensor that is passed twice stays one tensor."""
    memo: dict[int, Tensor] = {}

    def cast(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            return argument
        if id(argument) not in memo:
            memo[id(argument)] = argument.detach().double().requires_grad_(argument.requires_grad)
        return memo[id(argument)]

    cast_arguments = {name: cast(argument) for name, argument in arguments.items()}
    outputs, gradients = _run(copy.deepcopy(module).double(), tuple(cast(x) for x in inputs), cast_arguments, seed)
    return outputs | gradients


def _run(module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any], seed: int) -> _Run:
    """Outputs and gradients by name, from leaves of its own."""
    with_gradients = torch.is_grad_enabled()
    leaves: dict[int, Tensor] = {}
    names: dict[int, str] = {}

    def leaf(name: str, argument: Any, *, differentiate: bool) -> Any:
        if not isinstance(argument, Tensor) or not (differentiate and with_gradients and argument.is_floating_point()):
            return argument
        if id(argument) in leaves:
            names[id(argument)] += f"={name}"
        else:
            leaves[id(argument)], names[id(argument)] = argument.detach().requires_grad_(), name
        return leaves[id(argument)]

    roles = [*_ROLES, *(f"input {i}" for i in range(len(_ROLES), len(inputs)))]
    own_inputs = [leaf(roles[i], x, differentiate=True) for i, x in enumerate(inputs)]
    own_arguments = {
        name: leaf(name, x, differentiate=name in _ROLES or (isinstance(x, Tensor) and x.requires_grad))
        for name, x in arguments.items()
    }
    with torch.random.fork_rng(), _dropout_in_the_order_of_the_indices(), warnings.catch_warnings():
        # Torch's complaint of a bool and a float mask in one call, which ours takes as it is.
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask and attn_mask", UserWarning)
        torch.manual_seed(seed)
        outputs = dict(_named_outputs(module(*own_inputs, **own_arguments)))
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in outputs.items()}
    if not with_gradients:
        return _Run(detached, {})

    wanted = {f"grad of {names[key]}": tensor for key, tensor in leaves.items()}
    for name, p in module.named_parameters():
        if p.requires_grad:
            wanted[f"grad of parameter {name}" if f"grad of {name}" in wanted else f"grad of {name}"] = p
    differentiable = [tensor for tensor in outputs.values() if tensor is not None and tensor.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x.device, x.dtype)
        for x in differentiable  # bfloat16 values are exact in fp32 and fp64, and nearly so in fp16
    ]
    if not (differentiable and wanted):
        return _Run(detached, {})
    gradients = torch.autograd.grad(differentiable, list(wanted.values()), cotangents, allow_unused=True)
    return _Run(detached, dict(zip(wanted, gradients, strict=True)))


def _named_outputs(result: Any, name: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """All tensors of a result, and those that it leaves out, however deep; what is neither is not compared."""
    if result is None or isinstance(result, Tensor):
        yield name or "output", result
    elif dataclasses.is_dataclass(result):
        yield from _named_outputs(
            {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}, name
        )
    elif isinstance(result, Mapping):
        for key, item in result.items():
            yield from _named_outputs(item, f"{name}.{key}" if name else str(key))
    elif isinstance(result, (tuple, list)):
        for i, item in enumerate(result):
            own = f"{name}.{i}" if name else ("output", "weights")[i] if i < 2 else f"output {i}"
            yield from _named_outputs(item, own)
