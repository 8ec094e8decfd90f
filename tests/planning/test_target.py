"""Targets by the names that sellers give them, and the table of chips."""

import json
import math

import pytest

from jaxformer.config import InputError
from jaxformer.hardware import CHIPS, GIB, chip, chip_named, hardware_file
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
    ('v5p:4x4x6', 'multiples of 4 chips along each side, at most 8,960 in all'),
    ('v5p:4x4x4096', 'at most 8,960'),
    ('v4:16x16x24', 'at most 4,096'),
    ('v5p:0x4x4', 'multiples of 4'),
    ('v5e-' + 5000 * '9', 'must be a cloud name'),
  ],
)
def test_what_is_not_offered_names_what_is(text, message):
  with pytest.raises(InputError, match=message):
    parse_target(text)


# Slices with a name by chips or TensorCores. Of v2 and v3: cloud.google.com/tpu/docs/regions-zones;
# of v5e and v6e: docs.cloud.google.com/tpu/docs/v5e and v6e; of the others the topologies that xpk
# gives a name (`core/system_characteristics.py`), to which belong those of Google's tables. Of v4
# and v5p moreover every number of cubes of 64 chips: up to a pod, and up to the largest job.
# Read in 2026-11.
SMALL = '2x2x1 2x2x2 2x2x4 2x4x4'
LONG = """
  4x4x4 4x4x8 4x4x12 4x8x8 4x4x20 4x8x12 4x4x28 8x8x8 4x12x12 4x8x20 4x4x44 8x8x12 4x4x52 4x8x28
  4x12x20 8x8x16 4x4x68 8x12x12 4x4x76 8x8x20 4x12x28 4x8x44 4x4x92 8x12x16 4x20x20 4x8x52 12x12x12
  8x8x28 4x4x116 8x12x20 4x4x124 8x16x16 4x12x44 4x8x68 4x20x28 12x12x16 4x4x148 4x8x76 4x12x52
  8x16x20 4x4x164 8x12x28 4x4x172 8x8x44 12x12x20 4x8x92 4x4x188 12x16x16 4x28x28 8x20x20 4x12x68
  8x8x52 4x4x212 12x12x24 4x20x44 8x16x28 4x12x76 4x8x116 4x4x236 12x16x20 4x4x244 4x8x124 12x12x28
  16x16x16 4x20x52 8x12x44 8x8x68 4x12x92 8x20x28 12x16x24 4x8x148 12x20x20 8x8x76 4x28x44 8x12x52
  16x16x20 12x12x36 4x8x164 12x16x28 4x20x68 4x8x172 4x12x116 8x16x44 12x20x24 4x28x52 8x8x92
  4x12x124 4x8x188 4x20x76 16x16x24 12x24x24 16x20x28"""
TOPOLOGIES = {
  'v4': f'{SMALL} 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16',
  'v5p': f'{SMALL} {LONG}',
  'tpu7x': f'1x1x1 {SMALL} {LONG} 16x16x32 16x24x24',
}
COUNTS = {
  'v2': (8, 32, 128, 256, 512),
  'v3': (8, 32, 64, 128, 256, 512, 1024, 2048),
  'v4': range(128, 8193, 128),
  'v5p': range(128, 12289, 128),
  'v5litepod': (1, 4, 8, 16, 32, 64, 128, 256),
  'v5e': (1, 4, 8, 16, 32, 64, 128, 256),
  'v6e': (1, 4, 8, 16, 32, 64, 128, 256),
}


def test_every_published_name_of_a_slice_is_known():
  known: dict[str, set[str]] = {}
  for name, shapes in TOPOLOGIES.items():
    for shape in shapes.split():
      chips = math.prod(map(int, shape.split('x')))
      target = parse_target(f'{name}-{2 * chips}')
      described = '2x2x1' if chips == 1 else shape  # libtpu describes no smaller slice
      assert (target.total_chips, target.topology) == (chips, f'{name}:{described}')
      assert parse_target(f'{name}:{shape}') == target
      known.setdefault(name, set()).add(f'{name}-{2 * chips}')
  for name, counts in COUNTS.items():
    for count in counts:
      target = parse_target(f'{name}-{count}')
      assert target.total_chips == count // target.chip.cores
      assert parse_target(target.name) == target
      known.setdefault(name, set()).add(f'{name}-{count}')
  # 96 cubes of v5p in the largest job, 2 larger slices and 4 smaller ones; 64 cubes and 4 of v4
  assert {name: len(slices) for name, slices in known.items()} == {
    'v2': 5,
    'v3': 8,
    'v4': 68,
    'v5litepod': 8,
    'v5e': 8,
    'v5p': 102,
    'v6e': 8,
    'tpu7x': 99,
  }


