"""The gallery of claims: verdict, charts, numbers and command of each, on one page.

    python experiments/claims/gallery.py    # writes the page from experiments/claims/results

Each claim is one file of this folder that ends with `publish(...)`: its result is written to
`results/NN/`, as `result.json` and an SVG per chart, and the page, `README.md`, is written again
from all results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.study.charts import Axis, Series, chart
from jaxformer.study.sharing import Interrupted
from jaxformer.study.statistics import Estimate

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / 'results'

Verdict = Literal['supported', 'partly supported', 'not supported', 'contradicted']
"""Whether the measurements, with their uncertainty, support the claim; partly if they support only
some of its parts; not if there is no significant difference; contradicted if the opposite holds."""


@dataclasses.dataclass(frozen=True)
class Picture:
  """A chart in the gallery; `name` is that of its file."""

  name: str
  caption: str
  svg: str

  @classmethod
  def of(cls, name: str, caption: str, series: list[Series], x: Axis, y: Axis) -> Picture:
    return cls(name, caption, chart(series, x, y, caption))


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of testing a claim.

  Attributes:
    number: of the claim, from 1.
    claim: its sentence.
    verdict: the outcome.
    because: a few sentences with the numbers and their uncertainty, and what more would need.
    scale: sizes, budget and seeds in one line.
    header, rows: a table of text, with the first column left-aligned.
    data: the numbers behind the charts and the table, as JSON data.
  """

  number: int
  claim: str
  verdict: Verdict
  because: str
  scale: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  data: dict[str, Any]


def arguments(doc: str | None) -> argparse.ArgumentParser:
  """Return a parser with the options of every claim: `--scale`, `--runs` and `--results`."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--scale', type=float, default=1.0, help='multiplies the budget; 1 fits two CPU cores'
  )
  parser.add_argument(
    '--runs', default='runs/claims', help='folder of the runs; finished runs are reused'
  )
  parser.add_argument(
    '--results',
    type=pathlib.Path,
    default=None,
    help=f'where the result goes: by default {RESULTS.name}/ here at scale 1, and under --runs at '
    'others',
  )
  return parser


def publish(args: argparse.Namespace, result: Result, pictures: list[Picture]) -> None:
  """Write a result and its charts, print the verdict, and write the page again."""
  results = args.results or (RESULTS if args.scale == 1 else pathlib.Path(args.runs) / 'results')
  folder = results / f'{result.number:02d}'
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob('*.svg'):
    old.unlink()
  for picture in pictures:
    (folder / f'{picture.name}.svg').write_text(picture.svg + '\n')
  script = pathlib.Path(sys.argv[0])
  where = HERE.name + '/' + script.name
  saved = {
    **dataclasses.asdict(result),
    'pictures': [[p.name, p.caption] for p in pictures],
    'command': shlex.join(['python', f'experiments/{where}', *sys.argv[1:]]),
    'made_with': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'machine': platform.machine(),
    },
  }
  # Files of the repository by their path in it: the result is the same wherever a checkout lies.
  text = json.dumps(saved, indent=1).replace(f'"{HERE.parents[1]}/', '"')
  (folder / 'result.json').write_text(text + '\n')
  print(_table(result.header, result.rows))
  print(f'\nclaim {result.number}, {result.claim}\n{result.verdict}: {result.because}')
  print(f'page: {write_page(results)}')


def write_page(results: pathlib.Path) -> pathlib.Path:
  """Write the gallery of a folder of results."""
  found = [json.loads(file.read_text()) for file in sorted(results.glob('*/result.json'))]
  page = (HERE if results == RESULTS else results) / 'README.md'
  where = '' if results != RESULTS else f'{RESULTS.name}/'
  parts = [
    '# Claims tested',
    'Claims that are often made of these architectures, each tested by one command at a scale that '
    'fits two CPU cores in under half an hour (the first in about one hour), and at larger scales '
    'with `--scale`. A verdict holds at the scale stated with it. Written by '
    '`python experiments/claims/gallery.py`.',
    _table(
      ('claim', 'verdict'),
      [
        (f'{r["number"]}. [{r["claim"]}](#claim-{r["number"]})', f'**{r["verdict"]}**')
        for r in found
      ],
    ),
  ]
  for r in found:
    made = r['made_with']
    parts += [
      f'## Claim {r["number"]}',
      f'> {r["claim"]}',
      f'**{r["verdict"].capitalize()}.** {r["because"]}',
      *(
        f'![{caption}]({where}{r["number"]:02d}/{name}.svg)\n\n*{caption}*'
        for name, caption in r['pictures']
      ),
      _table(r['header'], r['rows']),
      f'Scale: {r["scale"]}',
      f'`{r["command"]}` (Python {made["python"]}, jax {made["jax"]}, {made["device"]})',
    ]
  page.write_text('\n\n'.join(parts) + '\n')
  return page


def note(line: str) -> None:
  """Print progress to standard error."""
  print(line, file=sys.stderr, flush=True)


def to_the_end(main: Callable[[], None]) -> None:
  """Run a claim. Invalid input (exit code 2) and signals (that of a resumable run) end it with one
  line."""
  try:
    main()
  except InputError as e:
    note(f'error: {e}')
    sys.exit(2)
  except (Interrupted, KeyboardInterrupt):
    note('interrupted: runs are saved; the same command resumes them')
    sys.exit(PREEMPTED)


def signed(e: Estimate, places: int = 3) -> str:
  """Format a difference with its interval."""
  return f'{e.mean:+.{places}f} ± {e.half_width:.{places}f}'


def _table(header, rows) -> str:
  def line(cells) -> str:
    return f'| {" | ".join(str(c).replace("|", chr(92) + "|") for c in cells)} |'

  return '\n'.join([line(header), line(['---', *('---:' for _ in header[1:])]), *map(line, rows)])


if __name__ == '__main__':
  print(write_page(RESULTS))
