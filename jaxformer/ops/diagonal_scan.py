"""Recurrences with a diagonal state matrix: one that does not change with time (S5; Smith et al.
2023, "Simplified State Space Layers", eq. 2), and one that does (the RG-LRU; De et al. 2024,
"Griffin", eq. 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from jaxformer.ops.chunks import scan_chunks, scan_steps
from jaxformer.ops.documents import count_starts
from jaxformer.ops.implementation import Operation
from jaxformer.ops.sequence_parallel import local_length, multiply_add, over_time, reset_masks
from jaxformer.ops.ssm_systems import as_complex, as_real

CHUNK = 256  # tokens of a chunk of `gated_scan`
_TOKEN = ('batch', 'time', None)


def diagonal_scan(
  v_BTN: Float[Array, 'B T N'],
  log_a_P: Complex[Array, ' P'],
  state_BN: Float[Array, 'B N'] | None = None,
  starts_BT: Bool[Array, 'B T'] | None = None,
  *,
  reverse: bool = False,
) -> tuple[Float[Array, 'B T N'], Float[Array, 'B N'] | None]:
  """x_t = exp(log_a) x_{t-1} + v_t for P = N / 2 complex numbers, the real parts of all and then
  the imaginary parts in a real array (v_t = Bbar u_t in the paper).

  The state is zero before the first token, or `state_BN`, and again where `starts_BT` is True.
  Returns x_BTN and the state after the last token, None where none was given. With `reverse` the
  sequence is read from its end: x_t follows from x_{t+1}, which is dropped where `starts_BT` is
  True. fp32."""
  B, T, N = v_BTN.shape
  compute = DIAGONAL_SCAN[DIAGONAL_SCAN.choose()]
  state = jnp.zeros((B, N), jnp.float32) if state_BN is None else state_BN
  starts_BT = jnp.zeros((B, T), bool) if starts_BT is None else starts_BT

  def run(x_BN, v_BTN, log_a_P, starts_BT):
    x_BTN = as_real(compute(as_complex(x_BN), as_complex(v_BTN), log_a_P, starts_BT))
    return x_BTN, x_BTN[:, -1]

  def summarize(v_BTN, log_a_P, starts_BT):
    """A shard runs its part from zeros, and then adds what is left of the state before it."""
    v_BTP = as_complex(v_BTN)
    x_BTP = compute(jnp.zeros_like(v_BTP[:, 0]), v_BTP, log_a_P, starts_BT)
    age = jnp.arange(1, v_BTN.shape[1] + 1, dtype=jnp.float32)[:, None]
    size, angle = jnp.exp(age * log_a_P.real[None]), age * log_a_P.imag[None]
    power_TP = jax.lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))
    factor = jnp.where(reset_masks(starts_BT)[0][:, None], power_TP[-1:], 0.0)

    def outputs(first_BN):
      reached = (count_starts(starts_BT) == 0)[..., None]
      from_state = power_TP[None] * as_complex(first_BN)[:, None]
      return as_real(x_BTP + jnp.where(reached, from_state, 0.0))

    join = lambda x_BN, part: as_real(multiply_add(as_complex(x_BN), part))  # noqa: E731
    return (factor, x_BTP[:, -1]), join, outputs

  in_axes = (_TOKEN, (None,), _TOKEN[:2])
  sharded = over_time(run, ('batch', None), in_axes, _TOKEN, summarize, reverse=reverse)
  x_BTN, last = sharded(state, v_BTN, log_a_P, starts_BT)
  return x_BTN, None if state_BN is None else last


def scan_naive(x_BP, v_BTP, log_a_P, starts_BT):
  """The recurrence, one token after another."""
  a_P = jnp.exp(log_a_P)

  def step(x_BP, v_BP):
    x_BP = a_P[None] * x_BP + v_BP
    return x_BP, x_BP

  return scan_steps(step, x_BP, (v_BTP,), starts_BT)[0]


def scan_associative(x_BP, v_BTP, log_a_P, starts_BT):
  """The recurrence in log T steps."""
  a_BTP = jnp.where(starts_BT[..., None], 0.0, jnp.exp(log_a_P)[None, None])
  return _associative(a_BTP, v_BTP.at[:, 0].add(a_BTP[:, 0] * x_BP))


@jax.custom_vjp
def _associative(a_BTP, v_BTP):
  """x_t = a_t x_{t-1} + v_t as a scan of (a, v) (a', v') = (a a', a' v + v'), in log T steps."""

  def join(first, then):
    return first[0] * then[0], then[0] * first[1] + then[1]

  return jax.lax.associative_scan(join, (a_BTP, v_BTP), axis=1)[1]


def _associative_forward(a_BTP, v_BTP):
  x_BTP = _associative(a_BTP, v_BTP)
  return x_BTP, (a_BTP, x_BTP)


def _associative_backward(residuals, g_BTP):
  """The recurrence from the end, with a moved by one: it keeps x alone, where every step of the
  scan would keep its own."""
  a_BTP, x_BTP = residuals
  later = jnp.pad(a_BTP[:, 1:], ((0, 0), (0, 1), (0, 0)))
  dv = _associative(later[:, ::-1], g_BTP[:, ::-1])[:, ::-1]
  return dv * jnp.pad(x_BTP[:, :-1], ((0, 0), (1, 0), (0, 0))), dv


_associative.defvjp(_associative_forward, _associative_backward)


DIAGONAL_SCAN = Operation(
  'diagonal_scan', {'naive': scan_naive, 'associative': scan_associative}, lambda: ('associative',)
)


# ---- a matrix that changes with time -----------------------------------------------------------


def gated_scan(
  v_BTN: Float[Array, 'B T N'],
  log_a_BTN: Float[Array, 'B T N'],
  state_BN: Float[Array, 'B N'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T N'], Float[Array, 'B N']]:
  """x_t = exp(log_a_t) x_{t-1} + v_t for N real numbers.

  The state is zero before the first token, or `state_BN`, and again where `starts_BT` is True.
  Returns x_BTN and the state after the last token. fp32."""
  B, T, N = v_BTN.shape
  compute = GATED_SCAN[GATED_SCAN.choose(local_length(T))]
  state = jnp.zeros((B, N), jnp.float32) if state_BN is None else state_BN.astype(jnp.float32)

  def run(x_BN, v_BTN, log_a_BTN, starts_BT):
    x_BTN = compute(x_BN, v_BTN, log_a_BTN, starts_BT)
    return x_BTN, x_BTN[:, -1]

  def summarize(v_BTN, log_a_BTN, starts_BT):
    """A shard runs its part from zeros, and then adds what is left of the state before it."""
    x_BTN = compute(jnp.zeros_like(v_BTN[:, 0]), v_BTN, log_a_BTN, starts_BT)
    reached = (count_starts(starts_BT) == 0)[..., None]
    power_BTN = jnp.where(reached, jnp.exp(jnp.cumsum(log_a_BTN, axis=1)), 0.0)
    outputs = lambda first_BN: x_BTN + power_BTN * first_BN[:, None]  # noqa: E731
    return (power_BTN[:, -1], x_BTN[:, -1]), multiply_add, outputs

  wide = ('batch', 'time', 'inner')
  sharded = over_time(run, ('batch', 'inner'), (wide, wide, wide[:2]), wide, summarize)
  return sharded(state, v_BTN.astype(jnp.float32), log_a_BTN.astype(jnp.float32), starts_BT)


def gated_scan_naive(x_BN, v_BTN, log_a_BTN, starts_BT):
  """The recurrence, one token after another."""

  def step(x_BN, v_BN, log_a_BN):
    x_BN = jnp.exp(log_a_BN) * x_BN + v_BN
    return x_BN, x_BN

  return scan_steps(step, x_BN, (v_BTN, log_a_BTN), starts_BT)[0]


def gated_scan_associative(x_BN, v_BTN, log_a_BTN, starts_BT):
  """The recurrence in log T steps."""
  a_BTN = jnp.where(starts_BT[..., None], 0.0, jnp.exp(log_a_BTN))
  return _associative(a_BTN, v_BTN.at[:, 0].add(a_BTN[:, 0] * x_BN))


def gated_scan_chunked(x_BN, v_BTN, log_a_BTN, starts_BT):
  """The recurrence in log C steps within chunks of C tokens, one chunk after another: of the
  intermediate values of the steps only those of one chunk are in memory."""
  if v_BTN.shape[1] <= CHUNK:
    return gated_scan_associative(x_BN, v_BTN, log_a_BTN, starts_BT)

  def body(x_BN, *chunk):
    x_BTN = gated_scan_associative(x_BN, *chunk)
    return x_BTN[:, -1], x_BTN

  return scan_chunks(body, x_BN, (v_BTN, log_a_BTN, starts_BT), CHUNK)[0]


GATED_SCAN = Operation(
  'gated_scan',
  {'naive': gated_scan_naive, 'associative': gated_scan_associative, 'chunked': gated_scan_chunked},
  lambda T: ('naive',) if T == 1 else ('chunked',),
)
