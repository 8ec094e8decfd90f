"""The environment of a run: what a result may depend on apart from its config."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
  'jaxformer',
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
  home = Path(__file__).parents[1]
  source = hashlib.sha256()
  for file in sorted(home.rglob('*.py')):
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    source.update(f'{file.relative_to(home).as_posix()} {content}\n'.encode())
  return {
    'python': platform.python_version(),
    'versions': {p: v for p in PACKAGES if (v := _version(p)) or p == 'jaxformer'},
    'source_sha256': source.hexdigest(),
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """Return the commit of the package's source, with a + if files differ from it; None outside a
  repository."""
  if shutil.which('git') is None:
    return None
  home = Path(__file__).parent

  def git(*words: str) -> str | None:
    done = subprocess.run(
      ['git', '-C', str(home), *words], capture_output=True, text=True, check=False, timeout=20
    )
    return done.stdout.strip() if done.returncode == 0 else None

  head = git('rev-parse', 'HEAD')
  changed = head and git('status', '--porcelain', '--untracked-files=no', '--', str(home.parent))
  return f'{head}+' if changed else head
