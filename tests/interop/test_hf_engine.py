"""The engine without torch: maps, files, and what is refused."""

import dataclasses
import itertools
import json
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxformer.config import InputError
from jaxformer.files import WriteError
from jaxformer.interop import load_hf, save_hf, weights
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.tensors import INDEX, SINGLE, plan_files
from jaxformer.interop.weights import Rule
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Zeros
from jaxformer.layers.mlp import GatedMlp
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.params import ParamInfo, define
from jaxformer.models.stack import Group
from jaxformer.sharding import MeshConfig, Parallel, make_mesh
from tests.interop.small import SMALL, noisy

pytestmark = pytest.mark.quick


def same(a, b):
  assert list(a) == list(b)
  for name in a:
    np.testing.assert_array_equal(
      np.asarray(a[name]), np.asarray(b[name]), err_msg=name, strict=True
    )


@pytest.fixture(params=SMALL)
def small(request):
  """(config, params) of each small model."""
  return SMALL[request.param], noisy(SMALL[request.param])


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / SINGLE)


def rewrite(folder, change):
  tensors = tensors_of(folder)
  change(tensors)
  safetensors.numpy.save_file(
    {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / SINGLE
  )


def change_config(folder, **fields):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def saved(tmp_path):
  """A folder with the small Llama."""
  save_hf(tmp_path / 'saved', SMALL['llama'], noisy(SMALL['llama']))
  return tmp_path / 'saved'


# ---- round trips -------------------------------------------------------------------------------


def test_round_trip_is_bit_for_bit(small, tmp_path):
  config, params = small
  save_hf(tmp_path / 'out', config, params)
  read, loaded = load_hf(tmp_path / 'out')
  assert read == config
  same(loaded, params)
  assert os.listdir(tmp_path) == ['out']  # nothing partial is left behind


def test_second_export_is_byte_for_byte(saved, tmp_path):
  save_hf(tmp_path / 'again', *load_hf(saved))
  assert sorted(os.listdir(saved)) == sorted(os.listdir(tmp_path / 'again'))
  for file in os.listdir(saved):
    assert (saved / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()


def test_divided_files(small, tmp_path):
  config, params = small
  save_hf(tmp_path / 'out', config, params, max_shard_bytes=3000)
  files = sorted(p.name for p in (tmp_path / 'out').glob('*.safetensors'))
  index = json.loads((tmp_path / 'out' / INDEX).read_text())
  assert len(files) > 2
  assert set(index['weight_map'].values()) == set(files)
  assert index['metadata']['total_size'] == 4 * define(config).size
  same(load_hf(tmp_path / 'out')[1], params)


def test_transposed_arrays_are_written_as_they_read(saved):
  wq = noisy(SMALL['llama'])['stack.groups.0.0.branches.0.layer.q.kernel']
  for layer in range(3):
    np.testing.assert_array_equal(
      tensors_of(saved)[f'model.layers.{layer}.self_attn.q_proj.weight'], np.asarray(wq[layer]).T
    )


@pytest.mark.parametrize(
  ('name', 'file_type'), [('bfloat16', ml_dtypes.bfloat16), ('float16', np.float16)]
)
def test_half_precision_files_become_float32(small, tmp_path, name, file_type):
  config, params = small
  save_hf(tmp_path / 'out', config, params, dtype=name)
  assert {t.dtype for t in tensors_of(tmp_path / 'out').values()} == {np.dtype(file_type)}
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == name
  rounded = {n: np.asarray(p).astype(file_type) for n, p in params.items()}
  same(load_hf(tmp_path / 'out')[1], {n: p.astype('float32') for n, p in rounded.items()})
  kept = {n for n, i in define(config).info.items() if i.full_precision}
  same(
    load_hf(tmp_path / 'out', dtype=jnp.dtype(file_type))[1],
    {n: p.astype('float32') if n in kept else p for n, p in rounded.items()},
  )


def test_numbers_too_large_for_the_type(tmp_path):
  params = noisy(SMALL['tied']) | {'embedder.input.table': jnp.full((30, 16), 1e5)}
  with pytest.raises(InputError, match=r'float16.*model.embed_tokens.weight.*1e\+05'):
    save_hf(tmp_path / 'out', SMALL['tied'], params, dtype='float16')
  assert os.listdir(tmp_path) == []
  with pytest.raises(InputError, match=r"dtype = 'int8'"):
    save_hf(tmp_path / 'out', SMALL['tied'], params, dtype='int8')


def test_onto_a_mesh(saved):
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  _, params = load_hf(saved, parallel=Parallel(mesh))
  same(params, load_hf(saved)[1])
  wq = params['stack.groups.0.0.branches.0.layer.q.kernel']
  assert (
    wq.sharding
    == define(SMALL['llama']).shardings(Parallel(mesh))[
      'stack.groups.0.0.branches.0.layer.q.kernel'
    ]
  )
  assert wq.addressable_shards[0].data.shape == (3, 4, 8)


def test_grouping_of_blocks_does_not_matter(tmp_path):
  config = SMALL['gpt2']
  (group,) = config.stack
  regrouped = config.replace(stack=(group.replace(repeats=1), Group(pattern=group.pattern * 2)))
  save_hf(tmp_path / 'out', regrouped, noisy(regrouped))
  read, loaded = load_hf(tmp_path / 'out')
  assert read == config
  tokens = jnp.arange(20).reshape(2, 10)
  logits = [
    jax.jit(lambda p, c=c: define(c).merge(p)(tokens).y)(p)
    for c, p in ((regrouped, noisy(regrouped)), (read, loaded))
  ]
  np.testing.assert_allclose(*logits, atol=1e-6)


def test_tokenizer_comes_along(saved, tmp_path):
  source = tmp_path / 'tokenizer'
  source.mkdir()
  with pytest.raises(InputError, match='tokenizer_folder'):
    save_hf(tmp_path / 'out', *load_hf(saved), tokenizer_folder=source)
  (source / 'tokenizer.json').write_text('{"x": 1}')
  (source / 'training_args.bin').write_bytes(b'pickle')
  (source / 'config.json').write_text('{"eos_token_id": 7, "hidden_size": 999}')
  save_hf(tmp_path / 'out', *load_hf(saved), tokenizer_folder=source)
  files = ['config.json', 'generation_config.json', SINGLE, 'tokenizer.json']
  assert sorted(os.listdir(tmp_path / 'out')) == files
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] == 7
  assert load_hf(tmp_path / 'out')[0] == SMALL['llama']


# ---- what the files may leave out, and what they may not ---------------------------------------


def test_names_without_the_prefix_and_buffers(tmp_path):
  """GPT-2's own files lack `transformer.` and carry the causal mask."""
  config, params = SMALL['gpt2'], noisy(SMALL['gpt2'])
  save_hf(tmp_path / 'out', config, params)

  def as_published(tensors):
    for name in list(tensors):
      tensors[name.removeprefix('transformer.')] = tensors.pop(name)
    tensors['h.0.attn.bias'] = np.ones((1, 1, 12, 12), np.uint8)
    tensors['h.0.attn.masked_bias'] = np.float32(-1e4)
    tensors['lm_head.weight'] = tensors['wte.weight']

  rewrite(tmp_path / 'out', as_published)
  same(load_hf(tmp_path / 'out')[1], params)


def test_a_tied_head_must_be_the_embedding(tmp_path):
  save_hf(tmp_path / 'out', SMALL['tied'], noisy(SMALL['tied']))
  rewrite(
    tmp_path / 'out', lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'] + 1})
  )
  with pytest.raises(
    InputError,
    match=r'lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings',
  ):
    load_hf(tmp_path / 'out')


def test_all_that_is_wrong_in_one_message(saved):
  def spoil(tensors):
    del tensors['lm_head.weight'], tensors['model.layers.1.mlp.up_proj.weight']
    tensors['model.layers.3.mlp.up_proj.weight'] = np.zeros((24, 16), np.float32)
    tensors['model.layers.0.self_attn.k_proj.weight'] = np.zeros((16, 16), np.float32)
    tensors['model.norm.weight'] = np.zeros(16, np.int8)

  rewrite(saved, spoil)
  with pytest.raises(InputError) as e:
    load_hf(saved)
  for piece in (
    r'missing: lm_head\.weight \[30, 16\], model\.layers\.1\.mlp\.up_proj\.weight \[24, 16\];',
    r'unexpected: model\.layers\.3\.mlp\.up_proj\.weight',
    r'shape: model\.layers\.0\.self_attn\.k_proj\.weight is \[16, 16\], the config needs \[8, 16\]',
    r'model\.norm\.weight \(I8\)',
  ):
    assert re.search(piece, str(e.value)), piece


def test_parameters_are_checked_before_anything_is_written(tmp_path):
  params = noisy(SMALL['llama'])
  head = params.pop('head.kernel')
  with pytest.raises(
    InputError,
    match=r'missing: head.kernel \[16, 30\]; unexpected: tail; '
    r'wrong shape: embedder.input.table is \[3, 3\]',
  ):
    save_hf(
      tmp_path / 'out',
      SMALL['llama'],
      params | {'tail': head, 'embedder.input.table': jnp.zeros((3, 3))},
    )
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('left', [0, 4, 200, -1000, -1])
def test_truncated_files(saved, left):
  whole = (saved / SINGLE).read_bytes()
  (saved / SINGLE).write_bytes(whole[:left])
  with pytest.raises(InputError, match='corrupt or truncated'):
    load_hf(saved)


def test_index_and_files_disagree(tmp_path):
  save_hf(tmp_path / 'out', SMALL['llama'], noisy(SMALL['llama']), max_shard_bytes=3000)
  path = tmp_path / 'out' / INDEX
  index = json.loads(path.read_text())
  for name, file, message in (
    ('model.norm.weight', '../evil.safetensors', 'not the name of a safetensors file'),
    ('model.norm.weight', 'model-00099.safetensors', 'download is incomplete'),
    ('model.absent', index['weight_map']['model.norm.weight'], 'lists tensors.*model.absent'),
  ):
    path.write_text(json.dumps(index | {'weight_map': index['weight_map'] | {name: file}}))
    with pytest.raises(InputError, match=message):
      load_hf(tmp_path / 'out')


def test_pickles_are_never_opened(saved):
  (saved / SINGLE).rename(saved / 'pytorch_model.bin')
  with pytest.raises(InputError, match=r'pytorch_model\.bin.*run code.*save_pretrained'):
    load_hf(saved)
  (saved / 'pytorch_model.bin').unlink()
  with pytest.raises(InputError, match='neither'):
    load_hf(saved)
  with pytest.raises(InputError, match='no such folder'):
    load_hf(saved / 'nowhere')


def test_nothing_is_overwritten(saved, tmp_path):
  with pytest.raises(InputError, match='not an empty folder'):
    save_hf(saved, *load_hf(saved))
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='exists already'):
    save_hf(tmp_path / 'file', *load_hf(saved))
  (tmp_path / 'empty').mkdir()
  save_hf(tmp_path / 'empty', *load_hf(saved))
  assert load_hf(tmp_path / 'empty')[0] == SMALL['llama']


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  def fail(self, ours):
    raise errors.pop()

  monkeypatch.setattr(weights.Link, 'save', fail)
  full = 'Error while serializing: I/O error: No space left on device (os error 28)'
  errors = [
    InputError('bad [Errno 2]'),
    KeyError('bug'),
    safetensors.SafetensorError(full),
    PermissionError(13, 'No access'),
  ]
  for kind, message in (
    (InputError, r'out: cannot be written \(No access\)'),
    (WriteError, r'out: cannot be written \(No space left on device\)'),
    (KeyError, 'bug'),
    (InputError, 'bad'),
  ):
    with pytest.raises(kind, match=message):
      save_hf(tmp_path / 'out', SMALL['llama'], noisy(SMALL['llama']))
    assert os.listdir(tmp_path) == []


