"""The library in forked processes, in data loaders' workers, and beside a pool of threads that is already running."""

import multiprocessing
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import fused_mha
from attention_oracle import make_arguments, run_with_gradients
from native.dense_oracle import native_attention

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows forks no processes"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12: of processes with threads
    pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*:UserWarning"),
]
TIMEOUT = 60
LARGE = {"N": 2, "L": 200, "S": 1200, "H": 4, "H_kv": 4, "D": 16, "D_v": 16, "mask_dtype": torch.float32}


def in_a_fork(function):
    """What a function gives in a forked child with one thread; fails where the child hangs or dies."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        sender.send({name: x.numpy() for name, x in function().items()})

    process = context.Process(target=child)
    process.start()
    try:
        assert receiver.poll(TIMEOUT), "the forked child hangs"
        results = receiver.recv()
        process.join(TIMEOUT)
        assert process.exitcode == 0
    finally:
        process.kill()
    return {name: torch.from_numpy(x) for name, x in results.items()}


@pytest.mark.parametrize("threads", [1, 3])
def test_forward_and_backward_work_in_a_forked_child(threads, set_num_threads):
    set_num_threads(threads)
    arguments = make_arguments(**LARGE)
    expected = run_with_gradients(native_attention, arguments)  # with a pool of threads in the parent
    results = in_a_fork(lambda: run_with_gradients(native_attention, arguments))
    assert set(results) == set(expected)
    assert all(torch.equal(results[name], x) for name, x in expected.items())
    assert all(torch.equal(run_with_gradients(native_attention, arguments)[name], x) for name, x in expected.items())


def test_dropout_is_reproducible_in_a_forked_child():
    arguments = make_arguments(L=20, S=40, dropout_p=0.5, need_weights=True)

    def seeded():
        torch.manual_seed(4)
        return {"weights": native_attention(**arguments).weights}

    assert torch.equal(in_a_fork(seeded)["weights"], seeded()["weights"])


def collate(items):
    """A batch and what attention makes of it."""
    x = torch.stack(items)
    with fused_mha.backend("cpu"):
        return x, fused_mha.attention(x, x, x, is_causal=True).output


def test_a_data_loaders_worker_may_attend(set_num_threads):
    set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    items = [torch.randn(150, 4, 16, generator=generator) for _ in range(6)]
    collate(items[:2])  # starts the parent's threads
    loader = DataLoader(items, 2, num_workers=1, collate_fn=collate, timeout=TIMEOUT, multiprocessing_context="fork")
    batches = list(loader)
    assert len(batches) == 3
    for index, (x, output) in enumerate(batches):
        expected_x, expected = collate(items[2 * index : 2 * index + 2])
        assert torch.equal(x, expected_x)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_follow_no_number_of_threads_that_changes_between_forward_and_backward(threads, set_num_threads):
    arguments = make_arguments(**LARGE)
    set_num_threads(3)
    expected = run_with_gradients(native_attention, arguments)
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    output = native_attention(**arguments | leaves).output
    set_num_threads(threads)
    generator = torch.Generator().manual_seed(7)
    output.backward(torch.randn(output.shape, generator=generator).to(torch.bfloat16).float())
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[f"grad of {name}"]), name
