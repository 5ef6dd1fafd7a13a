"""Models of transformers with `attn_implementation="fused_mha"`: logits, gradients, tokens and weights of `eager`."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; the extra `transformers` has it"
)

from transformers.generation import GenerationMixin  # noqa: E402

from closeness import assert_close_to_oracle  # noqa: E402
from fused_mha.integrations import transformers as integration  # noqa: E402
from transformers_models import DECODERS, MODELS, InDouble, as_dtype, build, inputs_of, is_served, visible  # noqa: E402

VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
TERMS = 2 * 9 * 48  # of the longest sums, those of the gradients of weights
needs_masks = pytest.mark.skipif(VERSION < (4, 53), reason="transformers before 4.53 makes masks in each model")


@pytest.fixture(autouse=True)
def _registered():
    integration.register()


@pytest.fixture
def calls(monkeypatch):
    """The keywords of each call of the core."""
    calls = []
    attention = integration.attention

    def spy(*tensors, **keywords):
        calls.append(keywords)
        return attention(*tensors, **keywords)

    monkeypatch.setattr(integration, "attention", spy)
    return calls


def each_model(names, **more):
    return pytest.mark.parametrize("name", [name for name in names if is_served(name)], **more)


def results_of(model, inputs):
    """Logits where there is no padding, and each parameter's gradient."""
    model.zero_grad()
    logits = model(**inputs).logits
    if logits.dim() == 3:
        logits = logits[visible(inputs, *logits.shape[:2])]
    weights = torch.linspace(-1.0, 1.0, logits.numel(), dtype=torch.float64).view(logits.shape)
    (logits * weights.to(logits)).sum().backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("padding", [None, "left", "right"], ids=["whole", "left", "right"])
@each_model(MODELS)
def test_logits_and_gradients_are_those_of_eager(name, padding, calls):
    if name == "ViT" and padding is not None:
        pytest.skip("images have no padding")
    inputs = inputs_of(name, padding)
    ours = results_of(build(name, "fused_mha"), inputs)
    assert calls
    theirs = results_of(build(name, "eager"), inputs)
    exact, inputs = build(name, "eager", torch.float64), as_dtype(inputs, torch.float64)

    def oracle():
        with InDouble():
            return results_of(exact, inputs)

    assert_close_to_oracle(ours, theirs, oracle, TERMS)


@pytest.mark.parametrize("name", [name for name in ("Llama", "Gemma 2", "GPT-OSS") if is_served(name)])
def test_logits_of_half_types_are_those_of_eager(name, calls):
    inputs = inputs_of(name, "left")
    ours, theirs = (
        {"logits": results_of(build(name, implementation, torch.bfloat16), inputs)["logits"]}
        for implementation in ("fused_mha", "eager")
    )
    exact = build(name, "eager", torch.bfloat16).double()  # of the same rounded weights

    def oracle():
        with InDouble():
            return {"logits": results_of(exact, inputs)["logits"]}

    assert_close_to_oracle(ours, theirs, oracle, TERMS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"], ids=["whole", "left"])
@each_model(DECODERS)
def test_greedy_generation_takes_the_tokens_of_eager(name, padding, cache):
    if cache == "static" and ((name == "Whisper" and VERSION < (5, 0)) or (name == "Gemma 2" and VERSION < (4, 53))):
        pytest.skip("this transformers cannot do so with any attention")
    inputs = inputs_of(name, None if name == "Whisper" else padding)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    # Whisper's own generate wants 30 seconds of sound
    ours, theirs = (
        GenerationMixin.generate(build(name, implementation), **inputs, **options)
        for implementation in ("fused_mha", "eager")
    )
    assert ours.shape[1] > 1
    assert torch.equal(ours, theirs)


def weights_of(model, inputs):
    """The weights of all layers, of queries that are no padding."""
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    weights = {}
    for field in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for i, x in enumerate(getattr(output, field, None) or ()):
            if x is not None:
                weights[f"{field} {i}"] = x.transpose(1, 2)[visible(inputs, x.shape[0], x.shape[2])]
    return weights


@pytest.mark.filterwarnings("ignore:.*output_attentions=True. is not supported:UserWarning")  # by transformers 4.5x
@each_model(MODELS)
def test_weights_are_those_of_eager_and_come_from_the_core(name, calls):
    if name == "ViT" and VERSION < (5, 2):
        pytest.skip("this transformers takes the weights of what layers return, and does not say so")
    inputs = inputs_of(name, "left")
    ours = weights_of(build(name, "fused_mha"), inputs)
    assert len(calls) == len(ours) > 0
    assert all(call["need_weights"] for call in calls)
    theirs = weights_of(build(name, "eager"), inputs)
    exact, inputs = build(name, "eager", torch.float64), as_dtype(inputs, torch.float64)

    def oracle():
        with InDouble():
            return weights_of(exact, inputs)

    assert_close_to_oracle(ours, theirs, oracle, TERMS)


@pytest.mark.skipif(VERSION < (5, 2), reason="this transformers does not say what it captures")
def test_weights_are_returned_to_a_model_that_asks_no_layer_for_them(calls):
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="fused_mha").eval()
    tokens = inputs_of("Llama")["input_ids"]
    captured = model(tokens, output_attentions=True).attentions
    assert [x.shape for x in captured] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(captured[1].sum(-1), torch.ones(2, 4, 9))
    model(tokens)
    assert [call["need_weights"] for call in calls] == [True, True, False, False]


