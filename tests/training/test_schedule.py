import jax.numpy as jnp
import pytest

from jaxformer.config import InputError
from jaxformer.training import WSD, Constant, Cosine, Linear, Noam

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
