"""Results are bit-equal for every number of threads, from run to run, and in every mode."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attention_oracle import make_arguments, run_with_gradients
from fused_mha import MultiHeadAttention
from native.call_space import DTYPES
from native.dense_oracle import drawn_seed, native_attention

PER_HEAD = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
ONE_QUERY = {"N": 3, "L": 1, "S": 1100, "H": 6, "H_kv": 2, "D": 40, "D_v": 24}
LONG = {"N": 1, "L": 70, "S": 1300, "H": 2, "H_kv": 1, "D": 64, "D_v": 32}  # several chunks of keys in the backward
SHORT = {"N": 3, "L": 60, "S": 45, "H": 4, "H_kv": 2, "D": 16, "D_v": 16}
CASES = {
    "plain": SHORT | {"return_lse": True},
    "long": LONG | {"return_lse": True},
    "long and causal": LONG | {"is_causal": True, "causal_alignment": "bottom_right", "bias_kv": True},
    "bool mask": SHORT | {"mask_dtype": torch.bool, "mask_shape": "NHLS", "padding_dtype": torch.bool},
    "float mask of all": SHORT | {"mask_dtype": torch.float32, "mask_shape": "LS"},
    "float mask per head": SHORT | {"mask_dtype": torch.float32, "mask_shape": "HLS"},
    "float mask per batch": SHORT | {"mask_dtype": torch.float32, "mask_shape": "NLS"},
    "long float mask of all": LONG | {"mask_dtype": torch.float32, "mask_shape": "LS", "N": 2},
    "float mask of the keys": SHORT | {"mask_dtype": torch.float32, "mask_shape": "S", "padding_dtype": torch.float32},
    "virtual keys": SHORT | {"bias_kv": True, "add_zero_attn": True, "N": 7},
    "averaged weights": SHORT | {"need_weights": True, "bias_kv": True},
    "long averaged weights": LONG | {"need_weights": True},
    "weights per head and dropout": SHORT | PER_HEAD | {"dropout_p": 0.3},
    "weights of some heads": SHORT | {"weights_of_heads": (3, 0), "is_causal": True},
    "long weights of a head": LONG | {"weights_of_heads": (1,), "dropout_p": 0.3},
    "softcap, sinks and ALiBi": SHORT | {"softcap": 2.0, "of_heads": ("sinks", "alibi_slopes"), "return_lse": True},
    "long softcap, sinks and ALiBi": LONG | {"softcap": 2.0, "of_heads": ("sinks", "alibi_slopes"), "N": 2},
    "one query": ONE_QUERY | {"need_weights": True, "dropout_p": 0.3, "mask_dtype": torch.float32, "mask_shape": "HLS"},
    "long and dropout": LONG | {"dropout_p": 0.3, "mask_dtype": torch.float32, "mask_shape": "LS"},
}


def bits(results):
    """Tensors by name as integers, in which -0 is not 0."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return {name: x.contiguous().view(integers[x.element_size()]) for name, x in results.items()}


def assert_same_bits(results, expected):
    assert set(results) == set(expected)
    for name, x in bits(expected).items():
        assert torch.equal(bits(results)[name], x), name


