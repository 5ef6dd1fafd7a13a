"""The cache for models of transformers: keys, tokens and logits of transformers' own, without copying what is kept."""

import copy
import inspect

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; the extra `transformers` has it"
)

from transformers.generation import GenerationMixin  # noqa: E402

from fused_mha.integrations import transformers as integration  # noqa: E402
from transformers_models import DECODERS, build, config_of, inputs_of, is_served, visible  # noqa: E402

VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (4, 56), reason="the caches of this transformers have no such layers")
IS_CACHE = "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
NAME = "cache" if IS_CACHE else "past_key_values"
N, H, D = 2, 2, 8
LAYERS = {"full": "Llama", "window": "Mistral"}
every_layer = pytest.mark.parametrize("name", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _registered():
    integration.register()


def both(name):
    """Our cache and theirs."""
    config = config_of(name)
    return integration.cache(config), transformers.DynamicCache(config=config)


def tokens(length, seed=0, batch=N):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, H, length, D, generator=generator) for _ in range(2)]


def add(cache, length, seed=0, batch=N):
    with torch.no_grad():
        return cache.update(*tokens(length, seed, batch), 0)


def assert_same(caches, results):
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    ours, theirs = (cache.layers[0] for cache in caches)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)
    assert ours.get_seq_length() == theirs.get_seq_length()


def crop(cache, number):
    """Without the last tokens."""
    if number:
        cache.layers[0].crop(-number)


def interleave(cache, _):
    cache.batch_repeat_interleave(2)


def select(cache, _):
    cache.batch_select_indices(torch.tensor([1, 2, 3, 2]))


def reorder(cache, _):
    cache.reorder_cache(torch.tensor([1, 0]))


@every_layer
def test_tokens_are_kept_as_by_transformers(name):
    caches = both(name)
    for seed, length in enumerate((5, 1, 1, 3, 1, 9, *[1] * 40)):
        assert_same(caches, [add(cache, length, seed) for cache in caches])


@every_layer
@pytest.mark.parametrize("change", [crop, reorder], ids=["crop", "reorder"])
def test_a_changed_cache_goes_on_as_that_of_transformers(name, change):
    caches = both(name)
    if name == "Mistral" and change is crop:
        if not hasattr(caches[0], "activate_past_recording"):
            pytest.skip("this transformers crops no window that is full")
        for cache in caches:
            cache.activate_past_recording()
    for seed, length in enumerate((5, 1, 3, 1, 2, 4, 1, 1, 2, 2, 20, 2, 3)):
        assert_same(caches, [add(cache, length, seed) for cache in caches])
        for cache in caches:
            change(cache, seed % 2 and length - 1)


@every_layer
def test_other_batches_are_taken_as_by_transformers(name):
    caches = both(name)
    for change, batch in ((None, N), (interleave, 2 * N), (select, 2 * N)):
        for cache in caches:
            if change is not None:
                change(cache, None)
        for seed in range(8):
            assert_same(caches, [add(cache, 1 + seed % 2, seed, batch) for cache in caches])


@every_layer
def test_kept_tokens_stay_where_they_are(name):
    cache = both(name)[0]
    add(cache, 40)
    returned = [add(cache, 1, seed) for seed in range(64)]  # all alive, so that none takes another's place
    places = {tuple(x.untyped_storage().data_ptr() for x in keys_and_values) for keys_and_values in returned}
    assert len(places) <= (2 if name == "Llama" else 6)  # memory of 80 tokens and 160; of 16 for a window of 4


def test_calls_that_do_not_fit_are_those_of_transformers():
    for dtype, batch in ((torch.float64, N), (torch.float32, 1)):
        caches = both("Llama")
        results = []
        for cache in caches:
            add(cache, 3)
            add(cache, 1)
            key, value = (x.to(dtype) for x in tokens(1, batch=batch))
            try:
                with torch.no_grad():
                    results.append(cache.update(key, value, 0))
            except RuntimeError as error:
                results.append(str(error))
        if dtype == torch.float64:
            assert_same(caches, results)
            assert_same(caches, [add(cache, 2) for cache in caches])
        else:
            assert results[0] == results[1]


def test_gradients_reach_what_is_kept():
    caches, gradients = both("Llama"), []
    for cache in caches:
        add(cache, 3)
        add(cache, 1)
        first, second = (tokens(2, seed)[0].requires_grad_() for seed in (1, 2))
        cache.update(first, first, 0)
        keys, values = cache.update(second, second, 0)
        add(cache, 1)
        gradients.append(torch.autograd.grad((keys * values).sum(), (first, second)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_a_copy_goes_its_own_way():
    ours, theirs = both("Mistral")
    for cache in (ours, theirs):
        add(cache, 9)
        add(cache, 1)
    twin = copy.deepcopy(ours)
    add(twin, 3, seed=7)
    assert_same((ours, theirs), [add(cache, 3) for cache in (ours, theirs)])


def test_what_inference_mode_has_kept_takes_tokens_outside_of_it():
    caches = both("Llama")
    for cache in caches:
        with torch.inference_mode():
            add(cache, 3)
            add(cache, 1)
    assert_same(caches, [add(cache, 1) for cache in caches])


def logits_of(model, cache, inputs, chunks):
    """Of a prompt and its continuation in chunks."""
    mask, x, outputs, end = inputs.get("attention_mask"), inputs["input_ids"], [], 0
    with torch.no_grad():
        for chunk in x.split(chunks, dim=1):
            end += chunk.shape[1]
            so_far = {} if mask is None else {"attention_mask": mask[:, :end]}
            outputs.append(model(chunk, **so_far, **{NAME: cache}).logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("padding", [None, "left"], ids=["whole", "left"])
@pytest.mark.parametrize("name", [name for name in ("Llama", "Mistral", "Gemma 2", "GPT-OSS") if is_served(name)])
def test_logits_are_those_behind_transformers_cache(name, padding):
    model, inputs = build(name, "fused_mha"), inputs_of(name, padding)
    ours, theirs = (logits_of(model, cache, inputs, [4, 1, 1, 2, 1]) for cache in both(name))
    keep = visible(inputs, *ours.shape[:2])
    assert torch.equal(ours[keep], theirs[keep])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_of_other_implementations_are_the_same_too(implementation):
    model, inputs = build("Llama", implementation), inputs_of("Llama", "left")
    ours, theirs = (logits_of(model, cache, inputs, [4, 1, 1, 2, 1]) for cache in both("Llama"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [name for name in DECODERS if is_served(name)])
def test_generation_takes_the_tokens_of_transformers_cache(name, beams):
    if name == "Whisper" and VERSION < (5, 0):
        pytest.skip("this transformers cannot do so with any cache")
    model, inputs = build(name, "fused_mha"), inputs_of(name, None if name == "Whisper" else "left")
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    cache = integration.cache(model.config)
    ours = GenerationMixin.generate(model, **inputs, **options, **{NAME: cache})
    assert torch.equal(ours, GenerationMixin.generate(model, **inputs, **options))
    assert cache.get_seq_length() == ours.shape[1] - 1


@every_layer
def test_assisted_decoding_crops_it(name):
    if name == "Mistral" and not hasattr(transformers.DynamicCache, "activate_past_recording"):
        pytest.skip("this transformers crops no window that is full")
    model, assistant = build(name, "fused_mha"), build(name, "fused_mha", num_hidden_layers=1)
    inputs = {"input_ids": inputs_of(name)["input_ids"][:1]}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cache = integration.cache(model.config)
    ours = model.generate(**inputs, **options, assistant_model=assistant, **{NAME: cache})
    assert torch.equal(ours, model.generate(**inputs, **options))
