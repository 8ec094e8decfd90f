"""A training program for tests that kill it: `python program.py FOLDER CACHE`."""

import sys

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 1)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

from jaxformer.data import open_data  # noqa: E402  (jax must be set up first)
from jaxformer.training import load_experiment, train  # noqa: E402

experiment = load_experiment(sys.argv[1])
sys.exit(train(experiment, dataset=open_data(experiment.data, cache_dir=sys.argv[2])).exit_code)
