"""Blocks, stacks and whole models; `zoo` holds the named architectures."""
