"""Torch's `register_flop_formula`, imported without a warning; the operators' files call it."""

import logging

_log = logging.getLogger("torch.utils.flop_counter")
_was_disabled = _log.disabled
# CUDA builds of torch warn here from 2.11 on where there is no Triton, whose kernels no formula of ours is for.
_log.disabled = True
try:
    from torch.utils.flop_counter import register_flop_formula
finally:
    _log.disabled = _was_disabled

__all__ = ["register_flop_formula"]
