"""Routing of mixtures of experts: balancing losses, loads in closed form, slots with a capacity.

Dims: E experts, K experts per token, C slots of an expert in a sequence. All in fp32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.ops.sequence_parallel import scan_shards, time_axes
from jaxformer.sharding import per_shard


def load_of(expert_BTK: Int[Array, 'B T K'], experts: int) -> Float[Array, ' E']:
  """Tokens sent to each expert, as a fraction of all tokens; they add up to K."""
  chosen = expert_BTK[..., None] == jnp.arange(experts).reshape(1, 1, 1, experts)
  return jnp.sum(chosen, axis=(0, 1, 2)).astype(jnp.float32) / (
    expert_BTK.shape[0] * expert_BTK.shape[1]
  )


def balance_factors(
  load_E: Float[Array, ' E'], probabilities_BTE: Float[Array, 'B T E']
) -> Float[Array, '2 E']:
  """f_e, the fraction of tokens sent to expert e, without a gradient, and E P_e, with P_e the mean
  probability of it. Their inner product is `balance_loss`; that of their means over layers is the
  loss of the tokens of all these layers."""
  mean_E = jnp.mean(probabilities_BTE, axis=(0, 1))
  return jnp.stack([jax.lax.stop_gradient(load_E), load_E.shape[0] * mean_E])


def balance_loss(
  load_E: Float[Array, ' E'], probabilities_BTE: Float[Array, 'B T E']
) -> Float[Array, '']:
  """E sum_e f_e P_e, with f_e the fraction of tokens sent to expert e and P_e the mean probability
  of it (Fedus et al. 2022, eq. 4-6).

  f adds up to K, the experts per token, so balance costs K: 1 for Switch, 2 for two experts per
  token, as in transformers' Mixtral."""
  return jnp.prod(balance_factors(load_E, probabilities_BTE), axis=0).sum()


def sequence_balance_loss(
  expert_BTK: Int[Array, 'B T K'], probabilities_BTE: Float[Array, 'B T E']
) -> Float[Array, '']:
  """The mean over sequences of sum_e f_e P_e, with f_e = E / (K T) times the tokens of the sequence
  that are sent to expert e, and P_e its mean probability there (DeepSeek-AI 2024, DeepSeek-V3, eq.
  17-20). 1 if each sequence is balanced."""
  E, K = probabilities_BTE.shape[2], expert_BTK.shape[2]
  chosen = expert_BTK[..., None] == jnp.arange(E).reshape(1, 1, 1, E)
  f_BE = E / K * jnp.mean(jnp.sum(chosen, axis=2).astype(jnp.float32), axis=1)
  return jnp.mean(jnp.sum(f_BE * jnp.mean(probabilities_BTE, axis=1), axis=-1))


def in_best_groups(
  score_BTE: Float[Array, 'B T E'], groups: int, best: int, top: int
) -> Bool[Array, 'B T E']:
  """Whether an expert is in one of the `best` groups of its token, of `groups` with E / groups
  consecutive experts each. A group's score is the sum of its `top` largest (DeepSeek-AI 2024,
  DeepSeek-V2, section 2.2.2: 1; DeepSeek-V3, section 2.1.2, and the published code: 2)."""
  B, T, E = score_BTE.shape
  grouped = score_BTE.reshape(B, T, groups, E // groups)
  group_BTG = jnp.sum(jax.lax.top_k(grouped, top)[0], axis=-1)
  chosen_BTg = jax.lax.top_k(group_BTG, best)[1]
  is_best = jnp.any(chosen_BTg[..., None] == jnp.arange(groups).reshape(1, 1, 1, groups), axis=2)
  return jnp.repeat(is_best, E // groups, axis=2)


def z_loss(logits_BTE: Float[Array, 'B T E']) -> Float[Array, '']:
  """The mean of logsumexp(logits)^2, which keeps router logits small (Zoph et al. 2022, eq. 5)."""
  return jnp.mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)))


def cv_squared(x_E: Float[Array, ' E']) -> Float[Array, '']:
  """The squared coefficient of variation, variance / mean^2, over the population (Shazeer et al.
  2017, eq. 7)."""
  return jnp.var(x_E) / (jnp.square(jnp.mean(x_E)) + 1e-10)


