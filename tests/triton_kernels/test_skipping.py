"""Tiles that masks hide whole are not computed, and nothing else is left out."""

import importlib

import pytest
import torch

from attention_oracle import make_arguments
from triton_kernels.kinds import EVERYTHING, PER_HEAD, matches_oracle

pytest.importorskip("triton")
launcher = pytest.importorskip("fused_mha.backends.triton.launcher")
preparation = pytest.importorskip("fused_mha.backends.triton.preparation")

ALL_VISIBLE = {"hidden": 0.0, "mask_dtype": torch.bool}


def blocks(length, size):
    """Documents of `size` positions, each blind to the others (True = hidden)."""
    document = torch.arange(length) // size
    return document[:, None] != document[None, :]


@pytest.fixture
def searched(monkeypatch):
    """Every mask is searched for tiles to skip, however small the call is and however few heads share the mask."""
    monkeypatch.setattr(preparation, "_pays_to_search", lambda *_: True)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(
    ("dtype", "shape", "other"),
    [
        *((dtype, shape, EVERYTHING) for dtype in (torch.bool, torch.float16) for shape in ("LS", "NHLS")),
        (torch.bool, "HLS", EVERYTHING),
        (torch.float16, "S", EVERYTHING),
        (torch.float16, "NLS", PER_HEAD | {"is_causal": True, "bias_kv": True}),
        (torch.bool, "HLS", {"window": (60, 60), "padding_dtype": torch.bool, "dropout_p": 0.3}),
    ],
)
def test_masks_of_documents(attention, dtype, shape, other):
    sizes = {"N": 2, "L": 70, "S": 100, "H": 2, "H_kv": 1, "D": 16, "D_v": 16}
    arguments = make_arguments(**sizes, mask_dtype=dtype, mask_shape=shape, hidden=0.1, **other)
    mask = arguments["attn_mask"]
    hidden = blocks(100, 32)[: mask.shape[-2]].expand(mask.shape).clone()
    if mask.dim() == 4:
        hidden[-1, -1] = ~hidden[-1, -1]  # not the same of all
    hidden[..., 20:40, :] = True  # some queries see nothing
    arguments["attn_mask"] = hidden | mask if dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))
    matches_oracle(attention, arguments)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(("L", "S"), [(20, 2200), (2200, 20)])
