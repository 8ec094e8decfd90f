import jax.numpy as jnp
import optax
import pytest

from jaxformer.config import InputError
from jaxformer.training import (
  WSD,
  Constant,
  Cosine,
  CosineThenConstant,
  Exponential,
  InverseSquareRoot,
  Linear,
  Noam,
  StepDecay,
)

pytestmark = pytest.mark.quick

GOLDEN = {  # step -> factor, of 101 steps with a warm-up of 20: progress is (step - 20) / 80
  Constant(warmup=20): {0: 0.05, 9: 0.5, 19: 1.0, 20: 1.0, 100: 1.0},
  Linear(warmup=20, final=0.1): {0: 0.05, 20: 1.0, 60: 0.55, 100: 0.1},
  Cosine(warmup=20, final=0.1): {
    4: 0.25,
    19: 1.0,
    20: 1.0,
    40: 0.1 + 0.9 * (1 + 2**-0.5) / 2,
    60: 0.55,
    100: 0.1,
    500: 0.1,
  },
  WSD(warmup=20, decay=0.25): {9: 0.5, 20: 1.0, 80: 1.0, 90: 0.5, 100: 0.0},
  WSD(warmup=20, decay=0.25, sqrt=True): {80: 1.0, 85: 0.5, 100: 0.0},
  Noam(warmup=16, width=64): {0: 1 / 8 / 64, 15: 1 / 32, 63: 1 / 64},
  # of the first 51 steps: progress is (step - 20) / 30
  CosineThenConstant(warmup=20, until=0.505, final=0.1): {9: 0.5, 20: 1.0, 35: 0.55, 60: 0.1},
  # 80 steps from 20 to 100, of which the first 10 are held
  Exponential(warmup=20, hold=10, final=0.01): {9: 0.5, 20: 1.0, 30: 1.0, 65: 0.1, 100: 0.01},
  StepDecay(warmup=0, hold=50, every=10): {
    0: 1,
    49: 1,
    50: 1 / 2,
    59: 1 / 2,
    60: 1 / 4,
    100: 2**-6,
  },
  InverseSquareRoot(warmup=16): {0: 1 / 16, 15: 1.0, 63: 1 / 2},
}


@pytest.mark.parametrize('schedule', GOLDEN, ids=lambda s: s.tag)
def test_golden_points(schedule):
  for step, factor in GOLDEN[schedule].items():
    assert float(schedule.factor(step, 101)) == pytest.approx(factor, rel=1e-5), step


def test_warmup_of_none_is_a_tenth_and_never_over_1000():
  assert [Cosine().warmup_steps(n) for n in (5, 300, 50_000)] == [0, 30, 1000]
  assert float(Cosine().factor(0, 5)) == 1.0


def test_a_traced_step_gives_what_a_number_gives():
  assert float(Cosine().factor(jnp.int32(70), 101)) == float(Cosine().factor(70, 101))


def test_bad_values_are_refused():
  with pytest.raises(InputError, match=r'WSD\.decay = 1\.5'):
    WSD(decay=1.5)
  with pytest.raises(InputError, match=r'Cosine\.warmup'):
    Cosine(warmup=-1)


def test_steps_and_inverse_square_roots_are_those_of_optax():
  ours, theirs = (
    StepDecay(warmup=0, hold=6, every=3, decay=0.8),
    optax.exponential_decay(1.0, 3, 0.8, transition_begin=3, staircase=True),
  )
  for step in range(20):
    assert float(ours.factor(step, 20)) == pytest.approx(float(theirs(step)))
  # with the rate of the peak, as Noam has it by a factor of sqrt(width * warmup)
  root, noam = InverseSquareRoot(warmup=16), Noam(warmup=16, width=64)
  for step in (0, 10, 40):
    assert float(root.factor(step, 99)) == pytest.approx(32 * float(noam.factor(step, 99)))
