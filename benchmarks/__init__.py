"""Figures that were measured (`results/`), and the page that is made of them."""
