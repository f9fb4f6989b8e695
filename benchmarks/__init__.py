"""Measured results (`results/`) and the Markdown pages made from them."""
