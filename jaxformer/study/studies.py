"""Named studies, for `jaxformer compare NAME`."""

from jaxformer.config import Registry
from jaxformer.data import AssociativeRecall, Text
from jaxformer.study.study import ScaledFamily, ScalingGrid, Study, budgets

STUDIES: Registry[Study] = Registry('study')

ALL_KINDS = tuple(
  ScaledFamily(family=f, name=n)
  for f, n in (
    ('llama3', 'transformer'),
    ('mixtral', 'mixture'),
    ('lstm', 'LSTM'),
    ('s4d', 'S4D'),
    ('h3', 'H3'),
    ('mamba', 'Mamba'),
    ('mamba2', 'Mamba-2'),
    ('rwkv4', 'RWKV-4'),
    ('rwkv7', 'RWKV-7'),
    ('jamba', 'Jamba'),
  )
)
"""One architecture of each kind; the transformer is the baseline."""

# Half a million active parameters is about the smallest size at which all ten have a shape within
# two per cent: Jamba's pattern has eight layers. One rate and two seeds: the standard study has
# tuning and more seeds.
STUDIES.add(
  'quickstart',
  Study(
    name='quickstart',
    entries=ALL_KINDS,
    match='active_params',
    target=5e5,
    tasks=(Text(sequence_length=128), AssociativeRecall(length=10)),
    tokens=40_000,
    batch_size=8,
    learning_rates=(3e-3,),
    seeds=(1, 2),
    runs_per_program=2,
    eval_batches=16,
    contexts=(64, 512),
    timing_repeats=3,
  ),
)

STUDIES.add(
  'standard',
  Study(
    name='standard',
    entries=ALL_KINDS,
    target=1e7,
    tasks=(Text(sequence_length=512), AssociativeRecall(length=100, vocab_size=40)),
    tokens=50_000_000,
    batch_size=64,
    learning_rates=(3e-4, 1e-3, 3e-3),
    seeds=(1, 2, 3, 4, 5),
    runs_per_program=3,
    eval_batches=32,
    contexts=(128, 1024, 8192),
    timing_repeats=10,
  ),
)

# Sizes grow more slowly than the optimal size, so that some models are trained on many tokens for
# their size and some on few. One seed: the interval of a law rests on how runs scatter around it.
# Two runs beyond the largest budget: one with many tokens, one with many parameters. Small batches:
# with larger ones, which models this small do not need, the optimal size lies below the smallest
# that exists.
_BUDGETS = budgets((6e10, 1.8e11, 5.4e11, 1.25e12), (3e4, 4.5e4, 7e4, 1.1e5, 1.7e5), 0.25)
STUDIES.add(
  'scaling',
  Study(
    name='scaling',
    entries=(ScaledFamily(family='llama2', name='transformer'),),
    tolerance=0.15,
    tasks=(Text(sequence_length=64),),
    batch_size=4,
    learning_rates=(3e-3, 1e-2),
    seeds=(1,),
    eval_batches=256,
    scaling=ScalingGrid(
      budgets=_BUDGETS[:3], held_out=(_BUDGETS[3].replace(params=_BUDGETS[3].params[1::2]),)
    ),
  ),
)