# ---- models without a counterpart --------------------------------------------------------------


def llama_with(**attention):
  config = SMALL['llama']
  block = config.stack[0].pattern[0]
  first, second = block.branches
  layer = first.layer.replace(**attention)
  return config.replace(
    stack=(
      Group(pattern=(Block.Config(branches=(first.replace(layer=layer), second)),), repeats=3),
    )
  )


OTHER = Block.Config(
  branches=(PreNorm(layer=Attention.Config()), PreNorm(layer=GatedMlp.Config(hidden=8)))
)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (
      llama_with(softcap=30.0),
      r'As llama: stack\.0\.pattern\.0\.branches\.0\.layer\.softcap: 30\.0 -> null',
    ),
    (
      llama_with(position=None),
      'As llama: the position of layer 0 of block 0: must be Rotary, not None',
    ),
    (SMALL['gpt2'].replace(head_bias=Zeros()), 'As gpt2: head_bias'),
    (SMALL['gpt2'].replace(final_norm=None), 'As gpt2: final_norm'),
    (
      SMALL['llama'].replace(
        stack=(Group(pattern=(Block.Config(branches=(PreNorm(layer=Attention.Config()),)),)),)
      ),
      r'As llama: block 0: must be PreNorm\(Attention\), PreNorm\(GatedMlp\), '
      r'not PreNorm\(Attention\)\.',
    ),
    (
      SMALL['llama'].replace(stack=(*SMALL['llama'].stack, Group(pattern=(OTHER,)))),
      r'As llama: stack\.3\.pattern\.0\.branches',
    ),
  ],
)
def test_models_without_a_counterpart(tmp_path, config, message):
  with pytest.raises(InputError, match=message):
    save_hf(tmp_path / 'out', config, {})


