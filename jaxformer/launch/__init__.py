"""Job files for the machines of others: Cloud TPU and clusters, through tools that exist. Nothing
here is needed to train."""

from jaxformer.launch.engine import Engine, LaunchError, submit
from jaxformer.launch.gcloud import GCloud
from jaxformer.launch.job import Git, Installed, Job, Source, Wheel, WorkingDirectory, source_of
from jaxformer.launch.sky import Sky
from jaxformer.launch.slurm import Slurm
from jaxformer.launch.xpk import XPK

ENGINES: dict[str, type[Engine]] = {
  engine.tag.lower(): engine for engine in (Sky, XPK, GCloud, Slurm)
}

__all__ = [
  'ENGINES',
  'XPK',
  'Engine',
  'GCloud',
  'Git',
  'Installed',
  'Job',
  'LaunchError',
  'Sky',
  'Slurm',
  'Source',
  'Wheel',
  'WorkingDirectory',
  'source_of',
  'submit',
]
