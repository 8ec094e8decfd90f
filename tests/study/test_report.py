"""The report, made of invented runs."""

import csv
import html.parser
import io
import json
import math
import re

import pytest

from jaxformer.data import AssociativeRecall, DataConfig
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.costs import AtContext, Costs
from jaxformer.study.report import csv_text, html_text, markdown_text, save
from jaxformer.study.results import gather
from jaxformer.study.runner import Finished, Trial, Tuned
from jaxformer.study.study import AsIs, Study
from jaxformer.study.svg import Axis, Point, Series, chart

pytestmark = pytest.mark.quick
NAMES = ('attention', 'LSTM <1997>', 'worse', 'diverges')
BITS = {'attention': 2.0, 'LSTM <1997>': 1.5, 'worse': 2.6, 'diverges': 2.0}
ENVIRONMENT = {
  'command': ['jaxformer', 'compare', 'invented'],
  'versions': {'jax': '1.2.3'},
  'python': '3.11',
  'platform': 'here',
  'commit': 'abc',
  'time': 'now',
  'devices': {'count': 1, 'kind': 'cpu'},
  'data': {'StandardLibrary': {'sha256': 'f00d'}},
}


def invented(folder, names=NAMES, bits=BITS):
  """A study of text and of recall: every seed adds the same to all, and each run a little of its
  own."""
  model = FAMILIES['gru'].make(width=8, layers=1, hidden=0, vocab_size=256, context_length=32)
  study = Study(
    name='invented',
    entries=tuple(AsIs(name=n, model_config=model) for n in names),
    target=6000,
    tasks=(DataConfig(sequence_length=32), AssociativeRecall()),
    learning_rates=(1e-3, 3e-3),
    dir=str(folder),
  )

  def trial(title, seed, task, rate=1e-3):
    at = folder / f'{title}-{task}-{seed}-{rate}'.replace('<', '').replace('>', '')
    at.mkdir(parents=True)
    value = bits[title] + 0.1 * seed + 0.01 * math.sin(7 * seed + len(title))
    rows = [{'step': s, 'tokens': 100 * s, 'train/loss': value + 1 / s} for s in range(1, 30)]
    score = (
      {'eval/bits_per_byte': value}
      if task == 'StandardLibrary'
      else {'eval/accuracy': 1 - value / 4}
    )
    last = {'step': 30, 'tokens': 3000, 'eval/loss': value, 'eval/source': f'{task} test', **score}
    if title == 'diverges' and seed == 2:
      last = {'step': 30, 'eval/loss': None}
    (at / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in [*rows, last]))
    return Trial(rate, seed, str(at), last['eval/loss'] or math.inf, last)

  results = {
    task: tuple(
      Tuned(
        n,
        model,
        tuple(trial(n, 0, task, r) for r in study.learning_rates),
        1e-3,
        True,
        tuple(trial(n, s, task) for s in study.seeds),
      )
      for n in names
    )
    for task in study.task_titles
  }
  costs = {
    n: Costs(
      6000,
      6000,
      4e4,
      1e3 * (i + 1),
      1.5,
      10**6 * (i + 1),
      tuple(AtContext(c, 100 if i else 100 * c, 1e-3 * c, 1e-4) for c in (64, 512)),
    )
    for i, n in enumerate(names)
  }
  positions = {('StandardLibrary', n): [3 - i / 64 for i in range(32)] for n in names}
  return gather(Finished(study, results), costs, positions, ENVIRONMENT)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  return invented(tmp_path_factory.mktemp('runs'))


class Page(html.parser.HTMLParser):
  """Checks that elements close in order, and keeps the text of cells and what could be fetched."""

  EMPTY = {'meta', 'br', 'line', 'circle', 'path', 'polygon'}

  def __init__(self, text):
    super().__init__()
    self.open, self.rows, self.charts, self.fetched = [], [], 0, []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.fetched += [v for k, v in attributes if k in ('src', 'href', 'xlink:href', 'srcset')] + [
      tag
    ] * (tag in ('link', 'script'))
    self.charts += ('role', 'img') in attributes
    self.rows += [[]] if tag == 'tr' else []
    if tag not in self.EMPTY:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    pass

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] in ('td', 'th'):
      self.rows[-1].append(data)


def test_the_page_stands_alone(results):
  text = html_text(results)
  page = Page(text)
  assert page.fetched == []
  assert not re.search(r'https?://|@import|url\(', text)
  assert 'nan' not in re.sub(r'[a-z]+nan|nan[a-z]+', '', text.lower())
  assert 'Infinity' not in text
  assert '<1997>' not in text
  assert page.charts == 15  # 3 of quality a task, 3 and 2 of curves, 1 by position, 3 by context


def test_verdicts(results):
  text = {o.title: o for o in results.tasks[0].outcomes}
  assert [text[n].verdict for n in NAMES] == [None, 'better', 'worse', 'diverged']
  assert text['diverges'].scores[2] is None
  assert text['diverges'].estimate.runs == 2
  assert results.answer[0].startswith('StandardLibrary: LSTM <1997> has the best mean')
  assert (
    'LSTM <1997> is better; worse is worse; no difference is shown for diverges'
    in results.answer[0]
  )
  accuracy = {o.title: o.verdict for o in results.tasks[1].outcomes}
  # more is better there, and scores were turned round
  assert accuracy == {n: o.verdict for n, o in text.items()}


