"""Studies: the same comparison over several sizes, seeds and budgets. See docs/study.md."""
