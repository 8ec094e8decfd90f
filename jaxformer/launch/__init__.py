"""Job files for Cloud TPU and clusters, submitted through existing launchers, which run as
subprocesses and are installed separately. Training needs none of this."""

from jaxformer.launch.engine import Engine, LaunchError, submit
from jaxformer.launch.gcloud import GCloud
from jaxformer.launch.job import CodeSource, Job
from jaxformer.launch.sky import Sky
from jaxformer.launch.slurm import Slurm
from jaxformer.launch.source import source_of
from jaxformer.launch.xpk import XPK

ENGINES: dict[str, type[Engine]] = {
  engine.tag.lower(): engine for engine in (Sky, XPK, GCloud, Slurm)
}

__all__ = [
  'ENGINES',
  'XPK',
  'CodeSource',
  'Engine',
  'GCloud',
  'Job',
  'LaunchError',
  'Sky',
  'Slurm',
  'source_of',
  'submit',
]
