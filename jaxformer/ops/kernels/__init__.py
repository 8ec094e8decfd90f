"""Kernels of our own, for what neither XLA nor the kernels that come with JAX do well."""
