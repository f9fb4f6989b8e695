"""Path integration and memory: TEM-t, a transformer with recurrent position codes, and TEM (Whittington et al. 2022).

The data flow:

    spaces of `small.grid` -> environments (walks, symbols, new links) -> model (TEM-t, with a store) or machine (TEM)
    -> train (accuracy over zero-shot links) -> runs -> figures                                             Figure 4
                                             -> recording -> cell_figures                            Figures 1, 2b, 5
    memory -> capacity, bench
"""
