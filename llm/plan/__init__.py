"""What a run costs, worked out beforehand."""
