"""lm-eval on official tasks: tasks, rows, and results stored next to the model."""
