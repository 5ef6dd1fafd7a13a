"""Run by `test_c_boundary` in a process that a wrong answer may end.

Prints, for calls of which each number is possible but whose products overflow, the least workspace that they need and
the one that the library asks for.
"""

import torch

from native.c_abi import RESULTS, Call

ROWS = (2**31, 2**30)  # N and L: 2^61 rows, all of them in one element by strides of 0
THREADS = 2**62
WIDTH = 2**44


def plain(function: str, dtype: torch.dtype, queries: list[int], keys: list[int], stride: list[int]) -> Call:
    """A call without what it can do without, of these sizes whatever its tensors are."""
    call = Call(function, dtype)
    absent = {"attn_mask", "key_padding_mask", "bias_k", "bias_v", "seed", *RESULTS[function]}
    present = {"output", "grad_output", "grad_query", "grad_key", "grad_value"}
    for name in absent - present:
        call.fields(name).data = None
    for name in ("query", "key", "value", *(present & set(RESULTS[function]))):
        fields = call.fields(name)
        fields.size[:] = keys if name in ("key", "value", "grad_key", "grad_value") else queries
        fields.stride[:], fields.bytes = stride, 2**62
    stats = call.fields("stats")
    stats.size[:], stats.stride[:], stats.bytes = [2, queries[0], 1, queries[1]], [0, 0, 0, 1], 2**62
    call.arguments.attention.dropout_p = call.arguments.attention.add_zero_attn = 0
    return call


def many_rows(function: str) -> Call:
    """A call of 2^61 rows whose every size and stride fits."""
    N, L = ROWS
    return plain(function, torch.float64, [N, L, 1, 1], [N, 1, 1, 1], [0, 0, 0, 0])


def many_threads(function: str) -> Call:
    """More threads than there are."""
    call = Call(function)
    call.arguments.attention.threads = THREADS
    return call


def wide_heads(function: str) -> Call:
    """One head that fits, with a part of the workspace for each of as many threads as there may be."""
    sizes = [1, 1, 1, WIDTH]
    call = plain(function, torch.float32, sizes, sizes, [0, 0, 0, 1])
    call.arguments.attention.threads = 2**16
    return call


if __name__ == "__main__":
    for function in RESULTS:
        of_rows = 0 if function == "forward" else ROWS[0] * ROWS[1] * 8  # the backward keeps a number for each
        for make, least in ((many_rows, of_rows), (many_threads, THREADS), (wide_heads, WIDTH * 4 * 2**16)):
            print(f"{function}-{make.__name__}", least, make(function).workspace(), flush=True)
