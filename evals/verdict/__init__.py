"""Two runs as a pair: measurements, statistics, power, efficiency, the verdict."""
