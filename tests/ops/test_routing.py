"""Losses and loads of routers against their definitions: Monte Carlo, numpy, and figures written
out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.routing import (
  BIAS_GRADIENT,
  balance_loss,
  cv_squared,
  load_balancing_bias_gradient,
  load_of,
  noisy_load,
  z_loss,
)

pytestmark = pytest.mark.quick


def test_load_in_closed_form_is_that_of_drawing_again():
  """Load_e counts the tokens that would choose e if the noise of e alone were drawn again, that of
  the others kept: 20,000 draws."""
  N, E, k, draws = 6, 5, 2, 20_000
  keys = jax.random.split(jax.random.key(0), 4)
  clean = jax.random.normal(keys[0], (1, N, E))
  std = jax.nn.softplus(jax.random.normal(keys[1], (1, N, E)))
  noisy = clean + std * jax.random.normal(keys[2], clean.shape)
  got = np.asarray(noisy_load(clean, noisy, std, k))
  expected, numbers = np.zeros(E), np.random.default_rng(0)
  for n in range(N):
    for e in range(E):
      drawn = np.asarray(clean[0, n, e]) + np.asarray(std[0, n, e]) * numbers.standard_normal(draws)
      others = np.delete(np.asarray(noisy[0, n]), e)
      expected[e] += np.mean((others[None] > drawn[:, None]).sum(1) < k)
  np.testing.assert_allclose(got, expected, atol=4 * np.sqrt(N * 0.25 / draws))


def test_load_of_sure_choices_counts_them():
  """With little noise the closed form is the number of tokens of each expert."""
  clean = jnp.array([[[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [3.0, 0.0, 2.0, 1.0]]])
  np.testing.assert_allclose(
    noisy_load(clean, clean, jnp.full_like(clean, 1e-3), 2), [2, 2, 2, 0], atol=1e-6
  )


def test_losses_at_balance_and_at_collapse():
  """Balance costs K, as transformers' Mixtral has it (Switch's K is 1); all tokens at the same K of
  E experts, surely, E."""
  E, K = 8, 2
  balanced = jnp.stack([jnp.arange(8), (jnp.arange(8) + 1) % 8], -1)[None]
  assert float(balance_loss(load_of(balanced, E), jnp.full((1, 8, E), 1 / E))) == pytest.approx(K)
  assert float(
    balance_loss(load_of(balanced[..., :1], E), jnp.full((1, 8, E), 1 / E))
  ) == pytest.approx(1)
  collapsed = jnp.zeros((1, 8, 2), jnp.int32).at[..., 1].set(1)
  sure = jnp.zeros((1, 8, E)).at[..., :2].set(0.5)
  assert float(balance_loss(load_of(collapsed, E), sure)) == pytest.approx(E)
  assert float(cv_squared(jnp.array([1.0, 1.0, 1.0, 1.0]))) == 0
  # the variance over the population
  assert float(cv_squared(jnp.array([4.0, 0.0, 0.0, 0.0]))) == pytest.approx(3)
  assert float(z_loss(jnp.zeros((2, 3, E)))) == pytest.approx(np.log(E) ** 2)


def test_balance_loss_is_that_of_transformers():
  """Of one layer. Numbers of transformers 5.24, `load_balancing_loss_func((logits,), 4, 2)` with
  these logits."""
  logits = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.5, 0.4, 2.5, -0.5], [1.0, -1.0, 0.0, 3.0]])[None]
  expert = jax.lax.top_k(logits, 2)[1]
  assert float(balance_loss(load_of(expert, 4), jax.nn.softmax(logits))) == pytest.approx(
    2.097664, abs=1e-6
  )


def test_balance_loss_pulls_towards_balance():
  """Its gradient lowers the probability of what is chosen too often; the choice itself has none."""
  load = jnp.array([1.5, 0.5, 0.0, 0.0])
  gradient = jax.grad(lambda p: balance_loss(load, p))(jnp.full((1, 2, 4), 0.25))
  assert np.all(np.diff(np.asarray(gradient[0, 0])) <= 0)
  assert (
    float(jnp.abs(jax.grad(lambda f: balance_loss(f, jnp.full((1, 2, 4), 0.25)))(load)).max()) == 0
  )


def test_the_bias_gradient_is_the_sign_of_the_load():
  load = jnp.array([0.5, 0.25, 0.125, 0.125])
  value, gradient = jax.value_and_grad(lambda b: 7.0 * load_balancing_bias_gradient(b, load))(
    jnp.zeros(4)
  )
  assert float(value) == 0
  np.testing.assert_allclose(gradient, BIAS_GRADIENT * np.array([1, 0, -1, -1]))
