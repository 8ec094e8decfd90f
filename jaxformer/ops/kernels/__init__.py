"""Pallas kernels for operations that neither XLA nor the kernels of JAX compute well. Each is an
implementation of an operation in `jaxformer.ops`, which chooses it."""