def noisy_load(
  clean_BTE: Float[Array, 'B T E'],
  noisy_BTE: Float[Array, 'B T E'],
  std_BTE: Float[Array, 'B T E'],
  k: int,
) -> Float[Array, ' E']:
  """Load_e = sum_tokens Phi((clean_e - kth_excluding_e) / std_e): how many tokens would choose e if
  only its noise were drawn again (Shazeer et al. 2017, eq. 8-10). kth_excluding_e is the k-th
  largest noisy logit among the others: of all, the (k+1)-th where e is among the k chosen, else the
  k-th. Needs k < E."""
  top = jax.lax.top_k(noisy_BTE, k + 1)[0]
  kth, next_ = top[..., k - 1 : k], top[..., k:]
  threshold = jnp.where(noisy_BTE > next_, next_, kth)
  return jnp.sum(jax.scipy.stats.norm.cdf((clean_BTE - threshold) / std_BTE), axis=(0, 1))


BIAS_GRADIENT = 1e-4  # size of the gradient of `load_balancing_bias_gradient`


@jax.custom_vjp
def load_balancing_bias_gradient(
  bias_E: Float[Array, ' E'], load_E: Float[Array, ' E']
) -> Float[Array, '']:
  """0, whose gradient with respect to the biases is `BIAS_GRADIENT` sign(load - mean load),
  whatever the incoming gradient.

  Balancing without a loss adds a bias to each expert's score and lowers it where the expert has too
  many tokens (DeepSeek-AI 2024, section 2.1.2). As the gradient of a parameter, that rule is
  applied by the optimizer, stored by checkpoints and summed by accumulation like all others. All
  our optimizers take steps of the size of the learning rate, whatever that of gradients, so a small
  one is enough: it hardly changes the global norm of the gradients.
  """
  return jnp.zeros(())


load_balancing_bias_gradient.defvjp(
  lambda bias_E, load_E: (jnp.zeros(()), load_E),
  lambda load_E, _: (BIAS_GRADIENT * jnp.sign(load_E - jnp.mean(load_E)), jnp.zeros_like(load_E)),
)


def assign_slots(
  expert_BTK: Int[Array, 'B T K'], weight_BTK: Float[Array, 'B T K'], experts: int, capacity: int
) -> tuple[Int[Array, 'B E C'], Float[Array, 'B E C'], Float[Array, '']]:
  """Assign at most `capacity` tokens of every sequence to each expert, the earlier ones first: a
  token loses an expert whose slots are taken by tokens before it. So no token's slot depends on
  later tokens or on other sequences.

  Returns the token in each slot of each expert and its weight (0 for an empty slot), and the
  fraction of choices dropped."""

  def shard(expert_BTK, weight_BTK):
    B, T, K = expert_BTK.shape
    before_BP, _ = _choices_before(expert_BTK, experts)
    # slots beyond the last are left out by `mode='drop'`
    at = jnp.arange(B)[:, None], expert_BTK.reshape(B, T * K), before_BP
    token_BP = jnp.broadcast_to((jnp.arange(T * K, dtype=jnp.int32) // K)[None], (B, T * K))
    token, weight = (
      jnp.zeros((B, experts, capacity), dtype).at[at].set(a, mode='drop')
      for dtype, a in ((jnp.int32, token_BP), (jnp.float32, weight_BTK.reshape(B, T * K)))
    )
    return token, weight, jnp.mean((before_BP >= capacity).astype(jnp.float32), axis=1)

  tokens = ('batch', None, None)
  mapped = per_shard(shard, (tokens, tokens), tokens, tokens, ('batch',))
  token, weight, dropped_B = mapped(expert_BTK, weight_BTK)
  return token, weight, jnp.mean(dropped_B)


def has_slot(expert_BTK: Int[Array, 'B T K'], experts: int, capacity: int) -> Bool[Array, 'B T K']:
  """Whether a token gets a slot (`assign_slots`) of each of its experts."""
  axes = time_axes(expert_BTK.shape[1])

  def shard(expert_BTK):
    before_BP, taken_BE = _choices_before(expert_BTK, experts)
    if axes:
      earlier_BE, _ = scan_shards(taken_BE, jnp.zeros_like(taken_BE), jnp.add, axes)
      before_BP += jnp.take_along_axis(earlier_BE, expert_BTK.reshape(before_BP.shape), axis=1)
    return before_BP.reshape(expert_BTK.shape) < capacity

  tokens = ('batch', 'time', None)
  return per_shard(shard, (tokens,), tokens)(expert_BTK)


def _choices_before(expert_BTK, experts):
  """For each choice the number of earlier ones of the same expert in its row, [B, T K], and the
  total of each expert, [B, E]."""
  flat = expert_BTK.reshape(len(expert_BTK), -1)
  chosen_BPE = flat[..., None] == jnp.arange(experts).reshape(1, 1, experts)
  counts_BPE = jnp.cumsum(chosen_BPE, axis=1, dtype=jnp.int32)
  return jnp.sum(jnp.where(chosen_BPE, counts_BPE - 1, 0), axis=-1), counts_BPE[:, -1]
