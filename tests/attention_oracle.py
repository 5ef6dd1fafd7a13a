"""A naive fp64 attention with an explicit rule of visibility, and the comparison of `fused_mha.attention` with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fused_mha
from closeness import assert_close_to_oracle
from fused_mha.core import dispatch
from fused_mha.core.inputs import AttentionResult, check_attention

BACKENDS = [
    candidate.name for candidate in dispatch.BACKENDS if "cpu" in (candidate.capability.devices or ("cpu",))
]  # that run here
SERVE_EVERYTHING = ["cpu", "reference"]  # weights, log-sum-exp, dropout on the CPU, empty tensors
DEFAULTS = {
    "attn_mask": None,
    "key_padding_mask": None,
    "is_causal": False,
    "causal_alignment": "top_left",
    "window": None,
    "bias_k": None,
    "bias_v": None,
    "sinks": None,
    "alibi_slopes": None,
    "add_zero_attn": False,
    "dropout_p": 0.0,
    "scale": None,
    "softcap": None,
    "need_weights": False,
    "average_attn_weights": True,
    "return_lse": False,
    "weights_of_heads": None,
}


def returned_weights(a, weights):
    """What a call returns of its weights (N, H, L, S')."""
    if a["weights_of_heads"] is not None:
        return torch.stack([weights[:, h] for h in a["weights_of_heads"]], dim=1)
    if not a["need_weights"]:
        return None
    return weights.mean(1) if a["average_attn_weights"] else weights


def is_visible(i, j, L, S, is_causal=False, causal_alignment="top_left", window=None):
    """Whether query i sees the real key j, by causality and window alone."""
    position = i + (S - L if causal_alignment == "bottom_right" else 0)
    left, right = window or (None, None)
    if is_causal and j > position:
        return False
    if left is not None and j < position - left:
        return False
    return right is None or j <= position + right


def _masks_of_row(a, n, h, i):
    """Row (n, h, i) of attn_mask and row n of key_padding_mask."""
    rows = []
    if a["attn_mask"] is not None:
        mask = a["attn_mask"] if a["attn_mask"].dim() == 4 else a["attn_mask"][None, None]
        rows.append(mask[tuple(index if size > 1 else 0 for index, size in zip((n, h, i), mask.shape, strict=False))])
    if a["key_padding_mask"] is not None:
        rows.append(a["key_padding_mask"][n])
    return rows


def _hides(row, j):
    return bool(row[j]) if row.dtype == torch.bool else row[j].item() == float("-inf")


def _visible_keys(a, n, h, i):
    L, S = a["query"].shape[1], a["key"].shape[1]
    rows = _masks_of_row(a, n, h, i)
    return [
        j
        for j in range(S)
        if is_visible(i, j, L, S, a["is_causal"], a["causal_alignment"], a["window"])
        and not any(_hides(row, j) for row in rows)
    ]


def naive_attention(keep=None, **arguments):
    """`fused_mha.attention` by loops over n, h and i; `keep` (N, H, L, S') is dropout's mask, True = keep."""
    a = DEFAULTS | arguments
    query, key, value = a["query"], a["key"], a["value"]
    N, L, H, D = query.shape
    S, H_kv, D_v = key.shape[1], key.shape[2], value.shape[3]
    scale = D**-0.5 if a["scale"] is None else a["scale"]
    width = S + (a["bias_k"] is not None) + a["add_zero_attn"]
    outputs, weights, lses = [], [], []
    for n in range(N):
        for h in range(H):
            g = h * H_kv // H
            for i in range(L):
                visible = _visible_keys(a, n, h, i)
                keys, values = [key[n, visible, g]], [value[n, visible, g]]
                additive = torch.zeros(len(visible), dtype=query.dtype)
                for row in _masks_of_row(a, n, h, i):
                    if row.dtype != torch.bool:
                        additive = additive + row[visible].to(query.dtype)
                if a["bias_k"] is not None:
                    keys.append(a["bias_k"][g][None])
                    values.append(a["bias_v"][g][None])
                if a["add_zero_attn"]:
                    keys.append(key.new_zeros(1, D))
                    values.append(key.new_zeros(1, D_v))
                keys, values = torch.cat(keys), torch.cat(values)
                scores = keys @ query[n, i, h] * scale
                if a["softcap"] is not None:
                    scores = a["softcap"] * torch.tanh(scores / a["softcap"])
                if a["alibi_slopes"] is not None:
                    position = i + (S - L if a["causal_alignment"] == "bottom_right" else 0)
                    distances = torch.tensor([abs(position - j) for j in visible], dtype=query.dtype)
                    additive = additive - a["alibi_slopes"][h] * distances
                scores = scores + F.pad(additive, (0, width - S))
                if a["sinks"] is not None:
                    scores = torch.cat([scores, a["sinks"][h].to(query.dtype)[None]])
                p = torch.softmax(scores, dim=0)[: keys.shape[0]]
                columns = torch.tensor([*visible, *range(S, width)], dtype=torch.long)
                if keep is not None:
                    p = p * keep[n, h, i, columns] / (1.0 - a["dropout_p"])
                outputs.append(p @ values)
                weights.append(torch.zeros(width, dtype=query.dtype).scatter(0, columns, p))
                lses.append(torch.logsumexp(scores, dim=0))

    def stack(rows, *shape):
        return torch.stack(rows).reshape(N, H, L, *shape) if rows else query.new_zeros(N, H, L, *shape)

    all_weights = stack(weights, width)
    return AttentionResult(
        stack(outputs, D_v).transpose(1, 2),
        returned_weights(a, all_weights),
        stack(lses) if a["return_lse"] else None,
    )


def torch_attention(**arguments):
    """The same by torch's own op, or by its formula where weights or the log-sum-exp are asked for."""
    a = DEFAULTS | arguments
    query, key, value = a["query"], a["key"], a["value"]
    N, L, H, D = query.shape
    S, H_kv = key.shape[1:3]

    def extend(keys, bias):
        parts = [keys] if bias is None else [keys, bias.expand(N, 1, -1, -1)]
        if a["add_zero_attn"]:
            parts.append(keys.new_zeros(N, 1, H_kv, keys.shape[3]))
        return torch.cat(parts, dim=1).repeat_interleave(H // H_kv, dim=2)

    key, value = extend(key, a["bias_k"]), extend(value, a["bias_v"])
    hidden = torch.ones(N, H, L, key.shape[1], dtype=torch.bool)
    hidden[..., S:] = False
    for n in range(N):
        for h in range(H):
            for i in range(L):
                hidden[n, h, i, _visible_keys(a, n, h, i)] = False
    bias = torch.zeros(N, H, L, S, dtype=query.dtype)
    for mask in (a["attn_mask"], None if a["key_padding_mask"] is None else a["key_padding_mask"][:, None, None]):
        if mask is not None and mask.dtype != torch.bool:
            bias = bias + mask.masked_fill(mask == float("-inf"), 0.0).to(query.dtype)
    bias = F.pad(bias, (0, key.shape[1] - S)).masked_fill(hidden, float("-inf"))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    slopes, softcap, sinks = a["alibi_slopes"], a["softcap"], a["sinks"]
    if slopes is not None:
        position = torch.arange(L)[:, None] + (S - L if a["causal_alignment"] == "bottom_right" else 0)
        distances = F.pad((position - torch.arange(S)).abs(), (0, key.shape[1] - S))
        bias = bias - slopes.to(query.dtype)[:, None, None] * distances
    wants_more = a["need_weights"] or a["weights_of_heads"] or a["return_lse"]
    if not (wants_more or softcap or sinks is not None):
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=a["scale"])
        return AttentionResult(output.transpose(1, 2), None, None)
    empty = hidden.all(dim=-1, keepdim=True)
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if a["scale"] is None else a["scale"])
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    scores = scores + bias.masked_fill(empty, 0.0)
    of_empty = torch.tensor(float("-inf"))
    if sinks is not None:
        of_empty = sinks.to(query.dtype)[:, None, None].expand(N, H, L, 1)
        scores = torch.cat((scores, of_empty), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[1]].masked_fill(empty, 0.0)
    lse = torch.where(empty, of_empty, torch.logsumexp(scores, dim=-1, keepdim=True))[..., 0]
    return AttentionResult(
        (weights @ v).transpose(1, 2),
        returned_weights(a, weights),
        lse if a["return_lse"] else None,
    )


