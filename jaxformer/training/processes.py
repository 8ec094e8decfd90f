"""The processes of one run: found from the environment, and joined before JAX initializes its
devices.

Each host of a TPU slice, or each node of a GPU cluster, runs the same command. The processes of a
run are found, in this order, from

- `JAXFORMER_COORDINATOR` (host:port of process 0), `JAXFORMER_PROCESSES` (their number) and
  `JAXFORMER_PROCESS` (the index of this one);
- what JAX detects itself: Cloud TPU, TPUs on GKE, Slurm, Open MPI, Kubernetes with its Python
  package;
- `SKYPILOT_NODE_IPS` and `SKYPILOT_NODE_RANK`, which SkyPilot sets on each node;
- `JAX_COORDINATOR_ADDRESS`, `NNODES` and `NODE_RANK`, which xpk sets on nodes with GPUs.

Without any of them there is one process.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils

from jaxformer import config
from jaxformer.config import InputError, first_lines, whole
from jaxformer.exit_codes import BAD_INPUT, FAILED, Failure

OWN = ('JAXFORMER_COORDINATOR', 'JAXFORMER_PROCESSES', 'JAXFORMER_PROCESS')
J = TypeVar('J')  # JSON data
WAIT = 'JAXFORMER_JOIN_SECONDS'
PORT = 8476  # of process 0, if the environment names only its host
_ERRORS = 'jaxformer/errors/'
_INPUT = 'input'  # the kind of an `InputError` among them
WATCH_SECONDS = 2.0  # between checks for errors of other processes
GRACE_SECONDS = 10.0  # in which a process that meets the others ends by itself
_watch = threading.Lock()
_meetings = itertools.count()  # the processes meet equally often


Group = tuple[str, dict[str, Any]]
"""The processes of a run: the environment variable that names process 0, and the arguments of
`jax.distributed.initialize`; without arguments what JAX detects itself, in words."""


def group(environment: Mapping[str, str]) -> Group | None:
  """Return the processes that this one belongs to, or None for a single process. Raises
  `InputError` for an inconsistent environment."""
  if any(name in environment for name in OWN):
    if missing := [name for name in OWN if not environment.get(name)]:
      raise InputError(
        f'{" and ".join(missing)} must be given with '
        f'{" and ".join(n for n in OWN if environment.get(n))}'
      )
    return _group(environment, environment[OWN[0]], *OWN)
  if (known := _known_to_jax(environment)) is not None:
    return known, {}
  if _several(environment, 'SKYPILOT_NUM_NODES'):
    nodes = environment.get('SKYPILOT_NODE_IPS', '').split()
    if not nodes:
      raise InputError('SKYPILOT_NUM_NODES is above 1, but SKYPILOT_NODE_IPS names no nodes')
    names = ('SKYPILOT_NODE_IPS', 'SKYPILOT_NUM_NODES', 'SKYPILOT_NODE_RANK')
    return _group(environment, f'{nodes[0]}:{PORT}', *names)
  if _several(environment, 'NNODES') and 'JAX_COORDINATOR_ADDRESS' in environment:
    names = ('JAX_COORDINATOR_ADDRESS', 'NNODES', 'NODE_RANK')
    host, port = environment[names[0]], environment.get('JAX_COORDINATOR_PORT', str(PORT))
    return _group(environment, host if ':' in host else f'{host}:{port}', *names)
  return None


def join(environment: Mapping[str, str] = os.environ) -> bool:
  """Join the processes of this run, waiting for them up to `JAXFORMER_JOIN_SECONDS` (300), and
  return True; do nothing for a single process.

  Call it before any use of devices. Raises `InputError` if the environment is wrong, or process 0
  cannot be reached in time. (If process 0 runs and others are missing, JAX aborts all of them after
  the same time, with its own report and exit code 134.)"""
  found = None if jax.distributed.is_initialized() else group(environment)
  if found is None:
    return False
  source, arguments = found
  seconds = _whole(environment, WAIT, 1) if WAIT in environment else 300
  try:
    if arguments.get('process_id'):
      _reach(arguments['coordinator_address'], seconds)
    jax.distributed.initialize(**arguments, initialization_timeout=seconds)
  except (RuntimeError, ValueError, OSError) as e:
    reason = (str(e).splitlines() or [type(e).__name__])[0]
    where = (
      f'{arguments["coordinator_address"]} ({source})'
      if arguments
      else f'the other processes of {source}'
    )
    raise InputError(f'cannot join {where} within {seconds} s: {reason}') from None
  return True


def exchange(value: J) -> list[J]:
  """Return the JSON data that all processes give, in their order, once all are here.

  It uses the service by which the processes found each other, not their devices, so that a process
  that fails on its way here can announce that (`announced`). Raises its error on all."""
  count = jax.process_count()
  if count == 1:
    return [value]
  client = _service()
  place = f'jaxformer/met/{next(_meetings)}/'
  client.key_value_set(f'{place}{jax.process_index()}', json.dumps(value))
  while True:
    found = dict(client.key_value_dir_get(place))
    if len(found) == count:
      return [json.loads(found[f'{place}{i}']) for i in range(count)]
    if errors := sorted(client.key_value_dir_get(_ERRORS)):
      kind, _, what = errors[0][1].partition(' ')
      raise (_Everywhere if kind == _INPUT else _FailedElsewhere)(what)
    time.sleep(0.02)


def _service() -> Any:
  """The key-value store of the processes."""
  return global_state.client


@contextlib.contextmanager
def announced() -> Generator[None]:
  """Announce an error that is raised inside to the other processes, so that they end where they
  would wait for this one; and end this process if it waits on its devices for one that has stopped,
  which would take until JAX aborts it."""
  try:
    with _watching():
      yield
  except (_Everywhere, _FailedElsewhere):
    raise
  except Exception as e:
    if jax.process_count() > 1:
      where = f'process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()})'
      what = str(e) if isinstance(e, InputError | Failure) else f'{type(e).__name__}: {e}'
      with contextlib.suppress(RuntimeError):  # this process has announced one, or it is too late
        kind = _INPUT if isinstance(e, InputError) else 'failure'
        error = f'{kind} {where} has stopped: {what}'
        _service().key_value_set(f'{_ERRORS}{jax.process_index()}', error)
    raise


@contextlib.contextmanager
def _watching() -> Generator[None]:
  """Look for errors of other processes during the block, but for one inside another."""
  if jax.process_count() == 1 or not _watch.acquire(blocking=False):
    yield
    return
  ended = threading.Event()
  threading.Thread(target=_end_with_others, args=(ended,), name='errors', daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    _watch.release()


def _end_with_others(ended: threading.Event) -> None:
  """End this process some time after another has announced an error, unless it has `ended` the
  watched block by then."""
  own, errors = f'{_ERRORS}{jax.process_index()}', list[tuple[str, str]]()
  while not errors:
    if ended.wait(WATCH_SECONDS):
      return
    try:
      errors = sorted(e for e in _service().key_value_dir_get(_ERRORS) if e[0] != own)
    except RuntimeError:  # the service is gone, and JAX aborts the process
      return
  if ended.wait(GRACE_SECONDS):
    return
  kind, _, what = errors[0][1].partition(' ')
  with contextlib.suppress(OSError):
    print(f'error: {what}', file=sys.stderr, flush=True)
  with contextlib.suppress(Exception):  # the process that has stopped waits for this
    jax.distributed.shutdown()
  os._exit(BAD_INPUT if kind == _INPUT else FAILED)  # the main thread cannot be reached


class _Everywhere(InputError):
  """An error that all processes raise."""


class _FailedElsewhere(Failure):
  """The error of another process, whose cause is not what the user gave."""


def check_equal(facts: Mapping[str, Any]) -> None:
  """Raises `InputError` on all processes if the facts of one, JSON data by name, differ from those
  of process 0; it names the processes and what differs."""
  first, *others = exchange({'host': socket.gethostname(), 'facts': dict(facts)})
  lines = []
  for i, other in enumerate(others, 1):
    differ = config.differences(first['facts'], other['facts'])
    lines += [f'process {i} ({other["host"]}): {d}' for d in differ]
  if lines:
    raise _Everywhere(
      f'all processes of a run must agree; from process 0 ({first["host"]}) differ:\n  '
      f'{first_lines(lines)}'
    )


def broadcast_from_process_0(fn: Callable[[], J]) -> J:
  """Return on all processes the JSON data that `fn` returns on process 0: files may differ between
  hosts, and change while the first one writes. An `InputError` there is raised on all."""
  if jax.process_count() == 1:
    return fn()
  text = b''
  with announced():
    if jax.process_index() == 0:
      text = json.dumps(fn()).encode()
    size = exchange(len(text))[0]
  mine = np.frombuffer(text or bytes(size), np.uint8)
  return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8)))


def _reach(address: str, seconds: int) -> None:
  """Wait until process 0 listens, since JAX's client aborts the program if it does not. Raises
  `OSError`."""
  host, _, port = address.rpartition(':')
  end = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection(
        (host.strip('[]'), int(port)), timeout=max(0.1, end - time.monotonic())
      ).close()
      return
    except OSError:
      if time.monotonic() >= end:
        raise
      time.sleep(min(1.0, seconds / 20))


def _group(
  environment: Mapping[str, str], address: str, coordinator: str, count: str, index: str
) -> Group:
  processes, mine = _whole(environment, count, 1), _whole(environment, index, 0)
  host, _, port = address.rpartition(':')
  if not host or not 0 < (whole(port) or 0) < 2**16:
    raise InputError(coordinator, address, 'host:port')
  if mine >= processes:
    raise InputError(index, mine, f'below {count} = {processes}; processes count from 0')
  return coordinator, {
    'coordinator_address': address,
    'num_processes': processes,
    'process_id': mine,
  }


def _whole(environment: Mapping[str, str], name: str, least: int) -> int:
  text = environment.get(name, '')
  number = whole(text)
  if number is None or number < least:
    raise InputError(name, text, f'a whole number, at least {least}')
  return number


def _several(environment: Mapping[str, str], name: str) -> bool:
  return (whole(environment.get(name, '')) or 0) > 1


def _known_to_jax(environment: Mapping[str, str]) -> str | None:
  """Return the environment that `jax.distributed.initialize` would detect. (JAX itself reports it
  only after it has waited.)"""
  if _on_tpu(environment):
    return 'this TPU slice'
  slurm = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_LOCALID')
  if _several(environment, 'SLURM_NTASKS') and all(name in environment for name in slurm):
    return f'Slurm job {environment["SLURM_JOB_ID"]}'
  if 'OMPI_MCA_orte_hnp_uri' in environment and _several(environment, 'OMPI_COMM_WORLD_SIZE'):
    return 'this Open MPI job'
  if (
    'KUBERNETES_SERVICE_HOST' in environment
    and 'JOB_COMPLETION_INDEX' in environment
    and importlib.util.find_spec('kubernetes')
  ):
    return 'this Kubernetes job'
  return None


def _on_tpu(environment: Mapping[str, str]) -> bool:
  """Return whether this is one of several hosts with TPUs. GKE lists them in the environment; on a
  Cloud TPU machine JAX queries its metadata, and a single host is a group of one."""
  hosts = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
  if hosts is not None:
    return ',' in hosts or _several(environment, 'MEGASCALE_NUM_SLICES')
  if (
    environment.get('JAX_PLATFORMS', 'tpu') not in ('', 'tpu', 'tpu,cpu')
    or 'TPU_SKIP_MDS_QUERY' in environment
  ):
    return False
  chips = any(pathlib.Path('/dev').glob('accel*')) or any(pathlib.Path('/dev/vfio').glob('[0-9]*'))
  return chips and importlib.util.find_spec('libtpu') is not None
