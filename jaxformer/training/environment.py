"""The environment of a run: what a result may depend on apart from its config."""

import functools
import importlib.metadata
import os
import platform
import sys
import time
from typing import Any

import jax

from jaxformer.installation import FOLDER, git, installation, source_sha256

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


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """Return the commit of the package's source, with a + if files differ from it; None outside a
  repository."""
  head = git(FOLDER, 'rev-parse', 'HEAD')
  changed = head and git(FOLDER, 'status', '--porcelain', '--untracked-files=no', '--', '.')
  return f'{head}+' if changed else head
