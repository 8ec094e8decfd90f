"""The HiPPO-LegS matrices and their decompositions (Gu et al. 2020; 2022), in double precision with
numpy, for initialization."""

from __future__ import annotations

import functools

import numpy as np


def legs(size: int) -> tuple[np.ndarray, np.ndarray]:
  """A and B of HiPPO-LegS (Gu et al. 2020, theorem 2): A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1)
  for n = k, 0 above; B_n = sqrt(2n+1)."""
  root = np.sqrt(2 * np.arange(size) + 1.0)
  return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(size) + 1.0), root


@functools.lru_cache(maxsize=8)
def legs_basis(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues and eigenvectors [size, size / 2] of the normal matrix LegS + P P^T with P_n =
  sqrt(n + 1/2) (Gu et al. 2022, theorem 1).

  It is -1/2 plus a skew-symmetric matrix, so its eigenvectors are those of a Hermitian one. They
  come in conjugate pairs, of which those with positive imaginary part are kept, sorted by
  decreasing frequency, with the phase at which the first entry of every eigenvector is
  positive."""
  p = np.sqrt(np.arange(size) + 0.5)
  frequency, v = np.linalg.eigh(-1j * (legs(size)[0] + np.outer(p, p) + 0.5 * np.eye(size)))
  kept = np.argsort(-frequency)[: size // 2]
  return -0.5 + 1j * frequency[kept], v[:, kept] * (np.abs(v[0, kept]) / v[0, kept])


def legs_dplr(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """LegS as a diagonal matrix plus one of rank 1, A = V (Lambda - p p^*) V^*, in the basis V of
  `legs_basis` and its conjugate: Lambda, p = V^* P and b = V^* B, size / 2 complex numbers each.

  The imaginary part of b is clipped at 2, as in the authors' code (`nplr`, whose `B_clip` is 2):
  it would be 41 for a size of 64."""
  a, v = legs_basis(size)
  b = v.conj().T @ legs(size)[1]
  return a, v.conj().T @ np.sqrt(np.arange(size) + 0.5), b.real + 1j * np.clip(b.imag, -2, 2)
