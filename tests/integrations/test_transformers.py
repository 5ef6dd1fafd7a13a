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
