"""Evaluation of exported folders and run folders; imports no trainer."""
