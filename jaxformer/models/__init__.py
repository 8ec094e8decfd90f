"""Blocks, stacks and models; `zoo` holds the named architectures."""
