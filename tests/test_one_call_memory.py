"""What a module's forward allocates that is one call of the C++ library."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fused_mha import MultiHeadAttention
from native.test_memory import allocations


@pytest.fixture
def one_thread():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.usefixtures("one_thread")
def test_no_tensor_of_all_scores_is_allocated(need_weights, one_calls):
    L, E, H = 1024, 64, 8
    module = MultiHeadAttention(E, H, batch_first=True)
    x = torch.randn(1, L, E)
    mask, padding = torch.zeros(L, L), torch.zeros(1, L, dtype=torch.bool)

    def run():
        output, weights = module(x, x, x, need_weights=need_weights, attn_mask=mask, key_padding_mask=padding)
        (output.sum() if weights is None else output.sum() + weights.square().sum()).backward()

    assert max(allocations(run)) <= max(L * L * 4 if need_weights else 0, 3 * L * E * 4, H * L * 1024)
    assert max(allocations(run)) < H * L * L
    assert all(one_calls)


@pytest.mark.usefixtures("one_thread")
def test_the_workspace_does_not_grow_with_the_batch(one_calls):
    module = MultiHeadAttention(32, 4, batch_first=True).eval()

    def workspace(N):
        x = torch.randn(N, 50, 32)
        with torch.no_grad():
            sizes = allocations(lambda: module(x, x, x, need_weights=False))
        return max(size for size in sizes if size != x.nbytes)

    assert workspace(400) == workspace(100)
    assert all(one_calls)


def test_no_projection_is_kept_in_inference(one_calls):
    module = MultiHeadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(200, 50, 32)
    with torch.no_grad():
        sizes = allocations(lambda: module(x, x, x, need_weights=False))
    assert sorted(sizes)[-1] == x.nbytes  # the output alone is of the inputs' size
    assert sum(sizes) < 2 * x.nbytes


class TestALargeWorkspace:
    """It is kept for the next call, since memory from the system must be cleared first."""

    @staticmethod
    def call(E, rows=600):  # more than half of E, that weights are packed
        module, x = MultiHeadAttention(E, 4, batch_first=True).eval(), torch.randn(1, rows, E)

        def run():
            with torch.no_grad():
                return module(x, x, x, need_weights=False)[0]

        return run, 4 * E * E * 4 + 4 * x.nbytes  # at least the packed weights and the projections

    def test_is_allocated_once(self, one_calls):
        run, least = self.call(512)
        run()
        assert all(size < least // 2 for size in allocations(run))
        larger, _ = self.call(768)
        larger()
        assert all(size < least // 2 for size in allocations(run))
        assert all(one_calls)

    def test_beyond_some_size_is_given_back(self, one_calls):
        run, least = self.call(2560, rows=1300)
        assert least > 128 * 2**20
        for _ in range(2):
            assert max(allocations(run)) > least
        assert all(one_calls)

    def test_serves_one_of_several_threads(self, one_calls):
        run, _ = self.call(512)
        expected = run()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: run(), range(12)))
        assert all(torch.equal(x, expected) for x in found)
        assert all(one_calls)
