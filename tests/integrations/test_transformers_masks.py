"""The mask function has the entries of transformers' own masks, and makes a dense one only of what is no band."""

import inspect

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed; the extra `transformers` has it")
masking = pytest.importorskip("transformers.masking_utils", reason="transformers before 4.53 makes masks in each model")

from fused_mha.integrations.lazy_mask import Band, LazyMask  # noqa: E402
from fused_mha.integrations.transformers import attention_forward  # noqa: E402
from fused_mha.integrations.transformers_masks import attention_mask  # noqa: E402

HAS_POSITIONS = "cache_position" in inspect.signature(masking.eager_mask).parameters  # before 5.4
HAS_BIDIRECTIONAL = hasattr(masking, "bidirectional_mask_function")
HAS_BIDIRECTIONAL_WINDOW = hasattr(masking, "sliding_window_bidirectional_mask_function")


def sizes_of(L, S, first=0, kv_offset=0, N=2):
    """The keywords of a mask function for L queries from `first` on and S keys from `kv_offset` on."""
    sizes = {"batch_size": N, "kv_length": S, "kv_offset": kv_offset}
    if HAS_POSITIONS:
        return sizes | {"cache_position": torch.arange(first, first + L)}
    return sizes | {"q_length": L, "q_offset": first, "device": torch.device("cpu")}


def assert_has_the_entries_of_eager(mask, **arguments):
    expected = masking.eager_mask(**arguments)
    assert mask.dtype == expected.dtype == torch.float32
    assert torch.equal(mask.entries(), expected.expand(mask.shape))


def padding(width, *hidden):
    mask = torch.ones(2, width, dtype=torch.bool)
    mask[1, list(hidden)] = False
    return mask


CAUSAL = masking.causal_mask_function
WINDOW = masking.sliding_window_causal_mask_function(3)
BANDS = {
    "causal": (CAUSAL, sizes_of(4, 4), None, (None, 0)),
    "a chunk behind a cache": (CAUSAL, sizes_of(3, 7, first=4), None, (None, 0)),
    "a static cache, prefill": (CAUSAL, sizes_of(4, 9), None, (None, 0)),
    "a static cache, a chunk": (CAUSAL, sizes_of(2, 9, first=4), None, (None, 0)),
    "padding on the left": (CAUSAL, sizes_of(5, 5), padding(5, 0, 1), (None, 0)),
    "padding on the right": (CAUSAL, sizes_of(5, 5), padding(5, 4), (None, 0)),
    "padding shorter than a static cache": (CAUSAL, sizes_of(5, 9), padding(5, 0), (None, 0)),
    "padding shorter than the keys that are seen": (CAUSAL, sizes_of(5, 9), padding(4, 0), (None, 0)),
    "a mask of no padding": (CAUSAL, sizes_of(5, 5), padding(5), (None, 0)),
    "a window": (WINDOW, sizes_of(7, 7), None, (2, 0)),
    "a window that is wider": (masking.sliding_window_causal_mask_function(7), sizes_of(7, 7), None, (None, 0)),
    "a window and padding": (WINDOW, sizes_of(7, 7), padding(7, 0, 1), (2, 0)),
    "a window's cache, full": (WINDOW, sizes_of(2, 4, first=9, kv_offset=7), None, (2, 0)),
    "a window's cache and padding": (WINDOW, sizes_of(2, 4, first=9, kv_offset=7), padding(11, 8), (2, 0)),
    "one query of a window": (WINDOW, sizes_of(1, 6, first=5), None, (2, None)),
    "one query before the future": (CAUSAL, sizes_of(1, 6, first=3), None, (None, None)),
    "windows of two sizes": (
        masking.and_masks(WINDOW, masking.sliding_window_overlay(2), CAUSAL), sizes_of(6, 6), None, (1, 0)
    ),
}  # fmt: skip
if HAS_BIDIRECTIONAL:
    bidirectional = masking.bidirectional_mask_function
    BANDS |= {
        "bidirectional": (bidirectional, sizes_of(4, 6), None, (None, None)),
        "bidirectional and padding": (bidirectional, sizes_of(4, 4), padding(4, 3), (None, None)),
    }
