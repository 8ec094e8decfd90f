"""Linear time-invariant state-space models, one small system for each channel.

  x_t = Abar x_{t-1} + Bbar u_t        y_t = C x_t

A `System` says what Abar, Bbar and C are (`ops/ssm_systems.py`, `ops/ssm_dplr.py`); everything here
is the same for all of them.
There are three forms: the recurrence itself (`ssm_naive`), a convolution with the kernel C Abar^j
  Bbar by Fourier transform, and
chunks: inside a chunk a product with the Toeplitz matrix of the kernel, from chunk to chunk the
  state. Chunks are matrix products,
continue from a state and keep packed documents apart exactly; the state of every chunk's start, and
no more of it, is in memory.

States are real: N numbers a channel, the real and the imaginary parts side by side where a system
  thinks in complex numbers.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.long_convolution import fft_convolution
from jaxformer.ops.sequence_parallel import over_time, time_axes, unbroken
from jaxformer.sharding import per_shard, platform

# positions; about as many as numbers of state, so that states take the memory of the input
CHUNK = 64
FFT_FROM = 256  # positions from which Fourier transforms are faster than chunks on a CPU or GPU


class System(abc.ABC):
  """A discrete system for H channels by themselves, N real numbers of state and M outputs each."""

  @property
  @abc.abstractmethod
  def sizes(self) -> tuple[int, int, int]:
    """M, H, N."""

  @abc.abstractmethod
  def next(self, x_BHN: Array, u_BH: Array) -> Array:
    """Abar x + Bbar u."""

  @abc.abstractmethod
  def read(self, x_BHN: Array) -> Array:
    """C x: [B, M, H]."""

  @abc.abstractmethod
  def maps(self, length: int) -> tuple[Array, Array]:
    """into_HCN = Abar^j Bbar and out_MHCN = C Abar^(j + 1) for j = 0 .. length - 1."""

  @abc.abstractmethod
  def transition(self, steps: int) -> Callable[[Array], Array]:
    """x_HBN -> Abar^steps x_HBN."""

  @abc.abstractmethod
  def kernel(self, length: int) -> Array:
    """k_MHT = C Abar^j Bbar for j = 0 .. length - 1."""

  @property
  @abc.abstractmethod
  def parts(self) -> tuple[tuple[Array, tuple[str | None, ...]], ...]:
    """The arrays that it consists of, each with its logical axes."""

  @abc.abstractmethod
  def of(self, *arrays: Array) -> System:
    """The same system made of other arrays in the order of `parts`: a shard's."""

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

  The second result is the state after the last token, None where no
  state was given. fp32 inside; y has the dtype of u. With `reverse`
  the sequence is read from its end: x_t follows from x_{t+1}, which is dropped where `starts_BT` is
    True.
  """
  chosen = SSM.choose(u_BTH.shape[1], state_BHN is not None, starts_BT is not None)
  form = SSM[chosen]
  u = u_BTH.astype(jnp.float32)
  if axes := time_axes(u.shape[1]):
    y, last = _over_time(u, system, state_BHN, starts_BT, form, axes, reverse)
  elif reverse:
    y, last = form(
      jnp.flip(u, 1), system, state_BHN, None if starts_BT is None else jnp.flip(starts_BT, 1)
    )
    y = jnp.flip(y, 1)
  else:
    y, last = form(u, system, state_BHN, starts_BT)
  return y.astype(u_BTH.dtype), None if state_BHN is None else last


def _fft(u, system, state_BHN, starts_BT):
  return jax.vmap(fft_convolution, (None, 0), 2)(u, system.kernel(u.shape[1])), None


def _fft_unsupported(T: int, state: bool, starts: bool) -> str | None:
  if time_axes(T):
    return 'it needs all positions of a sequence on one device'
  return 'it takes no state and no packed documents' if state or starts else None


def _order(T: int, state: bool, starts: bool) -> tuple[str, ...]:
  return ('fft', 'chunked') if T >= FFT_FROM and platform() != 'tpu' else ('chunked',)


def _over_time(u, system: System, state_BHN, starts_BT, form, axes: tuple[str, ...], reverse: bool):
  """On shards of time (`ops.sequence_parallel`)."""
  arrays, array_axes = zip(
    *((part, axes) for a, axes in system.parts for part in _reals(a)), strict=True
  )
  complex_parts = [jnp.iscomplexobj(a) for a, _ in system.parts]

  def shard(state_BHN, u_BTH, *rest):
    *reals, starts_BT = rest
    parts = iter(reals)
    here = system.of(
      *(
        jax.lax.complex(next(parts), next(parts)) if pair else next(parts) for pair in complex_parts
      )
    )
    if reverse:
      u_BTH, starts_BT = jnp.flip(u_BTH, 1), None if starts_BT is None else jnp.flip(starts_BT, 1)
    move = here.transition(u_BTH.shape[1])

    def run(x_BHN, u_BTH):
      return form(u_BTH, here, x_BHN, starts_BT)

    def summary(u_BTH):
      own = run(None, u_BTH)[1]
      return jnp.ones(own.shape[0], bool) if starts_BT is None else unbroken(starts_BT)[0], own

    def join(x_BHN, part):
      kept_B, own_BHN = part
      return own_BHN + jnp.where(
        kept_B[:, None, None], jnp.swapaxes(move(jnp.swapaxes(x_BHN, 0, 1)), 0, 1), 0.0
      )

    y, last = over_time(run, summary, join, axes, reverse=reverse)(state_BHN, u_BTH)
    return jnp.flip(y, 1) if reverse else y, last

  wide, state = ('batch', 'time', 'inner'), ('batch', 'inner', None)
  mapped = per_shard(
    shard, (state, wide, *array_axes, wide[:2]), ('batch', 'time', None, 'inner'), state
  )
  y, last = mapped(
    system.zeros(u.shape[0]) if state_BHN is None else state_BHN, u, *arrays, starts_BT
  )
  return y, last


def _reals(a: Array) -> tuple[Array, ...]:
  return (a.real, a.imag) if jnp.iscomplexobj(a) else (a,)


def ssm_naive(
  u_BTH: Float[Array, 'B T H'],
  system: System,
  state_BHN: Float[Array, 'B H N'] | None = None,
  starts_BT: Bool[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T M H'], Float[Array, 'B H N']]:
  """The recurrence, one token after the other."""
  B, T, _ = u_BTH.shape
  first = system.zeros(B) if state_BHN is None else state_BHN
  starts = jnp.zeros((B, T), bool) if starts_BT is None else starts_BT

  def step(x_BHN, now):
    u_BH, starts_B = now
    x_BHN = system.next(jnp.where(starts_B[:, None, None], 0.0, x_BHN), u_BH)
    return x_BHN, system.read(x_BHN)

  last, y_TBMH = jax.lax.scan(step, first, (jnp.swapaxes(u_BTH, 0, 1), starts.T))
  return jnp.swapaxes(y_TBMH, 0, 1), last


def ssm_step(
  u_BH: Float[Array, 'B H'], system: System, state_BHN: Float[Array, 'B H N']
) -> tuple[Float[Array, 'B M H'], Float[Array, 'B H N']]:
  """One token: y_BMH, which has the dtype of u, and the new state."""
  x_BHN = system.next(state_BHN, u_BH.astype(jnp.float32))
  return system.read(x_BHN).astype(u_BH.dtype), x_BHN


# ---- chunks ------------------------------------------------------------------------------------


def ssm_chunked(
  u_BTH: Float[Array, 'B T H'],
  system: System,
  state_BHN: Float[Array, 'B H N'] | None = None,
  starts_BT: Bool[Array, 'B T'] | None = None,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T M H'], Float[Array, 'B H N']]:
  """The recurrence chunk by chunk; a last, shorter chunk takes what is left over."""
  B, T, _ = u_BTH.shape
  C = min(chunk, T)
  whole = T - T % C
  k_MHC, maps = system.kernel(C), system.maps(C)
  x_HBN = jnp.swapaxes(system.zeros(B) if state_BHN is None else state_BHN, 0, 1)
  ys = []
  for start, end, size in ((0, whole, C), (whole, T, T - whole)):
    if size:
      begins = None if starts_BT is None else starts_BT[:, start:end]
      into_HCN, out_MHCN = maps[0][:, :size], maps[1][:, :, :size]
      y, x_HBN = _chunks(
        u_BTH[:, start:end],
        k_MHC[..., :size],
        into_HCN,
        out_MHCN,
        system.transition(size),
        x_HBN,
        begins,
      )
      ys.append(y)
  return ys[0] if len(ys) == 1 else jnp.concatenate(ys, axis=1), jnp.swapaxes(x_HBN, 0, 1)


def _chunks(
  u_BTH: Array,
  k_MHC: Array,
  into_HCN: Array,
  out_MHCN: Array,
  transition: Callable[[Array], Array],
  x_HBN: Array,
  starts_BT: Array | None,
) -> tuple[Array, Array]:
  """T a multiple of C: y_BTMH and the last state, channels first."""
  (B, T, H), (M, _, C) = u_BTH.shape, k_MHC.shape
  n = T // C
  u_HGC = u_BTH.reshape(B * n, C, H).transpose(2, 0, 1)  # G: chunks of all rows
  # F: outputs times positions
  out_HNF = out_MHCN.transpose(1, 3, 0, 2).reshape(H, -1, M * C)
  if starts_BT is None:
    index_GC, u_last, kept_nB = None, u_HGC, None
  else:
    # The documents of each chunk by number, 0 for the one that the carried state belongs to.
    index_GC = jnp.cumsum(starts_BT.reshape(B * n, C), axis=1, dtype=jnp.int32)
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
  w_HCF = (
    toeplitz(k_MHC.reshape(M * H, C)).reshape(M, H, C, C).transpose(1, 2, 0, 3).reshape(H, C, M * C)
  )
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
  # Rows of 2 C numbers, read again as rows of 2 C - 1, shift by one from each to the next: no
  # gather, whose gradient scatters.
  flat = jnp.broadcast_to(row[:, None], (H, C, 2 * C)).reshape(H, -1)[:, : C * (2 * C - 1)]
  return flat.reshape(H, C, 2 * C - 1)[:, :, :C]


def _matmul(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision='highest')


@jax.custom_vjp
def _within_documents(
  u_HGC: Float[Array, 'H G C'],
  w_HCF: Float[Array, 'H C F'],
  index_GC: Int[Array, 'G C'],
  index_GF: Int[Array, 'G F'],
) -> Float[Array, 'H G F']:
  """sum_s u[s] w[s, t] over the pairs of positions of one document.

  Product after product, each of one document of every chunk: as many as the chunk with most
  documents has, mostly two."""

  def add(d, y_HGF):
    return y_HGF + _only(d, index_GF, _matmul(_only(d, index_GC, u_HGC), w_HCF))

  return jax.lax.fori_loop(
    0, jnp.max(index_GC) + 1, add, jnp.zeros((*u_HGC.shape[:2], w_HCF.shape[2]), u_HGC.dtype)
  )


def _only(d: Array, index: Array, x: Array) -> Array:
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


SSM = Operation(
  'ssm',
  {
    'naive': Implementation(ssm_naive),
    'chunked': Implementation(ssm_chunked),
    'fft': Implementation(_fft, _fft_unsupported),
  },
  _order,
)
