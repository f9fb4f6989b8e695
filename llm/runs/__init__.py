"""A run folder seen from outside, without torch."""
