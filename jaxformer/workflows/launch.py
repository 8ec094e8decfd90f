"""Jobs on rented machines or a cluster: checked, priced, written and submitted."""

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any, Unpack

from jaxformer.config import InputError, digest
from jaxformer.installation import installation
from jaxformer.launch import ENGINES, Engine, Job, source_of, submit
from jaxformer.launch.catalog import price_source, priced
from jaxformer.launch.check import check_on, setup_of
from jaxformer.launch.data_paths import check_data_paths
from jaxformer.launch.source import check_version, described
from jaxformer.launch.sweep import grid
from jaxformer.launch.user_files import requirements, user_files
from jaxformer.launch.write import write_files
from jaxformer.overrides import override
from jaxformer.planning.estimate import UTILIZATION, TrainingRun, training_run
from jaxformer.planning.memory import DeviceMemory
from jaxformer.planning.target import parse_target
from jaxformer.training.experiment import Experiment, RunConfig, check_complete
from jaxformer.workflows.load import name_code
from jaxformer.workflows.names import resolve
from jaxformer.workflows.on_target import on_target
from jaxformer.workflows.overrides import Overrides, pairs_of
from jaxformer.workflows.progress import Log
from jaxformer.workflows.sizes import Size
from jaxformer.workflows.tables import amount, table


@dataclasses.dataclass(frozen=True)
class PlannedJob:
  """One job, with the estimated time and cost of its run and its memory per device."""

  job: Job
  experiment: Experiment
  run: TrainingRun
  memory: DeviceMemory

  @property
  def price(self) -> float:
    """USD for the whole run; on demand if spot capacity has no list price."""
    spot = self.run.spot_price_usd if self.job.spot else None
    return self.run.price_usd if spot is None else spot


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
  """Jobs that are ready to be submitted; nothing is written or started yet."""

  engine: Engine
  jobs: list[PlannedJob]

  @property
  def missing(self) -> dict[str, str]:
    """What has to be given before the jobs can be submitted, by field."""
    return {
      f'data.{field}': m.what for p in self.jobs for field, m in p.experiment.data.missing().items()
    }

  def check_complete(self) -> None:
    """Raise `InputError` if something has to be given first."""
    for p in self.jobs:
      check_complete(p.experiment)

  @property
  def files(self) -> dict[pathlib.Path, str]:
    """Contents of the job files by path."""
    return {path: text for p in self.jobs for path, text in self.engine.files(p.job).items()}

  def json(self) -> dict[str, Any]:
    job = self.jobs[0].job
    return {
      'engine': self.engine.tag.lower(),
      'target': job.target.name,
      'spot': job.spot,
      'jobs': [
        {'name': p.job.name, 'command': self.engine.command(p.job), 'train': p.job.words}
        | p.run.as_json()
        | {'price': p.price, 'memory_bytes_per_device': p.memory.total}
        for p in self.jobs
      ],
      'price': sum(p.price for p in self.jobs),
      'price_source': price_source(job.target),
      'source': described(job.source),
      'version': job.version,
      'user_files': job.files.sha256(),
      'requirements': list(job.requirements),
      **({'to_be_given': self.missing} if self.missing else {}),
      'files': {str(path): text for path, text in self.files.items()},
    }

  def lines(self) -> list[str]:
    first, job = self.jobs[0], self.jobs[0].job
    model, spot = first.experiment.model.tag, ' spot' if job.spot else ''
    lines = [
      f'{model} with {first.run.params:,} parameters on {job.target.name}{spot}: '
      f'{job.target.total_chips} chips of {job.target.hosts} hosts'
    ]
    rows: list[tuple[str, ...]] = [
      ('run', 'tokens', 'FLOPs', f'time at {first.run.utilization:.0%}', 'price')
    ]
    rows += [_row(p.job.name, [p]) for p in self.jobs]
    if len(self.jobs) > 1:
      rows.append(_row(f'{len(self.jobs)} runs', self.jobs))
    lines += [f'  {line}' for line in table(rows)]
    bound = ''
    if job.spot and first.run.spot_price_usd is None:
      bound = ', on demand; the market price of spot capacity is below it'
    lines.append(f'price per hour: {_money(first.price / first.run.seconds * 3600)}{bound}')
    lines.append(f'prices: {price_source(job.target)}')
    needed, limit = max(p.memory.total for p in self.jobs), job.target.device_memory_bytes
    fits = 'fits'
    if needed > limit:
      fits = (
        f'{(needed - limit) / 1e9:,.3g} GB too much: use --training.remat full, '
        '--training.accumulate or a larger target'
      )
    lines.append(
      f'memory per device: about {needed / 1e9:,.3g} GB of {limit / 1e9:.3g}, {fits} '
      '(`jaxformer plan --compile` reports what the compiler needs)'
    )
    lines += [f'to be given: {field} ({what})' for field, what in self.missing.items()]
    lines.append(f'jaxformer {job.version}: {described(job.source)}')
    if hashes := job.files.sha256():
      named = ', '.join(f'{path} ({digest[:12]})' for path, digest in hashes.items())
      lines.append(f'your files, by sha256: {named}')
    if job.requirements:
      installs = 'needs' if job.source.kind == 'installed' else 'installs'
      lines.append(f'{installs} for your files: {", ".join(job.requirements)}')
    commands = (shlex.join(self.engine.command(p.job)) for p in self.jobs)
    return [*lines, *(f'submitted by: {command}' for command in commands)]

  @property
  def title(self) -> str:
    """The job, or how many there are."""
    return self.jobs[0].job.name if len(self.jobs) == 1 else f'{len(self.jobs)} jobs'

  @property
  def follow(self) -> str:
    """The command that shows the first job's progress."""
    return self.engine.after(self.jobs[0].job)

  def submit(self, log: Log = print) -> None:
    """Write the job files and submit the jobs. Raises `InputError` for what cannot be written, and
    `LaunchError`."""
    self.check_complete()
    files = {
      path: (text, p.job.mark) for p in self.jobs for path, text in self.engine.files(p.job).items()
    }
    for path in write_files(files):
      log(f'wrote {path}')
    for p in self.jobs:
      submit(self.engine, p.job)


