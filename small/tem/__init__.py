"""Path integration and memory: TEM-t, a transformer with recurrent position codes, and TEM (tem-transformer.txt).

The data flow so far:

    spaces of `small.grid` -> environments (walks, symbols, new links) -> model (TEM-t) or machine (TEM), on codes and
    memory -> train (accuracy over zero-shot links) -> runs -> figures                                      Figure 4
"""
