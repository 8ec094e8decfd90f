"""What `sample` draws, against distributions written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.inference import generate, request
from jaxformer.inference.sampling import GREEDY, OFF, PLAIN, Sampling, filtered, sample
from tests.inference.models import model

P = np.array([0.05, 0.4, 0.25, 0.1, 0.2])
SEEN = np.array([False, True, False, False, True])


def expected(sampling: Sampling, p=P, seen=SEEN) -> np.ndarray:
  """The distribution, token by token in plain Python."""
  logits = np.log(p)
  if sampling.repetition_penalty:
    r = sampling.repetition_penalty
    logits = [l if not s else l / r if l > 0 else l * r for l, s in zip(logits, seen)]
  weights = {i: np.exp(l / sampling.temperature) for i, l in enumerate(logits)}
  if sampling.top_k:
    weights = dict(sorted(weights.items(), key=lambda kv: -kv[1])[: sampling.top_k])
  if sampling.top_p:
    total, mass, kept = sum(weights.values()), 0.0, {}
    for i, w in sorted(weights.items(), key=lambda kv: -kv[1]):
      if mass >= sampling.top_p:
        break
      kept[i] = w
      mass += w / total
    weights = kept
  if sampling.min_p:
    weights = {i: w for i, w in weights.items() if w >= sampling.min_p * max(weights.values())}
  return np.array([weights.get(i, 0.0) for i in range(len(p))]) / sum(weights.values())


CASES = [
  PLAIN,
  Sampling(temperature=0.5),
  Sampling(temperature=2.0),
  Sampling(top_k=1),
  Sampling(top_k=3),
  Sampling(top_k=99),
  Sampling(top_p=0.01),
  Sampling(top_p=0.6),
  Sampling(top_p=0.7),
  Sampling(top_p=0.999),
  Sampling(min_p=0.5),
  Sampling(min_p=1.0),
  Sampling(repetition_penalty=1.7),
  Sampling(repetition_penalty=0.5),
  Sampling(repetition_penalty=1.3, temperature=0.8, top_k=4, top_p=0.9, min_p=0.3),
]


@pytest.mark.quick
@pytest.mark.parametrize('sampling', CASES, ids=str)
def test_distribution_is_that_of_the_papers(sampling):
  logits = jnp.asarray(np.log(P), jnp.float32)[None]
  got = jax.nn.softmax(filtered(logits, jnp.asarray(SEEN)[None], sampling))[0]
  np.testing.assert_allclose(got, expected(sampling), atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize('sampling', [PLAIN, CASES[-1]], ids=str)
def test_draws_follow_the_distribution(sampling):
  n = 6_000
  logits, seen = (
    jnp.broadcast_to(jnp.asarray(np.log(P), jnp.float32), (n, 5)),
    jnp.broadcast_to(SEEN, (n, 5)),
  )
  tokens = np.asarray(
    jax.jit(lambda k: sample(k, logits, seen, sampling))(jax.random.split(jax.random.key(0), n))
  )
  counts, p = np.bincount(tokens, minlength=5), expected(sampling)
  assert not counts[p == 0].any()
  chi2 = ((counts - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum()
  # the 0.9999 quantile at 4 degrees of freedom; fewer tokens kept have a lower one
  assert chi2 < 23.5


@pytest.mark.quick
def test_equal_logits():
  """The nucleus is the smallest set even among equals, and the most likely token stays when
  rounding says otherwise."""
  flat = jnp.zeros((1, 8))
  assert np.isfinite(filtered(flat, None, Sampling(top_p=0.5))).tolist() == [
    [True] * 4 + [False] * 4
  ]
  assert np.isfinite(filtered(flat, None, Sampling(top_k=2))).all()  # as likely as the second
  assert np.isfinite(filtered(flat, None, Sampling(min_p=1.0))).all()
  assert np.isfinite(filtered(flat, None, Sampling(top_p=1e-9))).sum() == 1


@pytest.mark.quick
def test_rows_are_drawn_by_their_own_keys():
  keys, logits = (
    jax.random.split(jax.random.key(3), 6),
    jax.random.normal(jax.random.key(4), (6, 50)),
  )
  together = sample(keys, logits, None, PLAIN)
  alone = [int(sample(keys[i : i + 1], logits[i : i + 1], None, PLAIN)[0]) for i in range(6)]
  assert together.tolist() == alone


@pytest.mark.quick
def test_greedy_takes_the_argmax_after_the_penalty():
  logits, seen = (
    jnp.asarray([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]]),
    jnp.asarray([[False, True, False], [True, False, False]]),
  )
  assert sample(None, logits, None, GREEDY).tolist() == [1, 0]
  assert sample(None, logits, seen, Sampling(temperature=0.0, repetition_penalty=3.0)).tolist() == [
    2,
    2,
  ]


@pytest.mark.quick
@pytest.mark.parametrize(
  'wrong',
  [
    {'temperature': -1.0},
    {'temperature': 1e-300},
    {'temperature': 1e300},
    {'temperature': float('nan')},
    {'temperature': float('inf')},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 1.1},
    {'top_p': float('nan')},
    {'min_p': -0.1},
    {'min_p': 1.5},
    {'repetition_penalty': 0.0},
    {'repetition_penalty': 1e300},
    {'temperature': 0.0, 'top_k': 5},
    {'temperature': 0.0, 'top_p': 0.5},
    {'temperature': 0.0, 'min_p': 0.5},
  ],
  ids=str,
)
def test_settings_without_effect_are_errors(wrong):
  with pytest.raises(InputError, match=list(wrong)[-1]):
    Sampling(**wrong)


@pytest.mark.quick
@pytest.mark.parametrize('field', OFF)
def test_values_that_are_off_in_other_libraries_are_off(field):
  off = {field: OFF[field]}
  logits = jnp.asarray(np.random.default_rng(0).normal(0, 9, (4, 999)), jnp.float32)
  assert np.array_equal(filtered(logits, None, Sampling(**off)), logits)
  assert sample(None, logits, None, Sampling(temperature=0.0, **off)).tolist() == (
    logits.argmax(-1).tolist()
  )
  definition, params = model('alibi')
  options = {'max_new_tokens': 6, 'seed': 3}
  found = [
    generate(request(definition, params, [[1, 2]], sampling=s, **options))[0].tokens
    for s in (Sampling(), Sampling(**off))
  ]
  assert found[0] == found[1]
