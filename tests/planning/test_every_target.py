"""`jaxformer plan` of published models on the chips of the table, in training and inference: a
sample of what `experiments/plan_every_target.py` runs."""

import json

import pytest

from experiments.plan_every_target import REFUSAL, combinations, tried
from jaxformer.api import plan
from jaxformer.cli.main import main
from jaxformer.config import InputError


def finite(text):
  raise AssertionError(f'{text} in JSON')


@pytest.mark.thorough
@pytest.mark.parametrize(('name', 'chip', 'phase'), combinations([], 30))
def test_every_plan_is_finite_or_refused_by_field(capsys, name, chip, phase):
  answer, answers = tried(name, chip, phase)
  target = answers[-1][0]
  code = main(['plan', name, '--target', target, '--phase', phase, '--json'])
  out, err = capsys.readouterr()
  if answer.startswith('planned'):
    value = json.loads(out, parse_constant=finite)
    assert code == 0
    assert value['step']['seconds'] > 0
    assert value['target']['name'] == target
  else:
    assert code == 2
    assert REFUSAL.match(err.splitlines()[-1].removeprefix('error: '))
    assert not out


def test_a_batch_that_does_not_divide_names_one_that_does():
  refusal = 'training.batch_size = 20: must be a multiple of 8, the devices of v5e-8, since'
  with pytest.raises(InputError, match=refusal) as refused:
    plan('lstm-zaremba-medium', target='v5e-8', log=lambda line: None)
  assert REFUSAL.match(str(refused.value))
  found = plan(
    'lstm-zaremba-medium',
    target='v5e-8',
    overrides={'training.batch_size': 24},
    log=lambda line: None,
  )
  assert found.json()['memory']['fits']
