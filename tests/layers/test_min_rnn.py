"""minGRU and minLSTM against the recurrences of the paper, written here in float64, and against its
form in logarithms.

The layers run in fp32. The tolerance is 1e-6 of the largest magnitude of the output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.layer import Context
from jaxformer.layers.min_rnn import MinGru, MinLstm
from jaxformer.models.params import define
from jaxformer.testing.case import Alone

B, T, D = 2, 90, 32


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softplus(x):
  return np.logaddexp(0, x)


def g(x):
  return np.where(x >= 0, x + 0.5, sigmoid(x))


def log_g(x):
  return np.where(x >= 0, np.log(np.maximum(x, 0) + 0.5), -softplus(-x))


def layer(config, scale):
  """(output of a sequence, parameters in float64); larger weights with `scale`."""
  definition = define(Alone(layer=config))
  params = {n: scale * p for n, p in definition.init(jax.random.key(0)).items()}
  x = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
  y = jax.jit(lambda p, x: definition.merge(p)(x, Context()).y)(params, jnp.asarray(x))
  return np.asarray(y), x.astype(np.float64), {n: np.asarray(p, float) for n, p in params.items()}


def affine(x, p, name):
  return x @ p[f'{name}.kernel'] + p[f'{name}.bias']


def agrees(got, want):
  difference = np.abs(got - want).max() / np.abs(want).max()
  print(f'largest difference {difference:.1e} of the largest output')
  assert difference < 1e-6


@pytest.mark.parametrize('scale', [1.0, 10.0])
@pytest.mark.parametrize('kind', [MinGru, MinLstm])
def test_recurrences_are_those_of_the_paper(kind, scale):
  """Feng et al. 2024, algorithms 3 and 5, whose state starts from 0 here. At a scale of 10 gates
  close to 1e-8; beyond, the rounding of their logits is above the tolerance."""
  got, x, p = layer(kind.Config(), scale)
  first = sigmoid(affine(x, p, 'gates.0'))
  if kind is MinGru:
    keep, take = 1 - first, first
  else:
    second = sigmoid(affine(x, p, 'gates.1'))
    keep, take = first / (first + second), second / (first + second)
  h, want = np.zeros((B, D)), np.empty((B, T, D))
  candidate = g(affine(x, p, 'candidate'))
  for t in range(T):
    h = keep[:, t] * h + take[:, t] * candidate[:, t]
    want[:, t] = h
  agrees(got, want)


@pytest.mark.parametrize('kind', [MinGru, MinLstm])
def test_the_form_in_logarithms_gives_the_same(kind):
  """Algorithms 6 and 8: cumulative sums and log-sum-exp of logarithms."""
  got, x, p = layer(kind.Config(), 1.0)
  first = affine(x, p, 'gates.0')
  if kind is MinGru:
    log_keep, log_take = -softplus(first), -softplus(-first)
  else:
    difference = softplus(-first) - softplus(-affine(x, p, 'gates.1'))
    log_keep, log_take = -softplus(difference), -softplus(-difference)
  values = log_take + log_g(affine(x, p, 'candidate'))
  sums = np.cumsum(log_keep, axis=1)
  agrees(got, np.exp(sums + np.logaddexp.accumulate(values - sums, axis=1)))


def test_the_convolution_is_causal_and_comes_first():
  """h of a kernel that takes the input three tokens back is h of the input three tokens back."""
  config = MinGru.Config(hidden=24, d_conv=4)
  definition = define(Alone(layer=config))
  params = definition.init(jax.random.key(0))
  params['conv.kernel'] = jnp.zeros((4, D)).at[0].set(1.0)
  params['conv.bias'] = jnp.zeros(D)
  without = define(Alone(layer=config.replace(d_conv=None)))
  x = jax.random.normal(jax.random.key(2), (B, T, D))
  late = jnp.pad(x[:, :-3], ((0, 0), (3, 0), (0, 0)))
  others = {n: params[n] for n in without.info}
  np.testing.assert_allclose(
    definition.merge(params)(x, Context()).y, without.merge(others)(late, Context()).y, atol=1e-6
  )
