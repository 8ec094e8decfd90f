"""Starts training on rented machines or a cluster: writes the job file, shows the plan and its
price, asks, and calls the tool.

Engines: sky (SkyPilot), xpk (GKE), gcloud (queued resources of Cloud TPU), slurm. Their settings
  are dotted, as in
--sky.infra gcp/us-east5 --xpk.cluster NAME --gcloud.zone us-east5-b --slurm.partition gpu;
overrides of the experiment are those of `train`. A run that is preempted is started again and goes
on. `--sweep FIELD=VALUE,VALUE` starts a job for each value, two sweeps one for each pair. What the
tool needs is not needed to train: it may live in an environment of its own."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

from jaxformer.cli.common import Overrides, amount, answer, experiment_of, note, table
from jaxformer.config import InputError
from jaxformer.overrides import override

OVERRIDES = True
# the keys of jaxformer.launch.ENGINES, which is not read before a command is
NAMES = ('sky', 'xpk', 'gcloud', 'slurm')
HERE = 'runs'


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('engine', metavar='ENGINE', choices=NAMES, help=', '.join(NAMES))
  parser.add_argument(
    'experiment',
    metavar='PRESET|FILE',
    help='a name of `jaxformer list`, or a Python file that defines `experiment`',
  )
  parser.add_argument(
    '--target',
    required=True,
    help='v6e-16, v5p-2048 (as Google Cloud names them: 1,024 chips), 2xv5e-256, '
    'v5p:4x4x16, h100:8, 2xh100:8',
  )
  parser.add_argument(
    '--spot', action='store_true', help='on machines that may be taken away, at the lower price'
  )
  parser.add_argument(
    '--source',
    help='what the machines install: git+URL@COMMIT, a wheel (a file or a URL), a folder with '
    "jaxformer's pyproject.toml (sky, xpk; there the working folder is the default), installed "
    '(slurm; the '
    'default there: the environment that is active now)',
  )
  parser.add_argument(
    '--sweep',
    action='append',
    default=[],
    metavar='FIELD=A,B',
    help='a job for each value; may be repeated',
  )
  parser.add_argument(
    '--utilisation', type=float, help='part of the peak that the estimate of time counts on (0.4)'
  )
  parser.add_argument(
    '--dry-run', action='store_true', help='print the files and the plan, write and start nothing'
  )
  parser.add_argument('--yes', action='store_true', help='do not ask')
  parser.add_argument(
    '--json', action='store_true', help='print files, commands and plan as one JSON object'
  )


@dataclasses.dataclass(frozen=True)
class Planned:
  """One job, with the estimated time and cost of its run and its memory per device."""

  job: Any
  experiment: Any
  run: Any
  memory: Any

  @property
  def price(self) -> float:
    """USD for the whole run; on demand if spot capacity has no list price."""
    spot = self.run.spot_price_usd if self.job.spot else None
    return self.run.price_usd if spot is None else spot

  @property
  def price_per_hour(self) -> float:
    return self.price / self.run.seconds * 3600


def run(args: argparse.Namespace, overrides: Overrides) -> int:
  from jaxformer.launch import ENGINES, LaunchError, submit

  own = [(path, text) for path, text in overrides if path.partition('.')[0] == args.engine]
  engine = override(ENGINES[args.engine](), own, root=args.engine)
  planned = plan(args, engine, [o for o in overrides if o not in own])
  if not args.dry_run and not args.yes and not sys.stdin.isatty():
    raise InputError(
      'launch needs confirmation, but stdin is not a terminal: give --yes or --dry-run'
    )
  files = {path: text for p in planned for path, text in engine.files(p.job).items()}
  if args.dry_run:
    answer(
      value(engine, planned, files), args.json, lambda: summary(engine, planned) + printed(files)
    )
    return 0
  for line in summary(engine, planned):
    note(line)
  if not args.yes and not confirmed(planned):
    note('nothing was started')
    return 0
  write(files)
  try:
    for p in planned:
      submit(engine, p.job)
  except LaunchError as e:
    note(f'error: {e}')
    return 1
  answer(
    value(engine, planned, files),
    args.json,
    lambda: [f'started; to look after it: {engine.after(planned[0].job)}'],
  )
  return 0


def plan(args: argparse.Namespace, engine: Any, overrides: Overrides) -> list[Planned]:
  """The jobs, checked as far as it can be done here. Raises `InputError`."""
  from jaxformer.launch import Job, source_of
  from jaxformer.launch.check import check_on
  from jaxformer.launch.sweep import grid
  from jaxformer.planning.estimate import UTILISATION, training_run
  from jaxformer.planning.target import parse_target

  target = parse_target(args.target)
  source = engine.default_source() if args.source is None else source_of(args.source)
  planned = []
  for suffix, point in grid(args.sweep):
    given = [*overrides, *point]
    experiment = experiment_of(args.experiment, given)
    job = Job(
      name=f'{experiment.run.name or pathlib.Path(args.experiment).stem}{suffix}',
      experiment=args.experiment,
      overrides=tuple(o for o in given if o[0] not in ('run.name', 'run.dir')),
      run_dir=experiment.run.dir,
      folder=pathlib.Path(HERE if '://' in experiment.run.dir else experiment.run.dir).expanduser(),
      target=target,
      spot=args.spot,
      source=source,
    )
    engine.check(job)
    memory = check_on(experiment, target)
    t, length = experiment.training, experiment.data.positions
    run = training_run(
      experiment.model,
      length,
      target,
      t.steps * t.batch_size * length,
      UTILISATION if args.utilisation is None else args.utilisation,
    )
    planned.append(Planned(job, experiment, run, memory))
  return planned


def summary(engine: Any, planned: list[Planned]) -> list[str]:
  """The plan for a reader."""
  first, job = planned[0], planned[0].job
  lines = [
    f'{first.experiment.model.tag} with {first.run.params:,} parameters on '
    f'{job.target.name}{" spot" if job.spot else ""}: '
    f'{job.target.total_chips} chips of {job.target.hosts} hosts'
  ]
  rows = [('run', 'tokens', 'FLOPs', f'time at {first.run.utilisation:.0%}', 'price')]
  rows += [
    (
      p.job.name,
      amount(p.run.tokens),
      f'{p.run.train_flops:.3g}',
      duration(p.run.seconds),
      money(p.price),
    )
    for p in planned
  ]
  if len(planned) > 1:
    rows.append(
      (
        f'{len(planned)} runs',
        amount(sum(p.run.tokens for p in planned)),
        f'{sum(p.run.train_flops for p in planned):.3g}',
        duration(sum(p.run.seconds for p in planned)),
        money(sum(p.price for p in planned)),
      )
    )
  lines += [f'  {line}' for line in table(rows)]
  at_most = job.spot and first.run.spot_price_usd is None
  bound = ', on demand; the market price of spot capacity is below it' if at_most else ''
  lines.append(f'price per hour: {money(first.price_per_hour)}{bound}')
  memory, there = max(p.memory.total for p in planned), job.target.device_memory_bytes
  fits = (
    'fits'
    if memory <= there
    else (
      f'{(memory - there) / 1e9:,.3g} GB too much: use --training.remat full, '
      '--training.accumulate or '
      'a larger target'
    )
  )
  lines.append(
    f'memory per device: about {memory / 1e9:,.3g} GB of {there / 1e9:.3g}, {fits} '
    '(`jaxformer plan --compile` asks the compiler)'
  )
  return [*lines, *(f'submitted by: {command}' for command in shown(engine, planned))]


def shown(engine: Any, planned: list[Planned]) -> list[str]:
  import shlex

  return [shlex.join(engine.command(p.job)) for p in planned]


def value(engine: Any, planned: list[Planned], files: dict[pathlib.Path, str]) -> dict[str, Any]:
  return {
    'engine': engine.tag.lower(),
    'target': planned[0].job.target.name,
    'spot': planned[0].job.spot,
    'jobs': [
      {'name': p.job.name, 'command': engine.command(p.job), 'train': p.job.words}
      | p.run.as_json()
      | {'price': p.price, 'memory_bytes_per_device': p.memory.total}
      for p in planned
    ],
    'price': sum(p.price for p in planned),
    'files': {str(path): text for path, text in files.items()},
  }


def printed(files: dict[pathlib.Path, str]) -> list[str]:
  return [
    line for path, text in files.items() for line in ('', f'==== {path} ====', text.rstrip('\n'))
  ]


def confirmed(planned: list[Planned]) -> bool:
  what = planned[0].job.name if len(planned) == 1 else f'{len(planned)} jobs'
  print(f'start {what}? [y/N] ', end='', file=sys.stderr, flush=True)
  return sys.stdin.readline().strip().lower() in ('y', 'yes')


def write(files: dict[pathlib.Path, str]) -> None:
  for path, text in files.items():
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    except OSError as e:
      raise InputError(f'{path}: cannot be written ({e.strerror})') from None
    note(f'wrote {path}')


def duration(seconds: float) -> str:
  """For a reader: 3.2 days."""
  for unit, size in (('days', 86_400), ('hours', 3600), ('minutes', 60)):
    if seconds >= size:
      return (
        f'{seconds / size:,.3g} {unit}'
        if seconds < 1000 * size
        else f'{seconds / size:,.0f} {unit}'
      )
  return f'{seconds:.3g} seconds'


def money(dollars: float) -> str:
  return f'${dollars:,.2f}'