# ---- pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('rule', 'shapes', 'theirs'),
  [
    (Rule(('a',), 'x'), [(4,)], {'x': (4,)}),
    (Rule(('a', 'b', 'c'), 'x'), [(3, 2), (3, 1), (3, 4)], {'x': (3, 7)}),
    (Rule(('a', 'b'), 'x', transposed=True), [(3, 2), (3, 1)], {'x': (3, 3)}),
    (Rule(('a',), 'x.{item}', transposed=True), [(2, 3, 5)], {'x.0': (5, 3), 'x.1': (5, 3)}),
    (
      Rule(('a', 'b'), 'x', transposed=True, reshape=lambda s: (s[0], 1, s[1])),
      [(4, 6), (4, 2)],
      {'x': (8, 1, 4)},
    ),
    (Rule(('a',), 'x', reshape=lambda s: (s[0] // 3, 3)), [(6,)], {'x': (2, 3)}),
    (Rule(('a', 'b'), 'x', groups=4), [(3, 4), (3, 4)], {'x': (3, 8)}),
    (Rule(('a', 'b'), 'x', transposed=True, groups=2), [(3, 4), (3, 6)], {'x': (10, 3)}),
  ],
)
def test_rules_undo_themselves(rule, shapes, theirs):
  numbers = np.random.default_rng(0)
  ours = [numbers.normal(size=s).astype('float32') for s in shapes]
  where = tuple(weights.Location(str(i), (), s) for i, s in enumerate(shapes))
  link = weights.link(rule, where, rule.theirs)
  saved = link.save(ours)
  assert {n: t.shape for n, t in saved.items()} == weights.shapes([link]) == theirs
  for a, b in zip(link.load(list(saved.values())), ours, strict=True):
    np.testing.assert_array_equal(a, b)


def test_parts_alternate_in_groups():
  where = tuple(weights.Location(n, (), (s,)) for n, s in (('a', 4), ('b', 2)))
  saved = weights.link(Rule(('a', 'b'), 'x', groups=2), where, 'x').save(
    [np.arange(4), np.array([10, 11])]
  )
  np.testing.assert_array_equal(saved['x'], [0, 1, 10, 2, 3, 11])


def test_places_count_blocks_through_all_groups_of_a_stack():
  def info(*shape, stacked=False):
    axes = ('layers', *(None,) * (len(shape) - 1)) if stacked else (None,) * len(shape)
    return ParamInfo(shape, np.float32, axes, True, 1.0, False, True, 1.0)

  where = weights.locations(
    {
      'embedder.input.table': info(7, 2),
      'stack.groups.0.0.a': info(2),
      'stack.groups.1.0.a': info(3, 2, stacked=True),
      'stack.groups.1.1.b': info(3, 4, stacked=True),
      'stack.groups.2.0.a': info(2),
      'encoder.stack.groups.0.0.a': info(2, 2, stacked=True),
    }
  )
  assert where['embedder.input.table'] == weights.Location('embedder.input.table', (), (7, 2))
  assert [where[f'stack.{i}.a'].stored.split('.')[2] for i in (0, 1, 3, 5, 7)] == [
    '0',
    '1',
    '1',
    '1',
    '2',
  ]
  assert where['stack.6.b'] == weights.Location('stack.groups.1.1.b', (2,), (4,))
  assert where['encoder.stack.1.a'] == weights.Location('encoder.stack.groups.0.0.a', (1,), (2,))
  assert len(where) == 11


def test_a_rule_that_is_forgotten_is_noticed():
  def with_rules(change):
    rules = change(FAMILIES['llama'].rules(SMALL['llama']))
    return dataclasses.replace(FAMILIES['llama'], rules=lambda config: rules)

  forgotten = with_rules(lambda rules: [r for r in rules if 'down' not in r.ours[0]])
  with pytest.raises(
    InputError, match=r'no tensors for stack\.0\.branches\.1\.layer\.down\.kernel'
  ):
    weights.connect(forgotten, SMALL['llama'])
  with pytest.raises(ValueError, match='twice'):
    weights.connect(with_rules(lambda rules: [*rules, rules[0], *rules]), SMALL['llama'])


def test_files_are_closed_when_full():
  assert plan_files({'a': 5, 'b': 5, 'c': 20, 'd': 1}, 10) == {
    'model-00001-of-00003.safetensors': ['a', 'b'],
    'model-00002-of-00003.safetensors': ['c'],
    'model-00003-of-00003.safetensors': ['d'],
  }
  assert plan_files({'a': 5}, 1) == {SINGLE: ['a']}


def test_one_tensor_at_a_time(saved, monkeypatch):
  """No tensor is read twice, and a parameter leaves the host before the next one is begun."""
  read, put, load, device_put = [], [], weights.load, jax.device_put

  def counted(kind, config, file, *rest):
    count = lambda name: read.append(name) or file.read(name)  # noqa: E731
    return load(kind, config, dataclasses.replace(file, read=count), *rest)

  monkeypatch.setattr(weights, 'load', counted)
  monkeypatch.setattr(jax, 'device_put', lambda *a: put.append(len(read)) or device_put(*a))
  load_hf(saved)
  assert len(read) == len(set(read)) == 30
  assert max(b - a for a, b in itertools.pairwise(put)) == 3  # as many as there are layers
