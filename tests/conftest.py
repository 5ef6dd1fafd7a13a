"""Settings of the whole suite: how long Hypothesis searches, one seed for each test, one thread for each worker."""

import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, max_examples=60, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "default")

if "PYTEST_XDIST_WORKER" in os.environ:  # two OpenMP pools on one core spend their time waiting for each other
    torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Give every test one seed, so that what it draws does not depend on the tests before it."""
    torch.manual_seed(0)
