"""What a target adds to an experiment whose settings leave it open: a mesh, and microbatches that
fit. `plan` estimates, and `launch` starts, what `on_target` returns."""

import dataclasses
from collections.abc import Collection

from jaxformer.config import InputError
from jaxformer.launch.check import setup_of
from jaxformer.planning.memory import fits
from jaxformer.planning.setup import default_mesh, divisors
from jaxformer.planning.target import Target
from jaxformer.training.experiment import Experiment
from jaxformer.workflows.overrides import Pairs


def on_target(
  experiment: Experiment, target: Target, given: Collection[str]
) -> tuple[Experiment, Pairs]:
  """Return an experiment as it is trained on a target, and the overrides that make it so.

  A mesh is chosen by `default_mesh`, and as few microbatches per update as fit into memory by the
  formulas (else as many as the mesh allows), so that neither changes what is trained.

  Args:
    given: paths that the user set, with underscores; a mesh or `training.accumulate` among them is
      kept.
  """
  e = experiment
  changes: Pairs = []
  if not any(path.startswith('mesh') for path in given):
    batch = e.training.batch_size // e.training.accumulate
    mesh = default_mesh(e.model, target, e.training.batch_size, e.training.accumulate)
    changes += [(f'mesh.{a}', str(n)) for a, n in mesh.given.items() if n > 1 or a == 'data']
    e = e.replace(mesh=mesh)
    if e.data.positions % mesh.context:
      accepted = (
        f'a multiple of {target.devices}, the devices of {target.name}, since sequences of '
        f'{e.data.positions} are not sharded evenly over them either; or use a smaller target or '
        '--mesh'
      )
      raise InputError('training.batch_size', batch, accepted)
  if 'training.accumulate' not in given:
    count = _microbatches(e, target)
    if count != e.training.accumulate:
      changes.append(('training.accumulate', str(count)))
      e = e.replace(training=e.training.replace(accumulate=count))
  return e, changes


def _microbatches(experiment: Experiment, target: Target) -> int:
  """Return the fewest microbatches that fit: those that the mesh needs if they do, else found by
  bisection, since memory falls with them."""
  setup = dataclasses.replace(setup_of(experiment, target), accumulate=1)
  try:
    counts = divisors(setup.local_batch[0])
    if len(counts) == 1 or fits(setup):
      return 1
    low, high = 1, len(counts) - 1
    while low < high:
      middle = (low + high) // 2
      fitting = fits(dataclasses.replace(setup, accumulate=counts[middle]))
      low, high = (low, middle) if fitting else (middle + 1, high)
    return counts[low]
  except InputError:  # what does not divide; whoever estimates this setup says it
    return experiment.training.accumulate
