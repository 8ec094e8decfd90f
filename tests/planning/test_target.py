"""Targets by the names that sellers give them, and the table of chips."""

import json

import pytest

from jaxformer.config import InputError
from jaxformer.planning.hardware import CHIPS, GIB, chip, chip_named, hardware_file
from jaxformer.planning.target import SHAPES, parse_target

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
  ('text', 'chips', 'slices', 'topology', 'hosts'),
  [
    ('v5p-2048', 1024, 1, 'v5p:8x8x16', 256),
    ('v4-8', 4, 1, 'v4:2x2x1', 1),
    ('v6e-256', 256, 1, 'v6e:16x16', 32),
    ('v5e-64', 64, 1, 'v5e:8x8', 8),
    ('2 x v5e-256', 256, 2, 'v5e:16x16', 64),
    ('2xv5e-256', 256, 2, 'v5e:16x16', 64),
    ('v5e:2x4', 8, 1, 'v5e:2x4', 1),
    ('v5p:4x8x4', 128, 1, 'v5p:4x4x8', 32),
    ('tpu7x-256', 128, 1, 'tpu7x:4x4x8', 32),
    ('h100:8', 8, 1, None, 1),
    ('h100-nvl:2', 2, 1, None, 1),
    ('b200:64', 64, 1, None, 8),
    ('v6e-1', 1, 1, 'v6e:2x2', 1),
  ],
)
def test_names_of_sellers(text, chips, slices, topology, hosts):
  target = parse_target(text)
  assert (target.chips, target.slices, target.topology, target.hosts) == (
    chips,
    slices,
    topology,
    hosts,
  )
  assert target.devices == chips * slices * target.chip.devices
  assert parse_target(target.name) == target
  assert target.price_per_hour() == pytest.approx(target.chip.price_per_hour * chips * slices)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('v5q-8', "unknown chip 'v5q'.*did you mean v5p"),
    ('v5p-100', 'v5p-64 or v5p-128 .in TensorCores, two per chip'),
    ('v5e-48', 'v5e-32 or v5e-64'),
    ('v6e-512', 'such as v6e-256 '),
    ('h100:12', 'full hosts of 8 GPUs, such as 8 or 16'),
    ('v5e:3x3', 'topologies of v5e: 1x1, 2x2'),
    ('v5e:16', r'v5e-16'),
    ('0 x v5e-8', 'at least one slice'),
    ('large', 'must be a cloud name such as v5p-2048'),
  ],
)
def test_what_is_not_offered_names_what_is(text, message):
  with pytest.raises(InputError, match=message):
    parse_target(text)


def test_every_shape_of_three_axes_is_whole_hosts():
  for name, shapes in SHAPES.items():
    for shape in shapes:
      assert parse_target(f'{name}:{shape}').chips % 4 == 0 or CHIPS[name].chips_per_host == 8


def test_devices_of_jax_are_known():
  kinds = {
    'TPU v4': 'v4',
    'TPU v5 lite': 'v5e',
    'TPU v5e': 'v5e',
    'TPU v5': 'v5p',
    'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e',
    'TPU7x': 'v7x',
    'NVIDIA A100-SXM4-80GB': 'a100',
    'NVIDIA H100 80GB HBM3': 'h100',
    'NVIDIA H100 NVL': 'h100-nvl',
    'NVIDIA H200': 'h200',
    'NVIDIA B200': 'b200',
  }
  for kind, name in kinds.items():
    found = chip(kind)
    assert found is not None
    assert found.name == name
  assert chip('cpu') is None
  assert chip('TPU v5 something') is None


def test_every_figure_has_a_source_and_a_date():
  for c in CHIPS.values():
    assert c.source
    assert c.date
    assert (
      c.peak('bf16') < c.peak('int8' if 'int8' in c.flops_per_second else 'fp8') or c.name == 'v4'
    )
  with pytest.raises(
    InputError, match="precision = 'fp4': must be one of those of v5p, bf16, int8, fp8"
  ):
    CHIPS['v5p'].peak('fp4')


def test_a_file_of_ones_own(tmp_path):
  path = tmp_path / 'chips.toml'
  path.write_text(
    '[v5e]\nprice_per_hour = 0.5\n[mine]\nmemory_bytes = 1e9\nbytes_per_second = 1e9\n'
    'interconnect_bytes_per_second = 1e9\nnetwork_bytes_per_second = 1e9\nchips_per_host = 4\n'
    'price_per_hour = 1.0\nflops_per_second = {bf16 = 1e12}\n'
  )
  chips = hardware_file(path)
  assert chips['v5e'].price_per_hour == 0.5
  assert chips['v5e'].memory_bytes == 15.75 * GIB
  assert parse_target('mine-16', chips).price_per_hour() == 16.0
  assert chip_named('v6e', chips) == CHIPS['v6e']


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'v5e': {'prise_per_hour': 1}},
      "v5e: .*no field 'prise_per_hour'; did you mean price_per_hour",
    ),
    ({'v5e': {'price_per_hour': 'much'}}, "v5e: Chip.price_per_hour = 'much': must be a number"),
    ({'v5e': {'flops_per_second': 1e12}}, 'v5e: Chip.flops_per_second = .*including bf16'),
    ({'v5e': {'price_per_hour': -1}}, 'v5e: Chip.price_per_hour = -1.0: must be positive'),
    ({'v5e': 3}, 'must be fields of a chip'),
    ({'v5e': {'name': 'mine'}}, 'must be fields of a chip other than its name'),
    ({'mine': {'price_per_hour': 1}}, 'mine: .*Chip needs flops_per_second, memory_bytes'),
    ([], 'chip name -> fields'),
  ],
)
def test_a_wrong_file_names_the_field(tmp_path, fields, message):
  path = tmp_path / 'chips.json'
  path.write_text(json.dumps(fields))
  with pytest.raises(InputError, match=message):
    hardware_file(path)
  with pytest.raises(InputError, match='No such file'):
    hardware_file(tmp_path / 'none.json')
