"""Initial values of a layer, and what tests of initialization ask of them."""

import numpy as np
from flax import nnx

from jaxformer.layers.layer import LayerPosition


def built(layer, width, index=1, depth=6, branches=6):
  """Parameters by name, of a layer in this position."""
  position = LayerPosition(index=index, depth=depth, branches=branches)
  module = layer.build(width, nnx.Rngs(params=0), position)
  return {
    '.'.join(map(str, path)): p for path, p in nnx.to_flat_state(nnx.state(module, nnx.Param))
  }


def values(layer, width, **position):
  return {n: np.asarray(p[...]) for n, p in built(layer, width, **position).items()}


def uniform(p, bound):
  """Fills [-bound, bound] and has its standard deviation, to five standard errors."""
  assert np.abs(p).max() <= bound
  assert np.abs(p).max() > 0.95 * bound
  assert abs(p.std() - bound / np.sqrt(3)) < 5 * bound / np.sqrt(p.size)


def normal(p, std, truncated=False):
  """Has mean 0 and this standard deviation, to five standard errors, and numbers beyond 2.3
  standard deviations unless `truncated`."""
  assert abs(p.mean()) < 5 * std / np.sqrt(p.size)
  assert abs(p.std() - std) < 5 * std / np.sqrt(2 * p.size)
  assert (np.abs(p).max() < 2.28 * std) == truncated


def log_uniform(steps, low, high):
  """Fills [low, high], with as many steps below the geometric mean as above."""
  assert steps.min() >= 0.999 * low
  assert steps.max() <= 1.001 * high
  assert abs(np.mean(steps < np.sqrt(low * high)) - 0.5) < 2.5 / np.sqrt(steps.size)
  assert steps.max() / steps.min() > 0.3 * high / low
