"""Results that are not finite, as an error that names the weights they come from."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformer.exit_codes import NotFiniteError
from jaxformer.models.params import Params


def require_finite(what: str, finite: Any, params: Params) -> None:
  """Raise `NotFiniteError` for `what` (a plural) unless all of `finite` is true.

  Args:
    finite: booleans, whether each of the results is finite.
    params: those that computed them.
  """
  if np.asarray(finite).all():
    return
  wrong = [n for n, p in params.items() if not bool(jnp.isfinite(p).all())]
  if wrong:
    more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    cause = f'nor are the weights {", ".join(wrong[:3])}{more}'
  else:
    dtypes = ' and '.join(sorted({p.dtype.name for p in params.values()}))
    cause = f'though all weights are: activations overflow with weights in {dtypes}'
  raise NotFiniteError(f'the {what} are not finite (NaN or infinity), {cause}')
