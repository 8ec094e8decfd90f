"""Systems for `ops.ssm`: diagonal in complex conjugate pairs, dense, and the shift register; and
the discretization of continuous systems."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from jaxformer.ops.linear_solve import solve
from jaxformer.ops.ssm import System

# ---- from continuous to discrete ---------------------------------------------------------------


def zoh(
  a: Complex[Array, 'H N'], b: Complex[Array, 'H N'], dt_H: Float[Array, ' H']
) -> tuple[Array, Array]:
  """Zero-order hold of x' = a x + b u for diagonal a: log Abar = dt a and Bbar = (Abar - 1) / a b
  (Gu et al. 2022, eq. 6).

  The imaginary part of log Abar is reduced to [-pi, pi], so that powers of Abar are accurate. Near
  a = 0, where the quotient and its gradient are lost, Bbar is dt (1 + dt a / 2) b."""
  z = dt_H[:, None] * a
  small = jnp.square(z.real) + jnp.square(z.imag) < 1e-10
  half = jnp.sin(0.5 * z.imag)
  # e^z - 1 without the cancellation near z = 0.
  grown = jax.lax.complex(
    jnp.expm1(z.real) * jnp.cos(z.imag) - 2 * half * half, jnp.exp(z.real) * jnp.sin(z.imag)
  )
  turns = jax.lax.stop_gradient(jnp.round(z.imag / (2 * math.pi)))
  high = 6.28125  # 2 pi in two parts, of which the first times a small integer is exact
  angle = (z.imag - turns * high) - turns * (2 * math.pi - high)
  quotient = grown / jnp.where(small, 1.0, a) * b
  return jax.lax.complex(z.real, angle), jnp.where(
    small, dt_H[:, None] * (1 + 0.5 * z) * b, quotient
  )


def bilinear(
  a: Complex[Array, 'H N'], b: Complex[Array, 'H N'], dt_H: Float[Array, ' H']
) -> tuple[Array, Array]:
  """Tustin's rule for diagonal a: Abar = (1 + dt a / 2) / (1 - dt a / 2), Bbar = dt b / (1 - dt a /
  2). Returns log Abar and Bbar.

  Where Abar is 0, dt a / 2 counts as the next number above -1, since log 0 has no gradient."""
  w = 0.5 * dt_H[:, None] * a
  step = 2.0**-24  # from -1 to that number
  over = 1 + w.real
  over = over + jnp.where(jnp.square(over) + jnp.square(w.imag) < step**2, step, 0.0)
  above, below = (
    jnp.square(over) + jnp.square(w.imag),
    jnp.square(1 - w.real) + jnp.square(w.imag),
  )
  # |Abar|^2 - 1: exact where Abar is near the unit circle
  ratio = 4 * w.real / below
  near = ratio > -0.5
  far = jnp.log(above) - jnp.log(below)
  size = 0.5 * jnp.where(near, jnp.log1p(jnp.where(near, ratio, 0.0)), far)
  angle = jnp.arctan2(w.imag, over) + jnp.arctan2(w.imag, 1 - w.real)
  return jax.lax.complex(size, angle), dt_H[:, None] * b / (1 - w)


def dense_bilinear(
  a: Float[Array, 'H N N'], b: Float[Array, 'H N'], dt_H: Float[Array, ' H']
) -> tuple[Float[Array, 'H N N'], Float[Array, 'H N']]:
  """Tustin's rule for real matrices: Abar - I = (I - dt A / 2)^{-1} dt A (see `DenseSystem`) and
  Bbar = (I - dt A / 2)^{-1} dt b."""
  dt = dt_H[:, None, None]
  right = dt * jnp.concatenate([a, b[..., None]], axis=-1)
  solved = solve(jnp.eye(a.shape[-1])[None] - 0.5 * dt * a, right)
  return solved[..., :-1], solved[..., -1]


# ---- complex numbers as real states ------------------------------------------------------------


def as_real(z):
  """The real representation of complex numbers: all real parts, then all imaginary parts."""
  return jnp.concatenate([z.real, z.imag], axis=-1)


def as_complex(x):
  """The inverse of `as_real`."""
  re, im = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jax.lax.complex(re, im)


def reading(c: Array) -> Array:
  """The real vector whose inner product with the real representation of x is 2 Re(c x)."""
  return jnp.concatenate([2 * c.real, -2 * c.imag], axis=-1)


# ---- diagonal ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalSystem(System):
  """x_t = exp(log_a) x_{t-1} + b u_t, y_t = 2 Re(c x_t): each complex number represents itself
  and its conjugate, so a system of real state size N has P = N / 2 of them.

  Attributes:
    log_a_HP, b_HP: from `zoh` or `bilinear`.
    c_MHP: one output vector per output.
  """

  log_a_HP: Complex[Array, 'H P']
  b_HP: Complex[Array, 'H P']
  c_MHP: Complex[Array, 'M H P']

  axes = (('inner', None), ('inner', None), (None, 'inner', None))

  def output_map(self):
    return reading(self.c_MHP)

  def next(self, x_BHN, u_BH):
    return (
      _rotate(self._powers(jnp.ones(1))[:, 0][None], x_BHN)
      + as_real(self.b_HP)[None] * u_BH[..., None]
    )

  def transition(self, steps):
    a_H1P = self._powers(jnp.full(1, steps))
    return lambda x_HBN: _rotate(a_H1P, x_HBN)

  def _powers(self, j_C):
    """Abar^j: [H, C, P]."""
    j, log_a = j_C.astype(jnp.float32)[None, :, None], self.log_a_HP[:, None]
    size, angle = jnp.exp(j * log_a.real), j * log_a.imag
    return jax.lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))

  def inputs(self, length):
    return as_real(self.b_HP[:, None] * self._powers(jnp.arange(length)))

  def outputs(self, length, first, step):
    return reading(self.c_MHP[:, :, None] * self._powers(first + step * jnp.arange(length))[None])


def _rotate(a, x):
  """The product of complex numbers with a state in real representation."""
  re, im = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([re * a.real - im * a.imag, re * a.imag + im * a.real], axis=-1)


# ---- dense -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseSystem(System):
  """Real matrices: x_t = Abar x_{t-1} + b u_t, y_t = c x_t with Abar = I + d. Powers come from
  squares (Krylov doubling): O(N^3 log C) per channel.

  Matrices near I, of systems with slow modes, are stored and multiplied as their difference d from
  it: in fp32, I + d would keep only a few digits of d, which determine the slow modes."""

  d_HNN: Float[Array, 'H N N']
  b_HN: Float[Array, 'H N']
  c_MHN: Float[Array, 'M H N']

  axes = (('inner', None, None), ('inner', None), (None, 'inner', None))

  def output_map(self):
    return self.c_MHN

  def next(self, x_BHN, u_BH):
    moved = jnp.einsum('hnk,bhk->bhn', self.d_HNN, x_BHN, precision='highest')
    return x_BHN + (moved + self.b_HN[None] * u_BH[..., None])

  def transition(self, steps):
    d = power_less_one(self.d_HNN, steps)
    return lambda x_HBN: x_HBN + jnp.einsum('hnk,hbk->hbn', d, x_HBN, precision='highest')

  def inputs(self, length):
    return krylov(self.d_HNN, self.b_HN[:, None], length, transposed=True)

  def outputs(self, length, first, step):
    M, H, N = self.sizes
    first_HMN = jnp.swapaxes(self.c_MHN, 0, 1)
    if first:
      first_HMN = first_HMN + jnp.matmul(first_HMN, self.d_HNN, precision='highest')
    d = self.d_HNN if step == 1 else power_less_one(self.d_HNN, step)
    return krylov(d, first_HMN, length).reshape(H, length, M, N).transpose(2, 0, 1, 3)


def power_less_one(d: Float[Array, 'H N N'], power: int) -> Float[Array, 'H N N']:
  """(I + d)^power - I by repeated squaring, without ever adding I: (I + d)(I + e) = I + (d + e + d
  e)."""
  result = jnp.zeros_like(d)
  while power:
    if power & 1:
      result = result + d + jnp.matmul(result, d, precision='highest')
    power >>= 1
    d = _squared_less_one(d) if power else d
  return result


def _squared_less_one(d):
  return 2 * d + jnp.matmul(d, d, precision='highest')


def krylov(
  d_HNN: Float[Array, 'H N N'], v_HMN: Float[Array, 'H M N'], length: int, transposed: bool = False
) -> Float[Array, 'H R N']:
  """The rows v Abar^j, or v (Abar^j)^T, for j = 0 .. length - 1 and Abar = I + d, M rows per
  j: each squaring of Abar doubles their number."""
  M, rows = v_HMN.shape[1], v_HMN
  while (have := rows.shape[1] // M) < length:
    old = rows[:, : (length - have) * M]
    moved = jnp.einsum(
      'hrk,hnk->hrn' if transposed else 'hrk,hkn->hrn', old, d_HNN, precision='highest'
    )
    rows = jnp.concatenate([rows, old + moved], axis=1)
    d_HNN = _squared_less_one(d_HNN) if 2 * have < length else d_HNN
  return rows


# ---- shift -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShiftSystem(System):
  """A shift register: the state is the last N inputs, newest first, y_t = sum_n c_n u_{t-n}. A
  short convolution as a state-space model (Fu et al. 2023, section 3.2: the shift SSM of H3, with B
  = e_1)."""

  c_MHN: Float[Array, 'M H N']

  axes = ((None, 'inner', None),)

  def output_map(self):
    return self.c_MHN

  def next(self, x_BHN, u_BH):
    return jnp.concatenate([u_BH[..., None], x_BHN[..., :-1]], axis=-1)

  def transition(self, steps):
    kept = max(self.sizes[2] - steps, 0)
    return lambda x_HBN: jnp.pad(x_HBN[..., :kept], ((0, 0), (0, 0), (self.sizes[2] - kept, 0)))

  def inputs(self, length):
    _, H, N = self.sizes
    return jnp.broadcast_to(jnp.eye(length, N)[None], (H, length, N))

  def outputs(self, length, first, step):
    N, end = self.sizes[2], first + step * length
    c = jnp.pad(self.c_MHN, ((0, 0), (0, 0), (0, end)))
    return jnp.stack([c[..., j : j + N] for j in range(first, end, step)], axis=2)
