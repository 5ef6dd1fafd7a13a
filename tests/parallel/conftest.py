"""The ranks that the tests of this folder share; those of one worker of xdist import torch once."""

import pytest
import torch.distributed as dist

from parallel.ranks import Ranks

if not dist.is_available():
    collect_ignore_glob = ["test_*.py"]  # a torch without it, as on some platforms


def _ranks(size):
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks():
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four_ranks():
    yield from _ranks(4)