def test_more_tiles_than_are_looked_up_at_once(attention, L, S):
    arguments = make_arguments(N=1, L=L, S=S, H=1, H_kv=1, D=16, **ALL_VISIBLE)
    longer = arguments["attn_mask"] if L > S else arguments["attn_mask"].T
    longer[:100] = longer[1000:1900] = True  # tile 63 is the sign of the bits
    matches_oracle(attention, arguments)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("of", ["query", "key", "value"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_hidden_tiles_are_not_computed(attention, of, need_weights):
    arguments = make_arguments(N=1, L=192, S=192, H=1, H_kv=1, D=16, need_weights=need_weights, **ALL_VISIBLE)
    arguments["attn_mask"] |= blocks(192, 64)
    arguments[of][:, 64:128] = float("nan")
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    results = attention(**arguments)
    seen = torch.arange(192) // 64 != 1
    loss = results.output[:, seen].sum()
    if need_weights:
        loss = loss + results.weights[:, seen].square().sum()
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient[:, seen].isfinite().all()


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(
    ("mask", "plain", "masked", "edge"),
    [
        ({}, 10, 0, 0),
        ({"is_causal": True}, 2, 0, 4),
        ({"window": (0, 0)}, 0, 0, 4),
        ({"key_padding_mask": torch.arange(160)[None] % 64 < 32}, 4, 0, 0),
        ({"key_padding_mask": torch.where(torch.arange(160)[None] < 100, -torch.inf, 0.0)}, 2, 2, 0),
        ({"key_padding_mask": torch.full((1, 160), 0.5)}, 0, 10, 0),
        ({"attn_mask": blocks(160, 64)[:128]}, 4, 0, 0),
        ({"attn_mask": blocks(160, 80)[:128]}, 2, 6, 0),
        ({"attn_mask": blocks(160, 64)[:128], "key_padding_mask": torch.arange(160)[None] < 40}, 2, 1, 0),
        ({"attn_mask": torch.zeros(128, 160), "is_causal": True}, 2, 0, 4),
    ],
    ids=[
        "plain",
        "causal",
        "window",
        "padding with holes",
        "float padding",
        "added padding",
        "documents",
        "documents that end in a tile",
        "padded documents",
        "zeros and causal",
    ],
)
def test_tiles_are_visited_where_a_query_sees_a_key_and_masks_read_where_they_touch_one(
    attention, monkeypatch, mask, plain, masked, edge
):
    forward = importlib.import_module("fused_mha.backends.triton.forward")
    kinds, attend = [], forward._attend

    def visit(*arguments):
        kinds.append(int(arguments[-1]))
        return attend(*arguments)

    monkeypatch.setattr(forward, "_attend", visit)
    attention(**make_arguments(N=1, L=128, S=160, H=1, H_kv=1, D=16), **mask)  # tiles of 64 by 32
    assert [kinds.count(kind) for kind in range(3)] == [plain, masked, edge]


@pytest.mark.parametrize(
    ("call", "is_searched"),
    [
        ({"mask_dtype": torch.bool, "mask_shape": "LS"}, True),
        ({"mask_dtype": torch.bool, "mask_shape": "NHLS"}, False),
        ({"mask_dtype": torch.float32, "mask_shape": "NLS"}, False),
        ({"mask_dtype": torch.float32, "mask_shape": "LS"}, False),
        ({"mask_dtype": torch.float32, "mask_shape": "LS", "N": 8}, True),
        ({"mask_dtype": torch.bool, "mask_shape": "LS", "L": 4}, False),
        ({"mask_dtype": torch.float32, "mask_shape": "4D S"}, True),
    ],
)
def test_a_mask_is_searched_where_many_heads_share_it_in_a_large_call(attention, monkeypatch, call, is_searched):
    monkeypatch.setattr(preparation, "LEAST_SCORES", 1000)
    found = []
    run = launcher.run
    monkeypatch.setattr(launcher, "run", lambda kernel, *rest: (found.append(kernel.fn.__name__), run(kernel, *rest)))
    arguments = make_arguments(**{"N": 2, "L": 17, "S": 20, "H": 4, "H_kv": 2, "D": 16} | call)
    attention(**arguments)
    assert ("mask_squares" in found) is is_searched


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bool, (1, 1, 70, 40)),
        (torch.float32, (2, 1, 1, 40)),
        (torch.bool, (1, 2, 70, 1)),
        (torch.float32, (2, 1, 70, 1)),
        (torch.float32, (1, 1, 1, 1)),
    ],
)
def test_expanded_masks_are_read_where_they_lie(attention, monkeypatch, dtype, shape):
    arguments = make_arguments(N=2, L=70, S=40, H=2, H_kv=2, D=16, mask_dtype=dtype, mask_shape="4D NHLS")
    whole = arguments["attn_mask"][tuple(slice(size) for size in shape)]
    arguments["attn_mask"] = whole.expand(2, 2, 70, 40)
    found = []
    run = launcher.run
    monkeypatch.setattr(launcher, "run", lambda kernel, *rest: (found.append(rest[2].attn_mask), run(kernel, *rest)))
    matches_oracle(attention, arguments)
    assert all(mask.numel() <= whole.numel() * 40 for mask in found)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("shape", ["LS", "HLS", "NLS"])
def test_a_mask_of_the_whole_batch_beside_padding_of_one_element(attention, shape):
    arguments = make_arguments(N=2, L=20, S=70, H=2, H_kv=1, D=16, mask_dtype=torch.float32, mask_shape=shape)
    arguments["key_padding_mask"] = torch.zeros(2, 70, dtype=torch.bool)
    arguments["key_padding_mask"][0, 32:] = True
    matches_oracle(attention, arguments | {"need_weights": True})
