"""The report, made of invented runs."""

import csv
import dataclasses
import html
import io
import json
import math
import re
import types
from xml.etree import ElementTree

import jax
import pytest

from jaxformer.data import AssociativeRecall, Text
from jaxformer.inference import DecodeTime
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.charts import Axis, Point, Series, chart
from jaxformer.study.costs import Costs
from jaxformer.study.earlier import keep_earlier
from jaxformer.study.report import _other_software, content, csv_text, page, reproduction, save
from jaxformer.study.results import gather
from jaxformer.study.runner import Planned, Trial, Tuned
from jaxformer.study.statistics import compare
from jaxformer.study.study import FixedModel, Study
from jaxformer.training.environment import software

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


def invented(folder, names=NAMES, bits=BITS, ngrams=None):
  """A study of text and of recall: every seed adds the same to all, and each run a little of its
  own. `ngrams` is what is known of such models."""
  model = FAMILIES['gru'].make(width=8, layers=1, vocab_size=256, context_length=32)
  study = Study(
    name='invented',
    entries=tuple(FixedModel(name=n, model_config=model) for n in names),
    target=6000,
    tasks=(Text(sequence_length=32), AssociativeRecall()),
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
        Planned(study, entry, data, model, 6000.0, task),
        tuple(trial(n, 0, task, r) for r in study.learning_rates),
        1e-3,
        True,
        tuple(trial(n, s, task) for s in study.seeds),
      )
      for n, entry in zip(names, study.entries, strict=True)
    )
    for task, data in zip(study.task_titles, study.tasks, strict=True)
  }
  costs = {
    n: Costs(
      1e3 * (i + 1),
      1.5,
      10**6 * (i + 1),
      tuple(DecodeTime(c, 100 if i else 100 * c, 1e-3 * c, 1e-4, 1.0) for c in (64, 512)),
    )
    for i, n in enumerate(names)
  }
  measured = {('StandardLibrary', n): ([3 - i / 64 for i in range(32)], None) for n in names}
  facts = {f'{n}_bits_per_byte': v for n, v in (ngrams or {}).items()}
  of_text = ENVIRONMENT['data']['StandardLibrary'] | facts
  return gather(
    study, results, costs, measured, ENVIRONMENT | {'data': {'StandardLibrary': of_text}}
  )


def html_text(results):
  return page('report.html', content(results))


def markdown_text(results):
  return page('report.md', content(results))


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  return invented(tmp_path_factory.mktemp('runs'))


class Page:
  """A report's HTML as a tree: the rows of its tables, and what a browser would fetch."""

  def __init__(self, text):
    # the templates write XHTML but for two kinds of empty elements
    body = re.sub(r'<(meta[^>]*|br)>', r'<\1/>', text.removeprefix('<!DOCTYPE html>\n'))
    self.tree = ElementTree.fromstring(body)
    self.rows = [[c.text or '' for c in row] for row in self.tree.iter('tr')]
    self.charts = [e.get('aria-label') for e in self.tree.iter('{http://www.w3.org/2000/svg}svg')]
    self.fetched = [
      value
      for e in self.tree.iter()
      for key, value in e.items()
      if key.rpartition('}')[2] in ('src', 'href', 'srcset') and not value.startswith('#')
    ]
    self.fetched += [e.tag for e in self.tree.iter() if e.tag in ('link', 'script', 'img')]
    self.fetched += re.findall(r'@import|url\((?!#)', text)


def test_the_page_stands_alone(results):
  text = html_text(results)
  page = Page(text)
  assert page.fetched == []
  assert not re.search(r'\bnan\b|infinity|\binf\b', ''.join(page.tree.itertext()).lower())
  for title in results.study.task_titles:
    assert any(c.startswith(f'{title}: ') for c in page.charts)
  for name in NAMES:  # in the legend of every chart that has its points, as text
    assert text.count(html.escape(name)) > len(page.charts)


