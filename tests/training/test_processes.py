"""Which processes belong together, by the environments that say so."""

import pytest

from jaxformer.config import InputError
from jaxformer.training.processes import group, join

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
