"""Studies of architectures at equal size, or over a grid of sizes: training, statistics, report."""
