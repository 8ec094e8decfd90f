"""Prices of SkyPilot's catalog, in place of list prices: CSV files that SkyPilot keeps in
`~/.sky/catalogs/VERSION/CLOUD/vms.csv`. Only the files are read; SkyPilot itself is not needed.

https://github.com/skypilot-org/skypilot-catalog
"""

import csv
import dataclasses
import datetime
import math
import pathlib
import re
from collections.abc import Iterator

from jaxformer.config import InputError
from jaxformer.files import user_path
from jaxformer.launch.engine import TPUS, accelerator_type, nodes_of_gpus
from jaxformer.launch.sky import GPUS
from jaxformer.planning.target import Target

SKY = 'sky'
CATALOG = 'SkyPilot catalog'
_FORM = 'sky (what SkyPilot has downloaded), or a folder with CLOUD/vms.csv'


@dataclasses.dataclass(frozen=True)
class _Offer:
  """A price in USD per hour of a slice or of one node, and where it is asked."""

  price: float
  where: str


def catalog_target(target: Target, prices: str, infra: str | None = None) -> Target:
  """Return a target with the lowest prices of a catalog, on demand and of spot capacity, whose
  source says the file, its date, and the region of each.

  Args:
    prices: 'sky' for the catalog that SkyPilot has downloaded, or a folder like it.
    infra: CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE, to which the prices are limited.

  Raises `InputError` where there is no catalog, or none of its prices is of the target: prices of
  the table are not mixed in.
  """
  folder = _folder(prices)
  cloud, region, zone = [*(infra or '').split('/'), '', '', ''][:3]
  files = sorted(folder.glob('*/vms.csv'))
  if cloud not in ('', '*'):
    files = [file for file in files if file.parent.name == cloud.lower()]
  on_demand: list[_Offer] = []
  spot: list[_Offer] = []
  for file in files:
    for row in _rows(file, prices):
      place = f'{row["Region"]}/{row["AvailabilityZone"]}'
      if not _is_of(row, target) or not _is_in(row, region, zone):
        continue
      where = f'{file.parent.name}/{place.rstrip("/")} of {_date(file)}'
      for column, found in (('Price', on_demand), ('SpotPrice', spot)):
        if (price := _price(row[column], file, prices)) is not None:
          found.append(_Offer(price, where))
  if not on_demand:
    where = '' if infra is None else f' in {infra}'
    problem = f'has no price of {_name(target)}{where}; give --price, or leave --prices out'
    raise InputError('--prices', prices, problem=problem)
  units = target.slices if target.topology else nodes_of_gpus(target)[0]
  cheapest, cheapest_spot = _lowest(on_demand), _lowest(spot)
  source = f'price: {CATALOG} {folder}, on demand {cheapest.where}'
  if spot:
    source += f', spot {cheapest_spot.where}'
  chip = target.chip.replace(
    price_per_hour=cheapest.price * units / target.total_chips,
    spot_per_hour=cheapest_spot.price * units / target.total_chips if spot else None,
    source=f'{_without_price(target.chip.source)}; {source}',
  )
  return dataclasses.replace(target, chip=chip)


def priced(
  target: Target, price: float | None, prices: str | None, infra: str | None = None
) -> Target:
  """Return a target at a price per chip-hour, or at those of a catalog."""
  if price is None:
    return target if prices is None else catalog_target(target, prices, infra)
  if prices is not None:
    raise InputError('--prices', prices, problem='has no effect with --price')
  if not 0 < price < float('inf'):
    raise InputError('--price', price, 'positive')
  chip = target.chip.replace(
    price_per_hour=price,
    spot_per_hour=price,
    source=f'{_without_price(target.chip.source)}; price: --price',
  )
  return dataclasses.replace(target, chip=chip)


def price_source(target: Target) -> str:
  """Where the price of a target is from, with its date."""
  source = target.chip.source
  return source.partition('price: ')[2].partition(';')[0] or f'{source}, {target.chip.date}'


def _without_price(source: str) -> str:
  """The source of a chip's other figures."""
  return re.sub('; price: [^;]*', '', source).replace(' and price: ', ': ')


def _folder(prices: str) -> pathlib.Path:
  if prices == SKY:
    versions = pathlib.Path('~/.sky/catalogs').expanduser().glob('v*')
    found = sorted((v for v in versions if re.fullmatch(r'v[0-9]+', v.name)), key=_number)
    folder = found[-1] if found else None
  else:
    folder = user_path(prices, '--prices')
  if folder is None or not any(folder.glob('*/vms.csv')):
    raise InputError('--prices', prices, f'{_FORM}; there is none (`sky show-gpus` downloads it)')
  return folder


def _number(version: pathlib.Path) -> int:
  return int(version.name.removeprefix('v'))


def _rows(file: pathlib.Path, prices: str) -> Iterator[dict[str, str]]:
  needed = ('InstanceType', 'AcceleratorName', 'AcceleratorCount', 'Price', 'SpotPrice', 'Region')
  try:
    with file.open(newline='', encoding='utf-8') as opened:
      reader = csv.DictReader(opened, restval='')
      if missing := [n for n in needed if n not in (reader.fieldnames or ())]:
        problem = f'{file} has no column {", ".join(missing)}'
        raise InputError('--prices', prices, problem=problem)
      for row in reader:
        row.setdefault('AvailabilityZone', '')
        yield row
  except (OSError, ValueError, csv.Error) as e:
    if isinstance(e, InputError):
      raise
    raise InputError('--prices', prices, problem=f'{file} cannot be read ({e})') from None


def _name(target: Target) -> str:
  if target.topology:
    known = target.chip.name in TPUS
    return f'tpu-{accelerator_type(target)}' if known else target.chip.name
  return f'{GPUS.get(target.chip.name, target.chip.name)}:{nodes_of_gpus(target)[1]}'


def _is_of(row: dict[str, str], target: Target) -> bool:
  """Whether a row is of the slices, or of the nodes, of a target."""
  name, count = row['AcceleratorName'], row['AcceleratorCount']
  if target.topology:
    return name == _name(target)
  # without an instance, the price is that of the GPUs alone
  return bool(row['InstanceType']) and f'{name}:{count.removesuffix(".0")}' == _name(target)


def _is_in(row: dict[str, str], region: str, zone: str) -> bool:
  return region in ('', '*', row['Region']) and zone in ('', '*', row['AvailabilityZone'])


def _price(text: str, file: pathlib.Path, prices: str) -> float | None:
  try:
    found = float(text or 'nan')
  except ValueError:
    raise InputError('--prices', prices, problem=f'{file}: {text!r} is no price') from None
  return found if math.isfinite(found) and found > 0 else None


def _lowest(offers: list[_Offer]) -> _Offer:
  return min(offers, key=lambda o: o.price, default=_Offer(math.nan, ''))


def _date(file: pathlib.Path) -> str:
  return datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC).date().isoformat()