def test_each_against_each(results):
  task = results.tasks[0]
  assert [(d.name, d.against) for d in task.pairs] == [
    ('LSTM <1997>', 'attention'),
    ('LSTM <1997>', 'worse'),
    ('attention', 'worse'),
  ]
  # from the best on; one whose run diverged is not among them
  assert {d.verdict for d in task.pairs} == {'better'}
  assert 'It is better than every other whose runs all came to an end.' in results.answer[0]
  rows = Page(html_text(results)).rows
  names = ['LSTM <1997>', 'attention', 'worse']
  table = rows[next(i for i, r in enumerate(rows) if r == ['architecture', *names]) :][1:4]
  assert [r[0] for r in table] == names
  differences = {(d.name, d.against): d.estimate.mean for d in task.pairs}
  # an empty cell has no text
  assert table[0][1:] == [f'−{-differences["LSTM <1997>", n]:.3f}*' for n in names[1:]]
  assert table[2][1:] == [f'+{-differences[n, "worse"]:.3f}*' for n in names[:2]]
  accuracy = {(d.name, d.against): d for d in results.tasks[1].pairs}
  assert accuracy['LSTM <1997>', 'worse'].verdict == 'better'
  assert accuracy['LSTM <1997>', 'worse'].estimate.mean > 0


def test_those_near_the_best_are_named(tmp_path):
  near = invented(tmp_path, NAMES[:3], {'attention': 2.0, 'LSTM <1997>': 2.001, 'worse': 2.6})
  assert 'Not told apart from it: ' in near.answer[0]
  assert 'worse' not in near.answer[0].partition('Not told apart from it: ')[2].partition('.')[0]
  assert not invented(tmp_path / 'two', NAMES[:2]).tasks[0].pairs  # the table of scores says it


def test_all_forms_agree(results, tmp_path):
  save(results, tmp_path / 'report')
  assert sorted(p.name for p in (tmp_path / 'report').iterdir()) == [
    'report.csv',
    'report.html',
    'report.json',
    'report.md',
  ]
  data = json.loads(
    (tmp_path / 'report' / 'report.json').read_text(), parse_constant=lambda c: pytest.fail(c)
  )
  table = list(csv.DictReader(io.StringIO(csv_text(results))))
  markdown, page = markdown_text(results), Page(html_text(results))
  outcomes = [(t, o) for t in data['tasks'] for o in t['outcomes']]
  assert len(table) == len(outcomes) == 8
  for row, (task, o) in zip(table, outcomes, strict=True):
    assert (row['task'], row['architecture'], row['verdict']) == (
      task['title'],
      o['title'],
      o['verdict'] or 'reference',
    )
    assert float(row['mean']) == o['estimate']['mean']
    assert row['p_holm'] == ('' if o['difference'] is None else str(o['difference']['p_adjusted']))
    mean = (
      f'{o["estimate"]["mean"]:.3f} ±'
      if task['metric'] == 'bits per byte'
      else f'{100 * o["estimate"]["mean"]:.1f}% ('
    )
    assert any(r and r[0] == o['title'] and len(r) > 1 and r[1].startswith(mean) for r in page.rows)
    assert f'| {o["title"]} | {mean}' in markdown
  for line in data['answer']:
    assert line in markdown
  assert 'f00d' in markdown
  assert data['digest'] in markdown


def test_a_study_of_one_seed_claims_nothing(tmp_path):
  one = invented(tmp_path, ('attention', 'worse'))
  study = one.study.replace(seeds=(1,))
  outcomes = {
    t: tuple(
      Tuned(
        o.title,
        e.model_config,
        (),
        1e-3,
        False,
        tuple(
          Trial(1e-3, s, str(tmp_path / r), 1.0, {'eval/loss': 1.0, 'eval/bits_per_byte': v})
          for r, (s, v) in zip(o.runs[:1], list(o.scores.items())[:1], strict=True)
        ),
      )
      for o, e in zip(task.outcomes, study.entries, strict=True)
    )
    for t, task in zip(study.task_titles, one.tasks, strict=True)
  }
  found = gather(Finished(study, outcomes), one.costs, {}, ENVIRONMENT)
  assert [o.verdict for o in found.tasks[0].outcomes] == [None, 'too few seeds']
  assert 'One seed tells no difference from chance' in found.answer[0]
  Page(html_text(found))


@pytest.mark.parametrize('log', [False, True])
def test_a_chart_keeps_to_its_frame(log):
  points = tuple(Point(10.0**i, 3.0 + i, 2.0 + i, 4.0 + i) for i in range(5))
  svg = chart(
    [Series('a', 0, points, line=True), Series('b', 9, points[:1])],
    Axis('x', log),
    Axis('y'),
    'chart',
  )
  numbers = [float(v) for v in re.findall(r'\b(?:x|cx|x1|x2)="([-\d.]+)"', svg)]
  assert numbers
  assert all(0 <= v <= 536 for v in numbers)
  level = Series('a', 0, (Point(1.0, 0.0), Point(2.0, 0.0)))  # no range, and no logarithm of 0
  assert 'nan' not in chart([level], Axis('x', log), Axis('y', log), 'flat')
  with pytest.raises(ValueError, match='no points'):
    chart([Series('a', 0, (Point(math.nan, 1.0),))], Axis('x'), Axis('y'), 'empty')
