"""What `fused_mha.attention` says of wrong arguments: the types and texts of `inputs.check_attention`."""

import re

import pytest
import torch

import fused_mha

# N = 2, L = 3, S = 5, H = 4, H_kv = 2, D = 6, D_v = 7
QUERY, KEY, VALUE = (torch.zeros(shape) for shape in ((2, 3, 4, 6), (2, 5, 2, 6), (2, 5, 2, 7)))
BIAS_K, BIAS_V = torch.zeros(2, 6), torch.zeros(2, 7)


def error(exception, text, /, **arguments):
    """One row: what is wrong, and the whole text of the error."""
    return pytest.param(arguments, exception, text, id=text[:60])


ROWS = [
    error(RuntimeError, "query must be 4-D, (batch, length, heads, head size); got shape (3, 4, 6)", query=QUERY[0]),
    error(RuntimeError, "key must be 4-D, (batch, length, heads, head size); got shape (5, 2, 6)", key=KEY[0]),
    error(
        RuntimeError,
        "value must be 4-D, (batch, length, heads, head size); got shape (1, 2, 5, 2, 7)",
        value=VALUE[None],
    ),
    error(RuntimeError, "query must be of a floating dtype; got torch.int64", query=QUERY.long()),
    error(RuntimeError, "key must be of a floating dtype; got torch.bool", key=KEY.bool()),
    error(RuntimeError, "value must be of a floating dtype; got torch.complex64", value=VALUE.to(torch.complex64)),
    error(RuntimeError, "key must have query's dtype, torch.float32; got torch.float64", key=KEY.double()),
    error(RuntimeError, "value must have query's dtype, torch.float32; got torch.bfloat16", value=VALUE.bfloat16()),
    error(
        RuntimeError,
        "query must have a head size of at least 1; got shape (2, 3, 4, 0)",
        query=QUERY[..., :0],
        key=KEY[..., :0],
    ),
    error(
        RuntimeError,
        "key must have shape (N, S, H_kv, D) with query's N = 2 and D = 6; got (1, 5, 2, 6), query is (2, 3, 4, 6)",
        key=KEY[:1],
        value=VALUE[:1],
    ),
    error(
        RuntimeError,
        "key must have shape (N, S, H_kv, D) with query's N = 2 and D = 6; got (2, 5, 2, 5), query is (2, 3, 4, 6)",
        key=KEY[..., :5],
    ),
    error(
        RuntimeError,
        "value must have shape (N, S, H_kv, D_v) with key's (N, S, H_kv) = (2, 5, 2); got (2, 4, 2, 7)",
        value=VALUE[:, :4],
    ),
    error(
        RuntimeError,
        "value must have shape (N, S, H_kv, D_v) with key's (N, S, H_kv) = (2, 5, 2); got (2, 5, 1, 7)",
        value=VALUE[:, :, :1],
    ),
    error(
        RuntimeError,
        "query's heads must be a multiple of key's and value's; got H = 3 and H_kv = 2",
        query=QUERY[:, :, :3],
    ),
    error(
        RuntimeError,
        "query's heads must be a multiple of key's and value's; got H = 4 and H_kv = 0",
        key=KEY[:, :, :0],
        value=VALUE[:, :, :0],
    ),
    *(
        error(RuntimeError, f"all tensors must be on query's device, cpu; got {name} on meta", **arguments)
        for name, arguments in {
            "key": {"key": KEY.to("meta")},
            "value": {"value": VALUE.to("meta")},
            "attn_mask": {"attn_mask": torch.zeros(3, 5, device="meta")},
            "key_padding_mask": {"key_padding_mask": torch.zeros(2, 5, device="meta")},
            "bias_k": {"bias_k": BIAS_K.to("meta"), "bias_v": BIAS_V},
            "bias_v": {"bias_k": BIAS_K, "bias_v": BIAS_V.to("meta")},
        }.items()
    ),
    *(
        error(
            RuntimeError,
            f"{name} must be of dtype bool (True = ignore) or floating point (added to the scores); got {dtype}",
            **{name: torch.zeros(shape, dtype=dtype)},
        )
        for name, shape in (("attn_mask", (3, 5)), ("key_padding_mask", (2, 5)))
        for dtype in (torch.int64, torch.uint8, torch.complex64)
    ),
    *(
        error(
            RuntimeError,
            "attn_mask must have shape (L|1, S) or (N|1, H|1, L|1, S) with (N, H, L, S) = (2, 4, 3, 5); "
            f"got {shape}{hint}",
            attn_mask=torch.zeros(shape),
        )
        for shape, hint in (
            ((5,), ""),
            ((3, 1), ""),
            ((3, 4), ""),
            ((5, 3), ". Is it transposed?"),
            ((8, 3, 5), ""),
            ((4, 2, 3, 5), ""),
            ((2, 2, 3, 5), ""),
            ((1, 4, 2, 5), ""),
            ((2, 4, 5, 3), ". Is it transposed?"),
            ((1, 2, 4, 3, 5), ""),
        )
    ),
    *(
        error(
            RuntimeError,
            f"key_padding_mask must have shape (N, S) = (2, 5); got {shape}{hint}",
            key_padding_mask=torch.zeros(shape, dtype=torch.bool),
        )
        for shape, hint in (
            ((5,), ""),
            ((1, 5), ""),
            ((2, 3), ""),
            ((5, 2), ". Is it transposed?"),
            ((2, 1, 1, 5), ""),
        )
    ),
    error(RuntimeError, "bias_k and bias_v must be given together; got bias_k alone", bias_k=BIAS_K),
    error(RuntimeError, "bias_k and bias_v must be given together; got bias_v alone", bias_v=BIAS_V),
    error(
        RuntimeError,
        "bias_k must have shape (2, 6) and dtype torch.float32; got (4, 6) and torch.float32",
        bias_k=torch.zeros(4, 6),
        bias_v=BIAS_V,
    ),
    error(
        RuntimeError,
        "bias_v must have shape (2, 7) and dtype torch.float32; got (2, 6) and torch.float32",
        bias_k=BIAS_K,
        bias_v=BIAS_K,
    ),
    error(
        RuntimeError,
        "bias_v must have shape (2, 7) and dtype torch.float32; got (2, 7) and torch.float16",
        bias_k=BIAS_K,
        bias_v=BIAS_V.half(),
    ),
    error(
        ValueError,
        "causal_alignment must be 'top_left' or 'bottom_right'; got 'lower_right'",
        causal_alignment="lower_right",
    ),
    *(
        error(
            ValueError, f"window must be (left, right), each None or a count of keys >= 0; got {window}", window=window
        )
        for window in ((-1, 0), (0, -2), (None, -1), (1,), (1, 2, 3), (True, 0), (1.0, 0), 3)
    ),
    *(
        error(
            TypeError, f"{name} must be a Tensor, not list: torch.as_tensor makes one of an array", **{name: [[False]]}
        )
        for name in ("attn_mask", "key_padding_mask")
    ),
    *(
        error(ValueError, f"dropout probability has to be between 0 and 1, but got {p}", dropout_p=p)
        for p in (-0.1, 1.5, float("nan"))
    ),
]


@pytest.mark.parametrize(("arguments", "exception", "text"), ROWS)
def test_error_says_what_came_and_what_was_expected(arguments, exception, text):
    with pytest.raises(exception, match=f"^{re.escape(text)}$") as raised:
        fused_mha.attention(**{"query": QUERY, "key": KEY, "value": VALUE} | arguments)
    assert raised.type is exception


def test_the_arguments_of_the_table_are_right_without_the_mistakes():
    output = fused_mha.attention(
        QUERY,
        KEY,
        VALUE,
        attn_mask=torch.zeros(3, 5),
        key_padding_mask=torch.zeros(2, 5),
        bias_k=BIAS_K,
        bias_v=BIAS_V,
        window=(0, 0),
        dropout_p=1.0,
    ).output
    assert output.shape == (2, 3, 4, 7)


@pytest.mark.parametrize("where", ["attn_mask", "is_causal", "dropout_p"])
def test_options_are_keywords_only(where):
    position = ["attn_mask", "key_padding_mask", "is_causal", "causal_alignment", "window", "dropout_p"].index(where)
    with pytest.raises(TypeError, match="takes 3 positional arguments"):
        fused_mha.attention(QUERY, KEY, VALUE, *[None] * (position + 1))