def plan_launch(
  engine: Engine | str,
  target_experiment: str,
  *,
  target: str,
  overrides: Overrides = (),
  spot: bool = False,
  source: str | None = None,
  sweep: Sequence[str] = (),
  utilization: float = UTILIZATION,
  price: float | None = None,
  prices: str | None = None,
  init_from: str | None = None,
  resume_from: int | None = None,
  code: Sequence[str] = (),
  **size: Unpack[Size],
) -> LaunchPlan:
  """Return training jobs for rented machines or a cluster, checked and priced. `.submit()` writes
  their files and starts them; until then nothing is written or started.

  Args:
    engine: a config from `jaxformer.launch`, or 'sky', 'xpk', 'gcloud' or 'slurm'.
    target_experiment, overrides, size: see `experiment`; settings of the engine are overrides too,
      `{'sky.infra': 'gcp/us-east5'}`.
    target: slices or hosts to rent, 'v6e-16', '2xv5e-256', 'h100:8'.
    spot: on machines that may be preempted, at the lower price.
    source: what the machines install: jaxformer==VERSION, git+URL@COMMIT, a wheel, a folder with
      jaxformer's pyproject.toml, or 'installed'; by default what runs here. Its version must be the
      one that plans, which the machines compare.
    sweep: a job for each value, 'optimizer.learning_rate=1e-3,3e-3'; several make a grid.
    utilization: share of the peak that the estimated time assumes.
    price: USD per chip-hour, in place of the list price.
    prices: 'sky', or a folder like SkyPilot's catalog, whose prices replace the list price.
    init_from, resume_from, code: see `train`. Files of the user, with what they import beside them,
      are part of the jobs, and the machines compare their hashes.
  """
  pairs = pairs_of(overrides)
  if isinstance(engine, str):
    own = [pair for pair in pairs if pair[0].partition('.')[0] == engine]
    pairs = [pair for pair in pairs if pair not in own]
    engine = override(ENGINES[engine](), own, root=engine)
  slice_ = priced(parse_target(target), price, prices, engine.infra_of_prices)
  installs = engine.default_source() if source is None else source_of(source)
  version = installation().version
  check_version(installs, version)
  name_code(code)
  if resume_from is not None and resume_from < 0:
    raise InputError('--resume-from', resume_from, 'the step of a checkpoint')
  options = {**size, 'init-from': init_from, 'resume-from': resume_from}
  words = [(n.replace('_', '-'), str(v)) for n, v in options.items() if v is not None]
  words += [('code', str(file)) for file in code]
  jobs: list[PlannedJob] = []
  for suffix, point in grid(sweep):
    given = [*pairs, *point]
    found = resolve(target_experiment, given, size)
    e = override(found.experiment, found.overrides)
    files = user_files(target_experiment, [text for _, text in given], [str(f) for f in code])
    if found.open_mesh:
      e, changes = on_target(e, slice_, {path.replace('-', '_') for path, _ in given})
      given = [*given, *changes]
    job = Job(
      name=f'{e.run.name or pathlib.Path(target_experiment).stem}{suffix}',
      experiment=target_experiment,
      overrides=tuple(o for o in given if o[0] not in ('run.name', 'run.dir')),
      run_dir=e.run.dir,
      target=slice_,
      spot=spot,
      source=installs,
      version=version,
      files=files,
      requirements=requirements(files.imports),
      options=tuple(words),
    )
    engine.check(job)
    check_data_paths(engine, job, e.data)
    memory = check_on(e, slice_)
    precision = setup_of(e, slice_).precision
    run = training_run(
      e.model, e.data.positions, slice_, e.tokens, utilization, precision=precision
    )
    jobs.append(PlannedJob(job, e, run, memory))
  _check_different(jobs)
  return LaunchPlan(engine, jobs)


def _check_different(jobs: Sequence[PlannedJob]) -> None:
  """Raise `InputError` for jobs of a sweep that would be one: by their names on machines, or by
  what they train."""
  names: dict[str, str] = {}
  trained: dict[str, str] = {}
  for p in jobs:
    alone = p.experiment.replace(run=RunConfig())
    same = names.setdefault(p.job.short_name(), p.job.name)
    if same != p.job.name:
      raise InputError('--sweep', p.job.name, problem=f'has the name of {same} on the machines')
    same = trained.setdefault(digest(alone), p.job.name)
    if same != p.job.name:
      raise InputError('--sweep', p.job.name, problem=f'would train the same as {same}')


def _row(name: str, jobs: Sequence[PlannedJob]) -> tuple[str, ...]:
  runs = [p.run for p in jobs]
  return (
    name,
    amount(sum(r.tokens for r in runs)),
    f'{sum(r.train_flops for r in runs):.3g}',
    _duration(sum(r.seconds for r in runs)),
    _money(sum(p.price for p in jobs)),
  )


def _duration(seconds: float) -> str:
  for unit, size in (('days', 86_400), ('hours', 3600), ('minutes', 60)):
    if seconds >= size:
      n = seconds / size
      return f'{n:,.3g} {unit}' if n < 1000 else f'{n:,.0f} {unit}'
  return f'{seconds:.3g} seconds'


def _money(dollars: float) -> str:
  return f'${dollars:,.2f}'
