"""Linear time-invariant state-space models, one small system per channel.

  x_t = Abar x_{t-1} + Bbar u_t        y_t = C x_t

A `System` defines Abar, Bbar and C (`ops/ssm_systems.py`, `ops/ssm_dplr.py`); everything here is
the same for all of them. There are three implementations: the recurrence itself (`ssm_naive`), a
convolution with the kernel C Abar^j Bbar by Fourier transform (Gu et al. 2022, "S4"), and chunks:
inside a chunk a product with the Toeplitz matrix of the kernel, from chunk to chunk the state.
Chunks are matrix products, continue from a state and separate packed documents exactly; only the
states between chunks are in memory.

States are real: N numbers per channel, the real and the imaginary parts side by side where a system
is complex.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import scan_steps
from jaxformer.ops.documents import count_starts
from jaxformer.ops.implementation import Operation
from jaxformer.ops.long_convolution import fft_convolution
from jaxformer.ops.sequence_parallel import over_time, reset_masks, time_axes
from jaxformer.sharding import platform

# positions; about the state size, so that states take as much memory as the input
CHUNK = 64
FFT_FROM = 256  # positions from which Fourier transforms are faster than chunks on a CPU or GPU


class System(abc.ABC):
  """A discrete system for H independent channels with state size N (real) and M outputs each. A
  registered dataclass, so that it is a pytree of its arrays.

  Attributes:
    axes: logical axes of the arrays, in their order as leaves of the pytree.
  """

  axes: ClassVar[tuple[tuple[str | None, ...], ...]]

  @abc.abstractmethod
  def output_map(self) -> Float[Array, 'M H N']:
    """C, one vector per output."""

  @property
  def sizes(self) -> tuple[int, int, int]:
    """M, H, N."""
    M, H, N = self.output_map().shape
    return M, H, N

  @abc.abstractmethod
  def next(self, x_BHN, u_BH):
    """Abar x + Bbar u."""

  def read(self, x_BHN):
    """C x: [B, M, H]."""
    return jnp.sum(x_BHN[:, None] * self.output_map()[None], axis=-1)

  @abc.abstractmethod
  def transition(self, steps: int) -> Callable[[Array], Array]:
    """x_HBN -> Abar^steps x_HBN."""

  @abc.abstractmethod
  def inputs(self, length: int):
    """into_HCN = Abar^j Bbar for j = 0 .. length - 1."""

  @abc.abstractmethod
  def outputs(self, length: int, first: int, step: int):
    """out_MHCN = C Abar^(first + step j) for j = 0 .. length - 1; `first` is 0 or 1."""

  def kernel(self, length: int):
    """k_MHT = C Abar^j Bbar for j = 0 .. length - 1, in two levels: k_{i W + j} = (C Abar^{i W})
    (Abar^j Bbar), so that memory is O(N sqrt(T)) per channel, not O(N T)."""
    W = min(length, max(16, 1 << math.ceil(math.log2(length) / 2)))
    coarse_MHRN = self.outputs(-(-length // W), 0, W)
    k = jnp.einsum('mhrn,hwn->mhrw', coarse_MHRN, self.inputs(W), precision='highest')
    return k.reshape(*k.shape[:2], -1)[..., :length]

  def zeros(self, batch: int) -> Float[Array, 'B H N']:
    """The state before the first token."""
    _, H, N = self.sizes
    return jnp.zeros((batch, H, N), jnp.float32)


def ssm(
  u_BTH: Float[Array, 'B T H'],
  system: System,
  state_BHN: Float[Array, 'B H N'] | None = None,
  starts_BT: Bool[Array, 'B T'] | None = None,
  *,
  reverse: bool = False,
) -> tuple[Float[Array, 'B T M H'], Float[Array, 'B H N'] | None]:
  """y_BTMH of a system whose state is zero before the first token, or `state_BHN`, and again where
  `starts_BT` is True.

  The second result is the state after the last token, None where no state was given. fp32 inside; y
  has the dtype of u. With `reverse` the sequence is read from its end: x_t follows from x_{t+1},
  which is dropped where `starts_BT` is True.
  """
  B, T, _ = u_BTH.shape
  compute = SSM[SSM.choose(T, state_BHN is not None, starts_BT is not None)]
  state = system.zeros(B) if state_BHN is None else state_BHN

  def summarize(u_BTH, system, starts_BT):
    own_BHN = compute(system.zeros(u_BTH.shape[0]), u_BTH, system, starts_BT)[1]
    everywhere = jnp.ones(own_BHN.shape[0], bool)
    survives_B = everywhere if starts_BT is None else reset_masks(starts_BT)[0]
    move = system.transition(u_BTH.shape[1])

    def join(x_BHN, part):
      survives_B, own_BHN = part
      moved_BHN = jnp.swapaxes(move(jnp.swapaxes(x_BHN, 0, 1)), 0, 1)
      return own_BHN + jnp.where(survives_B[:, None, None], moved_BHN, 0.0)

    return (survives_B, own_BHN), join

  wide = ('batch', 'time', 'inner')
  sharded = over_time(
    compute,
    ('batch', 'inner', None),
    (wide, list(system.axes), wide[:2]),
    ('batch', 'time', None, 'inner'),
    summarize,
    reverse=reverse,
  )
  y, last = sharded(state, u_BTH.astype(jnp.float32), system, starts_BT)
  return y.astype(u_BTH.dtype), None if state_BHN is None else last


def ssm_naive(x_BHN, u_BTH, system: System, starts_BT=None):
  """The recurrence, one token after another."""
  starts_BT = jnp.zeros(u_BTH.shape[:2], bool) if starts_BT is None else starts_BT

  def step(x_BHN, u_BH):
    x_BHN = system.next(x_BHN, u_BH)
    return x_BHN, system.read(x_BHN)

  return scan_steps(step, x_BHN, (u_BTH,), starts_BT)


# ---- chunks ------------------------------------------------------------------------------------


def ssm_chunked(x_BHN, u_BTH, system: System, starts_BT=None, chunk: int = CHUNK):
  """The recurrence chunk by chunk; a last, shorter chunk has the remaining positions."""
  T = u_BTH.shape[1]
  C = min(chunk, T)
  complete = T - T % C
  k_MHC, into_HCN, out_MHCN = system.kernel(C), system.inputs(C), system.outputs(C, 1, 1)
  x_HBN = jnp.swapaxes(x_BHN, 0, 1)
  ys = []
  for start, end, size in ((0, complete, C), (complete, T, T - complete)):
    if size:
      y, x_HBN = _chunks(
        u_BTH[:, start:end],
        k_MHC[..., :size],
        into_HCN[:, :size],
        out_MHCN[:, :, :size],
        system.transition(size),
        x_HBN,
        None if starts_BT is None else starts_BT[:, start:end],
      )
      ys.append(y)
  return ys[0] if len(ys) == 1 else jnp.concatenate(ys, axis=1), jnp.swapaxes(x_HBN, 0, 1)


def _chunks(u_BTH, k_MHC, into_HCN, out_MHCN, transition, x_HBN, starts_BT):
  """T a multiple of C: y_BTMH and the last state, channels first."""
  (B, T, H), (M, _, C) = u_BTH.shape, k_MHC.shape
  n = T // C
  u_HGC = u_BTH.reshape(B * n, C, H).transpose(2, 0, 1)  # G: chunks of all rows
  # F: outputs times positions
  out_HNF = out_MHCN.transpose(1, 3, 0, 2).reshape(H, -1, M * C)
  if starts_BT is None:
    index_GC, u_last, kept_nB = None, u_HGC, None
  else:
    # The documents of each chunk by number, 0 for the one that the incoming state belongs to.
    index_GC = count_starts(starts_BT.reshape(B * n, C))
    u_last = jnp.where((index_GC == index_GC[:, -1:])[None], u_HGC, 0.0)
    kept_nB = (index_GC[:, -1] == 0).reshape(B, n).T
  ends_HGN = _matmul(u_last, into_HCN[:, ::-1])
  ends_nHBN = ends_HGN.reshape(H, B, n, -1).transpose(2, 0, 1, 3)

  def carry(x_HBN, now):
    ends_HBN, kept_B = now
    moved = transition(x_HBN)
    return ends_HBN + (
      moved if kept_B is None else jnp.where(kept_B[None, :, None], moved, 0.0)
    ), x_HBN

  last, before_nHBN = jax.lax.scan(carry, x_HBN, (ends_nHBN, kept_nB))
  from_state = _matmul(before_nHBN.transpose(1, 2, 0, 3).reshape(H, B * n, -1), out_HNF)
  w_MHCC = toeplitz(k_MHC.reshape(M * H, C)).reshape(M, H, C, C)
  w_HCF = w_MHCC.transpose(1, 2, 0, 3).reshape(H, C, M * C)
  if index_GC is None:
    y_HGF = _matmul(u_HGC, w_HCF) + from_state
  else:
    seen_GF = jnp.tile(index_GC, (1, M))
    y_HGF = _within_documents(u_HGC, w_HCF, index_GC, seen_GF) + jnp.where(
      (seen_GF == 0)[None], from_state, 0.0
    )
  return y_HGF.reshape(H, B, n, M, C).transpose(1, 2, 4, 3, 0).reshape(B, T, M, H), last


def toeplitz(k_HC: Float[Array, 'H C']) -> Float[Array, 'H C C']:
  """w[s, t] = k[t - s], 0 where t < s: u_C @ w is the causal convolution of C positions."""
  H, C = k_HC.shape
  row = jnp.concatenate([k_HC, jnp.zeros_like(k_HC)], axis=1)
  # Rows of 2 C numbers, reshaped to rows of 2 C - 1, shift by one from row to row: no gather, whose
  # gradient would be a scatter.
  flat = jnp.broadcast_to(row[:, None], (H, C, 2 * C)).reshape(H, -1)[:, : C * (2 * C - 1)]
  return flat.reshape(H, C, 2 * C - 1)[:, :, :C]


def _matmul(a, b):
  return jnp.matmul(a, b, precision='highest')


@jax.custom_vjp
def _within_documents(u_HGC, w_HCF, index_GC, index_GF):
  """sum_s u[s] w[s, t] over the pairs of positions of one document.

  One product per document of a chunk, for all chunks together: as many as the chunk with most
  documents has, mostly two."""

  def add(d, y_HGF):
    return y_HGF + _only(d, index_GF, _matmul(_only(d, index_GC, u_HGC), w_HCF))

  return jax.lax.fori_loop(
    0, jnp.max(index_GC) + 1, add, jnp.zeros((*u_HGC.shape[:2], w_HCF.shape[2]), u_HGC.dtype)
  )


def _only(d, index, x):
  return jnp.where((index == d)[None], x, 0.0)


def _within_documents_backward(residuals, g_HGF):
  u_HGC, w_HCF, index_GC, index_GF = residuals

  def add(d, sums):
    du, dw = sums
    g = _only(d, index_GF, g_HGF)
    du += _only(d, index_GC, jnp.einsum('hgf,hcf->hgc', g, w_HCF, precision='highest'))
    dw += jnp.einsum('hgc,hgf->hcf', _only(d, index_GC, u_HGC), g, precision='highest')
    return du, dw

  du, dw = jax.lax.fori_loop(
    0, jnp.max(index_GC) + 1, add, (jnp.zeros_like(u_HGC), jnp.zeros_like(w_HCF))
  )
  none = np.zeros(index_GC.shape, jax.dtypes.float0), np.zeros(index_GF.shape, jax.dtypes.float0)
  return du, dw, *none


_within_documents.defvjp(lambda *a: (_within_documents(*a), a), _within_documents_backward)


def _fft(x_BHN, u_BTH, system, starts_BT):
  return jax.vmap(fft_convolution, (None, 0), 2)(u_BTH, system.kernel(u_BTH.shape[1])), None


def _fft_unsupported(T: int, has_state: bool, has_starts: bool) -> str | None:
  if time_axes(T):
    return 'it needs all positions of a sequence on one device'
  if has_state or has_starts:
    return 'it takes no initial state and no packed documents'
  return None


def _order(T: int, has_state: bool, has_starts: bool) -> tuple[str, ...]:
  if T == 1:
    return ('naive',)
  return ('fft', 'chunked') if T >= FFT_FROM and platform() != 'tpu' else ('chunked',)


SSM = Operation(
  'ssm',
  {'naive': ssm_naive, 'chunked': ssm_chunked, 'fft': _fft},
  _order,
  {'fft': _fft_unsupported},
)
