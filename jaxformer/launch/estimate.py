"""What a job will take: tokens, FLOPs, time, money and memory, from the cost model and the table of
hardware."""

from __future__ import annotations

import dataclasses

from jaxformer.config import InputError
from jaxformer.planning.cost import cost
from jaxformer.planning.target import Target
from jaxformer.training.experiment import Experiment

UTILISATION = 0.4


@dataclasses.dataclass(frozen=True)
class Estimate:
  """
  Attributes:
    params, active_params: of the model, and what one token uses of them.
    tokens: of the whole run.
    flops: model FLOPs of the whole run (causal convention).
    utilisation: part of the chips' peak in bfloat16 that the time counts on.
    seconds: of training; starting, compiling and evaluating come on top.
    price_per_hour: dollars for all chips.
    price: dollars for `seconds`.
    at_most: the prices are those on demand, because spot capacity has no list price: it moves with
      the market, below them.
  """

  params: int
  active_params: int
  tokens: int
  flops: float
  utilisation: float
  seconds: float
  price_per_hour: float
  price: float
  at_most: bool


def estimate(
  experiment: Experiment, target: Target, spot: bool, utilisation: float = UTILISATION
) -> Estimate:
  """The estimate of a whole run. Raises `InputError` for a utilisation that is none."""
  if not 0 < utilisation <= 1:
    raise InputError(f'--utilisation {utilisation:g}: must be above 0 and at most 1')
  t, length = experiment.training, experiment.data.positions
  of = cost(experiment.model, length)
  tokens = t.steps * t.batch_size * length
  flops = tokens * of.train_flops_per_token
  seconds = flops / (target.total_chips * target.chip.peak() * utilisation)
  listed, on_demand = target.price_per_hour(spot=spot), target.price_per_hour()
  an_hour = on_demand if listed is None else listed
  assert an_hour is not None  # there is no chip without a price on demand
  return Estimate(
    params=of.params,
    active_params=of.active_params,
    tokens=tokens,
    flops=flops,
    utilisation=utilisation,
    seconds=seconds,
    price_per_hour=an_hour,
    price=an_hour * seconds / 3600,
    at_most=listed is None,
  )
