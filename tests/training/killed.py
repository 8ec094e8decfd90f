"""A program that trains again and again, in processes that die at a call that changes a folder:
`LD_PRELOAD=KILLER python killed.py KILLER CACHE`. Each line of its input is a JSON list of a file
with the experiment, the folder, N and the step to go back to: it trains in a process that dies at
the N-th such call (never for 0), and answers with the exit code. The imports, most of the time of a
start, take place once."""

import ctypes
import json
import os
import sys
from pathlib import Path

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 1)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

from jaxformer.config import from_json  # noqa: E402
from jaxformer.data import open_data  # noqa: E402  (jax must be set up first)
from jaxformer.training import train  # noqa: E402
from jaxformer.training.registry import import_configs  # noqa: E402

import_configs()
killer = ctypes.CDLL(sys.argv[1])


def run(config: str, folder: str, n: int, back: int | None) -> int:
  experiment = from_json(json.loads(Path(config).read_text()))
  data = open_data(experiment.data, cache_dir=sys.argv[2])
  if n:
    killer.arm(folder.encode(), ctypes.c_long(n))
  return train(experiment, dataset=data, resume_from=back).exit_code


for line in sys.stdin:
  child = os.fork()
  if not child:
    code = 1
    try:
      code = run(*json.loads(line))
    finally:
      sys.stderr.flush()
      os._exit(code)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print(status, flush=True)
