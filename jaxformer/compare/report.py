"""The report of a study: one HTML file that needs nothing else, and the same as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxformer import config
from jaxformer.compare.costs import by_position, longer, measure_costs, translations
from jaxformer.compare.figures import Figure, figures
from jaxformer.compare.results import Results, gather
from jaxformer.compare.runner import Interrupted, Log, run_study
from jaxformer.compare.study import Study
from jaxformer.compare.svg import CLASSES, key
from jaxformer.compare.tables import CSV_HEADER, MATCHED, Table, csv_rows, tables
from jaxformer.data import open_data
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.run import environment, write


def report_study(study: Study, log: Log) -> Results:
  """Runs a study, measures what it costs and writes its report to `DIR/STUDY/report`. Raises `compare.runner.Interrupted` after a
  signal; called again, it goes on from there."""
  with Interrupt() as interrupt:
    done = run_study(study, log, interrupt)
    datasets = [open_data(task) for task in study.tasks]
    first = done.results[study.task_titles[0]]
    costs = measure_costs(study, {t.title: t.model for t in first}, study.tasks[0], datasets[0], log, interrupt)
    positions, translated = {}, {}
    for where, task, dataset in zip(study.task_titles, study.tasks, datasets, strict=True):
      long = longer(task, dataset)
      for t in done.results[where]:
        folders = [r.folder for r in t.runs if r.metrics.get('eval/loss') is not None]
        positions[where, t.title] = by_position(study, where, t.title, folders, t.model, dataset, long) if folders else None
        translated[where, t.title] = translations(study, where, t.title, folders, t.model, dataset) if folders else None
        if interrupt.signal is not None:
          raise Interrupted
    data = {title: d.manifest for title, d in zip(study.task_titles, datasets, strict=True)}
    results = gather(done, costs, positions, environment(data), translated)
    save(results, study.folder / 'report')
  return results


def save(results: Results, folder: Path) -> None:
  """Writes report.html, .md, .csv and .json."""
  folder.mkdir(parents=True, exist_ok=True)
  write(folder / 'report.html', html_text(results))
  write(folder / 'report.md', markdown_text(results))
  write(folder / 'report.csv', csv_text(results))
  write(folder / 'report.json', json.dumps(results.to_json(), indent=2) + '\n')


def title_of(results: Results) -> str:
  return f'Study {results.study.name}'


def introduction(results: Results) -> str:
  """What was done, in a few sentences."""
  s = results.study
  rates = f'one learning rate, {s.learning_rates[0]:g}' if len(s.learning_rates) == 1 else (
    f'the same grid of {len(s.learning_rates)} learning rates')
  return (
    f'{len(s.entries)} architectures of {s.target:,.0f} {MATCHED[s.match]} each (within {s.tolerance:.0%}), trained on '
    f'{s.tokens:,} tokens of each task with {rates} and {len(s.seeds)} seed{"s" if len(s.seeds) > 1 else ""}, on the same '
    'sequences in the same order for equal seeds. What is said holds at this size and budget.')


def reproduction(results: Results) -> list[tuple[str, str]]:
  """(name, value) of what the numbers rest on."""
  e = results.environment
  devices = e.get('devices', {})
  command = e.get('command') or []
  shown = shlex.join(['jaxformer', *command[1:]]) if len(command) > 1 and command[1] == 'compare' else 'jaxformer.compare'
  rows = [
    ('command', shown), ('digest of the study', config.digest(results.study)), ('commit', e.get('commit') or 'none'),
    ('versions', ', '.join(f'{n} {v}' for n, v in e.get('versions', {}).items() if v)), ('python', e.get('python', '')),
    ('device', f'{devices.get("count", "")} x {devices.get("kind", "")}'), ('platform', e.get('platform', '')),
    ('time', e.get('time', ''))]
  return [*rows, *((f'data: {title}', _data_hash(m)) for title, m in e.get('data', {}).items())]


def _data_hash(manifest: object) -> str:
  """The hashes that a manifest of data holds."""
  if isinstance(manifest, dict):
    found = [f'{k} {v}' for k, v in manifest.items() if isinstance(v, str) and ('sha' in k or 'hash' in k or 'digest' in k)]
    return ', '.join([*found, *(h for v in manifest.values() if (h := _data_hash(v)))])
  return ''


def csv_text(results: Results) -> str:
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(CSV_HEADER)
  writer.writerows(csv_rows(results))
  return out.getvalue()


# ---- Markdown ---------------------------------------------------------------------------------------------------------


def markdown_text(results: Results) -> str:
  parts = [f'# {title_of(results)}', *results.answer, introduction(results)]
  parts += [part for t in tables(results) for part in (f'## {t.title}', t.note, _markdown_table(t))]
  parts += ['## How to reproduce', '\n'.join(f'- {name}: `{value}`' for name, value in reproduction(results)),
            '```json\n' + config.text(results.study).rstrip() + '\n```']
  return '\n\n'.join(parts) + '\n'


def _markdown_table(t: Table) -> str:
  def line(cells: Sequence[str]) -> str:
    return f'| {" | ".join(c.replace("|", chr(92) + "|") for c in cells)} |'
  return '\n'.join([line(t.header), line(['---', *('---:' for _ in t.header[1:])]), *map(line, t.rows)])


# ---- HTML -------------------------------------------------------------------------------------------------------------

STYLE = '''
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem; color: #1a1a1a; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p { max-width: 75ch; margin: .4rem 0; }
.answer { border-left: 4px solid #0072B2; background: #f1f6fa; padding: .5rem 1rem; }
.answer p { font-size: 1.05rem; }
.note { color: #555; font-size: .88rem; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0; }
.key { display: inline-flex; align-items: center; gap: .3rem; white-space: nowrap; font-size: .92rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .95rem; }
figure svg { width: 100%; height: auto; max-width: 640px; display: block; }
svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { border-bottom: 2px solid #888; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
pre { overflow-x: auto; font-size: .8rem; background: #f6f6f6; padding: .6rem; }
@media (max-width: 600px) {
  body { padding: .7rem; font-size: 15px; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
}
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  .figures { grid-template-columns: 1fr 1fr; gap: .6rem; }
  figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  table { font-size: 8pt; }
  th, td { padding: .15rem .35rem; white-space: normal; }
  .scroll { overflow: visible; }
  .answer { background: none; }
  details { display: none; }
}
'''


def html_text(results: Results) -> str:
  """The whole page; nothing in it is fetched from anywhere."""
  all_tables = tables(results)
  scores = [t for t in all_tables if t.title.startswith('Scores')]
  keys = ''.join(key(i, e.title) for i, e in enumerate(results.study.entries))
  e = html.escape
  return '\n'.join([
    '<!DOCTYPE html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">', f'<title>{e(title_of(results))}</title>',
    f'<style>{STYLE}{CLASSES}</style>', '</head>', '<body>', f'<h1>{e(title_of(results))}</h1>',
    '<div class="answer">', *(f'<p>{e(line)}</p>' for line in results.answer), '</div>', f'<p>{e(introduction(results))}</p>',
    '<h2>Scores</h2>', *map(_html_table, scores), '<h2>Figures</h2>', f'<div class="keys">{keys}</div>',
    '<p class="note">Bars are 95% intervals over seeds.</p>',
    '<div class="figures">', *map(_html_figure, figures(results)), '</div>',
    '<h2>Sizes, costs and tuning</h2>', *(_html_table(t) for t in all_tables if t not in scores),
    '<h2>How to reproduce</h2>', '<dl>', *(f'<dt>{e(n)}</dt><dd>{e(v)}</dd>' for n, v in reproduction(results)), '</dl>',
    '<details><summary>The study as data</summary>', f'<pre>{e(config.text(results.study))}</pre>', '</details>',
    '</body>', '</html>', ''])


def _html_table(t: Table) -> str:
  def cells(kind: str, row: Sequence[str]) -> str:
    return '<tr>' + ''.join(f'<{kind}>{html.escape(c)}</{kind}>' for c in row) + '</tr>'
  return '\n'.join([
    f'<h3>{html.escape(t.title)}</h3>', f'<p class="note">{html.escape(t.note)}</p>', '<div class="scroll"><table>',
    f'<thead>{cells("th", t.header)}</thead>', '<tbody>', *(cells('td', row) for row in t.rows), '</tbody></table></div>'])


def _html_figure(f: Figure) -> str:
  caption = f'<strong>{html.escape(f.title)}</strong><br><span class="note">{html.escape(f.note)}</span>'
  return f'<figure><figcaption>{caption}</figcaption><div class="scroll">{f.svg}</div></figure>'
