"""Meshes and the tables of rules: what divides what, and what is told when it does not fit."""

import jax
import numpy as np
import pytest

from jaxformer import config as configs
from jaxformer.config import InputError
from jaxformer.overrides import override
from jaxformer.sharding import MeshConfig, Parallel, make_mesh, make_parallel
from jaxformer.sharding_rules import AXES, MESH_AXES, RULES, AxisRules, Rules

pytestmark = pytest.mark.quick


def test_a_table_of_ones_own_is_set_by_dotted_path_and_survives_json():
  given = [
    ('rules', 'Rules'),
    ('rules.params.embed', 'fsdp,context'),
    ('rules.activations.inner', 'none'),
    ('context', '2'),
  ]
  mesh = override(MeshConfig(), given)
  assert mesh.rules.params.embed == ('fsdp', 'context')
  assert mesh.rules.activations.inner is None
  # parameters and activations are ruled separately
  assert mesh.rules.params.inner == RULES['fsdp_tensor'].params.inner
  assert configs.from_json(configs.to_json(mesh)) == mesh
  where = make_parallel(mesh, jax.devices()).param('w', ('embed', 'inner'), (8, 8))
  assert where.spec == jax.sharding.PartitionSpec(('fsdp', 'context'), 'tensor')


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'params.embed': 'fspd'}, "no mesh axis 'fspd'; did you mean fsdp?"),
    ({'params.embd': 'fsdp'}, 'did you mean embed?'),
    ({'params.embed': 'tensor'}, "embed and heads are axes of one array, and mesh axis 'tensor'"),
    ({'params.embed': 'fsdp,fsdp'}, 'distinct mesh axes'),
    ({'params.time': 'context'}, 'no parameter has this axis'),
    ({'activations.time': 'data'}, "batch and time are axes of one array, and mesh axis 'data'"),
  ],
)
def test_a_table_that_cannot_be_is_told(given, message):
  with pytest.raises(InputError, match=message.replace('?', r'\?')):
    override(
      MeshConfig(),
      [('rules', 'Rules'), *((f'rules.{path}', value) for path, value in given.items())],
    )


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (
      {'fsdp': 4, 'tensor': 3, 'data': 1},
      'needs 12 devices; there are 8; with the other axes as they are, tensor 2 would fit',
    ),
    (
      {'fsdp': 2, 'data': 1},
      'needs 2 devices; there are 8; with the other axes as they are, .*fsdp 8.* would fit',
    ),
    (
      {'context': 3},
      'needs a multiple of 3 devices; there are 8; with the other axes as they are, context 1 '
      'would fit',
    ),
  ],
)
def test_a_mesh_that_does_not_multiply_to_the_devices_is_told(sizes, message):
  with pytest.raises(InputError, match=message):
    MeshConfig(**sizes).sizes(8)


def test_devices_that_would_divide_nothing_are_told():
  with pytest.raises(InputError, match='shard nothing over it'):
    MeshConfig(tensor=2, rules='fsdp')
  table = Rules(activations=AxisRules(batch=('fsdp',)))
  with pytest.raises(InputError, match=r'mesh\.data = -1 takes the 4 remaining devices'):
    MeshConfig(fsdp=2, rules=table).sizes(8)


def test_an_axis_that_does_not_divide_its_dimension_is_told():
  mesh = make_mesh(MeshConfig(fsdp=8, data=1))
  with pytest.raises(
    InputError, match=r'mesh\.fsdp = 8: must divide embed = 12 of parameter w; 3, 4, 6 would'
  ):
    Parallel(mesh, 'fsdp').param('w', ('embed',), (12,))


def test_replicas_come_first_and_divide_the_batch():
  mesh = make_mesh(MeshConfig(replica=2, fsdp=2))
  assert mesh.axis_names == MESH_AXES == tuple(MeshConfig().given)
  assert mesh.shape['replica'] == mesh.shape['data'] == 2
  assert [d.id for d in mesh.devices[1].ravel()] == [4, 5, 6, 7]
  for rules in RULES.values():
    assert 'replica' in rules.activations.batch
    assert not any('replica' in rules.params[axis] for axis in AXES)


@pytest.mark.tpu_compiler
def test_slices_lie_along_replicas():
  pytest.importorskip(
    'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
  )
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x4', num_slices=2
  ).devices
  mesh = make_mesh(MeshConfig(replica=2, data=1, fsdp=4, tensor=2), devices)
  slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
  assert (slices[0] == 0).all()
  assert (slices[1] == 1).all()
  with pytest.raises(
    InputError, match=r'mesh\.replica = 1: must be a multiple of 2, the number of slices'
  ):
    make_mesh(MeshConfig(), devices)
