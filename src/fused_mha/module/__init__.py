"""`MultiHeadAttention`: the module, its projections, and the one call of the library that serves a whole forward."""