@pytest.mark.parametrize(
  ('text', 'topology'),
  [
    # from the table of xpk, core/system_characteristics.py
    ('v5p-1408', 'v5p:4x4x44'),
    ('v5p-2432', 'v5p:4x4x76'),
    ('v5p-5632', 'v5p:8x8x44'),
    ('v5p-10880', 'v5p:4x20x68'),
    ('v5p-11520', 'v5p:12x20x24'),
    ('v5p-12288', 'v5p:16x16x24'),
    ('v5p-17920', 'v5p:16x20x28'),
    ('v4-4096', 'v4:8x16x16'),
    ('tpu7x-2', 'tpu7x:2x2x1'),
    ('tpu7x-18432', 'tpu7x:16x24x24'),
    ('v5litepod-16', 'v5e:4x4'),
    ('v3-8', 'v3:2x2'),
    ('v3-2048', 'v3:32x32'),
    # custom topologies
    ('v5p:8x16x48', 'v5p:8x16x48'),
    ('v4:4x4x12', 'v4:4x4x12'),
    ('v4:1x2x2', 'v4:2x2x1'),
  ],
)
def test_topologies_of_names(text, topology):
  assert parse_target(text).topology == topology


def test_every_shape_is_whole_hosts():
  for name, shapes in SHAPES.items():
    for shape in shapes:
      target, host = parse_target(f'{name}:{shape}'), CHIPS[name].chips_per_host
      assert target.chips % 4 == 0 or target.chips == 1
      assert target.hosts == max(1, target.chips // host)


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
    'NVIDIA H100 PCIe': 'h100-pcie',
    'NVIDIA A100-SXM4-40GB': 'a100-40',
    'NVIDIA A100-PCIE-40GB': 'a100-40',
    'NVIDIA A100 80GB PCIe': 'a100-pcie',
    'Tesla V100-SXM2-16GB': 'v100',
    'Tesla V100-SXM2-32GB': 'v100-32',
    'NVIDIA L4': 'l4',
    'NVIDIA GH200 480GB': 'gh200',
    'NVIDIA GB200': 'gb200',
    'NVIDIA B300 SXM6 AC': 'b300',
    'AMD Instinct MI300X': 'mi300x',
    'TPU v2': 'v2',
    'TPU v3': 'v3',
  }
  for kind, name in kinds.items():
    found = chip(kind)
    assert found is not None
    assert found.name == name
  assert chip('cpu') is None
  assert chip('TPU v5 something') is None
  assert chip('NVIDIA L40S') is None


def test_every_figure_has_a_source_and_a_date():
  for c in CHIPS.values():
    assert c.source
    assert c.date
    rates = c.flops_per_second
    assert c.peak('fp32') <= c.peak('bf16')
    assert rates.get('fp8', c.peak('bf16')) >= c.peak('bf16')
    assert c.price_per_hour < 20
    assert c.interconnect_bytes_per_second < c.bytes_per_second
    assert c.network_bytes_per_second < c.interconnect_bytes_per_second
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
    ({'v5e': {'memory_bytes': 1e999}}, 'a finite number'),
    ({'v5e': {'flops_per_second': {'bf16': 1e999}}}, 'positive number'),
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


@pytest.mark.parametrize('name', [name for name, chip in CHIPS.items() if chip.clock_hz])
def test_the_clock_of_a_tpu_is_its_peak_over_whole_matrix_units(name):
  chip = CHIPS[name]
  units = chip.peak('bf16') / chip.devices / chip.clock_hz / (2 * 128 * 128)
  assert units == pytest.approx(round(units), rel=2e-3)
  assert round(units) in (4, 8, 16)  # of 128 x 128, or their number in units of 256 x 256
  assert chip.links
  assert chip.ring


@pytest.mark.parametrize(
  ('name', 'shape', 'closed'),
  [  # docs.cloud.google.com/tpu/docs/v5p and /v5e, and what MaxText describes to the compiler
    ('v5p', (2, 4, 4), (False, False, False)),
    ('v5p', (4, 4, 8), (True, True, True)),
    ('v4', (4, 4, 4), (True, True, True)),
    ('v7x', (4, 8, 8), (True, True, True)),
    ('v7x', (2, 2, 4), (False, False, False)),
    ('v5e', (8, 16), (False, True)),
    ('v6e', (16, 16), (True, True)),
    ('v6e', (4, 4), (False, False)),
  ],
)
def test_which_dimensions_of_a_slice_close_to_rings(name, shape, closed):
  assert CHIPS[name].closed(shape) == closed
