"""Scaling studies: what is planned, where rates come from, laws of invented losses and what they
foretell, and one end to end."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.data import AssociativeRecall, Dates
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.page import as_csv, as_html, as_markdown
from jaxformer.study.runner import Runner, Trial, Tuned
from jaxformer.study.scaling import Law
from jaxformer.study.scaling_report import CSV_HEADER, csv_rows, extrapolation, page_of
from jaxformer.study.scaling_results import gather_scaling
from jaxformer.study.scaling_study import (
  Budget,
  FinishedScaling,
  Planned,
  Scaled,
  ScalingStudy,
  Transferred,
  TriedAtEach,
  budgets,
  run_scaling,
)
from jaxformer.study.sharing import Interrupted
from jaxformer.study.studies import STUDIES
from jaxformer.study.study import AsIs, Grown
from jaxformer.training.interrupt import Interrupt
from tests.study.test_report import ENVIRONMENT, Page
from tests.tiers import thorough

quick = pytest.mark.quick
LAW, K, POWER = Law(E=1.2, A=40.0, B=120.0, alpha=0.4, beta=0.35), 9.0, 0.96
TASK = AssociativeRecall(length=6, test_sequences=64)


def study(**changes):
  all_budgets = budgets((3e8, 1.2e9, 4.8e9, 3.6e10), (600, 1200, 2400, 4800))
  held_out = (all_budgets[3].replace(params=all_budgets[3].params[1:3]),)
  return ScalingStudy(
    **{
      'name': 'invented',
      'entries': (Grown(family='gru', name='GRU-2014'),),
      'budgets': all_budgets[:3],
      'held_out': held_out,
      'task': TASK,
      'batch_size': 8,
      'bootstrap': 40,
      'learning_rates': (1e-3, 3e-3),
    }
    | changes
  )


def invented(noise=0.003, diverged=(), s=None):
  """Trainings whose losses are those of `LAW` but for noise; those whose place is among `diverged`
  are none."""
  s, rng, scaled = s or study(), np.random.default_rng(3), []
  model = FAMILIES['gru'].make(width=8, layers=1, hidden=0, vocab_size=10, context_length=8)
  for b in (*s.budgets, *s.held_out):
    for n in b.params:
      tokens = round(b.flops / K / n**POWER)
      loss = float(LAW.loss(n, tokens)) * np.exp(noise * rng.normal())
      if len(scaled) in diverged:
        loss = np.inf
      held_out = b.flops > s.budgets[-1].flops
      run = Trial(
        3e-3,
        1,
        f'runs/invented/{len(scaled)}',
        loss,
        {'eval/loss': loss, 'eval/source': 'recall test'},
      )
      planned = Planned(s.entries[0], b.flops, held_out, n, model, n, K * n**POWER, tokens)
      scaled.append(Scaled(planned, Tuned(s.entries[0].title, model, (), 3e-3, False, (run,)), 0.1))
  return gather_scaling(FinishedScaling(s, {s.entries[0].title: tuple(scaled)}), ENVIRONMENT)


@quick
def test_the_law_is_found_again():
  (f,) = invented().families
  for name, i in f.coefficients.items():
    assert i.low <= getattr(LAW, name) <= i.high
    assert i.low < i.value < i.high
  assert f.flops_law == pytest.approx((K, POWER))
  assert f.runs == 12
  assert f.explained > 0.99
  assert f.residual == pytest.approx(0.003, rel=0.7)
  assert f.exponent.low <= LAW.exponent(POWER) <= f.exponent.high
  for o in f.optima:
    best = LAW.optimal(o.flops, K, POWER)[0]
    assert o.params.low <= best <= o.params.high
    assert o.parabola is None or (
      o.parabola.inside and o.parabola.params == pytest.approx(best, rel=0.3)
    )
  assert [o.parabola is None for o in f.optima] == [False, False, False, True]
  assert [p.covered for p in f.held_out] == [True, True]
  assert all(
    p.foretold.value == pytest.approx(LAW.loss(p.params, p.tokens), rel=0.02) for p in f.held_out
  )


@quick
def test_what_lies_outside_is_said():
  results = invented()
  (f,) = results.families
  for p in f.held_out:
    assert f'foretold {p.foretold.value:.3f}' in results.answer[0]
    assert f'{p.loss:.3f} came, inside the interval' in results.answer[0]
    assert dataclasses.replace(p, loss=None).covered is None
  beyond = tuple(dataclasses.replace(p, loss=2 * p.loss) if p.held_out else p for p in f.points)
  found = dataclasses.replace(results, families=(dataclasses.replace(f, points=beyond),))
  assert found.answer[0].count('outside the interval and +9') == 2
  (table,) = extrapolation(found)
  assert [row[-2:] for row in table.rows] == [
    (f'{p.loss / p.foretold.value - 1:+.1%}', 'no') for p in beyond[-2:]
  ]


@quick
def test_runs_that_diverged_take_no_part():
  results = invented(diverged=(0, 12))
  (f,) = results.families
  assert (f.runs, f.points[0].loss, f.points[12].covered) == (11, None, None)
  assert 'diverged' in results.answer[0]
  assert as_markdown(page_of(results)).count('diverged') >= 3
  none = invented(diverged=range(9))
  assert 'no law (five coefficients need at least 6 runs; there are 3)' in none.answer[0]
  assert none.families[0].flat['3e+08'] == 'a parabola needs at least 3 sizes; there are 0'
  Page(as_html(page_of(none)))


@quick
def test_all_forms_agree():
  results = invented()
  page, markdown = Page(as_html(page_of(results))), as_markdown(page_of(results))
  data = json.loads(json.dumps(results.to_json()), parse_constant=lambda c: pytest.fail(c))
  rows = list(csv.DictReader(io.StringIO(as_csv(CSV_HEADER, csv_rows(results)))))
  points = data['families'][0]['points']
  assert len(rows) == len(points) == 14
  assert page.charts == 4
  assert page.fetched == []
  for row, p in zip(rows, points, strict=True):
    assert float(row['loss']) == p['loss']
    assert float(row['low']) == p['foretold']['low']
    assert (row['held_out'], row['inside']) == (str(p['held_out']), str(p['covered']))
    assert any(f'{p["params"]:,.0f}' in r and f'{p["loss"]:.3f}' in r for r in page.rows)
    assert f' {p["loss"]:.3f} |' in markdown
  assert data['answer'][0] in markdown
  assert 'GRU-2014' in markdown
  assert data['digest'] in markdown


# ---- what is planned ---------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch):
  """What would be trained: (FLOPs, tokens, rates) of each, in order; the second rate is always the
  best."""
  found = []

  def tuned(self, entry, model, task):
    s = self.study
    found.append((s.target, s.tokens, s.learning_rates))
    return Tuned(
      entry.title,
      model,
      (),
      s.learning_rates[-1],
      False,
      tuple(Trial(1e-3, i, 'run', 1.0, {}) for i in s.seeds),
    )

  monkeypatch.setattr(Runner, 'tuned', tuned)
  return found


@quick
def test_tokens_make_up_the_budget(tried):
  done = run_scaling(study(tolerance=0.5), lambda line: None, Interrupt())
  for scaled in done.results['GRU-2014']:
    p = scaled.planned
    batch = 8 * TASK.positions
    assert p.tokens % batch == 0
    assert abs(p.tokens * p.flops_per_token - p.flops) <= batch * p.flops_per_token / 2
    assert p.params == pytest.approx(p.target, rel=0.5)
  assert [s.planned.held_out for s in done.results['GRU-2014']] == [False] * 12 + [True] * 2


@quick
def test_rates(tried):
  run_scaling(study(tolerance=0.5, rates=TriedAtEach()), lambda line: None, Interrupt())
  assert {rates for _, _, rates in tried} == {(1e-3, 3e-3)}
  assert len(tried) == 14
  tried.clear()
  run_scaling(
    study(tolerance=0.5, rates=Transferred(exponent=-0.5)), lambda line: None, Interrupt()
  )
  assert tried[0][2] == (1e-3, 3e-3)  # the middle of the least budget, and nothing else
  assert tried[0][0] == 2400
  by_rates = [rates for _, _, rates in tried[1:]]
  assert (
    by_rates
    == [(3e-3,)] * 3
    + [(1.5e-3,)] * 4
    + [(7.5e-4,)] * 4
    + [(pytest.approx(3e-3 / 120**0.5, rel=0.01),)] * 2
  )


@quick
@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    ({'entries': ()}, ['ScalingStudy.entries', 'at least one']),
    (
      {
        'entries': (
          AsIs(
            model_config=FAMILIES['gru'].make(
              width=8, layers=1, hidden=0, vocab_size=10, context_length=8
            )
          ),
        )
      },
      ['ScalingStudy.entries', 'one size'],
    ),
    ({'budgets': budgets((1e7,), (1e3, 2e3, 4e3))}, ['ScalingStudy.budgets', 'at least two']),
    (
      {'budgets': budgets((4e7, 1e7), (1e3, 2e3, 4e3))},
      ['ScalingStudy.budgets', '4e+07, 1e+07', 'ascending'],
    ),
    (
      {'budgets': budgets((1e7, 4e7), (1e3, 2e3))},
      ['ScalingStudy.budgets', '2 sizes', 'at least 3'],
    ),
    (
      {'held_out': budgets((1e9,), (1e3,))},
      ['ScalingStudy.held_out', '1e+09', 'more than 4.8e+09'],
    ),
    ({'learning_rates': (3e-3, 1e-3)}, ['ScalingStudy.learning_rates', 'ascending']),
    ({'seeds': (0,)}, ['ScalingStudy.tuning_seed']),
    ({'bootstrap': 1}, ['ScalingStudy.bootstrap = 1']),
    ({'name': 'a/b'}, ['ScalingStudy.name', 'folder']),
  ],
)
def test_bad_studies(changes, parts):
  with pytest.raises(InputError) as e:
    study(**changes)
  for part in parts:
    assert part in str(e.value)


@quick
@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    (
      {'budgets': budgets((1e4, 1e7), (600, 1200, 2400))},
      ['10000 FLOPs are less than one batch of GRU', 'must be at least'],
    ),
    (
      {'budgets': budgets((1e7, 2e7), (1190, 1200, 1210))},
      ['are the same model', 'must lie further apart'],
    ),
    ({'task': Dates()}, ['ScalingStudy.task', 'are pairs']),
    ({'tolerance': 1e-6}, ['gru: nothing comes within', 'params']),
  ],
)
def test_what_cannot_be_planned(changes, parts, tried):
  with pytest.raises(InputError) as e:
    run_scaling(study(**{'tolerance': 0.5} | changes), lambda line: None, Interrupt())
  for part in parts:
    assert part in str(e.value)
  assert tried == []  # before any trains


@quick
def test_budgets_grow():
  _, second = budgets((1e10, 4e10), (1e4, 3e4, 9e4))
  assert second == Budget(flops=4e10, params=(2e4, 6e4, 18e4))
  with pytest.raises(InputError, match=r'Budget\.params'):
    Budget(flops=1e9, params=(2.0, 1.0))


# ---- from end to end ---------------------------------------------------------------------------

STUDY = """
from jaxformer.study.scaling_study import Budget, ScalingStudy, TriedAtEach
from jaxformer.study.study import Grown
from jaxformer.data import AssociativeRecall

