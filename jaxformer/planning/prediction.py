"""Prediction: speed of a compiled step, by the clock of `step_clock`."""

import dataclasses
from typing import Any

from jaxformer.planning.cost import cost, flops
from jaxformer.planning.setup import PlanSetup
from jaxformer.planning.step_profile import StepProfile

_BOUNDS = {
  'product': 'matrix products',
  'kernel': 'kernels',
  'memory': 'memory traffic',
  'communication': 'communication',
}
# The least and the largest ratio of published to predicted times of training steps, in
# `experiments/clock_validation.md`.
PUBLISHED_TO_PREDICTED = 0.82, 1.10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
  """What a TPU is predicted to do in a step.

  Attributes:
    seconds: of a step.
    interval: seconds between which the step would be if it were as far from its prediction as some
      published one; None in inference, of which none was compared.
    tokens_per_second, tokens_per_second_per_chip: of all chips, and of one.
    mfu: model FLOPs utilization, in the causal convention (masked scores of attention are not
      counted): FLOPs of the model, without recomputation, over those at the peak of all chips.
    mfu_full: with all scores of attention counted; None in inference.
    hfu: hardware FLOPs utilization: the same of all FLOPs that the program executes.
    bound: what takes most of the time.
    shares: of the time, by `Timed.kind`.
    train_seconds, train_price_usd: of the whole training at this speed; None in inference.
  """

  seconds: float
  interval: tuple[float, float] | None
  tokens_per_second: float
  tokens_per_second_per_chip: float
  mfu: float
  mfu_full: float | None
  hfu: float
  bound: str
  shares: dict[str, float]
  train_seconds: float | None = None
  train_price_usd: float | None = None

  def as_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def predict(
  setup: PlanSetup,
  profile: StepProfile,
  *,
  tokens: float | None = None,
  price_per_hour: float = 0.0,
) -> Prediction:
  """The prediction for a setup from the profile of its program.

  Args:
    tokens: of the whole training; None in inference.
    price_per_hour: of all chips, USD.
  """
  chips, chip, seconds = setup.target.total_chips, setup.target.chip, profile.seconds
  step_tokens = setup.batch_size * (1 if setup.phase == 'decode' else setup.length)
  at_peak = seconds * chips * chip.peak(setup.precision)
  model = flops(
    setup.model, setup.phase, setup.batch_size, setup.length, last_logits=setup.phase == 'prefill'
  )
  training = setup.phase == 'train'
  least, most = PUBLISHED_TO_PREDICTED
  full = cost(setup.model, setup.length).train_flops_per_token_full * step_tokens
  train_seconds = None if tokens is None else tokens / step_tokens * seconds
  return Prediction(
    seconds=seconds,
    interval=(least * seconds, most * seconds) if training else None,
    tokens_per_second=step_tokens / seconds,
    tokens_per_second_per_chip=step_tokens / seconds / chips,
    mfu=model / at_peak,
    mfu_full=full / at_peak if training else None,
    hfu=profile.flops * setup.target.devices / at_peak,
    bound=_BOUNDS[max(profile.by_kind, key=profile.by_kind.__getitem__)],
    shares={kind: s / seconds for kind, s in profile.by_kind.items()},
    train_seconds=train_seconds,
    train_price_usd=None if train_seconds is None else train_seconds / 3600 * price_per_hour,
  )
