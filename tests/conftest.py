"""Settings of the whole suite: how long Hypothesis searches, and one thread for each pytest-xdist worker."""

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
