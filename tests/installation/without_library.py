"""Shows that an installation without the C++ library says so once and works; exits with an error if not.

A fresh process runs it: `test_without_library.py`'s and, where there is no compiler to install with, `.ci/run`'s.
"""

import warnings

import torch

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_mha
    from fused_mha.backends import cpu
    from fused_mha.testing import assert_parity

assert cpu.LIBRARY is None, f"{cpu.LIBRARY.path} is a C++ library"
assert cpu.BACKEND.summary.endswith("not in this installation")


class Ours(torch.nn.Module):
    def forward(self, query, key, value):
        return fused_mha.attention(query, key, value, is_causal=True).output


class Theirs(torch.nn.Module):
    def forward(self, query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


padding = torch.arange(7) >= torch.tensor([[7], [4]])
ours = fused_mha.MultiHeadAttention(32, 4, batch_first=True)
theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(2, 7, 32)
with warnings.catch_warnings(record=True) as later:
    warnings.simplefilter("always")
    for is_training in (True, False):
        assert_parity(ours.train(is_training), theirs.train(is_training), x, x, x, key_padding_mask=padding)
        assert_parity(ours, theirs, x, x, x, need_weights=False)
    assert_parity(Ours(), Theirs(), *(torch.randn(2, 7, 4, 8) for _ in range(3)))

messages = [str(warning.message) for warning in (*caught, *later) if "fused_mha" in str(warning.message)]
assert len(messages) == 1, messages
print(messages[0])
