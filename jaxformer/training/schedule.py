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


class CosineThenConstant(ScheduleConfig):
  """`Cosine` that reaches `final` at the fraction `until` of the run, and stays there: GPT-3 has a
  cosine over 260 of 300 billion tokens (Brown et al. 2020, appendix B)."""

  until: float
  final: float = 0.1

  def validate(self):
    super().validate()
    self.require(0 < self.until < 1, 'until', 'above 0 and below 1: a fraction of the steps')

  def factor(self, step, steps):
    short = max(1, round(self.until * steps))
    return Cosine(warmup=self.warmup_steps(steps), final=self.final).factor(step, short)


class Exponential(ScheduleConfig):
  """1 for `hold` steps after the warm-up, then final^p: exponential decay down to `final` at the
  last step, where p rises from 0 to 1 (Peng et al. 2023, RWKV, appendix G)."""

  hold: int = 0
  final: float = 0.1

  def validate(self):
    super().validate()
    self.require_not_negative('hold')
    self.require(self.final > 0, 'final', 'above 0 and at most 1')

  def factor(self, step, steps):
    w = self.warmup_steps(steps)
    t, begin = jnp.asarray(step, jnp.float32), w + self.hold
    progress = jnp.clip((t - begin) / max(1, steps - 1 - begin), 0.0, 1.0)
    return jnp.minimum(1.0, (t + 1) / max(1, w)) * self.final**progress


class StepDecay(ScheduleConfig):
  """1 for `hold` steps, then times `decay` there and again every `every` steps: decay^(1 + floor((t
  - hold) / every)) from step t = hold (Sutskever et al. 2014, section 3.4; Zaremba et al. 2014,
  section 4.1)."""

  hold: int
  every: int
  decay: float = 0.5

  def validate(self):
    super().validate()
    self.require_not_negative('hold')
    self.require_positive('every')
    self.require(0 < self.decay <= 1, 'decay', 'above 0 and at most 1')

  def factor(self, step, steps):
    w, t = self.warmup_steps(steps), jnp.asarray(step, jnp.int32)
    times = jnp.maximum(0, 1 + (t - self.hold) // self.every)
    return jnp.minimum(1.0, (t + 1) / max(1, w)) * self.decay ** times.astype(jnp.float32)


class InverseSquareRoot(ScheduleConfig):
  """Linear warm-up over w steps, then sqrt(w / t) with t = step + 1 (Shazeer et al. 2017, appendix
  C.1): `Noam` with the rate at the peak as `learning_rate`."""

  def factor(self, step, steps):
    t, w = jnp.asarray(step, jnp.float32) + 1, max(1, self.warmup_steps(steps))
    return jnp.minimum(t / w, jnp.sqrt(w / t))