@needs_masks
@pytest.mark.parametrize("padding", [None, "left"], ids=["whole", "left"])
@each_model(["Llama", "Mistral", "Gemma 2", "GPT-OSS"])
def test_no_mask_is_dense_in_a_forward_and_in_decoding(name, padding, calls, monkeypatch):
    monkeypatch.delattr(integration.LazyMask, "entries")
    model, inputs = build(name, "fused_mha"), inputs_of(name, padding)
    with torch.no_grad():
        model(**inputs)
        assert {call["is_causal"] for call in calls} == {True}
        windows = {call["window"] for call in calls}
        assert windows == {"Llama": {None}, "Mistral": {(3, 0)}}.get(name, {None, (3, 0)})
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert all(call["attn_mask"] is None for call in calls)
    padded = [call.get("key_padding_mask") is not None for call in calls]
    assert any(padded) == (padding is not None)


def heads(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Layer(torch.nn.Module):
    """All that the attention function asks of a layer."""


def attend(query, key, value, mask=None, **keywords):
    layer = Layer().train(keywords.pop("training", False))
    return integration.attention_forward(layer, query, key, value, mask, **keywords)


def eager(query, key, value, mask=None, scaling=None, softcap=None, s_aux=None, position_bias=None, head_mask=None):
    """What eager functions of transformers compute, all in one."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        scores = scores + mask[..., : key.shape[2]]
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    weights = weights if head_mask is None else weights * head_mask.view(1, -1, 1, 1)
    return (weights @ value).transpose(1, 2), weights


QUERY, KEY, VALUE = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)
BIAS, SINKS, FACTORS = heads((1, 4, 5, 7), (4,), (4,), seed=1)
SEEN = torch.ones(2, 1, 5, 9, dtype=torch.bool).tril(2)
OPTIONS = {
    "grouped heads and a value size of its own": {},
    "a scale": {"scaling": 0.7},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": SINKS},
    "a bias": {"position_bias": BIAS},
    "a factor for each head": {"head_mask": FACTORS.view(1, 4, 1, 1)},
    "a bool mask, longer than the keys": {"mask": SEEN},
    "a bool mask of one row and rank 3": {"mask": SEEN[0, :, 2:3, :7]},
    "a float mask": {"mask": torch.where(SEEN[:1], 0.3, -torch.inf)},
    "a bool mask and a bias": {"mask": SEEN, "position_bias": BIAS},
    "a float mask and a bias": {"mask": torch.where(SEEN, 0.3, -3e38), "position_bias": BIAS},
    "everything": {
        "mask": SEEN,
        "scaling": 0.7,
        "softcap": 1.5,
        "s_aux": SINKS,
        "position_bias": BIAS,
        "head_mask": FACTORS,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layers_keywords_mean_what_they_mean_in_eager(options):
    query, key, value = (x.requires_grad_() for x in heads(QUERY, KEY, VALUE))

    def with_gradients(function, inputs, **more):
        output, weights = function(*inputs, **options, **more)
        gradients = torch.autograd.grad(output.cos().sum() + weights.sin().sum(), inputs)
        names = ("output", "weights", "query", "key", "value")
        return dict(zip(names, (output.detach(), weights.detach(), *gradients), strict=True))

    doubled = [x.detach().double().requires_grad_() for x in (query, key, value)]
    assert_close_to_oracle(
        with_gradients(attend, (query, key, value), output_attentions=True),
        with_gradients(eager, (query, key, value)),
        lambda: with_gradients(eager, doubled),
        terms=8 * 7 * 5,
    )


def test_a_position_bias_gets_its_gradient():
    query, key, value = heads(QUERY, KEY, VALUE)
    bias = BIAS.clone().requires_grad_()
    (ours,) = torch.autograd.grad(attend(query, key, value, SEEN, position_bias=bias)[0].cos().sum(), bias)
    (theirs,) = torch.autograd.grad(eager(query, key, value, SEEN, position_bias=bias)[0].cos().sum(), bias)
    torch.testing.assert_close(ours, theirs)


def test_a_layer_without_a_mask_is_causal_where_it_says_so():
    query, key, value = heads((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for keywords, mask in (
        ({}, None),
        ({"is_causal": False}, None),
        ({"is_causal": True}, causal),
        ({"is_causal": True, "sliding_window": 2}, causal.triu(-1)),
    ):
        ours, _ = attend(query, key, value, **keywords)
        torch.testing.assert_close(ours, eager(query, key, value, mask)[0])


def test_keys_and_values_are_read_where_they_lie(calls, monkeypatch):
    given = []
    monkeypatch.setattr(integration, "attention", lambda *tensors, **_: given.extend(tensors) or _Result())
    query, key, value = heads(QUERY, KEY, VALUE)
    attend(query, key, value)
    assert [x.data_ptr() for x in given] == [query.data_ptr(), key.data_ptr(), value.data_ptr()]
    assert given[1].shape == (2, 7, 2, 8)


class _Result:
    output = weights = None


def test_dropout_is_for_training():
    query, key, value = heads(QUERY, KEY, VALUE)
    whole, _ = attend(query, key, value)
    evaluated, _ = attend(query, key, value, dropout=0.4)
    assert torch.equal(evaluated, whole)
    output, weights = attend(query, key, value, dropout=0.4, training=True, output_attentions=True)
    share = (weights == 0).double().mean().item()
    assert abs(share - 0.4) < 0.1
    torch.testing.assert_close(output, (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2))


@each_model(["Llama"])
def test_a_model_in_training_drops_weights(name, calls):
    model = build(name, "fused_mha", attention_dropout=0.25).train()
    inputs = inputs_of(name)
    first, second = (model(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert {call["dropout_p"] for call in calls} == {0.25}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
@each_model(["Llama", "Mistral"])
def test_a_users_own_mask_counts(name, dtype):
    inputs = inputs_of(name)
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    theirs = build(name, "eager")(inputs["input_ids"], attention_mask=added).logits
    ours = build(name, "fused_mha")(inputs["input_ids"], attention_mask=mask if dtype == torch.bool else added).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, build(name, "fused_mha")(**inputs).logits, atol=1e-2)


@needs_masks
@each_model(["Llama", "Mistral"])
def test_packed_sequences_do_not_see_each_other(name, calls):
    tokens = inputs_of(name)["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model = build(name, "fused_mha")
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    assert all(call["attn_mask"].dtype == torch.bool for call in calls)
    alone = torch.cat([model(part, use_cache=False).logits for part in (tokens[:, :4], tokens[:, 4:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@needs_masks
@each_model(["Llama", "Gemma 2"])
def test_a_chunk_behind_a_cache_is_the_whole(name):
    model, inputs = build(name, "fused_mha"), inputs_of(name, "left")
    with torch.no_grad():
        whole = model(**inputs).logits
        mask = inputs["attention_mask"]
        start = model(inputs["input_ids"][:, :4], attention_mask=mask[:, :4], use_cache=True)
        cache = "cache" if "cache" in start else "past_key_values"
        rest = model(inputs["input_ids"][:, 4:], attention_mask=mask, **{cache: start[cache]})
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_model(["Llama"])
def test_gradient_checkpointing_has_the_same_gradients(name, use_reentrant):
    model, inputs = build(name, "fused_mha").train(), inputs_of(name, "left")
    plain = results_of(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again = results_of(model, {**inputs, "use_cache": False})
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[key], x) for key, x in plain.items())


@needs_masks
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be:DeprecationWarning")  # by 4.53's masks
@pytest.mark.usefixtures("fresh_compiler")
@each_model(["Llama", "Mistral", "BERT"])
def test_a_compiled_model_gives_what_an_eager_one_gives(name):
    model = build(name, "fused_mha")
    compiled = torch.compile(model, backend="eager", fullgraph=VERSION >= (5, 4))
    for padding in (None, "left"):
        inputs = inputs_of(name, padding)
        with torch.no_grad():
            expected = model(**inputs).logits
            result = compiled(**inputs).logits
        keep = visible(inputs, *result.shape[:2])
        torch.testing.assert_close(result[keep], expected[keep])


@needs_masks
@pytest.mark.usefixtures("fresh_compiler")
@each_model(["Mistral"])
def test_compiled_layers_of_an_eager_model_take_its_mask(name):
    model, inputs = build(name, "fused_mha"), inputs_of(name, "left")
    with torch.no_grad():
        expected = model(**inputs).logits
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"indices": torch.zeros(1)}, "indices is a keyword of attention that fused_mha does not know; got Tensor"),
        ({"sinks": torch.zeros(1)}, "sinks is a keyword of attention"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 5])}, "cu_seq_lens_q gives 2 sequences, and the mask does not"),
        ({"sliding_window": 2}, "sliding_window=2 has no meaning without a mask for 5 queries and 7 keys"),
        ({"head_mask": torch.zeros(2, 4)}, r"head_mask must have one number for each of 4 heads; got shape \(2, 4\)"),
    ],
)
def test_what_the_core_cannot_compute_is_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        attend(*heads(QUERY, KEY, VALUE), **keywords)


@pytest.mark.parametrize("name", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
def test_scores_that_a_layer_scales_in_silence_are_refused(name):
    layer = Layer()
    setattr(layer, name, name != "scale_attn_weights")
    with pytest.raises(ValueError, match=name):
        integration.attention_forward(layer, *heads(QUERY, KEY, VALUE), None)
    integration.attention_forward(layer, *heads(QUERY, KEY, VALUE), None, scaling=1.0)


def test_a_mask_of_one_row_for_a_causal_layer_is_refused():
    layer, mask = Layer(), torch.zeros(2, 1, 1, 7)
    layer.is_causal = True
    query, key, value = heads(QUERY, KEY, VALUE)
    message = r"attention_mask must have a row for each of the 5 queries of a causal layer; got shape \(2, 1, 1, 7\)"
    with pytest.raises(ValueError, match=message):
        integration.attention_forward(layer, query, key, value, mask)
    integration.attention_forward(layer, query[:, :, :1], key, value, mask)
    layer.is_cross_attention = True
    integration.attention_forward(layer, query, key, value, mask)


def test_keywords_of_others_are_let_pass():
    others = {"position_ids": torch.zeros(1), "use_cache": True, "indices": None, "deterministic": False}
    sequences = {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 7]), "max_length_q": 5}
    query, key, value = heads(QUERY, KEY, VALUE)
    expected, _ = attend(query, key, value, SEEN)
    assert torch.equal(attend(query, key, value, SEEN, **others, **sequences)[0], expected)
    apart = torch.tensor([0, 2, 5])
    assert torch.equal(attend(query, key, value, SEEN, cu_seq_lens_q=apart)[0], expected)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "my_flash", "paged|fused_mha"])
def test_a_name_that_transformers_knows_is_refused(name):
    with pytest.raises(ValueError, match="name must be one that transformers has no meaning for, as 'fused_mha'; got"):
        integration.register(name)


def test_registering_twice_and_by_another_name_is_fine():
    integration.register()
    integration.register("of_my_own")
    model = build("Llama", "of_my_own")
    assert model.config._attn_implementation == "of_my_own"
    assert torch.equal(model(**inputs_of("Llama")).logits, build("Llama", "fused_mha")(**inputs_of("Llama")).logits)
