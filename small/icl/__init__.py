"""In-context learning: an associative memory (AMICL) and the two-layer transformer with residual attention streams.

Burns et al. 2025, Sections 2 and 3, Appendices B to D. The data flow:

    task  ->  amicl                                         Figures 6, 7, 8
    task  ->  model  ->  train (snapshots)  ->  tables      Figure 3, Tables 1, 5, 6, t-tests
                         sweep (trainings over two knobs)   phase plot
"""
