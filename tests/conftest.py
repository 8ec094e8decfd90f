"""Every test sees 8 fake CPU devices, fails on implicit broadcasting and on arrays of other shapes
than functions state; compiled programs are kept between runs.

`JAXFORMER_NNX=tree` runs the suite with Flax NNX in tree mode.
"""

import gc
import os
import pathlib
from importlib.metadata import version

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
# Orthogonal matrices are drawn on each of the fake devices at once; OpenBLAS's threads would spin
# against each other.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# Nearly all of the suite's time is compilation of small programs. Without LLVM's optimizations it
# is two thirds; without the fusion emitters, which newer versions cannot do without, a third.
# `JAXFORMER_XLA=default` compiles as users do (a step of `.ci/run`).
if os.environ.get('JAXFORMER_XLA') != 'default':
  os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
    + (' --xla_cpu_use_fusion_emitters=false' if version('jaxlib').startswith('0.10.') else ''),
  )
else:
  os.environ.setdefault('XLA_FLAGS', '')

import jax
import pytest
from flax import nnx
from jaxtyping import install_import_hook

# The packages of plain functions on arrays. Modules and pytrees are built with tracers and
# placeholders of other shapes by JAX itself.
install_import_hook(
  [
    'jaxformer.ops',
    'jaxformer.data.dataset',
    'jaxformer.data.text',
    'jaxformer.data.pairs',
    'jaxformer.data.cache',
    'jaxformer.data.shuffle',
    'jaxformer.data.tasks',
    'jaxformer.inference.sampling',
    'jaxformer.training.schedule',
  ],
  # an int is a float, as for Python's type checkers
  'beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))',
)

# Tracing makes so many objects that Python's default looks for cycles in a ninth of the time.
gc.set_threshold(100_000, 20, 20)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update(
  'jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'xla')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

if os.environ.get('JAXFORMER_NNX') == 'tree':
  nnx.set_graph_mode(False)
  nnx.set_graph_updates(False)


def pytest_collection_modifyitems(items):
  """In the contract suite all tests of one layer or model stand together: they share compiled
  programs, and xdist's workers begin with halves of the list (`--dist worksteal`)."""

  def named(item):
    return str(item.callspec.params.get('name')) if hasattr(item, 'callspec') else ''

  where = [i for i, item in enumerate(items) if item.path.parent.name == 'contract']
  for i, item in zip(where, sorted((items[i] for i in where), key=named), strict=True):
    items[i] = item


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  """No test reads or writes the user's cache of tokenised corpora."""
  monkeypatch.setenv('JAXFORMER_CACHE', str(tmp_path_factory.getbasetemp() / 'jaxformer-cache'))


_MAPPINGS = pathlib.Path('/proc/self/maps')
_tests_run = 0


@pytest.fixture(autouse=True)
def _few_programs():
  """Compiled programs are let go before the kernel's limit of mappings a process (65,530) is
  reached: each holds several, and XLA ends the process when it gets no more."""
  yield
  global _tests_run
  _tests_run += 1
  if _tests_run % 10 == 0 and _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b'\n') > 20_000:
    jax.clear_caches()
    gc.collect()
