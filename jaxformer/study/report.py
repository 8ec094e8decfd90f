"""Report of a study: one self-contained HTML file, and the same as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import functools
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxformer import config
from jaxformer.data import Dataset, open_data
from jaxformer.files import write_atomically
from jaxformer.study.costs import by_position, longer, measure_costs, translations
from jaxformer.study.figures import figures
from jaxformer.study.law_report import (
  LAW_CSV_HEADER,
  fitted,
  law_csv_rows,
  law_figures,
  law_tables,
  trainings,
)
from jaxformer.study.results import Measured, Results, gather
from jaxformer.study.runner import Log, Trained, Tuned, run_study
from jaxformer.study.sharing import Interrupted, running
from jaxformer.study.study import ScalingGrid, Study
from jaxformer.study.tables import (
  CSV_HEADER,
  MATCHED,
  amount,
  csv_rows,
  detail_tables,
  score_tables,
)
from jaxformer.training.environment import environment
from jaxformer.training.interrupt import Interrupt

TEMPLATES = Path(__file__).parent / 'templates'


def report_study(study: Study, log: Log, helpers: Sequence[Sequence[str]] = ()) -> Results:
  """Run a study, measure its costs and write its report to `DIR/STUDY/report`. Raises
  `study.sharing.Interrupted` after a signal; called again, it resumes. `helpers` are commands that
  train the same study beside this process."""
  with Interrupt() as interrupt:
    with running(helpers, study.folder):
      trained, positions, translated = train_study(study, log, interrupt)
    datasets = [open_data(task) for task in study.tasks]
    costs = {}
    if study.scaling is None:
      models = {t.title: t.model for t in trained[study.task_titles[0]]}
      costs = measure_costs(study, models, study.tasks[0], datasets[0], log, interrupt)
    data = {title: d.manifest for title, d in zip(study.task_titles, datasets, strict=True)}
    results = gather(study, trained, costs, positions, translated, environment(data))
    save(results, study.folder / 'report')
  return results


def train_study(study: Study, log: Log, interrupt: Interrupt) -> tuple[Trained, Measured, Measured]:
  """Return the results of a study's runs, the loss at each position (`by_position`) and the scores
  of translations: the work that several processes share."""
  positions, translated, long = {}, {}, {}

  def score(where: str, dataset: Dataset, t: Tuned) -> None:
    folders = [r.folder for r in t.runs if r.metrics.get('eval/loss') is not None]
    if where not in long:
      long[where] = longer(dataset.config, dataset)
    if folders:
      of = study, where, t.title, folders, t.model, dataset
      positions[where, t.title] = by_position(*of, long[where])
      translated[where, t.title] = translations(*of)
    if interrupt.signal is not None:
      raise Interrupted

  each = score if study.scaling is None else None
  return run_study(study, log, interrupt, each), positions, translated


def save(results: Results, folder: Path) -> None:
  """Write report.html, .md, .csv and .json."""
  folder.mkdir(parents=True, exist_ok=True)
  contents = content(results)
  write_atomically(folder / 'report.html', page('report.html', contents))
  write_atomically(folder / 'report.md', page('report.md', contents))
  write_atomically(folder / 'report.csv', csv_text(results))
  write_atomically(folder / 'report.json', json.dumps(results.json(), indent=2) + '\n')


def page(template: str, contents: dict[str, Any]) -> str:
  """Fill in a template. The HTML needs no other file and no network."""
  return _templates().get_template(template).render(contents)


@functools.cache
def _templates() -> jinja2.Environment:
  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=jinja2.select_autoescape(['html']),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
  )


def csv_text(results: Results) -> str:
  """Return the CSV of a report."""
  scaling = results.study.scaling is not None
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(LAW_CSV_HEADER if scaling else CSV_HEADER)
  writer.writerows(law_csv_rows(results) if scaling else csv_rows(results))
  return out.getvalue()


def content(results: Results) -> dict[str, Any]:
  """Return what the templates show."""
  study = results.study
  shared = {
    'answer': results.answer,
    'reproduction': reproduction(results),
    'study': config.text(study).rstrip(),
  }
  if study.scaling is not None:
    return {
      **shared,
      'title': f'Scaling study {study.name}',
      'introduction': _scaling_introduction(study, study.scaling, results.tasks[0].scored_on),
      'headings': ('Laws', 'All trainings'),
      'results': law_tables(results),
      'figures': law_figures(results),
      'bars': 'Bars are 95% intervals.',
      'details': [trainings(f, results) for f in fitted(results)],
    }
  return {
    **shared,
    'title': f'Study {study.name}',
    'introduction': _introduction(study),
    'headings': ('Scores', 'Sizes, costs and tuning'),
    'results': score_tables(results),
    'figures': figures(results),
    'bars': 'Bars are 95% intervals over seeds.',
    'details': detail_tables(results),
  }


def _introduction(s: Study) -> str:
  rates = (
    f'the learning rate {s.learning_rates[0]:g}'
    if len(s.learning_rates) == 1
    else f'the same grid of {len(s.learning_rates)} learning rates'
  )
  seeds = f'{len(s.seeds)} seed{"s" if len(s.seeds) > 1 else ""}'
  return (
    f'{len(s.entries)} architectures of {s.target:,.0f} {MATCHED[s.match]} each (within '
    f'{s.tolerance:.0%}), trained on {s.tokens:,} tokens of each task with {rates} and {seeds}, on '
    'the same sequences in the same order for equal seeds. Conclusions hold for this size and '
    'number of tokens.'
  )


def _scaling_introduction(s: Study, scaling: ScalingGrid, scored_on: str) -> str:
  seeds = 'one seed' if len(s.seeds) == 1 else f'the mean over {len(s.seeds)} seeds'
  grid = ', '.join(f'{r:g}' for r in s.learning_rates)
  if scaling.rate_exponent is not None:
    rates = (
      f'at the best learning rate of {grid} for the middle size of the smallest budget, times '
      f'(FLOPs / FLOPs of that budget)^{scaling.rate_exponent:g}'
    )
  else:
    rates = f'each at the best learning rate of {grid}'
  first, last = scaling.budgets[0].flops, scaling.budgets[-1].flops
  return (
    f'Sizes of each architecture at {len(scaling.budgets)} budgets of training FLOPs '
    f'({amount(first)} to {amount(last)}), {seeds}, {rates}. The law L(N, D) = E + A / N^α + '
    'B / D^β (Hoffmann et al. 2022, section 3.3: Huber loss of log L) is fitted to the trainings '
    f'of each architecture; N are parameters, D tokens, L nats per token on {scored_on}. '
    'Held-out trainings are excluded from the fit. Conclusions hold for these data, sizes and '
    'budgets.'
  )


def reproduction(results: Results) -> list[tuple[str, str]]:
  """Return (name, value) of what the numbers depend on, from the environment of the study."""
  e = results.environment
  devices, command = e.get('devices', {}), e.get('command') or []
  from_shell = len(command) > 1 and command[1] == 'compare'
  versions = ', '.join(f'{n} {v}' for n, v in e.get('versions', {}).items() if v)
  rows = [
    ('command', shlex.join(['jaxformer', *command[1:]]) if from_shell else 'jaxformer.study'),
    ('digest of the study', config.digest(results.study)),
    ('commit', e.get('commit') or 'none'),
    ('versions', versions),
    ('python', e.get('python', '')),
    ('device', f'{devices.get("count", "")} x {devices.get("kind", "")}'),
    ('platform', e.get('platform', '')),
    ('time', e.get('time', '')),
  ]
  return [*rows, *((f'data: {title}', _hashes(m)) for title, m in e.get('data', {}).items())]


def _hashes(manifest: object) -> str:
  """Return the hashes in a data manifest, at any depth."""
  if not isinstance(manifest, dict):
    return ''
  found = [
    f'{k} {v}'
    for k, v in manifest.items()
    if isinstance(v, str) and ('sha' in k or 'hash' in k or 'digest' in k)
  ]
  return ', '.join([*found, *(h for v in manifest.values() if (h := _hashes(v)))])