def make_arguments(
    *,
    N=2,
    L=3,
    S=4,
    H=4,
    H_kv=2,
    D=3,
    D_v=5,
    dtype=torch.float32,
    mask_dtype=None,
    mask_shape="LS",
    padding_dtype=None,
    bias_kv=False,
    of_heads=(),
    hidden=0.3,
    seed=0,
    **others,
):
    """Random arguments of `attention`; `mask_shape` names the dimensions that are not 1, such as "NLS", `of_heads` what
    is drawn of "sinks" and "alibi_slopes".
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def mask(shape, kind):
        hides = torch.rand(shape, generator=generator) < hidden
        if kind == torch.bool:
            return hides
        return torch.randn(shape, generator=generator).masked_fill(hides, float("-inf")).to(kind)

    arguments = {"query": draw(N, L, H, D), "key": draw(N, S, H_kv, D), "value": draw(N, S, H_kv, D_v), **others}
    if bias_kv:
        arguments |= {"bias_k": draw(H_kv, D), "bias_v": draw(H_kv, D_v)}
    if mask_dtype is not None:
        if mask_shape in ("LS", "S"):
            shape = (L if mask_shape == "LS" else 1, S)
        else:
            names = mask_shape.removeprefix("4D ")
            shape = tuple(size if name in names else 1 for name, size in zip("NHLS", (N, H, L, S), strict=True))
        arguments["attn_mask"] = mask(shape, mask_dtype)
    if padding_dtype is not None:
        arguments["key_padding_mask"] = mask((N, S), padding_dtype)
    for name in of_heads:
        arguments[name] = draw(H) * (1.0 if name == "sinks" else 0.3)
    return arguments


def run_with_gradients(function, arguments, dtype=None, through=("output", "weights", "lse")):
    """Results and gradients by name, the latter through some of the results, from fresh leaves in a dtype if given."""

    def leaf(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return (x if dtype is None else x.to(dtype)).detach().requires_grad_()

    own = {name: leaf(x) for name, x in arguments.items()}
    results = {name: x for name, x in function(**own)._asdict().items() if x is not None}
    leaves = {name: x for name, x in own.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    generator = torch.Generator().manual_seed(7)
    outputs, cotangents = [], []
    for name, x in results.items():
        cotangent = torch.randn(x.shape, generator=generator).to(
            torch.bfloat16
        )  # exact in every dtype but fp16's range
        if name in through and x.requires_grad:
            outputs.append(x)
            cotangents.append(cotangent.to(torch.float16).to(x.dtype))
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    for (name, x), gradient in zip(leaves.items(), found, strict=True):
        results[f"grad of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return {name: x.detach() for name, x in results.items()}


def checked(**arguments):
    """The inputs of a call of `attention`."""
    return check_attention(**arguments)


def explain_attention(**arguments):
    """The choice of a back end for a call of `attention`."""
    return dispatch.explain_inputs(checked(**arguments))


def can_serve(backend, arguments):
    return not explain_attention(**arguments).reasons[backend]


def longest_sums(arguments, names):
    """How many terms the longest sum has that leads to each result."""
    (N, L, H, D), (S, H_kv, D_v) = arguments["query"].shape, arguments["value"].shape[1:]
    found = {}
    for name in names:
        found[name] = max(D, D_v, S + 2, L * H // H_kv)
        of = name.removeprefix("grad of ")
        if of != name and of not in ("query", "key", "value"):  # which sum over what they broadcast over
            entries = H_kv if "bias" in of else arguments[of].numel()
            found[name] = max(found[name], N * H * L * S // max(entries, 1))
    return found


def assert_matches_oracle(arguments, backend):
    """Compare outputs, weights, log-sum-exp and every gradient on one back end with the oracle, by the one rule."""
    with fused_mha.backend(backend):
        ours = run_with_gradients(fused_mha.attention, arguments)
    dtype = arguments["query"].dtype
    theirs = run_with_gradients(torch_attention, arguments)
    if dtype in (torch.float16, torch.bfloat16) and "lse" in ours:  # the log-sum-exp is fp32
        theirs["lse"] = run_with_gradients(torch_attention, arguments, torch.float32)["lse"]
    for name, result in ours.items():
        if name == "lse":
            assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        elif not name.startswith("grad"):
            assert result.dtype == dtype
    assert_close_to_oracle(
        ours,
        theirs,
        lambda: run_with_gradients(naive_attention, arguments, torch.float64),
        longest_sums(arguments, ours),
        dtype,
    )


# What users add to a score to hide it. A sum of scores with it is rounded to the mask alone.
FILLS = (-1e4, -1e9, -1e30, torch.finfo(torch.bfloat16).min)


def assert_added_numbers_hide(attention, dtype, fill, hidden, name):
    """As in torch's operators in fp32: beside other keys those have no weight, and all of a row have the same."""
    drawn = make_arguments(N=2, L=70, S=70, H=2, H_kv=2, D=16, D_v=16, dtype=dtype)
    query, key, value = (drawn[x] for x in ("query", "key", "value"))
    mask = torch.zeros(70, dtype=torch.float32, device=query.device)
    mask[:hidden] = fill
    mask = mask.expand(2, -1) if name == "key_padding_mask" else mask.expand(70, -1)

    def results(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        output, weights = attend(*leaves)
        loss = output.double().square().sum() + weights.double().square().sum()
        return [output, weights, *torch.autograd.grad(loss, leaves)]

    def expected(query, key, value):
        added = mask[:, None, None] if name == "key_padding_mask" else mask
        weights = (torch.einsum("nlhd,nshd->nhls", query, key) / 4 + added).softmax(-1)
        return torch.einsum("nhls,nshd->nlhd", weights, value), weights.mean(1)

    def attended(query, key, value):
        return attention(query=query, key=key, value=value, **{name: mask}, need_weights=True)[:2]

    found = results(attended, dtype)
    for x, wanted in zip(found, results(expected, torch.float32), strict=True):
        torch.testing.assert_close(x.float(), wanted, rtol=0.02, atol=0.02 * wanted.detach().abs().max().item())
