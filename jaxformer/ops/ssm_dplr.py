"""The system of S4: diagonal plus rank one, whose kernel is a Cauchy product (Gu, Goel and Re 2022,
'Efficiently Modeling Long Sequences with Structured State Spaces', section 3 and appendix C)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from jaxformer.ops.linear_solve import solve
from jaxformer.ops.ssm_systems import DenseSystem, as_real, power_less_one, reading

NODES = 128  # frequencies of a kernel that are computed together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DplrSystem(DenseSystem):
  """x' = (Lambda - p p^*) x + b u, y = 2 Re(c x), discretized by Tustin's rule. Each complex
  number represents itself and its conjugate: the system has real state size N = 2 P per channel.
  The recurrence is that of the same system with real matrices; the compiler removes them where only
  a kernel is computed.

  Instead of C the system has C~ = C (I - Abar^length), which the kernel of that length needs (lemma
  C.3). Kernels of up to that length are computed from C~ alone and truncated; for the recurrence
  and for longer kernels C is recovered with an N x N solve. That loses digits as |1 - e^{-dt length
  / 2}| approaches 0, so `length` should not be far below 1 / dt.

  Attributes:
    a_HP: Lambda, with negative real part.
    p_HP, b_HP: p and b.
    tilde_MHP: C~.
    dt_H: the step.
    length: that of C~.
  """

  a_HP: Complex[Array, 'H P']
  p_HP: Complex[Array, 'H P']
  b_HP: Complex[Array, 'H P']
  tilde_MHP: Complex[Array, 'M H P']
  dt_H: Float[Array, ' H']
  length: int = dataclasses.field(metadata={'static': True})

  axes = (*DenseSystem.axes, *(('inner', None),) * 3, (None, 'inner', None), ('inner',))

  def kernel(self, length):
    """The inverse Fourier transform of the generating function at the roots of unity (algorithm
    1)."""
    if length <= self.length:
      return self._cauchy_kernel(self.tilde_MHP, self.length)[..., :length]
    return self._cauchy_kernel(truncated(self.c_MHN, self.d_HNN, length), length)

  def _cauchy_kernel(self, tilde_MHP, length: int):
    """k = irfft of 2 / (1 + w) (C~ r b - C~ r p p^* r b / (1 + p^* r p)) with r = (z -
    Lambda)^{-1}, z = 2 / dt (1 - w) / (1 + w), at w = exp(-2 pi i k / length) for k = 0 .. length /
    2.

    With theta / 2 = pi k / length, s and c its sine and cosine, r = c dt/2 / (i s - c dt/2 Lambda),
    so nothing divides by 1 + w, and w = -1 (c = 0) is a node like all others with the limit dt/2 C~
    b. The terms are computed for `NODES` nodes at a time and recomputed in the backward pass: O(H N
    NODES) memory, not O(H N length).
    """
    M, H, _ = tilde_MHP.shape
    p_HP, b_HP = self.p_HP, self.b_HP
    half = np.pi * np.arange(length // 2 + 1) / length
    blocks = -(-len(half) // NODES)
    # any number: cut off below
    half = np.pad(half, (0, blocks * NODES - len(half)), constant_values=1.0)
    sin, cos = (jnp.asarray(f(half).reshape(blocks, NODES), jnp.float32) for f in (np.sin, np.cos))
    # C~ b and C~ p for each output, then p^* b and p^* p; their conjugates belong to the conjugate
    # of Lambda.
    products = [
      *jnp.concatenate([tilde_MHP * b_HP[None], tilde_MHP * p_HP[None]]),
      p_HP.conj() * b_HP,
      p_HP.conj() * p_HP,
    ]
    v_HVP = jnp.stack(products, axis=1)
    weights = as_real(v_HVP.conj()), as_real(v_HVP)
    mu_HP, gain = 0.5 * self.dt_H[:, None] * self.a_HP, 0.5 * self.dt_H[:, None, None]

    @jax.checkpoint
    def at(nodes):
      s_G, c_G = nodes
      sums = _cauchy(weights, mu_HP, s_G, c_G)
      cb, cp, pb, pp = sums[:, :M], sums[:, M : 2 * M], sums[:, -2:-1], sums[:, -1:]
      g = gain * c_G[None, None]
      return gain * (cb - cp * (g * pb) / (1.0 + g * pp)) * jax.lax.complex(c_G, s_G)[None, None]

    k_f = jax.lax.map(at, (sin, cos))  # [blocks, H, M, NODES]
    k_f = k_f.transpose(2, 1, 0, 3).reshape(M, H, -1)[..., : length // 2 + 1]
    return jnp.fft.irfft(k_f, length, axis=-1)


def dplr(
  a_HP: Complex[Array, 'H P'],
  p_HP: Complex[Array, 'H P'],
  b_HP: Complex[Array, 'H P'],
  tilde_MHP: Complex[Array, 'M H P'],
  dt_H: Float[Array, ' H'],
  length: int,
) -> DplrSystem:
  """The system, with its real matrices."""
  d, bbar = dense_dplr(a_HP, p_HP, b_HP, dt_H)
  rest = -jnp.swapaxes(power_less_one(d, length), 1, 2)
  c_HNM = solve(rest, jnp.transpose(reading(tilde_MHP), (1, 2, 0)))
  c_MHN = jnp.transpose(c_HNM, (2, 0, 1))
  return DplrSystem(d, bbar, c_MHN, a_HP, p_HP, b_HP, tilde_MHP, dt_H, length)


def truncated(
  c_MHN: Float[Array, 'M H N'], d_HNN: Float[Array, 'H N N'], length: int
) -> Complex[Array, 'M H P']:
  """C~ = C (I - Abar^length) for Abar = I + d, as complex numbers."""
  tilde = -jnp.einsum('mhk,hkn->mhn', c_MHN, power_less_one(d_HNN, length), precision='highest')
  re, im = jnp.split(tilde, 2, axis=-1)
  return jax.lax.complex(0.5 * re, -0.5 * im)


def dense_dplr(
  a_HP: Complex[Array, 'H P'],
  p_HP: Complex[Array, 'H P'],
  b_HP: Complex[Array, 'H P'],
  dt_H: Float[Array, ' H'],
) -> tuple[Float[Array, 'H N N'], Float[Array, 'H N']]:
  """Abar - I for Abar = (I - dt/2 A)^{-1} (I + dt/2 A), and Bbar = (I - dt/2 A)^{-1} dt B, as real
  matrices for the state [Re x, Im x].

  With q = [Re p, Im p], A is D - 2 q q^T: D rotates each pair. Then (I - dt/2 A)^{-1} = E - E q q^T
  E / (1 / dt + q^T E q) with E = (I - dt/2 D)^{-1}, all in closed form. A + A^T is negative
  definite, so every power of Abar has a norm below 1, and neither powers nor squares of it lose
  digits."""
  dt = dt_H[:, None]
  e = 1.0 / (1.0 - 0.5 * dt * a_HP)
  e_q, e_b = e * p_HP, e * b_HP  # complex: E [Re p, Im p]
  gain = 1.0 / (1.0 / dt + jnp.sum((p_HP.conj() * e_q).real, axis=1, keepdims=True))
  right = as_real(e_q)
  left = as_real((e * p_HP.conj()).conj())  # q^T E
  bbar = dt * (as_real(e_b) - right * gain * jnp.sum(left * as_real(b_HP), axis=1, keepdims=True))
  # Abar - I = 2 ((I - dt/2 A)^{-1} - I); of the part without q that is dt a / (1 - dt a / 2).
  turn = dt * a_HP * e
  re, im = jax.vmap(jnp.diag)(turn.real), jax.vmap(jnp.diag)(turn.imag)
  block = jnp.concatenate(
    [jnp.concatenate([re, -im], axis=2), jnp.concatenate([im, re], axis=2)], axis=1
  )
  return block - 2.0 * gain[..., None] * right[:, :, None] * left[:, None], bbar


def _cauchy(weights, mu_HP, s_G, c_G):
  """sum_n v_n / (i s - c mu_n) + conj(v_n) / (i s - c conj(mu_n)): [H, V, G]."""
  c, s = c_G[None, None], s_G[None, None]
  real, imag = -c * mu_HP.real[..., None], c * mu_HP.imag[..., None]
  below, above = s - imag, s + imag  # of mu and of its conjugate
  size, size_conj = 1.0 / (real * real + below * below), 1.0 / (real * real + above * above)
  re, re_conj, im, im_conj = real * size, real * size_conj, -below * size, -above * size_conj
  terms = (re + re_conj, im - im_conj), (im + im_conj, re - re_conj)
  reals, imags = (
    jnp.matmul(w, jnp.concatenate(term, axis=1), precision='highest')
    for w, term in zip(weights, terms, strict=True)
  )
  return jax.lax.complex(reals, imags)
