"""How often a forward of the module enters torch's pool of threads: a busy machine makes each entry wait."""

import contextlib
import ctypes
import time

import pytest
import torch

import fused_mha
from fused_mha.backends import native
from fused_mha.backends.cpu import LIBRARY
from fused_mha.module import linear

PARALLEL_FOR = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)
WORK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def by_torch(begin, end, grain, function, context):
    sizes = (ctypes.c_int64(x) for x in (begin, end, grain))
    return native._torch_library().torch_parallel_for(*sizes, ctypes.c_void_p(function), ctypes.c_void_p(context))


@contextlib.contextmanager
def counted_entries(pool=by_torch):
    """A list that grows by one number of workers for each entry."""
    entries = []

    def parallel_for(begin, end, grain, function, context):
        entries.append(end - begin)
        return pool(begin, end, grain, function, context)

    counting = PARALLEL_FOR(parallel_for)
    LIBRARY._c.fused_mha_set_parallel_for(counting)
    try:
        yield entries
    finally:
        LIBRARY._c.fused_mha_set_parallel_for(native._torch_parallel_for())


@pytest.fixture
def entries_of(set_num_threads, monkeypatch):
    """How many workers each entry of a forward has, by the shape of the input and the number of threads."""
    monkeypatch.setattr(linear, "dtypes", lambda: (torch.float32,))

    def count(N, L, E, threads):
        set_num_threads(threads)
        module = fused_mha.MultiHeadAttention(E, 4, batch_first=True)
        x = torch.randn(N, L, E)
        with torch.no_grad(), counted_entries() as entries:
            module(x, x, x, need_weights=False)
        return entries

    return count


@pytest.mark.parametrize(("L", "E"), [(8, 64), (49, 96)])
@pytest.mark.parametrize("threads", [2, 4])
def test_short_sequences_enter_the_pool_once_whatever_their_number(L, E, threads, entries_of):
    assert [entries_of(N, L, E, threads) for N in (256, 1024, 4096)] == [[threads]] * 3


def test_small_calls_stay_on_their_thread(entries_of):
    assert entries_of(1, 16, 64, threads=4) == []
    assert entries_of(8, 8, 32, threads=4) == []


def test_calls_of_a_tenth_of_a_millisecond_are_shared_until_others_keep_one_waiting(set_num_threads, monkeypatch):
    monkeypatch.setattr(linear, "dtypes", lambda: (torch.float32,))
    set_num_threads(2)
    module, x = fused_mha.MultiHeadAttention(256, 8, batch_first=True), torch.randn(1, 16, 256)
    are_away = False

    def pool(begin, end, grain, function, context):
        WORK(function)(begin, end, context)
        time.sleep(0.05 if are_away else 0)
        return 0

    def count(calls):
        before = len(entries)
        for _ in range(calls):
            module(x, x, x, need_weights=False)
        return len(entries) - before

    with torch.no_grad(), counted_entries(pool) as entries:
        while not count(1):  # whoever waited last in this process
            pass
        are_away = True
        while count(1):
            pass
        are_away = False
        assert count(255) == 0
        assert count(1) == 2


def test_one_token_shares_a_large_weight_among_the_threads(entries_of):
    assert entries_of(1, 1, 1024, threads=2) == [2, 2]


def test_one_token_shares_weights_that_one_second_level_cache_does_not_hold(entries_of):
    assert entries_of(1, 1, 384, threads=2) == [2]
    assert entries_of(1, 1, 256, threads=2) == []


def test_a_few_tokens_share_large_weights_instead_of_reading_them_once_for_each_thread(entries_of):
    assert entries_of(2, 1, 1024, threads=2) == entries_of(1, 1, 1024, threads=2)
    assert entries_of(64, 1, 256, threads=2) == [2]  # small ones stay in the cache
