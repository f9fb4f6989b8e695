"""Small experiments on the shared blocks, one folder each."""
