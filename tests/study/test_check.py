"""`jaxformer check` on layers written outside the package: one that keeps the contract, and some
that do not."""

import json
import pathlib
import re

import pytest

from jaxformer.cli import main
from tests.helpers import temporary_types

TEXT = (pathlib.Path(__file__).parents[2] / 'CONTRIBUTING.md').read_text()
WRONG = {  # what is changed in the tutorial's layer -> checks that fail -> what is said
  'Ahead': (
    ('jnp.swapaxes(x_BTD, 0, 1).astype', 'jnp.swapaxes(jnp.roll(x_BTD, -1, 1), 0, 1).astype'),
    {
      'no output depends on a later input': 'the output at position 0 depends on the input at '
      'position 1'
    },
  ),
  'Forgetful': (
    ('jnp.where(begins_B[:, None], 0.0, h_BD)', 'h_BD'),
    {
      'a sequence split anywhere gives the same': 'first at position 1 of row 1',
      'packed documents equal separate ones': 'documents of 1, 1, 17, 1 tokens in a row, against '
      'separate ones',
    },
  ),
  'Declares': (
    ('return width', 'return 2 * width'),
    {
      'the state has the declared size': 'state_size declares 64 numbers, but init_state returns 32'
    },
  ),
  'Steps': (
    (
      '  def __call__',
      '  def step(self, x_BD, ctx, state):\n    out = super().step(x_BD, ctx, state)\n'
      '    return Output(out.y + 0.5 * out.y, out.state)\n\n  def __call__',
    ),
    {
      'a sequence equals a prefill and steps': 'prefill of 0 and 20 steps against the '
      'full sequence: the output',
      'a sequence split anywhere gives the same': 'a sequence of 600 split at 300',
      'a long sequence equals its tokens one by one': 'a sequence of 512 in one call',
      'packed documents equal separate ones': 'documents in a row of 300',
    },
  ),
}


@pytest.fixture
def layer(tmp_path):
  """Writes the tutorial's layer under another name, with a change; returns what names it on the
  command line."""

  def write(name, old='', new=''):
    (code,) = re.findall(r'## Add a layer\n.*?```python\n(.*?)```', TEXT, re.S)
    assert not old or code.count(old) == 1
    code = (
      code.replace('class Leaky(', f'class {name}(')
      .replace('return Leaky(', f'return {name}(')
      .replace(old or '\0', new)
    )
    file = tmp_path / f'{name.lower()}.py'
    file.write_text(code)
    return f'{file}:{name}.Config'

  with temporary_types():
    yield write


def test_one_that_keeps_the_contract(layer, capsys):
  assert main(['check', layer('Kept')]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == 'Kept'
  assert lines[-1] == 'all checks pass'
  assert len(lines) == 14
  # sharding too: the tests have 8 devices
  assert all(line.startswith('  holds    ') for line in lines[1:-1])


@pytest.mark.parametrize('name', WRONG)
def test_one_that_does_not(name, layer, capsys):
  change, wrong = WRONG[name]
  assert main(['check', layer(name, *change), '--json']) == 1
  found = {v['check']: v for v in json.loads(capsys.readouterr().out)}
  for check, words in wrong.items():
    assert found[check]['verdict'] == 'fails'
    assert words in found[check]['wrong']
  if name != 'Ahead':  # what looks ahead breaks in many ways
    assert [c for c, v in found.items() if v['verdict'] == 'fails'] == list(wrong)


def test_one_that_cannot_be_run(layer, capsys):
  assert main(['check', layer('Fails', 'B, T, D = x_BTD.shape', 'B, T = x_BTD.shape')]) == 1
  out = capsys.readouterr().out
  assert 'FAILS    builds, with outputs like inputs: ValueError: too many values to unpack' in out
  assert '1 of 1 checks fail' in out
