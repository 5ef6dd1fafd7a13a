"""`pack` and `unpack`: exact inverses, with gradients, and what they refuse."""

import pytest
import torch

import fused_mha

RIGHT = torch.arange(6) >= torch.tensor([[6], [2], [0], [4]])
LEFT = RIGHT.flip(1)
MIXED = torch.tensor([[True, False, True, False, False, True]]).expand(4, 6)
paddings = pytest.mark.parametrize("padding", [RIGHT, LEFT, MIXED, ~RIGHT[:0]], ids=["right", "left", "mixed", "none"])


@paddings
def test_unpack_is_the_inverse_with_zeros_for_padding(padding):
    x = torch.randn(*padding.shape, 3, 2)
    rows, offsets = fused_mha.pack(x, padding)
    assert torch.equal(rows, x[~padding])
    assert offsets.tolist() == [0, *(~padding).sum(1).cumsum(0).tolist()]
    assert torch.equal(fused_mha.unpack(rows, padding), x.masked_fill(padding[:, :, None, None], 0.0))
    assert torch.equal(fused_mha.pack(fused_mha.unpack(rows, padding), padding)[0], rows)


@paddings
def test_gradients_are_those_of_the_rows(padding):
    x = torch.randn(*padding.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fused_mha.pack(x, padding)[0], (x,))
    rows = torch.randn(int((~padding).sum()), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: fused_mha.unpack(rows, padding), (rows,))


def test_packed_rows_attend_as_the_padded_batch():
    query, key, value = (torch.randn(4, 6, 2, 8) for _ in range(3))
    (q, offsets), (k, _), (v, _) = (fused_mha.pack(x, LEFT) for x in (query, key, value))
    output = fused_mha.unpack(fused_mha.varlen_attention(q, k, v, offsets, offsets).output, LEFT)
    expected = fused_mha.attention(query, key, value, key_padding_mask=LEFT).output
    torch.testing.assert_close(output, expected.masked_fill(LEFT[:, :, None, None], 0.0))


@pytest.mark.parametrize(
    ("x", "padding", "error", "text"),
    [
        (torch.randn(4, 6, 1), RIGHT.float(), RuntimeError, "key_padding_mask must be 2-D.* bool"),
        (torch.randn(4, 6, 1), RIGHT[0], RuntimeError, "key_padding_mask must be 2-D"),
        (torch.randn(4, 5, 1), RIGHT, RuntimeError, r"\(N, L\) = \(4, 5\); got \(4, 6\)"),
        (torch.randn(4), RIGHT, RuntimeError, "x must have at least 2 dimensions"),
        (torch.randn(4, 6, 1), RIGHT.to("meta"), RuntimeError, "key_padding_mask must be on cpu; got meta"),
        (torch.randn(4, 6, 1), [[True]], TypeError, "key_padding_mask must be a Tensor, not list"),
        ([1.0], RIGHT, TypeError, "x must be a Tensor, not list"),
    ],
)
def test_pack_refuses_by_name(x, padding, error, text):
    with pytest.raises(error, match=text):
        fused_mha.pack(x, padding)


def test_unpack_refuses_another_number_of_rows():
    with pytest.raises(
        RuntimeError, match=r"rows must have as many rows as key_padding_mask has False, 12; got shape \(5, 2\)"
    ):
        fused_mha.unpack(torch.randn(5, 2), RIGHT)


def test_unpack_refuses_what_has_no_rows():
    with pytest.raises(RuntimeError, match=r"rows must have at least 1 dimension, \(T, ...\); got shape \(\)"):
        fused_mha.unpack(torch.tensor(1.0), RIGHT)
    with pytest.raises(TypeError, match="rows must be a Tensor, not list"):
        fused_mha.unpack([1.0], RIGHT)


def test_on_meta_unpack_gives_shapes_and_pack_asks_for_values():
    rows, padding = torch.randn(12, 3, device="meta", requires_grad=True), RIGHT.to("meta")
    padded = fused_mha.unpack(rows, padding)
    assert (padded.device.type, padded.shape) == ("meta", (4, 6, 3))
    padded.sum().backward()
    assert rows.grad.shape == rows.shape
    with pytest.raises(
        RuntimeError, match="key_padding_mask must have values, which say how many rows there are; got a"
    ):
        fused_mha.pack(padded, padding)
