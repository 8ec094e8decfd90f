"""Prices of SkyPilot's catalog: a small one in its format, in place of list prices and never beside
them."""

import json
import os

import pytest

from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.launch.catalog import catalog_target, price_source
from jaxformer.planning.target import parse_target

pytestmark = pytest.mark.quick

HEAD = 'InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone'
GCP = """
TPU-VM,tpu-v6e-8,1.0,,,tpu-v6e-8,24.0,9.6,us-east5,us-east5-b
TPU-VM,tpu-v6e-8,1.0,,,tpu-v6e-8,20.0,12.0,europe-west4,europe-west4-a
TPU-VM,tpu-v6e-16,1.0,,,tpu-v6e-16,40.0,,us-east5,us-east5-b
,H100,8.0,,,H100,1.0,1.0,us-east5,us-east5-b
"""
AWS = """
p5.48xlarge,H100,8.0,192,2048,x,56.0,20.0,us-east-1,us-east-1a
p5.4xlarge,H100,1.0,16,256,x,8.0,,us-east-1,us-east-1a
m5.large,,,2,8,,0.1,0.05,us-east-1,us-east-1a
"""


@pytest.fixture
def catalog(tmp_path, monkeypatch):
  """The catalog as SkyPilot keeps it in the home folder."""
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  for version, cloud, rows in (('v8', 'gcp', GCP), ('v8', 'aws', AWS), ('v7', 'gcp', 'broken')):
    file = tmp_path / f'.sky/catalogs/{version}/{cloud}/vms.csv'
    file.parent.mkdir(parents=True)
    file.write_text(HEAD + rows)
    os.utime(file, (1_790_000_000, 1_790_000_000))
  return tmp_path / '.sky/catalogs/v8'


@pytest.mark.parametrize(
  ('target', 'infra', 'price', 'spot', 'where'),
  [
    ('v6e-8', None, 20.0, 9.6, 'gcp/europe-west4/europe-west4-a'),
    ('v6e-8', 'gcp/us-east5', 24.0, 9.6, 'gcp/us-east5/us-east5-b'),
    ('v6e-8', '*/us-east5/us-east5-b', 24.0, 9.6, 'gcp/us-east5'),
    ('v6e-16', None, 40.0, None, 'gcp/us-east5'),
    ('2xv6e-16', None, 80.0, None, 'gcp/us-east5'),
    ('h100:8', None, 56.0, 20.0, 'aws/us-east-1'),
    ('h100:16', None, 112.0, 40.0, 'aws/us-east-1'),
    ('h100:1', 'aws', 8.0, None, 'aws/us-east-1'),
  ],
)
def test_the_lowest_price_with_its_place_and_date(target, infra, price, spot, where, catalog):
  found = catalog_target(parse_target(target), 'sky', infra)
  assert found.price_per_hour() == pytest.approx(price)
  assert found.price_per_hour(spot=True) == (None if spot is None else pytest.approx(spot))
  said = price_source(found)
  assert said.startswith(f'SkyPilot catalog {catalog}, on demand ')
  assert where in said
  assert 'of 2026-09-21' in said
  assert found.chip.source.count('price: ') == 1
  assert ('spot' in said) == (spot is not None)
  assert found.chip.peak() == parse_target(target).chip.peak()


@pytest.mark.parametrize(
  ('target', 'infra', 'problem'),
  [
    ('v5p-128', None, 'has no price of tpu-v5p-128'),
    ('v6e-32', None, 'has no price of tpu-v6e-32'),
    ('v6e-8', 'gcp/us-west1', 'in gcp/us-west1'),
    ('h100:8', 'gcp', 'has no price of H100:8 in gcp'),  # the GPUs alone, without their machine
    ('b200:8', None, 'has no price of B200:8'),
  ],
)
def test_what_the_catalog_does_not_have_is_no_list_price(target, infra, problem, catalog):
  with pytest.raises(InputError, match=problem):
    catalog_target(parse_target(target), str(catalog), infra)


@pytest.mark.parametrize('text', [b'', b'a,b\n1,2\n', HEAD.encode() + b'\nx,tpu-v6e-8,1,,,,cheap,,r,z', b'\xff\xfe'])  # fmt: skip
def test_a_catalog_that_is_none_is_one_line(text, catalog):
  (catalog / 'gcp/vms.csv').write_bytes(text)
  with pytest.raises(InputError, match='--prices') as e:
    catalog_target(parse_target('v6e-8'), 'sky')
  assert '\n' not in str(e.value)


def test_without_a_catalog_nothing_is_guessed(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  for prices in ('sky', str(tmp_path), '/nowhere'):
    with pytest.raises(InputError, match=r'--prices = .*there is none'):
      catalog_target(parse_target('v6e-8'), prices)


def test_launch_and_plan_say_the_same_price_and_where_it_is_from(catalog, capsys):
  at = ['--target', 'v6e-8']
  words = ['launch', 'sky', 'gpt2-tiny', *at, '--run.dir', 'gs://b/r', '--dry-run']

  def answer(*words):
    assert main([*words, '--json']) == 0
    return json.loads(capsys.readouterr().out)

  plan = answer('plan', 'gpt2-tiny', *at, '--prices', 'sky')
  launch = answer(*words, '--prices', 'sky')
  assert launch['price'] == pytest.approx(plan['run']['price_usd'])
  assert launch['jobs'][0]['price_per_hour_usd'] == pytest.approx(20.0)
  spot = answer(*words, '--prices', 'sky', '--spot', '--sky.infra', 'gcp/us-east5')
  assert spot['price'] == pytest.approx(launch['price'] * 9.6 / 20)
  assert 'spot gcp/us-east5' in spot['price_source']
  listed = answer(*words)
  assert 'as of 2025' in listed['price_source']
  assert listed['price'] == pytest.approx(answer('plan', 'gpt2-tiny', *at)['run']['price_usd'])
  own = answer(*words, '--price', '1.5')
  assert own['jobs'][0]['price_per_hour_usd'] == 12.0
  assert own['price_source'] == '--price'
  assert main(words) == 0
  assert 'prices: cloud.google.com/tpu/pricing' in capsys.readouterr().out
  assert main(['plan', 'gpt2-tiny', *at, '--prices', 'sky']) == 0
  assert 'SkyPilot catalog' in capsys.readouterr().out
  for wrong in (['--price', '1', '--prices', 'sky'], ['--price', '0'], ['--price', 'nan']):
    assert main([*words, *wrong]) == 2


def test_the_table_has_a_dated_source_for_every_price():
  for name in ('v4-8', 'v5e-8', 'v5p-8', 'v6e-8', 'v7x-8', 'a100:8', 'h100:8', 'h200:8', 'b200:8'):
    assert '2025' in price_source(parse_target(name))
