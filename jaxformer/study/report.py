"""The report of a study: one HTML file that needs nothing else, and the same as Markdown, CSV and
JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxformer import config
from jaxformer.data import Dataset, open_data
from jaxformer.study.costs import by_position, longer, measure_costs, translations
from jaxformer.study.figures import figures
from jaxformer.study.page import Page, as_csv, as_html, as_markdown, reproduction, save_report
from jaxformer.study.results import Results, gather
from jaxformer.study.runner import Finished, Log, Tuned, run_study
from jaxformer.study.sharing import Interrupted, running
from jaxformer.study.study import Study
from jaxformer.study.tables import CSV_HEADER, MATCHED, csv_rows, tables
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.run import environment


def report_study(study: Study, log: Log, helpers: Sequence[Sequence[str]] = ()) -> Results:
  """Runs a study, measures what it costs and writes its report to `DIR/STUDY/report`. Raises
  `compare.sharing.Interrupted` after a signal; called again, it goes on from there. `helpers` are
  commands that train the same study beside this process."""
  with Interrupt() as interrupt:
    with running(helpers, study.folder):
      done, positions, translated = train_study(study, log, interrupt)
    datasets = [open_data(task) for task in study.tasks]
    first = done.results[study.task_titles[0]]
    costs = measure_costs(
      study, {t.title: t.model for t in first}, study.tasks[0], datasets[0], log, interrupt
    )
    data = {title: d.manifest for title, d in zip(study.task_titles, datasets, strict=True)}
    results = gather(done, costs, positions, environment(data), translated)
    save(results, study.folder / 'report')
  return results


Measured = dict[tuple[str, str], Any]
"""By task and entry."""


def train_study(
  study: Study, log: Log, interrupt: Interrupt
) -> tuple[Finished, Measured, Measured]:
  """The runs of a study, the loss at each position (`by_position`) and the scores of translations:
  what several processes share."""
  positions, translated, long = {}, {}, {}

  def score(where: str, dataset: Dataset, t: Tuned) -> None:
    if where not in long:
      long[where] = longer(dataset.config, dataset)
    folders = [r.folder for r in t.runs if r.metrics.get('eval/loss') is not None]
    positions[where, t.title] = (
      by_position(study, where, t.title, folders, t.model, dataset, long[where])
      if folders
      else None
    )
    translated[where, t.title] = (
      translations(study, where, t.title, folders, t.model, dataset) if folders else None
    )
    if interrupt.signal is not None:
      raise Interrupted

  return run_study(study, log, interrupt, score), positions, translated


def save(results: Results, folder: Path) -> None:
  """Writes report.html, .md, .csv and .json."""
  save_report(folder, page_of(results), csv_text(results), results.to_json())


def page_of(results: Results) -> Page:
  """What the report says."""
  all_tables = tables(results)
  scores = [t for t in all_tables if t.title.startswith('Scores')]
  return Page(
    title=f'Study {results.study.name}',
    answer=results.answer,
    introduction=introduction(results),
    results=('Scores', scores),
    figures=figures(results),
    keys=[e.title for e in results.study.entries],
    bars='Bars are 95% intervals over seeds.',
    details=('Sizes, costs and tuning', [t for t in all_tables if t not in scores]),
    reproduction=reproduction(results.study, results.environment),
    study=config.text(results.study),
  )


def introduction(results: Results) -> str:
  """What was done, in a few sentences."""
  s = results.study
  rates = (
    f'one learning rate, {s.learning_rates[0]:g}'
    if len(s.learning_rates) == 1
    else (f'the same grid of {len(s.learning_rates)} learning rates')
  )
  return (
    f'{len(s.entries)} architectures of {s.target:,.0f} {MATCHED[s.match]} each (within '
    f'{s.tolerance:.0%}), trained on '
    f'{s.tokens:,} tokens of each task with {rates} and {len(s.seeds)} '
    f'seed{"s" if len(s.seeds) > 1 else ""}, on the same '
    'sequences in the same order for equal seeds. What is said holds at this size and budget.'
  )


def html_text(results: Results) -> str:
  return as_html(page_of(results))


def markdown_text(results: Results) -> str:
  return as_markdown(page_of(results))


def csv_text(results: Results) -> str:
  return as_csv(CSV_HEADER, csv_rows(results))
