"""`LazyMask` is, for whatever a model does with it, the mask of `eager`, and says what it hides while that is true."""

import pytest
import torch

from fused_mha.integrations.lazy_mask import Band, LazyMask

CPU = torch.device("cpu")
LOWEST = torch.finfo(torch.float32).min


def mask_of(band, L=3, S=5, N=2):
    return LazyMask((N, 1, L, S), band, torch.float32, CPU)


def attends(mask):
    return mask.entries().eq(0).int().tolist()


CAUSAL = Band((None, 0), 4, None)


def test_a_causal_band_before_keys_of_the_future():
    assert attends(mask_of(CAUSAL)) == [[[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]] * 2
    assert mask_of(CAUSAL).entries().min() == LOWEST


def test_a_window_with_padding():
    padding = torch.tensor([[False, False, True, False], [True, True, True, True]])
    first = [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert attends(mask_of(Band((1, 0), 4, padding))) == [[first], [[[0] * 5] * 3]]


@pytest.mark.parametrize(
    ("limits", "L", "effective"),
    [
        ((None, 0), 3, (None, 0)),
        ((None, 0), 1, (None, None)),  # the last of the visible keys sees them all
        ((3, 0), 3, (None, 0)),
        ((2, 0), 3, (2, 0)),
        ((2, 0), 1, (2, None)),
        ((3, 2), 3, (None, None)),
        ((3, 1), 3, (None, 1)),
        ((0, 0), 2, (0, 0)),
    ],
)
def test_limits_that_hide_nothing_are_left_out(limits, L, effective):
    band = Band(limits, 4, None)
    assert band.effective(L).limits == effective
    assert torch.equal(band.hidden(L, 5, CPU), band.effective(L).hidden(L, 5, CPU))


def test_it_has_the_properties_of_a_tensor_without_entries():
    mask = mask_of(CAUSAL)
    assert (mask.shape, mask.dtype, mask.ndim, mask.device) == ((2, 1, 3, 5), torch.float32, 4, CPU)
    assert mask.to(CPU) is mask
    assert "visible=4" in repr(mask)
    assert mask._entries is None


@pytest.mark.parametrize(
    "operation",
    [
        lambda mask: mask + torch.arange(5),
        lambda mask: torch.where(mask == 0, 1.0, 2.0),
        lambda mask: torch.cat([mask, mask[:, :, :, :1]], dim=-1),
        lambda mask: mask.to(torch.float64),
        lambda mask: mask[:, :, -2:, :4].repeat(1, 4, 1, 1),
        lambda mask: mask.detach().clone(),
        lambda mask: torch.nn.functional.pad(mask, (0, 2)),
    ],
)
def test_an_operation_gives_what_it_gives_for_the_entries(operation):
    result = operation(mask_of(CAUSAL))
    assert type(result) is torch.Tensor
    assert torch.equal(result, operation(mask_of(CAUSAL).entries()))


def test_reading_leaves_it_what_it_is():
    mask = mask_of(CAUSAL)
    _ = mask + 1, mask == 0, mask.sum()
    assert mask.hides is CAUSAL


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask.masked_fill_(torch.ones(3, 5, dtype=torch.bool), 7.0),
        lambda mask: mask[..., :].fill_(7.0),
        lambda mask: mask.__setitem__(..., 7.0),
        lambda mask: mask.transpose(2, 3).fill_(7.0),
    ],
)
def test_what_is_written_into_it_counts(change):
    mask = mask_of(CAUSAL)
    change(mask)
    assert mask.hides is None
    assert (mask.entries() == 7.0).all()
    assert (mask + 0 == 7.0).all()


def test_a_dense_one_has_a_bool_tensor_of_what_it_hides():
    hidden = torch.tensor([[True, False], [False, True]]).expand(1, 1, 2, 2)
    mask = LazyMask((1, 1, 2, 2), hidden, torch.bfloat16, CPU)
    assert mask.hides is hidden
    lowest = torch.finfo(torch.bfloat16).min
    assert torch.equal(mask * 1, torch.tensor([[[[lowest, 0.0], [0.0, lowest]]]], dtype=torch.bfloat16))
