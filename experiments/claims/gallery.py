"""What became of each claim: its verdict, its picture, its numbers and its command, on one page.

    python experiments/claims/gallery.py        # writes the page again from what is in
    experiments/claims/results

A claim is one file of this folder, which ends with `publish(...)`: its result goes to
`results/NN/`, as `result.json` and an SVG for each picture, and the page, `README.md`, is made
again from all of them."""

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

Verdict = Literal['shown', 'shown in part', 'not shown', 'contradicted']
"""Whether what was measured, with its uncertainty, bears the claim out; in part where only some of
its sentences were borne out; not where no difference was seen; contradicted where the opposite
was."""


@dataclasses.dataclass(frozen=True)
class Picture:
  """A chart in the gallery: `name` is its file's."""

  name: str
  caption: str
  svg: str

  @classmethod
  def of(cls, name: str, caption: str, series: list[Series], x: Axis, y: Axis) -> Picture:
    return cls(name, caption, chart(series, x, y, caption))


@dataclasses.dataclass(frozen=True)
class Result:
  """What came of a claim.

  Attributes:
    number: of the claim, from 1 to 10.
    claim: its sentence.
    verdict: the outcome.
    because: a few sentences with the numbers and their uncertainty; what it would take to say more.
    scale: sizes, budget and seeds in a line, so that nobody takes a small run for a large one.
    header, rows: a table of text, the first column flush left.
    data: the numbers behind the pictures and the table, as JSON.
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
  """What every claim takes: `--scale`, `--runs` and `--results`."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--scale',
    type=float,
    default=1.0,
    help='times the budget: 1 fits two CPU cores, more is a larger study',
  )
  parser.add_argument(
    '--runs',
    default='runs/claims',
    help='where the run folders are; runs that are done are not run again',
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
  """Writes a result and its pictures, prints the verdict, and makes the page again."""
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
  (folder / 'result.json').write_text(json.dumps(saved, indent=1) + '\n')
  print(_table(result.header, result.rows))
  print(f'\nclaim {result.number}, {result.claim}\n{result.verdict}: {result.because}')
  print(f'page: {write_page(results)}')


def write_page(results: pathlib.Path) -> pathlib.Path:
  """The gallery of what is in a folder of results."""
  found = [json.loads(file.read_text()) for file in sorted(results.glob('*/result.json'))]
  page = (HERE if results == RESULTS else results) / 'README.md'
  where = '' if results != RESULTS else f'{RESULTS.name}/'
  parts = [
    '# Ten claims, tried',
    'Claims that are often made of these architectures, each tried by one command at a scale that '
    'fits two CPU cores in under half '
    'an hour (the first in about one), and larger with `--scale`. Verdicts hold at the scale that '
    'stands beside them. Written by '
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
  """Runs a claim. What ends it early is said in one line: wrong input (exit code 2), or a signal
  (that of a run that goes on when it is started again)."""
  try:
    main()
  except InputError as e:
    note(f'error: {e}')
    sys.exit(2)
  except (Interrupted, KeyboardInterrupt):
    note('interrupted: runs that are done are kept; the same command goes on from there')
    sys.exit(PREEMPTED)


def signed(e: Estimate, places: int = 3) -> str:
  """A difference with its interval."""
  return f'{e.mean:+.{places}f} ± {e.half_width:.{places}f}'


def _table(header, rows) -> str:
  def line(cells) -> str:
    return f'| {" | ".join(str(c).replace("|", chr(92) + "|") for c in cells)} |'

  return '\n'.join([line(header), line(['---', *('---:' for _ in header[1:])]), *map(line, rows)])


if __name__ == '__main__':
  print(write_page(RESULTS))