def test_verdicts(results):
  text = {o.title: o for o in results.tasks[0].outcomes}
  assert [text[n].verdict for n in NAMES] == [None, 'better', 'worse', 'diverged']
  assert text['diverges'].scores[2] is None
  assert text['diverges'].estimate.runs == 2
  assert re.search('LSTM <1997> .* best', results.answer[0])
  assert re.search('LSTM <1997> is .*better; worse is .*worse; .*diverges', results.answer[0])
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
  assert 'better than every other' in results.answer[0]
  rows = Page(html_text(results)).rows
  names = ['LSTM <1997>', 'attention', 'worse']
  table = rows[next(i for i, r in enumerate(rows) if r == ['architecture', *names]) :][1:4]
  assert [r[0] for r in table] == names
  differences = {(d.name, d.against): d.estimate.mean for d in task.pairs}
  assert table[0] == [names[0], '', *(f'−{-differences[names[0], n]:.3f}*' for n in names[1:])]
  assert table[2] == [names[2], *(f'+{-differences[n, "worse"]:.3f}*' for n in names[:2]), '']
  accuracy = {(d.name, d.against): d for d in results.tasks[1].pairs}
  assert accuracy['LSTM <1997>', 'worse'].verdict == 'better'
  assert accuracy['LSTM <1997>', 'worse'].estimate.mean > 0


def test_those_near_the_best_are_named(tmp_path):
  near = invented(tmp_path, NAMES[:3], {'attention': 2.0, 'LSTM <1997>': 2.001, 'worse': 2.6})
  (names,) = re.findall(r'[Nn]ot significantly different from it: ([^.]*)\.', near.answer[0])
  assert names in ('attention', 'LSTM <1997>')
  assert not invented(tmp_path / 'two', NAMES[:2]).tasks[0].pairs  # the table of scores says it


def test_a_pair_has_one_verdict(tmp_path):
  """Scores whose differences from the baseline are significant where only these are counted, and
  are not among all pairs."""
  bits = {'attention': 2.0, 'LSTM <1997>': 1.957, 'worse': 1.955}
  found = invented(tmp_path, NAMES[:3], bits)
  for task in found.tasks:
    scores = {o.title: o.scores for o in task.outcomes}
    alone = compare(scores, NAMES[0], lower_is_better=task.lower_is_better)
    assert {d.verdict for d in alone} == {'better'}
    by_pair = {frozenset((d.name, d.against)): d for d in task.pairs}
    for o in task.outcomes[1:]:
      assert (o.difference.name, o.difference.against) == (o.title, NAMES[0])
      assert o.difference.p_adjusted == by_pair[frozenset((o.title, NAMES[0]))].p_adjusted
      d = next(d for d in alone if d.name == o.title)
      assert dataclasses.astuple(o.difference.estimate) == pytest.approx(
        dataclasses.astuple(d.estimate)
      )
      assert o.verdict == 'no significant difference'
  assert 'No other architecture differs significantly from it.' in found.answer[0]
  assert 'No architecture differs significantly from attention.' in found.answer[0]
  assert 'corrected for all 3 pairs (Holm) and decides' in markdown_text(found)


def test_verdicts_of_pairs_turn_round_with_them(results):
  for task in results.tasks:
    # the baseline is better than one of them and worse than the other
    pairs = {(d.name, d.against): d for d in task.pairs}
    turned = pairs['attention', 'worse'].reversed()
    assert (turned.name, turned.against, turned.verdict) == ('worse', 'attention', 'worse')
    o = next(o for o in task.outcomes if o.title == 'worse')
    assert o.difference == turned
    assert turned.estimate.low < turned.estimate.mean < turned.estimate.high
    assert turned.reversed() == pairs['attention', 'worse']


@pytest.fixture
def no_charts(monkeypatch):
  """Pages without charts, which take long to draw."""
  monkeypatch.setattr('jaxformer.study.report.figures', lambda results: [])


@pytest.mark.usefixtures('no_charts')
def test_a_study_below_a_bigram_model_says_so_first(tmp_path):
  found = invented(tmp_path, ngrams={'unigram': 4.5, 'bigram': 1.234})
  first = (
    'StandardLibrary: No architecture predicts better than a bigram model of the training text '
    '(1.234 bits per byte): train longer before comparing.'
  )
  assert found.lines()[0] == found.json()['answer'][0] == first
  assert 'best mean' in found.lines()[1]
  answer = Page(html_text(found)).tree.find(".//div[@class='answer']")
  assert answer[0].text == first
  assert markdown_text(found).split('\n\n')[1] == first
  alone = dataclasses.replace(found, tasks=found.tasks[:1])
  assert alone.answer[0] == first.removeprefix('StandardLibrary: ')


