"""The forward of a module in one call of the C++ library: which calls it serves, and with which results."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import fused_mha
from calls import NAN, WEIGHTS, composed, random_module
from fused_mha.backends import cpu
from fused_mha.testing import Case, assert_parity
from fused_mha.testing.strategies import DTYPES, cases, seeds

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SERVED = {
    "self-attention": {},
    "key is value": {"sharing": "cross"},
    "three inputs": {"sharing": "separate"},
    "sizes of their own": {"sharing": "separate", "kdim": 6, "vdim": 9},
    "one size of their own": {"sharing": "cross", "kdim": 6, "vdim": 6},
    "no bias": {"bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "sharing": "cross"},
    "sequence first": {"batch_first": False, "sharing": "separate"},
    "unbatched": {"batched": False},
    "unbatched, sequence first": {"batched": False, "batch_first": False, "key_padding_mask": "bool"},
    "bool padding": {"key_padding_mask": "bool"},
    "float padding": {"key_padding_mask": "float", "sharing": "cross"},
    "bool mask": {"attn_mask": "bool"},
    "float mask": {"attn_mask": "float"},
    "bool mask per head": {"attn_mask": "bool per head"},
    "float mask per head": {"attn_mask": "float per head", "batched": False},
    "causal": {"attn_mask": "causal bool", "is_causal": True},
    "weights per head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "transposed": {"strides": "transposed"},
    "expanded": {"strides": "expanded", "batch_first": False},
    "one head": {"num_heads": 1},
    "heads of one number": {"num_heads": 16},
    "one query": {"L": 1, "sharing": "cross"},
    "one key": {"S": 1, "sharing": "cross"},
    "no more than a number": {"N": 1, "L": 1, "embed_dim": 1, "num_heads": 1},
}


def results(module, inputs, arguments):
    return [x for x in module(*inputs, **arguments) if x is not None]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.dtype == yours.dtype
        assert mine.stride() == yours.stride()
        assert torch.equal(mine, yours)


@each_dtype
@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
def test_one_call_serves_and_agrees_with_torch(case, dtype, one_calls):
    for training in (True, False):
        ours, theirs, inputs, arguments = Case(dtype=dtype, training=training, **case).build()
        assert_parity(ours, theirs, *inputs, **arguments)
        with torch.no_grad():
            assert_parity(ours, theirs, *inputs, **arguments)
    assert one_calls
    assert all(one_calls)


@settings(suppress_health_check=list(HealthCheck))
@given(case=cases(allow_empty=False), seed=seeds)
def test_any_call_gives_the_bits_of_the_composition(case, seed, one_calls):
    module, _, inputs, arguments = case.build(seed=seed)
    one_calls.clear()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.manual_seed(seed)
            ours = results(module, inputs, arguments)
            with composed():
                torch.manual_seed(seed)
                theirs = results(module, inputs, arguments)
        assert_same(ours, theirs)
    assert one_calls == [True] * 2


@settings(suppress_health_check=list(HealthCheck))
@given(case=cases(allow_empty=False), seed=seeds)
def test_any_call_agrees_with_torch(case, seed, one_calls):
    ours, theirs, inputs, arguments = case.build(seed=seed)
    assert_parity(ours, theirs, *inputs, seed=seed, **arguments)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (1, 2, 4, 5), (3, 2, 1, 5), (1, 1, 4, 5), (3, 2, 4, 5)], ids=str)
def test_masks_that_broadcast_give_the_bits_of_the_composition(kind, shape, one_calls):
    module = random_module()
    hidden = torch.rand(shape) < 0.4
    mask = hidden if kind == torch.bool else torch.randn(shape).masked_fill(hidden, float("-inf")).to(kind)
    query, key = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    arguments = {"attn_mask": mask, "is_causal": True}
    ours = results(module, (query, key, key), arguments)
    with composed():
        assert_same(ours, results(module, (query, key, key), arguments))
    assert one_calls == [True]


@each_dtype
@WEIGHTS
def test_every_mode_gives_the_same_bits(need_weights, average, dtype, one_calls):
    module = random_module(dtype=dtype)
    x = torch.randn(3, 5, 8, dtype=dtype)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False, True] * 2 + [False]])
    arguments = {"key_padding_mask": padding, "need_weights": need_weights, "average_attn_weights": average}
    expected = results(module, (x, x, x), arguments)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for training in (True, False):
            with mode():
                ours = results(module.train(training), (x, x, x), arguments)
            assert_same([y.clone() for y in ours], expected)
    assert all(one_calls)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        lambda x: (x[:, :1], x, x),  # the first token alone asks
        lambda x: (x, x[:, :4], x[:, :4]),
        lambda x: (x[:, :4], x, x),
        lambda x: (x[:, :4], x[:, :4], x[:, :4].clone()),
        lambda x: (x, x.view_as(x), x.view_as(x)),
        lambda x: (x, x[:, :6], x.detach()[:, :6]),
        lambda x: (x[:, ::2], x, x),
        lambda x: (x[:, :5], x[:, ::2], x[:, ::2]),
        lambda x: (x, x[:1].expand_as(x), x[:1].expand_as(x)),
        lambda x: (x.flip(1), x, x.flip(1)),
    ],
    ids=[
        "first",
        "key is a part",
        "query is a part",
        "copy",
        "views",
        "parts",
        "strided",
        "both",
        "expanded",
        "flipped",
    ],
)
def test_inputs_may_begin_at_one_address(parts, batch_first, one_calls):
    module = random_module()
    inputs = parts(torch.randn(3, 9, 8))
    if not batch_first:
        module.batch_first = False
        memo = {}
        inputs = [memo.setdefault(id(x), x.transpose(0, 1)) for x in inputs]
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    theirs.load_state_dict(module.state_dict())
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert_parity(module, theirs, *inputs)
    assert all(one_calls)


# Below and above the rows of one group of batch elements; the work of the last ones wakes other threads.
SIZES = [
    (1, 1, 1),
    (1, 3, 700),
    (2, 32, 20),
    (1, 64, 64),
    (1, 65, 64),
    (40, 50, 50),
    (41, 50, 3),
    (3, 700, 9),
    (600, 1, 2),
]


@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_number_of_threads_gives_the_same_bits(size, dtype, one_calls):
    N, L, S = size
    module = random_module(embed_dim=48, num_heads=3, dtype=dtype, dropout=0.2)
    inputs = [torch.randn(N, length, 48, dtype=dtype) for length in (L, S, S)]
    mask, padding = torch.rand(N, 1, L, S) < 0.3, torch.rand(N, S) < 0.2
    arguments = {"attn_mask": mask, "key_padding_mask": padding}

    def run():
        torch.manual_seed(3)
        ours = results(module, inputs, arguments)
        gradients = torch.autograd.grad([(y / 512).sum() for y in ours], [*module.parameters()])
        with torch.no_grad():
            torch.manual_seed(3)
            assert_same(results(module, inputs, arguments), ours)
        return [*ours, *gradients]

    former = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert_same(run(), alone)
    finally:
        torch.set_num_threads(former)
    assert all(one_calls)


@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_groups_of_the_batch_give_the_bits_of_the_composition(size, dtype, one_calls):
    N, L, S = size
    module = random_module(embed_dim=24, num_heads=3, dtype=dtype, dropout=0.2)
    query, key = (torch.randn(N, length, 24, dtype=dtype) for length in (L, S))
    for inputs in ((query, key, key), (query, query, query)):
        for average in (True, False):
            torch.manual_seed(3)
            ours = module(*inputs, average_attn_weights=average)
            torch.manual_seed(3)
            with composed():
                assert_same(ours, module(*inputs, average_attn_weights=average))
    assert one_calls == [True] * 4


def test_a_batch_element_does_not_depend_on_the_others(one_calls):
    module = random_module(embed_dim=48, num_heads=3)
    x = torch.randn(40, 50, 48)
    with torch.no_grad():
        output, weights = module(x, x, x)
        for n in (0, 9, 10, 39):
            assert_same(module(x[n], x[n], x[n]), (output[n], weights[n]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@WEIGHTS
def test_autocast_gives_the_bits_of_the_composition(need_weights, average, dtype, one_calls):
    module = random_module(add_bias_kv=True)
    x = torch.randn(3, 5, 8)
    arguments = {"need_weights": need_weights, "average_attn_weights": average}
    with torch.autocast("cpu", dtype=dtype):
        ours = results(module, (x, x, x), arguments)
        mixed = results(module, (x.to(dtype), x, x.double().float()), arguments)
    assert one_calls == [True, True]
    assert {y.dtype for y in (*ours, *mixed)} == {dtype}
    half = copy.deepcopy(module).to(dtype)
    assert_same(ours, results(half, [x.to(dtype)] * 3, arguments))
    assert_same(mixed, results(half, [x.to(dtype) for _ in range(3)], arguments))
    ours[0].float().sum().backward()
    assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("rows", [1, 2, 7, 40, 700])
@pytest.mark.parametrize("isa", cpu.LIBRARY.available_isas if cpu.LIBRARY else [])
def test_weights_that_autocast_rounds_as_they_are_read_give_the_bits_of_rounded_ones(rows, isa, one_calls, monkeypatch):
    module = random_module(embed_dim=111, num_heads=3, kdim=37)
    inputs = [torch.randn(1, rows, size) for size in (111, 37, 111)]
    given = []
    call = cpu.multi_head_attention
    monkeypatch.setattr(
        cpu, "multi_head_attention", lambda tensors, numbers: given.append(tensors) or call(tensors, numbers)
    )
    former = cpu.LIBRARY.isa
    cpu.LIBRARY.set_isa(isa)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = results(module, inputs, {})
            with torch.no_grad():
                assert_same(results(module, inputs, {}), ours)
    finally:
        cpu.LIBRARY.set_isa(former)
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    assert not any(x is weight for x in given[0] for weight in weights)  # rounded before, since they get gradients
    assert given[1][4:7] == weights
    assert one_calls == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharing", ["self", "cross", "separate"])
def test_autocast_agrees_with_torch(sharing, dtype, one_calls):
    ours, theirs, inputs, arguments = Case(sharing=sharing, embed_dim=32).build()
    with torch.autocast("cpu", dtype=dtype):
        assert_parity(ours, theirs, *inputs, **arguments)
    assert all(one_calls)


def test_fp64_under_autocast_stays_what_torch_makes_of_it(one_calls):
    ours, theirs, inputs, arguments = Case(dtype=torch.float64).build()
    with torch.autocast("cpu"):
        mine, yours = ours(*inputs, **arguments), theirs(*inputs, **arguments)
    assert [x.dtype for x in mine] == [x.dtype for x in yours]
    assert one_calls == [False]


def change_in_place(module):
    with torch.no_grad():
        module.in_proj_weight.mul_(2.0)


def change_data(module):
    module.out_proj.weight.data += 0.5  # raises no version counter


def replace_data(module):
    module.in_proj_weight.data = torch.randn(24, 8)


def replace_parameter(module):
    module.out_proj.bias = nn.Parameter(torch.randn(8))


def load_other_weights(module):
    module.load_state_dict({name: torch.rand_like(value) for name, value in module.state_dict().items()})


def assign_other_weights(module):
    module.load_state_dict({k: torch.rand_like(v) for k, v in module.state_dict().items()}, assign=True)


def step(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(2, 5, 8)
    module(x, x, x)[0].square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_data, replace_data, replace_parameter, load_other_weights, assign_other_weights, step],
    ids=lambda change: change.__name__,
)
def test_weights_are_read_as_they_are_at_the_call(change, one_calls):
    module, theirs = random_module(), nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    module(x, x, x)
    before = module(x, x, x)[0]
    change(module)
    theirs.load_state_dict(module.state_dict())
    assert not torch.equal(module(x, x, x)[0], before)
    assert_parity(module, theirs, x, x, x)
    assert all(one_calls)


def test_a_number_of_heads_that_is_changed_later_counts(one_calls):
    module, theirs = random_module(), nn.MultiheadAttention(8, 4, batch_first=True)
    theirs.load_state_dict(module.state_dict())
    module.num_heads = 4
    x = torch.randn(2, 5, 8)
    assert_parity(module, theirs, x, x, x)
    assert all(one_calls)


def test_a_row_that_is_masked_everywhere_gives_the_bias_of_out_proj(one_calls):
    module = random_module()
    x = torch.randn(2, 5, 8, requires_grad=True)
    output, weights = module(x, x, x, key_padding_mask=torch.tensor([[True] * 5, [False] * 5]))
    assert torch.equal(output[0], module.out_proj.bias.expand(5, 8))
    assert not weights[0].any()
    (gradient,) = torch.autograd.grad(output.sum() + weights.sum(), x)
    assert bool(gradient.isfinite().all())
    assert one_calls == [True]


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_the_same_for_every_batch_element_of_a_group_and_without(p, one_calls):
    module = random_module(dropout=p)
    x = torch.randn(40, 50, 8)
    draws = []
    for _ in range(2):
        torch.manual_seed(11)
        draws.append(module(x, x, x, average_attn_weights=False)[1])
    assert_same(draws[:1], draws[1:])
    kept = (draws[0] != 0).double().mean()
    assert abs(kept.item() - (1 - p)) < 0.01
    torch.manual_seed(12)
    assert p == 1.0 or not torch.equal(module(x, x, x, average_attn_weights=False)[1], draws[0])
    assert all(one_calls)


def test_nan_in_a_row_that_counts_reaches_its_own_batch_element_alone(one_calls):
    module = random_module()
    x = torch.randn(2, 5, 8)
    clean = module(x, x, x)[0]
    x[0, 3] = NAN
    output = module(x, x, x)[0]
    assert bool(output[0].isnan().all())
    assert torch.equal(output[1], clean[1])
    assert one_calls == [True, True]


def test_explain_names_the_library_for_such_a_call(one_calls):
    module = random_module()
    x = torch.randn(2, 5, 8)
    assert fused_mha.explain(module, x, x, x).chosen == "cpu"
