"""Kernels of our own, written in Pallas; each is a form of an operation in `jaxformer.ops`, which chooses it."""