if HAS_BIDIRECTIONAL_WINDOW:
    both_sides = masking.sliding_window_bidirectional_mask_function(2)
    BANDS["a window to both sides"] = (both_sides, sizes_of(6, 6), padding(6, 0), (2, 2))


@pytest.mark.parametrize("name", BANDS)
def test_a_band_is_one_with_or_without_padding_and_caches(name):
    function, sizes, padded, limits = BANDS[name]
    arguments = {"mask_function": function, "attention_mask": padded, **sizes}
    mask = attention_mask(**arguments)
    assert type(mask) is LazyMask
    assert isinstance(mask.hides, Band)
    assert mask.hides.limits == limits
    assert (mask.hides.padding is None) == (padded is None or bool(padded.all()))
    assert_has_the_entries_of_eager(mask, **arguments)


@pytest.mark.parametrize("name", BANDS)
def test_attention_by_a_band_is_attention_by_its_entries(name):
    function, sizes, padded, _ = BANDS[name]
    mask = attention_mask(mask_function=function, attention_mask=padded, **sizes)
    L, S = mask.shape[2:]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator) for n in (L, S, S))
    by_band, by_entries = (
        attention_forward(torch.nn.Module().eval(), query, key, value, given, output_attentions=True)
        for given in (mask, mask.entries() == 0.0)
    )
    torch.testing.assert_close(by_band, by_entries)


PACKED = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
DENSE = {
    "packed sequences": (masking.and_masks(CAUSAL, masking.packed_sequence_mask_function(PACKED)), sizes_of(4, 4)),
    "a union": (masking.or_masks(CAUSAL, lambda n, h, q, k: k < 2), sizes_of(4, 4)),
    "a user's own": (lambda n, h, q, k: (q + k) % 2 == 0, sizes_of(4, 4)),
    "a window that is a tensor": (masking.sliding_window_causal_mask_function(torch.tensor(3)), sizes_of(4, 4)),
    "queries that see keys of no band": (CAUSAL, sizes_of(2, 3, first=9)),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("padded", [None, padding(12, 0)], ids=["whole", "padded"])
def test_anything_else_is_dense(name, padded):
    function, sizes = DENSE[name]
    arguments = {"mask_function": function, "attention_mask": padded, **sizes}
    mask = attention_mask(**arguments)
    assert isinstance(mask.hides, torch.Tensor)
    assert mask.hides.dtype == torch.bool
    assert_has_the_entries_of_eager(mask, **arguments)


@pytest.mark.skipif(not HAS_POSITIONS, reason="this transformers gives an offset, no positions")
def test_positions_that_are_not_consecutive_are_dense():
    arguments = {"mask_function": CAUSAL, **sizes_of(3, 6)} | {"cache_position": torch.tensor([0, 2, 5])}
    mask = attention_mask(**arguments)
    assert isinstance(mask.hides, torch.Tensor)
    assert_has_the_entries_of_eager(mask, **arguments)


def test_a_step_that_sees_all_keys_needs_no_mask():
    assert attention_mask(mask_function=CAUSAL, **sizes_of(1, 6, first=5)) is None
    padded = attention_mask(mask_function=CAUSAL, attention_mask=padding(6, 0), **sizes_of(1, 6, first=5))
    assert padded.hides.padding.tolist() == [[False] * 6, [True] + [False] * 5]


def test_a_step_that_will_be_compiled_gets_an_ordinary_tensor():
    arguments = {"mask_function": CAUSAL, "allow_is_causal_skip": False, **sizes_of(1, 6, first=3)}
    mask = attention_mask(**arguments)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, masking.eager_mask(**arguments))


def test_a_function_of_another_meaning_under_a_known_name_is_dense(monkeypatch):
    from fused_mha.integrations import transformers_masks

    def inclusive(sliding_window):
        return lambda n, h, q, k: k >= q - sliding_window

    with monkeypatch.context() as patch:
        patch.setattr(masking, "sliding_window_overlay", inclusive)
        transformers_masks._known_functions.cache_clear()
        try:
            function = masking.and_masks(inclusive(2), CAUSAL)
            mask = attention_mask(mask_function=function, **sizes_of(5, 5))
        finally:
            transformers_masks._known_functions.cache_clear()
    assert isinstance(mask.hides, torch.Tensor)
    assert_has_the_entries_of_eager(mask, mask_function=function, **sizes_of(5, 5))
