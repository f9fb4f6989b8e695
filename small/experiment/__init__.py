"""What the four small experiments share: options, the folder of a run, groups of seeds, benchmarks."""
