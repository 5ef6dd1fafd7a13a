"""Ring attention on two and four processes against one process on the whole sequence: results, gradients and errors."""

import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fused_mha
from attention_oracle import checked
from closeness import assert_close_to_oracle, in_fp64
from fused_mha.backends import cpu
from fused_mha.parallel import ring, ring_attention, shard, unshard

N, L, H, H_KV, D, D_V = 2, 64, 2, 1, 8, 6
INFINITY = float("inf")
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool padding": {"key_padding_mask": torch.bool},
    "float padding, causal": {"key_padding_mask": torch.float32, "is_causal": True},
    "nothing visible": {"key_padding_mask": "all", "is_causal": True},
    "sinks, softcap, scale": {"sinks": True, "softcap": 3.0, "scale": 1.5, "is_causal": True},
    "dropout": {"dropout_p": 0.3},
    "dropout, causal, padding, sinks": {
        "dropout_p": 0.3,
        "is_causal": True,
        "key_padding_mask": torch.bool,
        "sinks": True,
    },
}


def arguments(case, dtype):
    """Tensors of the whole sequence, by name, and the other arguments."""
    generator = torch.Generator().manual_seed(2)
    options = dict(CASES[case])
    shapes = {"query": (N, L, H, D), "key": (N, L, H_KV, D), "value": (N, L, H_KV, D_V)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    padding = options.pop("key_padding_mask", None)
    if padding is not None:  # whole parts of ranks too, and all that the first queries see
        hidden = (torch.arange(L) < torch.tensor([[3], [40]])) | (torch.arange(L) >= 60)
        hidden[1] |= padding == "all"
        of_float = torch.randn(N, L, generator=generator).masked_fill(hidden, -INFINITY)
        options["key_padding_mask"] = of_float.to(dtype) if padding == torch.float32 else hidden
    if options.pop("sinks", False):
        tensors["sinks"] = torch.randn(H, generator=generator).to(dtype)
    return tensors, options


def gradients(attend, tensors, options, cotangent):
    """Of one call: output and gradients by name."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    torch.manual_seed(3)
    output = attend(**leaves, **options)
    found = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


def cotangent():
    return torch.randn(N, L, H, D_V, generator=torch.Generator().manual_seed(4))


def whole(tensors, options, **_):
    def attend(query, key, value, **others):
        return fused_mha.attention(query, key, value, **others).output

    return gradients(attend, tensors, options, cotangent())


def by_ring(case, dtype, back_end=None):
    tensors, options = arguments(case, dtype)
    parts = {name: x if name == "sinks" else shard(x) for name, x in tensors.items()}
    if "key_padding_mask" in options:
        options["key_padding_mask"] = shard(options["key_padding_mask"])
    results = gradients(ring_attention, parts, options, shard(cotangent()))
    if "sinks" in results:
        dist.all_reduce(results["sinks"])
    return {name: x if name == "sinks" else unshard(x) for name, x in results.items()}


def assert_equals_one_process(results, case, dtype):
    for name, x in results[0].items():
        assert all(torch.equal(other[name], x) for other in results[1:]), name
    tensors, options = arguments(case, dtype)

    def exact():
        return whole(in_fp64(tensors), in_fp64(options))

    assert_close_to_oracle(results[0], whole(tensors, options), exact, terms=L * H, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_ring_gives_what_one_process_gives(two_ranks, case, dtype):
    assert_equals_one_process(two_ranks.run(by_ring, case, dtype), case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_a_ring_of_four(four_ranks, case):
    assert_equals_one_process(four_ranks.run(by_ring, case, torch.float32), case, torch.float32)


def test_shards_are_the_zigzag_of_the_sequence_and_go_back(four_ranks):
    parts = four_ranks.run(shard_and_unshard)
    assert [part.tolist() for part, _ in parts] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert all(torch.equal(whole, torch.arange(8)) for _, whole in parts)


def shard_and_unshard():
    part = shard(torch.arange(8), dim=0)
    return part, unshard(part, dim=0)


def test_hidden_keys_reach_no_rank(two_ranks):
    for output, grad_query in two_ranks.run(with_nan_in_hidden_keys):
        assert output.isfinite().all()
        assert grad_query.isfinite().all()


def with_nan_in_hidden_keys():
    tensors, options = arguments("bool padding", torch.float32)
    hidden = options["key_padding_mask"]
    for name in ("key", "value"):
        tensors[name][hidden] = float("nan")
    query, key, value = (shard(tensors[name]) for name in ("query", "key", "value"))
    query.requires_grad_()
    output = ring_attention(query, key, value, key_padding_mask=shard(hidden))
    return output.detach(), torch.autograd.grad(output.sum(), query)[0]


def bad_call(what):
    rank, world = dist.get_rank(), dist.get_world_size()
    length, batch, heads, dtype = 32, 2, 2, torch.float32
    options, group, key_length = {}, None, None
    if what == "length of the whole":
        return shard(torch.zeros(2, 30))
    if what == "odd part":
        length = 31
    elif what == "length for dropout":
        length, options = 24, {"dropout_p": 0.5}
    elif what == "batch of one rank":
        batch = 2 + rank
    elif what == "dtype of one rank":
        dtype = torch.float64 if rank else dtype
    elif what == "causality of one rank":
        options = {"is_causal": rank == 0}
    elif what == "heads of one rank":
        heads = 3 if rank == 1 else 2
    elif what == "longer keys":
        key_length = 34
    elif what == "parts to unshard":
        return unshard(torch.zeros(2, 4 + 2 * rank))
    elif what == "mesh of two dimensions":
        group = dist.device_mesh.init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "context"))
    elif what == "no such dimension":
        group = dist.device_mesh.init_device_mesh("cpu", (world,), mesh_dim_names=("data",))["context"]
    elif what == "no group":
        group = "context"
    elif what == "mask with a gradient":
        options = {"key_padding_mask": torch.zeros(batch, length, requires_grad=True)}
    query = torch.zeros(batch, length, heads, 4, dtype=dtype)
    key = torch.zeros(batch, key_length or length, 2, 4, dtype=dtype)
    if what == "no query on one rank" and rank == 0:
        query = None
    return ring_attention(query, key, key, group, **options)


DIFFERS = "ring_attention must be called alike on every rank of the group\n  rank 0: query (2, 32, 2, 4) float32"
ERRORS = {
    "length of the whole": ("ValueError", "a sequence over 2 ranks must have a length that 2 * 2 = 4 divides; got 30"),
    "odd part": ("ValueError", "a rank's part must have an even length, of two chunks; got 31"),
    "length for dropout": ("ValueError", "with dropout, 16 must divide the length of a rank's part; got 24"),
    "batch of one rank": ("RuntimeError", DIFFERS),
    "dtype of one rank": ("RuntimeError", DIFFERS),
    "causality of one rank": ("RuntimeError", DIFFERS),
    "longer keys": ("RuntimeError", "key must have query's length, 32, in a ring; got (2, 34, 2, 4)"),
    "parts to unshard": ("RuntimeError", "unshard must be called alike on every rank of the group\n  rank 0: x (2, 4)"),
    "mesh of two dimensions": (
        "ValueError",
        "group must be a mesh of one dimension; got one of 2, ('data', 'context')",
    ),
    "no such dimension": ("KeyError", "context"),
    "no group": ("TypeError", "group must be a process group, a mesh of one dimension or None; got str"),
    "mask with a gradient": ("ValueError", "key_padding_mask must not need a gradient in a ring"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_every_rank_raises_by_name(two_ranks, what):
    expected, text = ERRORS[what]
    for error in two_ranks.errors(bad_call, what):
        assert error is not None
        assert error[0] == expected
        assert text in error[1]


def test_a_query_that_is_no_tensor_on_one_rank_reaches_the_others(two_ranks):
    first, second = two_ranks.errors(bad_call, "no query on one rank")
    assert first[0] == "AttributeError"
    assert f"rank 0: AttributeError: {first[1]}" in second[1]


@pytest.mark.parametrize(
    ("wrong", "dim", "error", "text"),
    [
        ([1.0], 1, "TypeError", "x must be a Tensor, not list"),
        (torch.zeros(4), 1, "IndexError", "index out of range"),
    ],
    ids=["no tensor", "no such dimension"],
)
def test_what_one_rank_cannot_unshard_reaches_the_others(two_ranks, wrong, dim, error, text):
    first, second = two_ranks.errors(unshard_on_the_first, wrong, dim)
    assert first[0] == error
    assert text in first[1]
    assert second == (
        "RuntimeError",
        f"unshard failed on another rank of the group\n  rank 0: {error}: {first[1]}",
    )


def unshard_on_the_first(wrong, dim):
    return unshard(torch.zeros(2, 4) if dist.get_rank() else wrong, dim=dim)


def test_an_error_of_one_rank_reaches_the_others(two_ranks):
    first, second = two_ranks.errors(bad_call, "heads of one rank")
    own = "query's heads must be a multiple of key's and value's; got H = 3 and H_kv = 2"
    assert second == ("RuntimeError", own)
    assert first == (
        "RuntimeError",
        f"ring_attention failed on another rank of the group\n  rank 1: RuntimeError: {own}",
    )


def second_derivative():
    query = torch.randn(1, 4, 1, 4, requires_grad=True)
    return torch.autograd.grad(ring_attention(query, query, query).sum(), query, create_graph=True)


def test_a_second_derivative_is_refused(two_ranks):
    for error in two_ranks.errors(second_derivative):
        assert error is not None
        assert error[1] == "ring_attention has no second derivative: call backward without create_graph=True"


def test_without_a_group_the_error_says_so():
    x = torch.zeros(1, 4, 1, 4)
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        ring_attention(x, x, x)


def test_without_the_library_the_error_says_so(monkeypatch):
    missing = cpu.BACKEND._replace(capability=cpu.BACKEND.capability._replace(is_installed=False))
    monkeypatch.setattr(cpu, "BACKEND", missing)
    x = torch.zeros(1, 4, 1, 4)
    inputs = checked(query=x, key=x, value=x)
    with pytest.raises(
        RuntimeError, match="needs the back end cpu, which cannot serve: it is not in this installation"
    ):
        ring.checked(inputs)


def by_triton(case, dtype):
    """A ring whose blocks the CUDA kernels serve, under Triton's interpreter."""
    from fused_mha.backends.triton import launch

    with (
        mock.patch.multiple(ring.schema, attention=launch.attention, attention_backward=launch.attention_backward),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, by which the interpreter computes
        return by_ring(case, dtype)


@pytest.mark.parametrize(
    ("case", "dtype"), [("dropout, causal, padding, sinks", torch.float32), ("sinks, softcap, scale", torch.float16)]
)
def test_the_kernels_for_cuda_serve_a_ring(two_ranks, case, dtype):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled, not interpreted")
    assert_equals_one_process(two_ranks.run(by_triton, case, dtype), case, dtype)
