"""What the contract suite runs over: every registered layer's examples and every tiny preset."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformer import config as configs
from jaxformer.config import Config
from jaxformer.layers.layer import Context, LayerConfig, Memory, Site
from jaxformer.models.classifier import Classifier
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, define
from jaxformer.models.zoo import PRESETS

WIDTH, BATCH, LENGTH = 32, 8, 20   # longer than what operations treat as a short decode


class Alone(Config):
  """A layer by itself, as something that `define` can take."""

  layer: LayerConfig
  width: int = WIDTH
  site: int = 1

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    return self.layer.build(self.width, rngs, Site(layer=self.site, layers=3, branches=6))


def _named(example: LayerConfig) -> str:
  given = configs.differences(configs.to_json(type(example)()), configs.to_json(example))
  given = [re.sub(r'\{"type": "(\w+)".*?(?= -> |$)', r'\1', d) for d in given]   # of a part of another type, the type
  return f'{example.tag}({", ".join(d.replace(": null", "").replace(" ", "")[:28] for d in given)})'


EXAMPLES = [e for kind in configs.types_of(LayerConfig) if kind.__module__.startswith('jaxformer.') for e in kind.examples()]
LAYERS = {_named(example): example for example in EXAMPLES}
assert len(LAYERS) == len(EXAMPLES), 'two examples share a name, and only one of them would be tested'
DECODING = {name: c for name, c in LAYERS.items() if c.decodes}
TINY = sorted(n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, LanguageModel.Config))
CLASSIFIERS = sorted(n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, Classifier.Config))
PAIRS = sorted(n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, EncoderDecoder.Config))


class Case:
  """A layer or a model with parameters, and its calls jitted once."""

  def __init__(self, config):
    self.definition: Definition = define(config)
    params = self.definition.init(jax.random.key(0))
    # Away from the initial values: a parameter that starts at zero hides what it multiplies.
    keys = jax.random.split(jax.random.key(1), len(params))
    self.params = {n: p + 0.05 * jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, params.items(), strict=True)}
    self.call = jax.jit(self.whole)
    self.step = jax.jit(lambda p, x, s: _pair(self.definition.merge(p).step(x, self.given(x[:, None], Context()), s)))

  def whole(self, params, x, ctx=Context(), state=None):
    return _pair(self.definition.merge(params)(x, self.given(x, ctx), state))

  def given(self, x, ctx):
    """The context with what the layer reads of earlier layers: values that follow from the same position's input alone."""
    config = self.definition.config
    reads = config.layer.reads(config.width) if isinstance(config, Alone) else {}
    if self.reads_memory:
      ctx = ctx.replace(memory=self.memory(x.shape[0]))
    # Scanned unless a test asks otherwise: half of what there is to compile.
    return ctx.replace(
      shared={n: jnp.sin(2 * x[..., jnp.arange(c) % x.shape[-1]]) for n, c in reads.items()},
      unroll=bool(ctx.unroll))

  @property
  def reads_memory(self):
    config = self.definition.config
    return isinstance(config, Alone) and config.layer.memory_width(config.width) is not None

  def memory(self, batch: int):
    """What a layer that reads an encoder's output finds: sources of LENGTH, LENGTH - 2, ... tokens."""
    y = jax.random.normal(jax.random.key(4), (BATCH, LENGTH, self.definition.config.layer.memory_width(WIDTH)))[:batch]
    return Memory(y, jnp.arange(LENGTH)[None] < LENGTH - 2 * jnp.arange(batch)[:, None])

  def init_state(self, batch: int, max_len: int, params=None):
    module = self.definition.merge(self.params if params is None else params)
    return module.begin(batch, max_len, self.memory(batch)) if self.reads_memory else module.init_state(batch, max_len)

  def loss(self, params, x, ctx=Context()):
    """A scalar that every output bears on."""
    y = self.whole(params, x, ctx)[0].astype(jnp.float32)
    return jnp.sum(jnp.sin(y) * (1 + jnp.arange(y.shape[1])[None, :, None]))


@functools.cache
def layer(name: str) -> Case:
  return Case(Alone(layer=LAYERS[name]))


@functools.cache
def model(name: str) -> Case:
  """A tiny preset with at most two periods: what more of them would show, only compile time pays for."""
  config = PRESETS[name].model
  return Case(config.replace(**{
    stack: tuple(g.replace(repeats=min(g.repeats, 2)) for g in getattr(config, stack))
    for stack in ('stack', 'encoder', 'decoder') if hasattr(config, stack)}))


def inputs(dtype=jnp.float32):
  return jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH), dtype)


def tokens(case: Case, length: int, batch: int = BATCH):
  return jax.random.randint(jax.random.key(3), (batch, length), 0, case.definition.config.vocab_size)


def segments(*lengths: int):
  return jnp.broadcast_to(jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))[None], (BATCH, sum(lengths)))


def _pair(out):
  return out.y, out.state


def close(a, b, rtol, what=''):
  """Equal up to `rtol` of the largest magnitude of b, leaf by leaf."""
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale = max(np.abs(y).max(initial=0.0), 1e-3)
    gap = np.abs(x - y).max(initial=0.0)
    assert gap <= rtol * scale, f'{what}{jax.tree_util.keystr(path)}: differs by {gap:.2e} where values reach {scale:.2e}'
