"""The gradients of a layer against differences of its outputs."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.layers.layer import Context
from jaxformer.testing.case import GRADIENTS, ROWS, TAIL, Broken, Case, inputs, segments

# Steps of the differences, relative to the size of what is changed. Errors from rounding in fp32
# grow as 1 / step, those from curvature, once extrapolated, as step^4; either is below LARGEST.
STEPS = 2e-3, 1e-3
SPAN = 64  # positions of the inputs that are changed together
DRAWS = 4  # of the weights of outputs
DOCUMENTS = 64, 172, 64
# Tolerances of a derivative along a random direction: relative to its own standard deviation over
# directions, which kinks (as of a ReLU) between the steps reach by hundredths, and, since rounding
# is relative to the outputs, to the largest of these.
OWN, LARGEST = 0.1, 5e-4
# Relative to the largest difference, and to the largest output: where those of the two steps are
# farther apart, they do not converge.
DISAGREE, ROUNDING = 0.03, 2e-6
LOW_GRADIENTS = 0.25  # in bfloat16: of the norm of a gradient


def weights(shape: tuple[int, ...], draw: int = 0) -> np.ndarray:
  """Return random weights of outputs, whose weighted sum is differentiated."""
  return np.random.default_rng(draw).standard_normal(shape).astype(np.float32)


def differentiable(case: Case) -> None:
  """Gradients of a long row with several documents, along random directions, equal differences of
  its outputs; those of a row without segments equal those of one document.

  Where differences do not converge, because a choice such as that of experts changes, outputs have
  weight 0."""
  x, ctx = inputs(batch=ROWS, length=TAIL), Context(segments_BT=segments(*DOCUMENTS, batch=ROWS))
  y = np.asarray(case.call(case.params, x, ctx)[0], np.float64)
  scale = float(np.max(np.abs(y)))
  found, smooth_BT = [], np.ones(x.shape[:2], bool)
  for what, params, dx in directions(case, x):
    coarse, fine = (slope(case, x, ctx, params, dx, step) for step in STEPS)
    bound = DISAGREE * np.max(np.abs(fine)) + ROUNDING * scale / min(STEPS)
    smooth_BT &= np.all(np.abs(coarse - fine) <= bound, axis=-1)
    found.append((what, params, dx, coarse, fine))
  if np.mean(smooth_BT) < 0.5:
    position, row = np.argwhere(~smooth_BT.T)[0]
    raise Broken(
      f'outputs jump, or are rounded more coarsely than in float32: differences over steps of '
      f'{STEPS[0]} and {STEPS[1]} disagree at {np.sum(~smooth_BT)} of {smooth_BT.size} positions, '
      f'first at position {position} of row {row}'
    )
  for draw in range(DRAWS):
    weight_BTD = weights(y.shape, draw) * smooth_BT[..., None]
    equal(found, case.pull_back(case.params, x, ctx, weight_BTD)[1], weight_BTD)
  one = Context(segments_BT=jnp.zeros(x.shape[:2], jnp.int32))
  without, of_one = (
    case.pull_back(case.params, x, c, weights(y.shape))[1] for c in (Context(), one)
  )
  near(without, of_one, GRADIENTS, 'a row without segments against one of one document')


def equal(found: Sequence[Any], gradients: tuple[Any, Any], weight_BTD: np.ndarray) -> None:
  """Raise `Broken` unless gradients of the weighted sum of outputs equal its differences along the
  directions found."""
  by_params, by_x = gradients
  compared = []
  for what, params, dx, *slopes in found:
    pairs = [(by_params[n], v) for n, v in params.items()] if params else [(by_x, dx)]
    terms = [np.asarray(g, np.float64) * v for g, v in pairs]
    coarse, fine = (float(np.sum(s * np.float64(weight_BTD))) for s in slopes)
    # the elements of a direction have random signs, so this is the standard deviation of the sum
    size = np.sqrt(sum(np.sum(np.square(t)) for t in terms))
    compared.append((what, sum(np.sum(t) for t in terms), fine + (fine - coarse) / 3, size))
  largest = max(size for *_, size in compared)
  for what, claimed, numeric, size in compared:
    if not abs(claimed - numeric) <= OWN * max(size, abs(numeric)) + LARGEST * largest:
      raise Broken(
        f'along a random direction in {what} the gradient is {claimed:.4g}, and differences of '
        f'outputs give {numeric:.4g} ({ROWS} rows of {TAIL})'
      )


def directions(case: Case, x: Any) -> Iterator[tuple[str, dict[str, np.ndarray], np.ndarray]]:
  """Yield a name and a random direction, of parameters and of inputs: one in each parameter, and
  one in the inputs at each SPAN positions."""
  draw = np.random.default_rng(0)
  for name, p in case.params.items():
    size = np.sqrt(np.mean(np.square(np.asarray(p, np.float64))))
    yield f'parameter {name}', {name: size * draw.standard_normal(p.shape)}, np.zeros(x.shape)
  for begin in range(0, x.shape[1], SPAN):
    end = min(begin + SPAN, x.shape[1])
    t = np.arange(x.shape[1])[None, :, None]
    some = np.where((begin <= t) & (t < end), draw.standard_normal(x.shape), 0)
    yield f'the inputs at positions {begin} to {end - 1}', {}, some


def slope(
  case: Case, x: Any, ctx: Context, params: dict[str, np.ndarray], dx: np.ndarray, step: float
) -> np.ndarray:
  """Return the derivative of the outputs along a direction, by a central difference."""

  def outputs(step: float) -> np.ndarray:
    changed = {
      n: (np.asarray(case.params[n]) + step * v).astype(np.float32) for n, v in params.items()
    }
    y = case.call(case.params | changed, (x + step * dx).astype(np.float32), ctx)[0]
    return np.asarray(y, np.float64)

  return (outputs(step) - outputs(-step)) / (2 * step)


def in_both_dtypes(case: Case) -> tuple[Any, Any]:
  """Return outputs and gradients of a long row in bfloat16, and those that the same numbers give in
  float32."""
  x, (low, same) = inputs(jnp.bfloat16, ROWS, TAIL), case.in_bfloat16()
  weight_BTD = weights(jax.eval_shape(case.whole, low, x)[0].shape)
  return (
    case.pull_back(low, x, Context(), weight_BTD),
    case.pull_back(same, x.astype(np.float32), Context(), weight_BTD),
  )


def near(found: tuple[Any, Any], reference: tuple[Any, Any], rtol: float, how: str) -> None:
  """Raise `Broken` unless gradients of parameters and inputs are finite and differ by at most rtol
  of their norm."""
  (by_params, by_x), (right, right_x) = found, reference
  pairs = {f'parameter {n}': (g, right[n]) for n, g in by_params.items()}
  norms = []
  for what, pair in (pairs | {'the inputs': (by_x, right_x)}).items():
    g, right_g = (np.asarray(a, np.float64) for a in pair)
    if not np.all(np.isfinite(g)):
      raise Broken(f'{how}: the gradient of {what} is not finite')
    norms.append((what, np.linalg.norm(g - right_g), np.linalg.norm(right_g)))
  largest = max(norm for *_, norm in norms)
  for what, gap, norm in norms:
    if not gap <= rtol * norm + LARGEST * largest:
      raise Broken(
        f'{how}: the gradient of {what} differs by {gap:.2g}, and its norm is {norm:.2g} ({ROWS} '
        f'rows of {TAIL})'
      )
