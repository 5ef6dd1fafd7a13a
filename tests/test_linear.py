"""Which product serves the projections, and that it is torch's linear layer in all but speed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_mha
from fused_mha.backends import cpu
from fused_mha.module import linear

needs_library = pytest.mark.skipif(cpu.LIBRARY is None, reason="this installation has no C++ library")


@pytest.fixture
def ours(monkeypatch):
    """The rule as on a processor where ours serves fp32."""
    if cpu.LIBRARY is None:
        pytest.skip("this installation has no C++ library")
    monkeypatch.setattr(linear, "serves", lambda dtype, *_: dtype in (torch.float32, torch.float16))


def operands(rows=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in ((2, rows // 2, 24), (16, 24), (16,))]


@needs_library
@pytest.mark.parametrize(
    ("isa", "best", "tiles", "dtypes"),
    [
        ("avx512_bf16", "avx512_bf16", (), (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        ("avx512_amx", "avx512_amx", (), (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        ("avx512", "avx512", (), (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        ("avx512", "avx512_bf16", (), (torch.float16, torch.float32, torch.float64)),
        ("avx512_bf16", "avx512", (), (torch.float16, torch.float32, torch.float64)),
        ("avx512", "avx512", (torch.bfloat16,), (torch.float16, torch.float32, torch.float64)),
        ("avx512_bf16", "avx512_amx", (torch.bfloat16, torch.float16), (torch.float16, torch.float32, torch.float64)),
        ("avx2", "avx2", (), (torch.float16, torch.bfloat16)),
        ("avx2", "avx512", (), (torch.float16,)),
        ("neon", "neon", (), (torch.float16,)),
        ("scalar", "scalar", (), (torch.float16,)),
    ],
)
def test_the_rule_goes_by_instruction_set_and_tiles(isa, best, tiles, dtypes, monkeypatch):
    monkeypatch.setattr(cpu.LIBRARY, "isa", isa)
    monkeypatch.setattr(cpu.LIBRARY, "_best_isa", best)
    monkeypatch.setattr(cpu.LIBRARY, "tile_dtypes", tiles)
    assert set(linear.dtypes()) == set(dtypes)


def serves(dtype, rows, features):
    return linear.serves(dtype, features, torch.empty(rows, features, device="meta"))


@needs_library
def test_few_rows_and_tiny_calls_are_ours_in_every_dtype(monkeypatch):
    monkeypatch.setattr(cpu.LIBRARY, "isa", "avx2")
    monkeypatch.setattr(cpu.LIBRARY, "tile_dtypes", (torch.bfloat16,))
    for dtype, most in ((torch.float32, 32), (torch.float64, 32), (torch.bfloat16, 8)):
        assert serves(dtype, 1, 4096)
        assert serves(dtype, most, 4096)
        assert not serves(dtype, most + 1, 4096)
        assert serves(dtype, 128, 128)
        assert not serves(dtype, 256, 128)
    monkeypatch.setattr(cpu.LIBRARY, "isa", "scalar")  # which is for processors that nobody measured
    assert not serves(torch.float32, 1, 8)
    assert serves(torch.float16, 1000, 1000)


@needs_library
def test_a_number_of_rows_becomes_no_part_of_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(cpu.LIBRARY, "isa", "avx2")

    @torch.compile(fullgraph=True, backend="eager")
    def is_ours(x):
        return x + linear.serves(x.dtype, x.shape[1], x)

    assert serves(torch.float32, 1, 8)
    assert not is_ours(torch.zeros(1, 8)).any()


@needs_library
def test_attention_between_long_sequences_is_left_to_the_processors_tiles(monkeypatch):
    monkeypatch.setattr(cpu.LIBRARY, "tile_dtypes", (torch.bfloat16,))

    def chosen(length, dtype=torch.bfloat16, **arguments):
        module = fused_mha.MultiHeadAttention(64, 4, batch_first=True, dtype=dtype)
        x = torch.zeros(1, length, 64, dtype=dtype)
        return fused_mha.explain(module, x, **{"need_weights": False} | arguments)

    assert chosen(64).chosen == "sdpa"
    assert "AMX" in chosen(64).left["cpu"]
    assert chosen(63).chosen == "cpu"
    assert chosen(64, torch.float32).chosen == "cpu"
    assert chosen(64, need_weights=True).chosen == "cpu"
    assert chosen(64, key_padding_mask=torch.zeros(1, 64, dtype=torch.bool)).chosen == "cpu"
    with fused_mha.backend("cpu"):
        assert chosen(64).chosen == "cpu"


@pytest.mark.usefixtures("ours")
def test_our_product_serves_eager_calls():
    x, weight, bias = operands()
    assert linear.is_ours(x, weight, bias)
    assert linear.is_ours(x, nn.Parameter(weight), None)
    assert linear.is_ours(x[:1, :1], weight, bias)
    assert not linear.is_ours(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert not linear.is_ours(x, weight.double(), bias)
    assert not linear.is_ours(x.to("meta"), weight.to("meta"), bias.to("meta"))
    with torch.autocast("cpu"):
        assert not linear.is_ours(x, weight, bias)
    for name in ("sdpa", "reference"):
        with fused_mha.backend(name):
            assert not linear.is_ours(x, weight, bias)
    torch.func.vmap(lambda row: torch.full((), linear.is_ours(row, weight, bias)))(x)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_results_and_gradients_are_torchs(dtype, has_bias):
    x, weight, bias = operands(dtype=dtype)
    bias = bias if has_bias else None
    tensors = [t for t in (x, weight, bias) if t is not None]
    for t in tensors:
        t.requires_grad_()
    results = []
    for layer in (linear.linear, F.linear):
        y = layer(x, weight, bias)
        results.append([y, *torch.autograd.grad(y, tensors, torch.ones_like(y) / 8)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(linear.linear(x, weight, bias), results[0][0])


@pytest.mark.usefixtures("ours")
def test_weights_are_read_as_they_are_at_the_call():
    module = fused_mha.MultiHeadAttention(32, 4, batch_first=True).eval()
    reference = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 40, 32)

    def assert_fresh():
        reference.load_state_dict(module.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(module(x, x, x)[0], reference(x, x, x)[0])

    assert_fresh()
    with torch.no_grad():
        module.in_proj_weight.mul_(2.0)
    assert_fresh()
    module.out_proj.weight.data += 0.5  # raises no version counter
    assert_fresh()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x, x, x)[0].square().mean().backward()
    optimizer.step()
    assert_fresh()
    module.load_state_dict({name: torch.rand_like(value) / 8 for name, value in module.state_dict().items()})
    assert_fresh()


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hooked_out_proj_is_called(hook):
    module = fused_mha.MultiHeadAttention(32, 4, batch_first=True)
    called = []
    getattr(module.out_proj, hook)(lambda *_: called.append(hook))
    x = torch.randn(2, 40, 32, requires_grad=True)
    module(x, x, x)[0].sum().backward()
    assert called


@pytest.mark.usefixtures("ours")
def test_torch_compile_takes_it_without_a_break_and_for_any_number_of_rows():
    module = fused_mha.MultiHeadAttention(32, 4, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 3, 70):
        x = torch.randn(2, rows, 32)
        torch.testing.assert_close(compiled(x, x, x)[0], module(x, x, x)[0])
