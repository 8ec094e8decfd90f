"""Start training on rented machines or a cluster.

Writes the job file, shows the plan and its price, asks for confirmation and calls the engine: sky
(SkyPilot), xpk (GKE), gcloud (queued resources of Cloud TPU) or slurm. These are invoked as
subprocesses and must be installed separately; training does not need them. Their settings are
dotted, as in --sky.infra gcp/us-east5 --xpk.cluster NAME --gcloud.zone us-east5-b --slurm.partition
gpu; overrides of the experiment are those of `train`. A run that is preempted is started again and
resumes. Files of yours, and what they import beside them, are part of the job; the machines compare
their hashes, and the version of jaxformer, before they train. `--sweep FIELD=VALUE,VALUE` starts a
job per value, two sweeps one per pair."""

import argparse
import sys
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import (
  code_option,
  emit,
  json_option,
  prices_option,
  print_json,
  show,
  size_options,
)
from jaxformer.exit_codes import DONE, FAILED

OVERRIDES = True
ENGINES = ('sky', 'xpk', 'gcloud', 'slurm')


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add('engine', metavar='ENGINE', choices=ENGINES, help=', '.join(ENGINES))
  add(
    'target_experiment',
    metavar='PRESET|FILE|FAMILY|FILE:NAME',
    help='a name of `jaxformer list`, a Python file that defines `experiment`, a family with a '
    'size, or a layer config in a Python file',
  )
  size_options(parser)
  add(
    '--target',
    required=True,
    help='v6e-16, v5p-2048 (as Google Cloud names them: 1,024 chips), 2xv5e-256, v5p:4x4x16, '
    'h100:8, 2xh100:8',
  )
  add('--spot', action='store_true', help='preemptible machines, at the lower price')
  add(
    '--source',
    help='what the machines install: jaxformer==VERSION, git+URL@COMMIT, a wheel (a file or a '
    "URL), a folder with jaxformer's pyproject.toml (sky and xpk), installed (slurm: the "
    'environment that is active now); default: what runs here, whose version it must have',
  )
  add('--price', type=float, help='USD per chip-hour, in place of the list price')
  prices_option(parser)
  add('--init-from', metavar='RUN', help='as of `train`: on gs://, or a folder on a shared disk')
  add('--resume-from', metavar='STEP', type=int, help='as of `train`')
  code_option(parser)
  add('--sweep', action='append', metavar='FIELD=A,B', help='a job per value; may be repeated')
  add('--utilization', type=float, help='assumed share of the peak FLOPs (0.4)')
  add('--dry-run', action='store_true', help='print the files and the plan, start nothing')
  add('--yes', action='store_true', help='start without confirmation')
  json_option(parser, 'files, commands and plan as one JSON object')


def run(json: bool, dry_run: bool = False, yes: bool = False, **options: Any) -> int:
  plan = jf.plan_launch(**options)
  if dry_run:
    show(plan, json)
    if not json:
      for path, text in plan.files.items():
        emit(f'\n==== {path} ====\n{text.rstrip()}')
    return DONE
  plan.check_complete()
  if not yes and (sys.stdin is None or not sys.stdin.isatty()):
    raise jf.InputError(
      'launch needs confirmation but stdin is not a terminal: --yes to start, or --dry-run'
    )
  print('\n'.join(plan.lines()), file=sys.stderr)
  if not yes and not _confirmed(plan.title):
    print('nothing was started', file=sys.stderr)
    return DONE
  try:
    plan.submit(lambda line: print(line, file=sys.stderr))
  except jf.LaunchError as e:
    print(f'error: {e}', file=sys.stderr)
    return FAILED
  if json:
    print_json(plan.json())
  else:
    emit(f'started; to follow it: {plan.follow}')
  return DONE


def _confirmed(what: str) -> bool:
  print(f'start {what}? [y/N] ', end='', file=sys.stderr, flush=True)
  return sys.stdin.readline().strip().lower() in ('y', 'yes')
