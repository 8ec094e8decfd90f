"""RWKV's own weight files without the package: maps, files, and what is refused."""

import importlib.util
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxformer.config import InputError
from jaxformer.interop import load_rwkv, save_rwkv
from jaxformer.interop.family import match
from jaxformer.interop.rwkv import VERSIONS, Sizes, version_of
from jaxformer.models.zoo import PRESETS
from tests.interop.small import RWKV, SMALL, noisy

pytestmark = pytest.mark.quick
TORCH = importlib.util.find_spec('torch') is not None
needs_torch = pytest.mark.skipif(not TORCH, reason='torch not installed')


def same(a, b):
  assert list(a) == list(b)
  for name in a:
    np.testing.assert_array_equal(
      np.asarray(a[name]), np.asarray(b[name]), err_msg=name, strict=True
    )


@pytest.fixture(params=RWKV)
def saved(request, tmp_path):
  """(file, config, params) of each version."""
  config, params = RWKV[request.param], noisy(RWKV[request.param])
  save_rwkv(tmp_path / 'm.safetensors', config, params)
  return tmp_path / 'm.safetensors', config, params


def test_round_trip_is_bit_for_bit(saved, tmp_path):
  path, config, params = saved
  read, loaded = load_rwkv(path)
  assert read == config
  same(loaded, params)
  assert os.listdir(tmp_path) == ['m.safetensors']  # nothing partial is left behind


@needs_torch
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_both_kinds_of_file_hold_the_same(saved, tmp_path, dtype):
  _, config, params = saved
  for suffix in ('safetensors', 'pth'):
    save_rwkv(tmp_path / f'again.{suffix}', config, params, dtype=dtype)
  (config_a, a), (config_b, b) = (
    load_rwkv(tmp_path / 'again.safetensors'),
    load_rwkv(tmp_path / 'again.pth'),
  )
  assert config_a == config_b == config
  same(a, b)
  if dtype == 'bfloat16':
    same(
      {n: np.asarray(p) for n, p in a.items()},
      {n: np.asarray(p).astype(ml_dtypes.bfloat16).astype(np.float32) for n, p in params.items()},
    )


@pytest.mark.parametrize('name', ['rwkv4-14b', 'rwkv5-7b', 'rwkv6-7b', 'rwkv7-2.9b'])
def test_published_sizes_follow_from_the_shapes(name):
  """What would be written is read as the preset."""
  model = PRESETS[name].model
  kind = match(model, VERSIONS.values(), Sizes)
  shapes = kind.write(model)
  assert version_of(shapes, name) is kind
  assert kind.read(Sizes(shapes, name)) == model


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop('blocks.1.ffn.key.weight'), r'missing: blocks\.1\.ffn\.key\.weight'),
    (
      lambda t: t.update({'blocks.0.att.extra': np.zeros(3, np.float32)}),
      r'unexpected: blocks\.0\.att\.extra',
    ),
    (lambda t: t.update({'ln_out.bias': np.zeros(3, np.float32)}), r'ln_out\.bias is \[3\]'),
    (lambda t: t.pop('emb.weight'), r'tensor emb\.weight is missing'),
    (
      lambda t: t.update({'emb.weight': np.zeros(3, np.float32)}),
      r'emb\.weight = \[3\]: must be a shape of 2 axes',
    ),
    (
      lambda t: t.update({'head.weight': np.zeros(t['head.weight'].shape, np.int8)}),
      'unsupported type',
    ),
  ],
)
def test_files_that_are_not_whole(saved, change, message):
  path, _, _ = saved
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(InputError, match=message):
    load_rwkv(path)


def test_other_files_are_refused(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    load_rwkv(tmp_path / 'none.safetensors')
  safetensors.numpy.save_file(
    {'blocks.0.att.time_mix_k': np.zeros((1, 1, 4), np.float32)}, tmp_path / 'v3.safetensors'
  )
  with pytest.raises(
    InputError,
    match=r'not the weights of RWKV-7, RWKV-6, RWKV-5\.2, RWKV-4; it holds blocks\.0\.att',
  ):
    load_rwkv(tmp_path / 'v3.safetensors')
  (tmp_path / 'cut.safetensors').write_bytes(b'abc')
  with pytest.raises(InputError, match='corrupt'):
    load_rwkv(tmp_path / 'cut.safetensors')


@pytest.mark.parametrize(
  ('version', 'change', 'message'),
  [
    (
      'RWKV-5.1',
      {'blocks.0.att.time_decay': (4,)},
      r'time_decay = \[4\]: must be a shape of 2 axes',
    ),
    (
      'RWKV-5.0',
      {'blocks.0.att.gate.weight': None, 'blocks.0.att.time_first': (4,)},
      r'unexpected: .*time_faaaa',
    ),
  ],
)
def test_versions_between_are_refused(tmp_path, version, change, message):
  """RWKV-5.0 and 5.1 have one decay a head."""
  save_rwkv(tmp_path / '5.2.safetensors', RWKV['rwkv5'], noisy(RWKV['rwkv5']))
  tensors = safetensors.numpy.load_file(tmp_path / '5.2.safetensors')
  tensors |= {n: np.zeros(s, np.float32) for n, s in change.items() if s is not None}
  for name in [n for n, s in change.items() if s is None]:
    del tensors[name]
  safetensors.numpy.save_file(tensors, tmp_path / 'other.safetensors')
  with pytest.raises(InputError, match=message):
    load_rwkv(tmp_path / 'other.safetensors')


@needs_torch
def test_pickles_that_hold_more_than_tensors(tmp_path):
  import torch

  class Code:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'ran'),)

  torch.save({'emb.weight': Code()}, tmp_path / 'code.pth')
  with pytest.raises(InputError, match='without running code'):
    load_rwkv(tmp_path / 'code.pth')
  assert not (tmp_path / 'ran').exists()
  torch.save({'model': {'emb.weight': torch.zeros(2)}}, tmp_path / 'nested.pth')
  with pytest.raises(
    InputError, match=r'nested\.pth: must be the state dict of a model, tensors by name'
  ):
    load_rwkv(tmp_path / 'nested.pth')
  (tmp_path / 'cut.pth').write_bytes(b'abc')
  with pytest.raises(InputError, match='not a state dict'):
    load_rwkv(tmp_path / 'cut.pth')


@pytest.mark.skipif(TORCH, reason='torch is installed')
def test_pth_without_torch(tmp_path):
  (tmp_path / 'm.pth').write_bytes(b'')
  with pytest.raises(InputError, match='need PyTorch'):
    load_rwkv(tmp_path / 'm.pth')


def test_what_cannot_be_written(saved, tmp_path):
  path, config, params = saved
  with pytest.raises(InputError, match='exists already'):
    save_rwkv(path, config, params)
  with pytest.raises(InputError, match=r'ends in \.safetensors or \.pth'):
    save_rwkv(tmp_path / 'm.bin', config, params)
  with pytest.raises(InputError, match=r'no format represents it\. As RWKV-7: '):
    save_rwkv(tmp_path / 'llama.safetensors', SMALL['llama'], noisy(SMALL['llama']))
  odd = config.replace(embedding_norm=config.embedding_norm.replace(eps=1e-3))
  with pytest.raises(InputError, match=r'embedding_norm\.eps'):
    save_rwkv(tmp_path / 'odd.safetensors', odd, params)
  with pytest.raises(InputError, match='missing'):
    save_rwkv(
      tmp_path / 'part.safetensors', config, {n: p for n, p in params.items() if n != 'head.kernel'}
    )
