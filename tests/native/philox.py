"""Philox4x32-7 and the dropout mask that is drawn from it, in numpy, from the paper alone.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): the multipliers of Philox4x32 and
the Weyl constants of its key schedule.
"""

from __future__ import annotations

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
WORD = 0xFFFFFFFF


def philox4x32(counter, key):
    """Four arrays of 32 random bits from a counter of four words or arrays of words, and a key of two words."""
    words = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    for round_ in range(ROUNDS):
        first, second = (np.uint64((k + round_ * w) & WORD) for k, w in zip(key, WEYL, strict=True))
        product_0, product_1 = MULTIPLIERS[0] * words[0], MULTIPLIERS[1] * words[2]
        words = [
            (product_1 >> np.uint64(32)) ^ words[1] ^ first,
            product_1 & np.uint64(WORD),
            (product_0 >> np.uint64(32)) ^ words[3] ^ second,
            product_0 & np.uint64(WORD),
        ]
    return words


def drawn_probability(dropout_p):
    """With which 16 random bits drop an element: the nearest multiple of 2^-16, 1 for no other than 1."""
    return 1.0 if dropout_p == 1.0 else min(round(dropout_p * 65536) / 65536, 1 - 2.0**-16)


def random_bits(seed, shape):
    """Sixteen of them for each element of (N, H, L, S), of a seed of two signed 64-bit integers."""
    N, H, L, S = shape
    groups = np.arange((S + 7) // 8)[None, None, :]
    queries = np.arange(L)[None, :, None]
    heads = np.arange(N * H)[:, None, None]
    words = philox4x32((groups, queries, heads, seed[1] & WORD), (seed[0] & WORD, (seed[0] >> 32) & WORD))
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    return np.stack(halves, axis=-1).reshape(N * H, L, 8 * groups.size)[..., :S].reshape(N, H, L, S)


def kept(seed, shape, dropout_p):
    """The bool array (N, H, L, S), True = keep."""
    return random_bits(seed, shape) >= drawn_probability(dropout_p) * 65536
