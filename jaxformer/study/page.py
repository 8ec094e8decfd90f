"""A report's page: what it says, once as HTML that needs nothing else and once as Markdown."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxformer import config
from jaxformer.config import Config
from jaxformer.study.figures import Figure
from jaxformer.study.svg import CLASSES, key
from jaxformer.study.tables import Table
from jaxformer.training.run import write


@dataclasses.dataclass(frozen=True)
class Page:
  """What a report says, in its order.

  Attributes:
    title: of the whole.
    answer: what came of it, a sentence or two a paragraph.
    introduction: what was done.
    results, details: a heading and the tables below it; the figures stand between the two.
    figures: the charts.
    keys: names of the styles 0, 1, ... that all charts share; empty where each has its own.
    bars: what the bars of the charts are.
    reproduction: (name, value) of what the numbers rest on.
    study: as text.
  """

  title: str
  answer: Sequence[str]
  introduction: str
  results: tuple[str, Sequence[Table]]
  figures: Sequence[Figure]
  keys: Sequence[str]
  bars: str
  details: tuple[str, Sequence[Table]]
  reproduction: Sequence[tuple[str, str]]
  study: str


def save_report(folder: Path, page: Page, rows: str, data: Any) -> None:
  """Writes report.html, .md, .csv (`rows`) and .json (`data`)."""
  folder.mkdir(parents=True, exist_ok=True)
  write(folder / 'report.html', as_html(page))
  write(folder / 'report.md', as_markdown(page))
  write(folder / 'report.csv', rows)
  write(folder / 'report.json', json.dumps(data, indent=2) + '\n')


def reproduction(study: Config, e: dict[str, Any]) -> list[tuple[str, str]]:
  """(name, value) of what the numbers of a study rest on, from the environment of its runs."""
  devices = e.get('devices', {})
  command = e.get('command') or []
  shown = (
    shlex.join(['jaxformer', *command[1:]])
    if len(command) > 1 and command[1] == 'compare'
    else 'jaxformer.study'
  )
  rows = [
    ('command', shown),
    ('digest of the study', config.digest(study)),
    ('commit', e.get('commit') or 'none'),
    ('versions', ', '.join(f'{n} {v}' for n, v in e.get('versions', {}).items() if v)),
    ('python', e.get('python', '')),
    ('device', f'{devices.get("count", "")} x {devices.get("kind", "")}'),
    ('platform', e.get('platform', '')),
    ('time', e.get('time', '')),
  ]
  return [*rows, *((f'data: {title}', _data_hash(m)) for title, m in e.get('data', {}).items())]


def _data_hash(manifest: object) -> str:
  """The hashes that a manifest of data holds."""
  if isinstance(manifest, dict):
    found = [
      f'{k} {v}'
      for k, v in manifest.items()
      if isinstance(v, str) and ('sha' in k or 'hash' in k or 'digest' in k)
    ]
    return ', '.join([*found, *(h for v in manifest.values() if (h := _data_hash(v)))])
  return ''


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(header)
  writer.writerows(rows)
  return out.getvalue()


# ---- Markdown ----------------------------------------------------------------------------------


def as_markdown(page: Page) -> str:
  parts = [f'# {page.title}', *page.answer, page.introduction]
  parts += [
    part
    for t in (*page.results[1], *page.details[1])
    for part in (f'## {t.title}', t.note, _markdown_table(t))
  ]
  parts += [
    '## How to reproduce',
    '\n'.join(f'- {name}: `{value}`' for name, value in page.reproduction),
    '```json\n' + page.study.rstrip() + '\n```',
  ]
  return '\n\n'.join(parts) + '\n'


def _markdown_table(t: Table) -> str:
  def line(cells: Sequence[str]) -> str:
    return f'| {" | ".join(c.replace("|", chr(92) + "|") for c in cells)} |'

  return '\n'.join(
    [line(t.header), line(['---', *('---:' for _ in t.header[1:])]), *map(line, t.rows)]
  )


# ---- HTML --------------------------------------------------------------------------------------

STYLE = """
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
"""


def as_html(page: Page) -> str:
  """The whole page; nothing in it is fetched from anywhere."""
  e, keys = html.escape, ''.join(key(i, name) for i, name in enumerate(page.keys))
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en">',
      '<head>',
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f'<title>{e(page.title)}</title>',
      f'<style>{STYLE}{CLASSES}</style>',
      '</head>',
      '<body>',
      f'<h1>{e(page.title)}</h1>',
      '<div class="answer">',
      *(f'<p>{e(line)}</p>' for line in page.answer),
      '</div>',
      f'<p>{e(page.introduction)}</p>',
      f'<h2>{e(page.results[0])}</h2>',
      *map(_html_table, page.results[1]),
      '<h2>Figures</h2>',
      *([f'<div class="keys">{keys}</div>'] if keys else []),
      f'<p class="note">{e(page.bars)}</p>',
      '<div class="figures">',
      *map(_html_figure, page.figures),
      '</div>',
      f'<h2>{e(page.details[0])}</h2>',
      *map(_html_table, page.details[1]),
      '<h2>How to reproduce</h2>',
      '<dl>',
      *(f'<dt>{e(n)}</dt><dd>{e(v)}</dd>' for n, v in page.reproduction),
      '</dl>',
      '<details><summary>The study as data</summary>',
      f'<pre>{e(page.study)}</pre>',
      '</details>',
      '</body>',
      '</html>',
      '',
    ]
  )


def _html_table(t: Table) -> str:
  def cells(kind: str, row: Sequence[str]) -> str:
    return '<tr>' + ''.join(f'<{kind}>{html.escape(c)}</{kind}>' for c in row) + '</tr>'

  return '\n'.join(
    [
      f'<h3>{html.escape(t.title)}</h3>',
      f'<p class="note">{html.escape(t.note)}</p>',
      '<div class="scroll"><table>',
      f'<thead>{cells("th", t.header)}</thead>',
      '<tbody>',
      *(cells('td', row) for row in t.rows),
      '</tbody></table></div>',
    ]
  )


def _html_figure(f: Figure) -> str:
  caption = (
    f'<strong>{html.escape(f.title)}</strong><br><span class="note">{html.escape(f.note)}</span>'
  )
  return f'<figure><figcaption>{caption}</figcaption><div class="scroll">{f.svg}</div></figure>'
