"""Path integration and memory: TEM-t, a transformer with recurrent position codes (tem-transformer.txt).

The data flow so far:

    spaces of `small.grid` -> environments (walks, symbols, new links) -> transformer (codes, memory) -> symbols
"""
