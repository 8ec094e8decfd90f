"""Parameters, FLOPs and state of a model, from its config and abstract shapes.

Conventions, stated once:

- A product of a token with an `[in, out]` matrix is 2 in out FLOPs. What is elementwise (norms,
  activations, softmax) is not counted.
- Training costs 3 forward passes (one forward, two for the gradients of activations and of
  weights); what remat computes again is not counted, as in model FLOPs utilisation (PaLM, appendix
  B).
- The score and value products of attention are counted over the keys that a causal mask lets
  through (`causal`), or over all pairs (`full`), the convention of many published utilisations.
- Of an encoder-decoder a token is one of the target, with one of the source beside it: sources and
  targets of the same length, each matrix multiplied once. State is that of the decoder, keys and
  values of a source of the context's length included.
- Embedding tables are looked up and cost nothing; the head counts, tied or not. Of a mixture only
  the experts in use count.
"""

from __future__ import annotations

import dataclasses

from jaxformer.config import InputError
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one token, one sequence and the model as a whole cost.

  Attributes:
    params: the number of parameters, exactly.
    active_params: of these, what one token uses.
    embedding_params: rows that are looked up and not multiplied; 0 for a tied head.
    length: the sequence length that the FLOPs are averaged over, in tokens.
    forward_flops_per_token: causal convention.
    train_flops_per_token: causal convention; three times the forward ones.
    train_flops_per_token_full: the same in the full convention.
    context_length: the length that the state is sized for, in tokens.
    decode_state_bytes: keys and values, or recurrent state, of one sequence of `context` tokens at
      2 bytes a number; None for a model that does not decode.
    weight_bytes: the parameters at 2 bytes a number.
  """

  params: int
  active_params: int
  embedding_params: int
  length: int
  forward_flops_per_token: float
  train_flops_per_token: float
  train_flops_per_token_full: float
  context_length: int
  decode_state_bytes: int | None
  weight_bytes: int


def flops_per_token(model: ModelConfig, length: int, causal: bool = True) -> float:
  """Training FLOPs a token at a sequence length: 3 x (2 x active matrix parameters + products
  between positions)."""
  return 3 * _forward(model, length, causal)


def cost(model: ModelConfig, length: int | None = None) -> Cost:
  """The cost of a model. `length` is the training sequence length, the model's context by
  default."""
  definition = define(model)
  length = model.context_length if length is None else length
  if length < 1:
    raise InputError(f'sequence length = {length}: must be positive')
  state = model.state_size(model.context_length)
  return Cost(
    params=definition.size,
    active_params=definition.active_size,
    embedding_params=sum(i.size for i in definition.info.values() if not i.matmul),
    length=length,
    forward_flops_per_token=_forward(model, length, True),
    train_flops_per_token=flops_per_token(model, length),
    train_flops_per_token_full=flops_per_token(model, length, causal=False),
    context_length=model.context_length,
    decode_state_bytes=None if state is None else 2 * state,
    weight_bytes=2 * definition.size,
  )


def _forward(model: ModelConfig, length: int, causal: bool) -> float:
  matrices = sum(
    2.0 * i.size * i.active
    for i in define(model).info.values()
    if i.matmul and len(i.matrix_axes) >= 2
  )
  return matrices + model.mixing_flops_per_token(length, causal)


def step_flops(model: ModelConfig, length: int, batch_size: int, remat: str) -> tuple[float, float]:
  """FLOPs of a training step on all devices: of three passes, and with the most that is computed
  again.

  A remat policy computes at most the whole forward pass again; without one, the loss still computes
  its slices of logits twice."""
  tokens = batch_size * length
  three = flops_per_token(model, length) * tokens
  head = (
    sum(2.0 * i.size for i in define(model).info.values() if i.matmul and 'vocab' in i.axes)
    * tokens
  )
  return three, three + (head if remat == 'none' else three / 3)


def inference_flops(model: ModelConfig, phase: str, batch: int, context_length: int) -> float:
  """Of reading `batch` prompts of `context` tokens ('prefill'), whose last positions alone meet the
  head; or of one more token of each sequence that has room for `context` ('decode')."""
  if phase == 'decode':
    last = model.mixing_flops_per_token(context_length, False) - model.mixing_flops_per_token(
      context_length, True
    )
    return batch * (_forward(model, context_length, True) + last)
  head = sum(2.0 * i.size for i in define(model).info.values() if i.matmul and 'vocab' in i.axes)
  return batch * (context_length * (_forward(model, context_length, True) - head) + head)