@pytest.mark.usefixtures('no_charts')
def test_what_is_not_better_than_a_bigram_model_is_marked(tmp_path):
  found = invented(tmp_path, ngrams={'unigram': 4.5, 'bigram': 2.0})
  better = {n: n == 'LSTM <1997>' for n in NAMES}
  data = json.loads(json.dumps(found.json()))
  assert data['tasks'][0]['ngrams'] == {'unigram': 4.5, 'bigram': 2.0}
  assert {o['title']: o['better_than_bigram'] for o in data['tasks'][0]['outcomes']} == better
  assert 'has the best mean' in data['answer'][0]
  assert data['answer'][1] == (
    'StandardLibrary: For comparison, a bigram model of the training text has 2.000 bits per byte '
    'on all held-out text, a unigram model 4.500. Not better than the bigram model: attention, '
    'worse, diverges.'
  )
  rows = Page(html_text(found)).rows
  start = next(i for i, row in enumerate(rows) if 'better than bigram' in row)
  at = rows[start].index('better than bigram')
  table = {row[0]: (row[1], row[at]) for row in rows[start + 1 : start + 7]}
  assert list(table)[:2] == ['LSTM <1997>', 'bigram model of bytes']
  assert list(table)[-1] == 'unigram model of bytes'
  assert table['bigram model of bytes'] == ('2.000', '')
  assert {n: table[n][1] for n in NAMES} == {n: 'yes' if b else 'no' for n, b in better.items()}
  assert '| bigram model of bytes | 2.000 |' in markdown_text(found)
  csv_rows = list(csv.DictReader(io.StringIO(csv_text(found))))
  assert {(r['bigram'], r['unigram']) for r in csv_rows if r['task'] == 'StandardLibrary'} == {
    ('2.0', '4.5')
  }
  # a task without text has no such models, and the report says nothing of them
  assert data['tasks'][1]['ngrams'] == {}
  assert {o['better_than_bigram'] for o in data['tasks'][1]['outcomes']} == {None}
  assert not any('igram' in line for line in data['answer'] if line.startswith('Associative'))


@pytest.mark.usefixtures('no_charts')
def test_better_than_a_bigram_model_all_stand_beside_it_unmarked(tmp_path, results):
  found = invented(tmp_path, ngrams={'unigram': 4.5, 'bigram': 3.0})
  assert found.answer[1].endswith('a unigram model 4.500.')
  assert found.tasks[0].not_better == []
  assert 'igram' not in html_text(results)  # nothing is known of them there


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
  markdown, shown = markdown_text(results), Page(html_text(results))
  outcomes = [(t, o) for t in data['tasks'] for o in t['outcomes']]
  assert len(table) == len(outcomes) == 8
  for row, (task, o) in zip(table, outcomes, strict=True):
    assert (row['task'], row['title'], row['verdict']) == (
      task['title'],
      o['title'],
      o['verdict'] or '',
    )
    assert float(row['estimate_mean']) == o['estimate']['mean']
    assert row['difference_p_adjusted'] == (
      '' if o['difference'] is None else str(o['difference']['p_adjusted'])
    )
    assert [row[f'scores_{seed}'] for seed in o['scores']] == [
      '' if score is None else str(score) for score in o['scores'].values()
    ]
    assert float(row['tokens_per_second']) == data['costs'][o['title']]['tokens_per_second']
    mean = (
      f'{o["estimate"]["mean"]:.3f} ±'
      if task['metric'] == 'bits per byte'
      else f'{100 * o["estimate"]["mean"]:.1f}% ('
    )
    assert any(
      r and r[0] == o['title'] and len(r) > 1 and r[1].startswith(mean) for r in shown.rows
    )
    assert f'| {o["title"]} | {mean}' in markdown
  for line in data['answer']:
    assert line in markdown
  assert 'f00d' in markdown
  assert data['digest'] in markdown


def test_markdown_has_whole_tables(results):
  blocks = markdown_text(results).split('\n\n')
  tables = [b.splitlines() for b in blocks if b.startswith('| ')]
  assert len(tables) == len(Page(html_text(results)).tree.findall('.//table'))
  for header, dashes, *rows in tables:
    assert set(dashes) == set('|- :')
    assert rows
    assert {line.count(' |') for line in rows} == {header.count(' |')} == {dashes.count(' |')}


