"""Comparisons of architectures: what is matched, how they are tuned, and what their differences
say."""