def results_and_gradients(arguments):
    with drawn_seed(3, 4):
        return run_with_gradients(native_attention, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_number_of_threads_gives_the_same_bits(isa, case, dtype, set_num_threads):
    arguments = make_arguments(dtype=dtype, **case)
    set_num_threads(1)
    alone = results_and_gradients(arguments)
    for threads in (2, 3, 4, 4):
        set_num_threads(threads)
        assert_same_bits(results_and_gradients(arguments), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_after_run_gives_the_same_bits_whatever_memory_held_before(isa, dtype):
    arguments = make_arguments(**SHORT, dtype=dtype, mask_dtype=dtype, bias_kv=True, **PER_HEAD)
    first = results_and_gradients(arguments)
    for garbage in (float("nan"), 1e30, -1.0):
        trash = [torch.full((size,), garbage) for size in (100, 10_000, 1_000_000)]
        del trash
        assert_same_bits(results_and_gradients(arguments), first)


@pytest.mark.parametrize(
    ("virtual", "masks"),
    [({"bias_kv": True}, {}), ({}, {"mask_dtype": torch.float32, "mask_shape": "S"})],
    ids=["bias", "mask"],
)
def test_a_gradient_that_sums_tens_of_thousands_of_batch_elements_into_one_number(virtual, masks, set_num_threads):
    arguments = make_arguments(
        N=100_000, L=1, S=1, H=1, H_kv=1, D=1, D_v=1, add_zero_attn=True, hidden=0.0, **virtual, **masks
    )
    set_num_threads(1)
    alone = results_and_gradients(arguments)
    for threads in (2, 3, 4):
        set_num_threads(threads)
        assert_same_bits(results_and_gradients(arguments), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [{}, {"need_weights": True}, PER_HEAD], ids=["output", "averaged", "everything"])
def test_grad_mode_no_grad_and_inference_mode_give_the_same_bits(isa, wanted, dtype):
    arguments = make_arguments(**SHORT, dtype=dtype, mask_dtype=torch.bool, padding_dtype=dtype, bias_kv=True, **wanted)

    def results():
        return {name: x.detach() for name, x in native_attention(**arguments)._asdict().items() if x is not None}

    plain = results()
    with torch.no_grad():
        assert_same_bits(results(), plain)
    with torch.inference_mode():
        assert_same_bits({name: x.clone() for name, x in results().items()}, plain)
    arguments["value"].requires_grad_()
    recorded = native_attention(**arguments).output
    assert recorded.requires_grad
    assert_same_bits({"output": recorded.detach()}, {"output": plain["output"]})
    with torch.no_grad():
        assert_same_bits(results(), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_module_gives_the_same_bits_in_training_eval_no_grad_and_inference_mode(isa, need_weights, dtype):
    module = MultiHeadAttention(32, 4, dropout=0.0, batch_first=True, dtype=dtype)
    x = torch.randn(3, 17, 32, dtype=dtype)
    padding = torch.zeros(3, 17, dtype=torch.bool)
    padding[1, 9:] = True

    def results():
        pair = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        return {str(i): y.detach().clone() for i, y in enumerate(pair) if y is not None}

    training = results()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for is_training in (True, False):
            module.train(is_training)
            with mode():
                assert_same_bits(results(), training)


def test_one_batch_element_or_head_does_not_depend_on_the_others(base_isa):
    arguments = make_arguments(**SHORT | {"H_kv": 4}, mask_dtype=torch.bool, **PER_HEAD)
    whole = native_attention(**arguments)
    for n, h in ((0, 0), (2, 3)):
        part = {name: arguments[name][n : n + 1, :, h : h + 1] for name in ("query", "key", "value")}
        alone = native_attention(**arguments | part)
        assert torch.equal(alone.output[0, :, 0], whole.output[n, :, h])
        assert torch.equal(alone.weights[0, 0], whole.weights[n, h])
        assert torch.equal(alone.lse[0, 0], whole.lse[n, h])


def test_python_threads_at_once_get_the_same_bits(base_isa, set_num_threads):
    set_num_threads(2)
    arguments = make_arguments(**LONG, mask_dtype=torch.float32, mask_shape="LS")
    expected = run_with_gradients(native_attention, arguments)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: run_with_gradients(native_attention, arguments), range(8), timeout=120):
            assert_same_bits(results, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SHORT, LONG, ONE_QUERY], ids=["short", "long", "one query"])
def test_weights_change_no_bit_of_the_output(isa, case, dtype):
    arguments = make_arguments(**case, dtype=dtype, return_lse=True, mask_dtype=torch.bool, padding_dtype=torch.bool)
    without = native_attention(**arguments)
    averaged, per_head = ({"need_weights": True, "average_attn_weights": average} for average in (True, False))
    for wanted in (averaged, per_head, {"weights_of_heads": (1,)}):
        result = native_attention(**arguments | wanted)
        expected = {"output": without.output, "lse": without.lse}
        assert_same_bits({"output": result.output, "lse": result.lse}, expected)
