"""Which processes belong together, by the environments that say so, and how they end together."""

import os
import threading
import time

import jax
import pytest

from jaxformer.config import InputError
from jaxformer.exit_codes import BAD_INPUT, FAILED, Failure
from jaxformer.training import processes
from jaxformer.training.processes import announced, exchange, group, join

pytestmark = pytest.mark.quick

OWN = {'JAXFORMER_COORDINATOR': 'ten:8476', 'JAXFORMER_PROCESSES': '4', 'JAXFORMER_PROCESS': '3'}
SKY = {
  'SKYPILOT_NUM_NODES': '2',
  'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
  'SKYPILOT_NODE_RANK': '1',
}
SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
XPK = {
  'JAX_COORDINATOR_ADDRESS': 'first',
  'JAX_COORDINATOR_PORT': '1234',
  'NNODES': '2',
  'NODE_RANK': '1',
}


def in_group(source, address, count, index):
  arguments = {'coordinator_address': address, 'num_processes': count, 'process_id': index}
  return source, arguments


@pytest.mark.parametrize(
  ('environment', 'found'),
  [
    ({}, None),
    (OWN, in_group('JAXFORMER_COORDINATOR', 'ten:8476', 4, 3)),
    (OWN | SLURM, in_group('JAXFORMER_COORDINATOR', 'ten:8476', 4, 3)),
    (SKY, in_group('SKYPILOT_NODE_IPS', '10.0.0.1:8476', 2, 1)),
    (
      SKY | {'SKYPILOT_NUM_NODES': '1', 'SKYPILOT_NODE_IPS': '10.0.0.1', 'SKYPILOT_NODE_RANK': '0'},
      None,
    ),
    (SLURM, ('Slurm job 7', {})),
    (SLURM | {'SLURM_NTASKS': '1'}, None),
    (
      {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:1', 'OMPI_COMM_WORLD_SIZE': '2'},
      ('this Open MPI job', {}),
    ),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}, ('this TPU slice', {})),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'TPU_WORKER_ID': '0'}, None),
    (
      {'TPU_WORKER_HOSTNAMES': 'a', 'TPU_WORKER_ID': '0', 'MEGASCALE_NUM_SLICES': '2'},
      ('this TPU slice', {}),
    ),
    (SKY | {'TPU_WORKER_HOSTNAMES': 'a,b'}, ('this TPU slice', {})),
    (XPK, in_group('JAX_COORDINATOR_ADDRESS', 'first:1234', 2, 1)),
  ],
)
def test_who_belongs_together(environment, found):
  assert group({'JAX_PLATFORMS': 'cpu'} | environment) == found


@pytest.mark.parametrize(
  ('environment', 'message'),
  [
    (
      {'JAXFORMER_PROCESS': '1'},
      'JAXFORMER_COORDINATOR and JAXFORMER_PROCESSES must be given with JAXFORMER_PROCESS',
    ),
    (
      OWN | {'JAXFORMER_PROCESS': '4'},
      'JAXFORMER_PROCESS = 4: must be below JAXFORMER_PROCESSES = 4; processes count from 0',
    ),
    (
      OWN | {'JAXFORMER_PROCESSES': 'two'},
      "JAXFORMER_PROCESSES = 'two': must be a whole number, at least 1",
    ),
    (OWN | {'JAXFORMER_COORDINATOR': 'ten'}, "JAXFORMER_COORDINATOR = 'ten': must be host:port"),
    (
      OWN | {'JAXFORMER_COORDINATOR': 'ten:70000'},
      "JAXFORMER_COORDINATOR = 'ten:70000': must be host:port",
    ),
    (
      OWN | {'JAXFORMER_JOIN_SECONDS': '0'},
      "JAXFORMER_JOIN_SECONDS = '0': must be a whole number, at least 1",
    ),
    (SKY | {'SKYPILOT_NODE_IPS': ''}, 'SKYPILOT_NODE_IPS names no nodes'),
    (
      SKY | {'SKYPILOT_NODE_RANK': '2'},
      'SKYPILOT_NODE_RANK = 2: must be below SKYPILOT_NUM_NODES = 2',
    ),
    # A port where nobody listens: 1 is the privileged port of a service that no machine runs.
    (
      OWN | {'JAXFORMER_COORDINATOR': '127.0.0.1:1', 'JAXFORMER_JOIN_SECONDS': '1'},
      r'cannot join 127.0.0.1:1 \(JAXFORMER_COORDINATOR\) within 1 s: .*refused',
    ),
  ],
)
def test_environments_that_cannot_be(environment, message):
  with pytest.raises(InputError, match=message):
    join({'JAX_PLATFORMS': 'cpu'} | environment)


def test_alone_nothing_happens():
  assert join({'JAX_PLATFORMS': 'cpu'}) is False


@pytest.fixture
def as_process(monkeypatch):
  """Makes this one of two processes, with a service that knows what each announced."""

  class Service:
    values = {}

    def key_value_set(self, key, value):
      self.values[key] = value

    def key_value_dir_get(self, place):
      return [(k, v) for k, v in self.values.items() if k.startswith(place)]

  monkeypatch.setattr(processes, '_service', Service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  return lambda index: monkeypatch.setattr(jax, 'process_index', lambda: index)


@pytest.mark.parametrize(
  ('error', 'kind'),
  [(Failure('full'), Failure), (InputError('wrong'), InputError), (KeyError('bug'), Failure)],
  ids=['failure', 'input', 'bug'],
)
def test_processes_that_meet_end_with_the_error_of_another(as_process, error, kind):
  as_process(0)
  with pytest.raises(type(error)), announced():
    raise error
  as_process(1)
  with pytest.raises(kind, match=r'^process 0 of 2 \(.*\) has stopped: '), announced():
    exchange('here')


@pytest.mark.parametrize(
  ('error', 'code'), [(Failure('full'), FAILED), (InputError('wrong'), BAD_INPUT)]
)
def test_a_process_that_waits_for_one_that_has_stopped_ends(
  as_process, monkeypatch, capsys, error, code
):
  ended, codes = threading.Event(), []
  monkeypatch.setattr(processes, 'WATCH_SECONDS', 0.01)
  monkeypatch.setattr(processes, 'GRACE_SECONDS', 0.05)
  monkeypatch.setattr(jax.distributed, 'shutdown', lambda: codes.append('shut down'))
  monkeypatch.setattr(os, '_exit', lambda code: codes.append(code) or ended.set())

  def stop():  # slowly; its own error is none of another
    try:
      with announced():
        raise error
    finally:
      time.sleep(0.2)

  as_process(0)
  with pytest.raises(type(error)), announced():
    stop()
  assert codes == []
  as_process(1)
  with announced(), announced():
    assert ended.wait(20)
  assert codes == ['shut down', code]
  err = capsys.readouterr().err
  assert err.startswith('error: process 0 of 2 (')
  assert err.endswith(f') has stopped: {error}\n')


def test_a_process_that_ends_in_time_is_left_alone(as_process, monkeypatch):
  monkeypatch.setattr(processes, 'WATCH_SECONDS', 0.01)
  monkeypatch.setattr(processes, 'GRACE_SECONDS', 0.3)
  monkeypatch.setattr(os, '_exit', lambda code: pytest.fail('ended'))
  as_process(0)
  with pytest.raises(Failure), announced():
    raise Failure
  as_process(1)
  with announced():
    time.sleep(0.1)
  time.sleep(0.4)
  assert not any(t.name == 'errors' for t in threading.enumerate())
