"""A training program for tests that kill it: `python program.py CONFIG CACHE`."""

import json
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
experiment = from_json(json.loads(Path(sys.argv[1]).read_text()))
sys.exit(train(experiment, dataset=open_data(experiment.data, cache_dir=sys.argv[2])).exit_code)
