"""The environment of a run: what a result may depend on apart from its config."""

import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxformer import config
from jaxformer.files import regular_file
from jaxformer.installation import FOLDER, commit_of, git, installation, source_sha256
from jaxformer.json_data import parse_json
from jaxformer.training.paths import AnyPath, to_path

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'tokenizers',
  'libtpu',
  'jax-cuda13-plugin',
)

# Settings of JAX that change what a program computes.
JAX_SETTINGS = (
  'jax_enable_x64',
  'jax_default_matmul_precision',
  'jax_default_prng_impl',
  'jax_threefry_partitionable',
  'jax_random_seed_offset',
  'jax_numpy_dtype_promotion',
  'jax_softmax_custom_jvp',
  'jax_use_shardy_partitioner',
  'jax_disable_most_optimizations',
)
# Flags of XLA that do not, and may name a folder of one host, or how many devices it has.
OWN_OF_A_HOST = ('--xla_dump', '--xla_force_host_platform_device_count')
AS_AT = 'as_at_start'


def environment(data_manifest: dict[str, Any]) -> dict[str, Any]:
  """Return versions, devices, flags, command, commit of the package, and the data, as JSON data."""
  devices = jax.devices()
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'command': sys.argv,
    'platform': platform.platform(),
    'cpus': os.cpu_count(),
    **software(),
    'devices': {
      'platform': devices[0].platform,
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
    },
    'xla_flags': {k: os.environ[k] for k in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS') if k in os.environ},
    'commit': _commit(),
    'data': data_manifest,
  }


@functools.cache
def software() -> dict[str, Any]:
  """Return the versions of Python and of packages, and a hash of this package's source, as JSON
  data: what all hosts of a run must have alike."""
  others = {p: v for p in PACKAGES if (v := _version(p))}
  return {
    'python': platform.python_version(),
    'versions': {'jaxformer': installation().version, **others},
    'source_sha256': source_sha256(),
  }


def compilation() -> dict[str, Any]:
  """Return the settings by which JAX and XLA compile programs, as JSON data: all hosts of a run
  must have the same."""
  flags = {k: _flags(os.environ.get(k, '')) for k in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')}
  return flags | {n: jax.config.values[n] for n in JAX_SETTINGS if n in jax.config.values}


def _flags(text: str) -> str:
  return ' '.join(sorted(f for f in text.split() if not f.startswith(OWN_OF_A_HOST)))


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """Return the commit of the package's checkout, with a + if files of the package differ from it,
  or the one that it was installed from; None if there is neither."""
  found = installation()
  if found.checkout is None:
    url, at, commit = (found.origin or '').rpartition('@')
    return commit if at and url.startswith('git+') else None
  head = commit_of(found.checkout)
  changed = head and git(FOLDER, 'status', '--porcelain', '--untracked-files=no', '--', '.')
  return f'{head}+' if changed else head


# ---- the starts of a run -----------------------------------------------------------------------


def with_start(entries: Sequence[Any], start: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Return the entries of `environment.json` with one for another start, which has a `time` and a
  `step`. The entry has these, and of the rest what differs from the start before: None for what is
  absent now, and `{AS_AT: n}` for a list or an object that the n-th start had, counted from 1. A
  list of files is written once, however often the run is started."""
  start = json.loads(json.dumps(start, default=str))
  if not (before := starts(entries)):
    return [start]
  last, entry = before[-1], {name: start[name] for name in ('time', 'step')}
  for name in [*start, *(name for name in last if name not in start)]:
    value = start.get(name)
    if name in entry or value == last.get(name):
      continue
    same = [n for n, old in enumerate(before, 1) if old.get(name) == value]
    entry[name] = {AS_AT: same[0]} if same and isinstance(value, dict | list) else value
  return [*(e for e in entries if isinstance(e, dict)), entry]


def starts(entries: Sequence[Any]) -> list[dict[str, Any]]:
  """Return all that is known of each start, by the entries of `environment.json`. Those without a
  `step`, as earlier versions wrote them, are complete."""
  found: list[dict[str, Any]] = []
  for entry in entries:
    if not isinstance(entry, dict):
      continue
    known = dict(found[-1]) if found and 'step' in entry else {}
    for name, value in entry.items():
      n = value.get(AS_AT) if isinstance(value, dict) else None
      known[name] = found[n - 1].get(name) if type(n) is int and 0 < n <= len(found) else value
    found.append({name: value for name, value in known.items() if value is not None})
  return found


def other_software(folder: str | AnyPath) -> list[str]:
  """Return how the software that a run was last started with differs from this, a line per version,
  or per hash of source; nothing if that is unknown."""
  known = starts(read_entries(to_path(folder) / 'environment.json'))
  now = software()
  was = {name: known[-1][name] for name in now if name in known[-1]} if known else {}
  return config.differences(was, {name: now[name] for name in was})


def read_entries(file: AnyPath) -> list[Any]:
  """Return the entries of an `environment.json`; none if it is missing or corrupt, which must not
  stop a run."""
  try:
    value = parse_json(regular_file(file).read_text())
  except (OSError, ValueError):
    return []
  return value if isinstance(value, list) else []
