"""Learning-rate schedules: pure functions from the step to a factor on the optimizer's
`learning_rate`.

Steps count from 0: the first update of a warm-up over `w` steps uses 1 / w of the learning rate,
and update `w - 1` the full one."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.config import Config

Step = Int[Array, ''] | int
Factor = Float[Array, '']


class ScheduleConfig(Config, abstract=True):
  """Base of the schedules.

  Attributes:
    warmup: steps of linear warm-up; None for a tenth of the run, at most 1000.
  """

  warmup: int | None = None

  def validate(self):
    self.require_not_negative('warmup')
    self.require(0 <= getattr(self, 'final', 0.0) <= 1, 'final', 'between 0 and 1')

  def warmup_steps(self, steps: int) -> int:
    """Return the warm-up of a run of `steps` steps."""
    return min(steps // 10, 1000) if self.warmup is None else self.warmup

  def factor(self, step: Step, steps: int) -> Factor:
    """Return the factor at a step of a run of `steps` steps: min(1, (step + 1) / warmup) *
    after(progress), where progress rises from 0 at the end of the warm-up to 1 at the last
    step."""
    w = self.warmup_steps(steps)
    t = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((t - w) / max(1, steps - 1 - w), 0.0, 1.0)
    return jnp.minimum(1.0, (t + 1) / max(1, w)) * self.after(progress)

  def after(self, progress: Float[Array, '']) -> Factor:
    """Return the factor at a fraction of the steps after the warm-up."""
    raise NotImplementedError


class Constant(ScheduleConfig):
  """Constant 1."""

  def after(self, progress):
    return jnp.ones_like(progress)


class Linear(ScheduleConfig):
  """1 - (1 - final) p: from 1 down to `final`, a fraction of the learning rate."""

  final: float = 0.0

  def after(self, progress):
    return 1.0 - (1.0 - self.final) * progress


class Cosine(ScheduleConfig):
  """final + (1 - final) (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, without restarts)."""

  final: float = 0.1

  def after(self, progress):
    return self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


class WSD(ScheduleConfig):
  """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4): 1 until the last fraction
  `decay` of the steps after the warm-up, then linearly (or as 1 - sqrt, Hägele et al. 2024, with
  `sqrt`) down to `final`."""

  decay: float = 0.2
  final: float = 0.0
  sqrt: bool = False

  def validate(self):
    super().validate()
    self.require(0 < self.decay <= 1, 'decay', 'above 0 and at most 1: a fraction of the steps')

  def after(self, progress):
    gone = jnp.clip((progress - (1.0 - self.decay)) / self.decay, 0.0, 1.0)
    return 1.0 - (1.0 - self.final) * (jnp.sqrt(gone) if self.sqrt else gone)


class Noam(ScheduleConfig):
  """width^-0.5 min(t^-0.5, t warmup^-1.5) with t = step + 1 (Vaswani et al. 2017, section 5.3). The
  optimizer's `learning_rate` is a factor on it, 1 in the paper; `width` is the paper's d_model."""

  width: int

  def validate(self):
    super().validate()
    self.require_positive('width')

  def factor(self, step, steps):
    t, w = jnp.asarray(step, jnp.float32) + 1, max(1, self.warmup_steps(steps))
    return self.width**-0.5 * jnp.minimum(t**-0.5, t * w**-1.5)
