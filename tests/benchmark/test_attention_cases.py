"""The core's dropout in the benchmark: what the check of it compares with."""

import torch

from fused_mha.benchmark import attention_cases, attention_cells


def test_dropout_of_the_attention_benchmark_is_verified_by_the_factor_that_is_drawn():
    (call,) = (call for call in attention_cases.CALLS if call.dropout)
    for cell in call.quick:
        attention_cases.attention_case(call, cell).verify()


def test_a_given_mask_of_what_is_kept_is_scaled_by_what_the_probability_is_rounded_to():
    inputs = [torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(3)]
    kept = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    (plain,), (dropped,) = (attention_cells.bmm(**given)(*inputs) for given in ({}, {"dropout": 0.3, "kept": kept}))
    torch.testing.assert_close(dropped, plain / (1.0 - 19661 / 65536), rtol=1e-14, atol=0.0)