def test_a_study_of_one_seed_claims_nothing(tmp_path):
  one = invented(tmp_path, ('attention', 'worse'))
  study = one.study.replace(seeds=(1,))
  outcomes = {
    t: tuple(
      Tuned(
        Planned(study, e, data, e.model_config, 6000.0, t),
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
    for t, data, task in zip(study.task_titles, study.tasks, one.tasks, strict=True)
  }
  found = gather(study, outcomes, one.costs, {}, ENVIRONMENT)
  assert [o.verdict for o in found.tasks[0].outcomes] == [None, 'too few seeds']
  assert not re.search('better|worse|significant', found.answer[0])
  Page(html_text(found))


@pytest.mark.parametrize('log', [False, True])
def test_charts(log):
  points = tuple(Point(10.0**i, 3.0 + i, 2.0 + i, 4.0 + i) for i in range(5))
  series = [Series('a', 0, points, line=True), Series('<b>', 9, points[:1])]

  def draw():
    return chart(series, Axis('x', log, '{:.0f} tokens'.format), Axis('$y_1$'), 'A < B')

  svg = draw()
  texts = [e.text for e in ElementTree.fromstring(svg).iter('{http://www.w3.org/2000/svg}text')]
  assert {'x', '$y_1$', 'a', '<b>'} <= set(texts)  # as text, not as outlines
  assert any(t.endswith('0 tokens') for t in texts)
  assert svg == draw()
  level = Series('a', 0, (Point(1.0, 0.0), Point(2.0, 0.0)))  # no range, and no logarithm of 0
  assert 'nan' not in chart([level], Axis('x', log), Axis('y', log), 'flat')
  with pytest.raises(ValueError, match='no points'):
    chart([Series('a', 0, (Point(math.nan, 1.0),))], Axis('x'), Axis('y'), 'empty')


def report(folder, results):
  """Write the data of a report, and return what is said of an earlier one."""
  results = dataclasses.replace(results, study=results.study.replace(dir='runs'))
  said = keep_earlier(folder, results.json())
  folder.mkdir(exist_ok=True)
  for name, text in (('report.json', json.dumps(results.json())), ('report.md', results.answer[0])):
    (folder / name).write_text(text)
  return said


def test_a_report_with_less_keeps_the_earlier_one_and_says_what_it_lacks(tmp_path):
  folder = tmp_path / 'report'
  two, three = (invented(tmp_path / str(n), NAMES[:n]) for n in (2, 3))
  assert report(folder, three) == []
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  (line,) = report(folder, two)
  assert line.endswith('; this one lacks architectures worse')
  (kept,) = (folder / 'earlier').iterdir()
  assert str(kept) in line
  assert {p.name: p.read_bytes() for p in kept.iterdir()} == before
  # a report with more replaces one with less
  assert report(folder, three) == []
  assert [p.name for p in (folder / 'earlier').iterdir()] == [kept.name]
  # the same is not kept twice
  assert str(kept) in report(folder, two)[0]
  (folder / 'report.json').write_text('{"digest": 1')
  (line,) = report(folder, three)
  assert re.search(r'earlier/unreadable; .* cannot be read', line)


def test_a_report_without_a_task_or_of_other_runs_has_less(tmp_path):
  folder, two = tmp_path / 'report', invented(tmp_path / 'two', NAMES[:2])
  assert report(folder, two) == []
  one = two.tasks[:1]
  assert report(folder, dataclasses.replace(two, tasks=one))[0].endswith(
    'lacks tasks AssociativeRecall'
  )
  (task,) = one
  other = dataclasses.replace(task.outcomes[0], runs=('attention-changed',))
  tasks = (dataclasses.replace(task, outcomes=(other, *task.outcomes[1:])),)
  (line,) = report(folder, dataclasses.replace(two, tasks=tasks))
  assert line.endswith('lacks 3 runs of other code, data or settings')
  assert len(list((folder / 'earlier').iterdir())) == 2


def test_runs_of_other_software_are_named(results, tmp_path):
  folders = [tmp_path / r for r in ('same', 'older', 'unknown')]
  for folder in folders:
    folder.mkdir()
  older = software() | {'versions': software()['versions'] | {'jax': '0.9'}}
  for folder, facts in ((folders[0], software()), (folders[1], older)):
    (folder / 'environment.json').write_text(json.dumps([facts]))
  tuned = types.SimpleNamespace(trials=(), runs=[types.SimpleNamespace(folder=f) for f in folders])
  said = []
  found = _other_software({'text': (tuned,)}, said.append)
  assert found == [f'older: versions.jax: "0.9" -> "{jax.__version__}"']
  assert said == [f'1 run was made with other software: {found[0].partition(": ")[2]}']
  shown = dataclasses.replace(results, environment=ENVIRONMENT | {'runs_of_other_software': found})
  assert dict(reproduction(shown))['runs of other software'] == found[0]
