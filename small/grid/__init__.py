"""Grid navigation: two memories, place cells and the NMDA activation (nmda-transformer.txt)."""
