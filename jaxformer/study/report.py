"""Report of a study: one self-contained HTML file, and the same as Markdown, CSV and JSON."""

import collections
import csv
import io
import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxformer import config
from jaxformer.data import Dataset
from jaxformer.files import write_atomically
from jaxformer.json_data import json_data
from jaxformer.study.costs import by_position, measure_costs, translations
from jaxformer.study.earlier import keep_earlier
from jaxformer.study.figures import figures
from jaxformer.study.law_report import fitted, law_figures, law_tables, trainings
from jaxformer.study.results import Measured, Results, gather
from jaxformer.study.runner import Trained, Tuned, run_study
from jaxformer.study.sharing import Interrupted, running
from jaxformer.study.sizing import MATCHED
from jaxformer.study.study import Log, ScalingGrid, Study
from jaxformer.study.tables import amount, detail_tables, score_tables
from jaxformer.training.environment import environment, other_software
from jaxformer.training.interrupt import Interrupt

TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(Path(__file__).parent / 'templates'),
  autoescape=jinja2.select_autoescape(['html']),
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  keep_trailing_newline=True,
)


def report_study(study: Study, log: Log, helpers: Sequence[Sequence[str]] = ()) -> Results:
  """Run a study, measure its costs and write its report to `DIR/STUDY/report`. Raises
  `study.sharing.Interrupted` after a signal; called again, it resumes. `helpers` are commands that
  train the same study beside this process."""
  study.check_folder()
  with Interrupt() as interrupt:
    with running(helpers, study.folder):
      trained, measured = train_study(study, log, interrupt)
    datasets, first, costs = study.open_tasks(), study.task_titles[0], {}
    if study.scaling is None:
      costs = measure_costs(study, trained[first], datasets[first], log, interrupt)
    data = {title: dataset.manifest for title, dataset in datasets.items()}
    facts = environment(data) | {'runs_of_other_software': _other_software(trained, log)}
    results = gather(study, trained, costs, measured, facts)
    for line in save(results, study.folder / 'report'):
      log(line)
  return results


def _other_software(trained: Trained, log: Log) -> list[str]:
  """Return which runs were made with other software, by what differs (then -> now), and log it."""
  found = collections.defaultdict[str, list[str]](list)
  tuned = itertools.chain.from_iterable(trained.values())
  for folder in dict.fromkeys(r.folder for t in tuned for r in (*t.trials, *t.runs)):
    if lines := other_software(folder):
      found['; '.join(lines)].append(Path(folder).name)
  for differences, runs in found.items():
    count = '1 run was' if len(runs) == 1 else f'{len(runs)} runs were'
    log(f'{count} made with other software: {differences}')
  return [f'{", ".join(runs)}: {differences}' for differences, runs in found.items()]


def train_study(study: Study, log: Log, interrupt: Interrupt) -> tuple[Trained, Measured]:
  """Return the results of a study's runs, and what is measured of them: the work that several
  processes share."""
  study.check_folder()
  measured: Measured = {}

  def measure(title: str, dataset: Dataset, t: Tuned) -> None:
    if study.scaling is None and any(r.finite_loss is not None for r in t.runs):
      found = by_position(study, title, t, dataset), translations(study, title, t, dataset)
      measured[title, t.title] = found
    if interrupt.signal is not None:
      raise Interrupted

  return run_study(study, log, interrupt, measure), measured


def save(results: Results, folder: Path) -> list[str]:
  """Write report.html, .md, .csv and .json. An earlier report that has more is kept, and named in
  the lines that are returned (`study.earlier`)."""
  folder.mkdir(parents=True, exist_ok=True)
  kept = keep_earlier(folder, results.json())
  contents = content(results)
  write_atomically(folder / 'report.html', page('report.html', contents))
  write_atomically(folder / 'report.md', page('report.md', contents))
  write_atomically(folder / 'report.csv', csv_text(results))
  write_atomically(folder / 'report.json', json.dumps(results.json(), indent=2) + '\n')
  return kept


def page(template: str, contents: dict[str, Any]) -> str:
  """Fill in a template. The HTML needs no other file and no network."""
  return TEMPLATES.get_template(template).render(contents)


def csv_text(results: Results) -> str:
  """Return the CSV of a report: a row per task and architecture or, of a scaling study, training.
  Columns are the numbers and texts of the JSON under the names that they have there; those of a
  nested object follow its name."""
  rows = []
  for task in results.tasks:
    shared = {'task': task.title, 'metric': task.metric, **task.ngrams}
    rows += [shared | _flat(o) | _flat(results.costs[o.title]) for o in task.outcomes]
    rows += [shared | {'title': f.title} | _flat(t) for f in task.laws for t in f.trainings]
  out = io.StringIO()
  names = dict.fromkeys(name for row in rows for name in row)
  writer = csv.DictWriter(out, names, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()


def _flat(value: Any) -> dict[str, Any]:
  """The numbers and texts of a dataclass by name, without lists."""
  found = {}
  for name, v in json_data(value).items():
    if isinstance(v, dict):
      found |= {f'{name}_{k}': x for k, x in _flat(v).items()}
    elif not isinstance(v, list):
      found[name] = v
  return found


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
      'details': [table for f in fitted(results) for table in trainings(f, results)],
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
  grid, seeds = s.learning_rates, f'{len(s.seeds)} seed{"s" if len(s.seeds) > 1 else ""}'
  rates = f'the same grid of {len(grid)} learning rates'
  if len(grid) == 1:
    rates = f'the learning rate {grid[0]:g}'
  return (
    f'{len(s.entries)} architectures of {s.target:,.0f} {MATCHED[s.match]} each (within '
    f'{s.tolerance:.0%}), trained on {s.tokens:,} tokens of each task with {rates} and {seeds}, on '
    'the same sequences in the same order for equal seeds. Conclusions hold for this size and '
    'number of tokens.'
  )


def _scaling_introduction(s: Study, scaling: ScalingGrid, scored_on: str) -> str:
  seeds = 'one seed' if len(s.seeds) == 1 else f'the mean over {len(s.seeds)} seeds'
  rates = f'at the best learning rate of {", ".join(f"{r:g}" for r in s.learning_rates)}'
  if scaling.rate_exponent is not None:
    rates += (
      ' for the middle size of the smallest budget, times (FLOPs / FLOPs of that '
      f'budget)^{scaling.rate_exponent:g}'
    )
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
  """Return (name, value) of what the numbers depend on: the study, and its environment."""
  command = shlex.join(results.environment.get('command') or [])
  facts = {'command': command, 'digest': config.digest(results.study)}
  facts |= _flat(results.environment)
  if others := results.environment.get('runs_of_other_software'):
    facts['runs of other software'] = ' '.join(others)
  return [(name.replace('_', ' '), str(value)) for name, value in facts.items()]
