"""Whatever the user gives works, or ends in one message and exit code 2 with nothing written: 2,000
odd command lines and configs of a fixed seed (`odd_input`), and a few in programs of their own."""

import json
import subprocess
import sys

import pytest

from jaxformer.cli import main
from tests.e2e.fuzz import problem_of_config
from tests.e2e.odd_input import Cases, make_sandbox, make_template
from tests.e2e.program import ROOT, contents, environment

SEED, COUNT, SLICES = 13, 2000, 20
PER_SLICE = COUNT // SLICES


@pytest.fixture(scope='session')
def template(first, tmp_path_factory):
  folder = tmp_path_factory.mktemp('odd') / 'template'
  make_template(folder, first[0] / 'runs')
  return folder


@pytest.mark.thorough
@pytest.mark.e2e
@pytest.mark.parametrize('part', range(SLICES))
def test_odd_input(part, template, tmp_path, cache):
  where = map(str, (template, tmp_path, SEED, part * PER_SLICE, PER_SLICE))
  done = subprocess.run(
    [sys.executable, '-m', 'tests.e2e.fuzz', *where],
    cwd=ROOT,
    env=environment(cache) | {'OPENBLAS_NUM_THREADS': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  *cases, end = map(json.loads, done.stdout.splitlines())
  assert [c for c in cases if c['problem']] == []
  assert sum(end['codes'].values()) == PER_SLICE


@pytest.mark.quick
def test_odd_configs(first, tmp_path):
  make_template(tmp_path / 'template', first[0] / 'runs')
  cases = Cases(SEED + 1, tmp_path / 'template')
  found = [cases[4 * i + 3].data for i in range(300)]
  assert [(d, wrong) for d in found if (wrong := problem_of_config(d))] == []


ODD_LINES = [
  ['train', 'gpt2-tiny', '--run.name', 'a' * 300],
  ['train', 'gpt2-tiny', '--run.dir', '~nouser/x'],
  ['train', 'gpt2-tiny', '--run.dir', 'x\udcff'],
  ['train', 'gpt2-tiny', '--model', 'LanguageModel'],
  ['train', 'gpt2-tiny', '--model.width', '1e30'],
  ['train', 'gpt2-tiny', '--model.width', '9' * 5000],
  ['train', 'gpt2-tiny', '--training.steps', '²'],
  ['train', 'gpt2-tiny', '--training.batch-size', '1e12'],
  ['train', 'gpt2-tiny', '--optimizer', '{"a":' * 100_000],
  ['train', 'gpt2-tiny', '--optimizer', '{"type": "Lion", "beta1": 0.5, "beta1": 0.6}'],
  ['train', 'gpt2-tiny', '--optimizer.learning-rate', '1e400'],
  ['train', 'gpt2-tiny', '--data.corpus', 'Files', '--data.corpus.path', 'fifo'],
  ['train', 'gpt2-tiny', '--data.corpus', 'Files', '--data.corpus.path', 'x' * 1_000_000],
  ['train', 'fifo.py'],
  ['train', 'leaves.py'],
  ['train', 'raises.py'],
  ['plan', 'latin.py'],
  ['plan', 'gpt2', '--hardware', '/dev/zero', '--target', 'v5e-8'],
  ['eval', 'first@²'],
  ['eval', 'first@' + '9' * 5000],
  ['generate', 'a' * 300],
  ['generate', '~nouser'],
  ['describe', 'a\0b'],
  ['convert', 'first', 'x' * 300],
]


@pytest.mark.quick
@pytest.mark.parametrize('words', ODD_LINES, ids=lambda w: ascii(' '.join(w))[1:60])
def test_odd_lines(words, first, tmp_path, capsys, monkeypatch):
  make_template(tmp_path / 'template', first[0] / 'runs')
  make_sandbox(tmp_path / 'template', tmp_path / 'here')
  monkeypatch.chdir(tmp_path / 'here')
  before = contents(tmp_path / 'here')
  assert main(words) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.count('error: ') == 1
  assert len(err) < 4000
  assert contents(tmp_path / 'here') == before


# (surroundings, command for a shell where $J is `jaxformer`, exit code, part of what is said)
PROGRAMS = [
  ({'JAX_PLATFORMS': 'nonsense'}, '$J eval first --batches 1', 2, "JAX_PLATFORMS = 'nonsense'"),
  ({'JAXFORMER_CACHE': '~nouser/x'}, '$J data info', 2, 'no home folder of ~nouser'),
  ({'JAXFORMER_CACHE': '/dev/null/x'}, '$J data info', 2, 'set JAXFORMER_CACHE'),
  ({'JAXFORMER_COORDINATOR': '²'}, '$J eval first --batches 1', 2, 'JAXFORMER_PROCESSES'),
  ({'HOME': '/nonexistent'}, '$J generate first --prompt x --max-new-tokens 1', 0, ''),
  ({'PYTHONIOENCODING': 'ascii'}, '$J generate first --prompt é --max-new-tokens 1', 0, ''),
  ({}, '$J list > /dev/full', 1, 'error: standard output: cannot be written'),
  ({}, '$J list --json | head -1', 0, ''),
  ({}, '$J list >&- 2>&-', 0, ''),
  ({}, 'test -z "$($J nope 2>&-)"', 0, ''),
  ({}, '$J generate first --prompt - <&-', 2, 'standard input: is closed'),
  ({}, 'mkdir gone; cd gone; rmdir ../gone; $J plan gpt2', 2, 'the working folder was deleted'),
  ({}, "$J generate $'\\xff\\xfe'", 2, 'UTF-8'),
  ({}, "printf '\\xff' | $J generate first --prompt - --max-new-tokens 1", 2, 'error: '),
]


@pytest.mark.thorough
@pytest.mark.e2e
@pytest.mark.parametrize('case', PROGRAMS, ids=lambda c: ' '.join((*c[0], c[1])))
def test_odd_surroundings(case, home, cache):
  surroundings, command, code, said = case
  before = contents(home)
  done = subprocess.run(
    ['bash', '-c', command],
    cwd=home,
    env=environment(cache) | {'J': f'{sys.executable} -m jaxformer'} | surroundings,
    capture_output=True,
    text=True,
    errors='replace',
    check=False,
    timeout=120,
  )
  assert (done.returncode, done.stderr) == (code, done.stderr)
  assert 'Traceback' not in done.stderr
  assert said in done.stderr
  assert contents(home) == before
