"""Training: an experiment as data, one step as a pure function, one loop, checkpoints, run
folders."""

from jaxformer.training.checkpoint import load_params
from jaxformer.training.experiment import Experiment, RunConfig, TrainingConfig, default_experiment
from jaxformer.training.loop import train, train_population
from jaxformer.training.member import TrainResult
from jaxformer.training.optimizer import (
  SGD,
  Adadelta,
  Adafactor,
  AdamThenSGD,
  AdamW,
  Lion,
  Muon,
  OptimizerConfig,
)
from jaxformer.training.run import load_experiment, read_metrics
from jaxformer.training.schedule import (
  WSD,
  Constant,
  Cosine,
  CosineThenConstant,
  Exponential,
  InverseSquareRoot,
  Linear,
  Noam,
  ScheduleConfig,
  StepDecay,
)
from jaxformer.training.setup import check
from jaxformer.training.trackers import TensorBoard, TrackerConfig, Trackio, Wandb

__all__ = [
  'SGD',
  'WSD',
  'Adadelta',
  'Adafactor',
  'AdamThenSGD',
  'AdamW',
  'Constant',
  'Cosine',
  'CosineThenConstant',
  'Experiment',
  'Exponential',
  'InverseSquareRoot',
  'Linear',
  'Lion',
  'Muon',
  'Noam',
  'OptimizerConfig',
  'RunConfig',
  'ScheduleConfig',
  'StepDecay',
  'TensorBoard',
  'TrackerConfig',
  'Trackio',
  'TrainResult',
  'TrainingConfig',
  'Wandb',
  'check',
  'default_experiment',
  'load_experiment',
  'load_params',
  'read_metrics',
  'train',
  'train_population',
]
