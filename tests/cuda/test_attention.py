"""The Triton kernels on a GPU against the fp64 oracle, in every dtype."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings

import fused_mha
from attention_oracle import FILLS, assert_added_numbers_hide, make_arguments
from fused_mha import parity
from native.call_space import calls
from triton_kernels.kinds import CASES, EVERYTHING, matches_oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEVERAL_TILES = {"N": 2, "L": 300, "S": 420, "H": 4, "H_kv": 2, "D": 64, "D_v": 64}
UNEVEN = {"N": 3, "L": 77, "S": 131, "H": 2, "H_kv": 1}
SIZES = {  # each dtype, size and kind of call is compiled: some seconds
    "float32": SEVERAL_TILES | {"dtype": torch.float32},
    "bfloat16": SEVERAL_TILES | {"dtype": torch.bfloat16},
    "odd": UNEVEN | {"D": 40, "D_v": 24, "dtype": torch.bfloat16},
}
HEAVIER = {
    "float16": SEVERAL_TILES | {"dtype": torch.float16},
    "large heads": {"N": 1, "L": 130, "S": 200, "H": 2, "H_kv": 2, "D": 128, "D_v": 128, "dtype": torch.bfloat16},
}
WHOLE = ("averaged weights", "bool mask and padding", "float mask and padding", "window beside virtual keys", "dropout")
WHOLE += ("softcap, causal, padding, dropout", "softcap, sinks, ALiBi")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_kind_of_call(attention, case, sizes):
    matches_oracle(attention, make_arguments(**sizes | case))


@pytest.mark.parametrize("sizes", HEAVIER.values(), ids=HEAVIER)
@pytest.mark.parametrize("case", WHOLE)
def test_most_kinds_of_calls(attention, case, sizes):
    matches_oracle(attention, make_arguments(**sizes | CASES[case]))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("hidden", [66, 70])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_numbers_that_are_added_hide(attention, dtype, name, hidden, fill):
    """A first tile of keys may be hidden by them alone."""
    assert_added_numbers_hide(attention, dtype, fill, hidden, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "D_v"), [(40, 24), (72, 40), (24, 8), (8, 40), (128, 64), (20, 12)])
@pytest.mark.parametrize("virtual", [False, True], ids=["plain", "virtual keys"])
def test_values_of_another_size_than_keys(attention, D, D_v, dtype, virtual):
    others = {"padding_dtype": torch.bool, "bias_kv": True} if virtual else {}
    matches_oracle(attention, make_arguments(**UNEVEN, D=D, D_v=D_v, dtype=dtype, **others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 8, 16, 40, 64, 80, 96, 128, 160, 256])
def test_head_sizes(attention, D, dtype):
    arguments = make_arguments(N=1, L=40, S=137, H=2, H_kv=2, D=D, D_v=D, dtype=dtype, is_causal=True)
    matches_oracle(attention, arguments)


@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 1000), (1000, 1), (128, 128), (129, 127), (3, 513)])
def test_lengths(attention, L, S):
    arguments = make_arguments(N=1, L=L, S=S, H=1, H_kv=1, D=16, bias_kv=True, is_causal=True, **EVERYTHING)
    matches_oracle(attention, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_that_a_mask_hides_are_not_computed(attention, monkeypatch, dtype):
    monkeypatch.setattr("fused_mha.backends.triton.preparation.LEAST_SCORES", 0)
    document = torch.arange(768) // 256
    arguments = make_arguments(N=1, L=768, S=768, H=4, H_kv=2, D=64, D_v=64, dtype=dtype, **EVERYTHING)
    arguments["attn_mask"] = document[:, None] != document[None, :]
    matches_oracle(attention, arguments)
    arguments["value"][:, 512:] = float("nan")
    assert attention(**arguments).output[:, :512].isfinite().all()


@pytest.mark.parametrize("part", range(12))  # of the search, for the workers: each call is compiled
def test_any_call(attention, part):
    @seed(part)
    @settings(max_examples=3, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
    @given(call=calls(dtypes=DTYPES, dropout=(0.0, 0.0, 0.3), smallest=1))
    def search(call):
        sizes = [call.arguments[name].shape[3] for name in ("query", "value")]
        assume(min(sizes) >= 4)  # torch's error in smaller heads, the measure, is luck
        tensors = [x for x in call.arguments.values() if isinstance(x, torch.Tensor)]
        assume(all(x.dtype != torch.float64 for x in tensors))  # no Triton kernel reads it, not even as a mask
        matches_oracle(attention, call.arguments, call.seed)

    search()


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parity_with_torchs_module(dtype, part, capsys, monkeypatch):
    configurations = list(parity.grid())[part::4]
    monkeypatch.setattr(parity, "grid", lambda full: configurations)
    status = parity.main(["--device", "cuda", "--dtype", dtype])
    assert status == 0, capsys.readouterr().out[-3000:]


def test_the_dropout_mask_is_that_of_the_cpu():
    shape, seed = (2, 3, 50, 70), torch.tensor([123456789012345, -987654321])
    masks = [torch.ops.fused_mha.dropout_mask(seed.to(device), shape, 0.3).cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*masks)


def test_more_heads_in_a_batch_than_a_grid_has_rows():
    query, key, value = (torch.randn(8200, 3, 8, 8, device="cuda", requires_grad=True) for _ in range(3))
    output = fused_mha.attention(query, key, value).output  # 65,600 heads
    output.sum().backward()
    expected = torch.softmax(torch.einsum("nlhd,nshd->nhls", query, key) * 8**-0.5, -1) @ value.transpose(1, 2)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert query.grad is not None
    assert query.grad.isfinite().all()
