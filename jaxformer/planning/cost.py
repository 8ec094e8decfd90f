"""Parameters, FLOPs and state of a model, from its config and abstract shapes.

Conventions, stated once:

- A product of a token with an `[in, out]` matrix is 2 in out FLOPs. Elementwise operations (norms,
  activations, softmax) are not counted.
- Training costs 3 forward passes: one forward, two for the gradients of activations and of weights.
  Recomputation under remat is not counted, as in model FLOPs utilization (PaLM, appendix B).
- The score and value products of attention are counted over the keys that a causal mask lets
  through (`causal`), or over all pairs (`full`), the convention of many published utilizations.
- In an encoder-decoder, a token is one of the target together with one of the source: both have the
  same length, and each matrix is multiplied once. The state is the decoder's, with keys and values
  of a source of `context_length` tokens.
- Embedding tables are looked up and cost nothing; the head counts, tied or not. In a mixture only
  the active experts count.
"""

import dataclasses
from collections.abc import Iterable

from jaxformer.config import InputError
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import ParamInfo, define
from jaxformer.planning.setup import Phase


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one token, one sequence and the model itself cost.

  Attributes:
    params: the exact number of parameters.
    active_params: parameters that one token uses.
    embedding_params: parameters that are looked up and not multiplied; 0 for a tied head.
    length: the sequence length that the FLOPs are averaged over, in tokens.
    forward_flops_per_token: causal convention.
    train_flops_per_token: causal convention; three times the forward ones.
    train_flops_per_token_full: the same in the full convention.
    context_length: the length that the state is sized for, in tokens.
    decode_state_bytes: keys and values at 2 bytes each, and recurrent state in the precision in
      which the program holds it (mostly fp32), of one sequence of `context_length` tokens; None for
      a model that does not decode.
    weight_bytes: the parameters at 2 bytes per value.
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


def cost(model: ModelConfig, length: int | None = None) -> Cost:
  """The cost of a model. `length` is the training sequence length, by default the model's
  `context_length`."""
  definition = define(model)
  length = model.context_length if length is None else length
  if length < 1:
    raise InputError('sequence length', length, 'positive')
  return Cost(
    params=definition.size,
    active_params=definition.active_size,
    embedding_params=sum(i.size for i in definition.info.values() if not i.matmul),
    length=length,
    forward_flops_per_token=flops(model, 'prefill', 1, length) / length,
    train_flops_per_token=flops_per_token(model, length),
    train_flops_per_token_full=flops_per_token(model, length, causal=False),
    context_length=model.context_length,
    decode_state_bytes=model.state_bytes(model.context_length),
    weight_bytes=2 * definition.size,
  )


def flops(
  model: ModelConfig,
  phase: Phase,
  batch_size: int,
  length: int,
  *,
  causal: bool = True,
  last_logits: bool = False,
) -> float:
  """FLOPs of one step on all devices together, without recomputation. The one function that counts
  them.

  Args:
    phase: 'train' for forward and backward over `batch_size` sequences of `length` tokens;
      'prefill' for their forward pass alone; 'decode' for one more token of each of `batch_size`
      sequences that hold `length` tokens, which sees all of them.
    causal: count only the pairs that a causal mask lets through.
    last_logits: whether the head reads only the last position of each sequence, as the compiled
      prefill does, rather than every position.
  """
  matrices = matrix_flops(define(model).info.values())
  mixing = model.mixing_flops_per_token(length, causal and phase != 'decode')
  tokens = batch_size * (1 if phase == 'decode' else length)
  total = tokens * (matrices + mixing)
  if last_logits:
    total -= (tokens - batch_size) * head_flops(model)
  return 3 * total if phase == 'train' else total


def matrix_flops(params: Iterable[ParamInfo]) -> float:
  """Forward FLOPs per token of the products with matrices."""
  return sum(
    2.0 * i.size * i.active * i.uses for i in params if i.matmul and len(i.matrix_axes) >= 2
  )


def flops_per_token(model: ModelConfig, length: int, causal: bool = True) -> float:
  """Training FLOPs per token, averaged over sequences of `length`: 3 x (2 x active matrix
  parameters + products between positions)."""
  return flops(model, 'train', 1, length, causal=causal) / length


def head_flops(model: ModelConfig) -> float:
  """Forward FLOPs per token of the product with the vocabulary."""
  return sum(2.0 * i.size for i in define(model).info.values() if i.matmul and 'vocab' in i.axes)


def recomputed_flops(model: ModelConfig, batch_size: int, length: int, remat: str) -> float:
  """The most FLOPs that a training step computes a second time, on all devices together: a remat
  policy repeats at most the whole forward pass; without one, the loss still computes its slices of
  logits twice."""
  if remat == 'none':
    return batch_size * length * head_flops(model)
  return flops(model, 'prefill', batch_size, length)
