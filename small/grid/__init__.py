"""Grid navigation: two memories, place cells and the NMDA activation (Kim et al. 2023).

The data flow:

    graph -> world -> model -> train (errors after each trial) -> runs -> figures          Figures 3, S4, S6 to S8, S10
                               recording -> cells (scores of neurons) -> place_figures     Figures 4, S5, S9, S10, S13
    biophysics                                                                             Figures 1, S2
"""
