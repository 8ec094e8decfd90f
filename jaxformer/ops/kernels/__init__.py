"""Kernels of our own, in Pallas, for what neither XLA nor the kernels that come with JAX do well.
Each is a form of an operation in `jaxformer.ops`, which chooses it."""
