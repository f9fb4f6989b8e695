"""lm-eval on official tasks: tasks, rows, and the results kept beside the model."""
