"""Measurements of one model: indirect objects, in-context score, heads, sparsity, loss."""