sizes = (1.4e4, 2.8e4, 5.6e4)
study = ScalingStudy(
  name='tiny', entries=(Grown(family='gpt2'),), budgets=(Budget(flops=1e8, params=sizes), Budget(flops=2e8, params=sizes)),
  held_out=(Budget(flops=4e8, params=sizes[1:2]),), task=AssociativeRecall(length=6, test_sequences=64), batch_size=8,
  learning_rates=(3e-3,), bootstrap=5, tolerance=1.0)
"""


@pytest.mark.e2e
@thorough
def test_interrupted_it_goes_on(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'study.py').write_text(STUDY)
  train = Runner._train
  trained = []

  def counted(self, group):
    train(self, group)
    trained.append(group[0].run.name)
    if stop and len(trained) == 3:
      raise Interrupted

  monkeypatch.setattr(Runner, '_train', counted)
  stop = True
  assert main(['compare', 'study.py']) == 75
  assert not (tmp_path / 'runs' / 'tiny' / 'report').exists()
  stop = False
  assert main(['compare', 'study.py', '--json']) == 0
  first = json.loads(capsys.readouterr().out)
  assert len(trained) == len(set(trained)) == 7
  assert sorted(p.name for p in (tmp_path / 'runs' / 'tiny' / 'report').iterdir()) == [
    'report.csv',
    'report.html',
    'report.json',
    'report.md',
  ]
  assert main(['compare', 'study.py', '--json']) == 0
  second = json.loads(capsys.readouterr().out)
  assert len(trained) == 7
  assert first['families'] == second['families']
  (family,) = first['families']
  assert all(p['loss'] > 0 for p in family['points'])
  assert len({p['params'] for p in family['points']}) == 3


@quick
def test_the_named_one_is_well_formed(capsys):
  s = STUDIES['scaling']
  assert isinstance(s, ScalingStudy)
  assert s.held_out
  assert main(['compare', 'scaling', '--study.budgets.0.params', '2e4,4e4', '--show']) == 2
  assert 'at least 3' in capsys.readouterr().err
