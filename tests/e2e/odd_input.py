"""Odd command lines and configs by number: values that are none, damaged files, types in wrong
places, over all commands and all types of configs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxformer as jf
from jaxformer.cli.main import _parser
from jaxformer.config import Config, config_bases, hints, types_of, union_options
from jaxformer.launch.engine import Engine
from jaxformer.training.registry import import_configs
from tests.e2e.program import SMALL, last

LONG, DEEP = 'a' * 300, '[' * 100_000
ODD = [
  *('', ' ', '0', '-0', '-1', '-0.0', '1.5', '1e12', '1e30', '-1e30', '1e308', '1e400', '-1e400'),
  *('nan', 'inf', '-inf', 'NaN', 'Infinity', '9' * 5000, '1' + '0' * 4000, '4294967296'),
  *('9223372036854775807', '9223372036854775808', '1000000000000', '65536', '0x10', '1_000', '1e'),
  *('²', '٣', '１', '½', '1²', '٣٣', '+1', ' 1 ', '1 2', '1,2', ',', '1,,2', '1,²', '1:2', '2:1'),
  *('true', 'none', 'null', 'None', '[]', '{}', '[1]', '[[1]]', '[1', '{"type"', '"x"', '[null]'),
  *(DEEP, '{"a":' * 100_000, '[{"type":' * 50_000, '{"type": 1}', '{"type": null}', '{"type": []}'),
  *('{"type": "LanguageModel"}', '{"type": "Lion", "type": "AdamW"}', '{"type": "Nope"}', '[NaN]'),
  *('{"type": "AdamW", "learning_rate": 1e999}', '{"type": "AdamW", "learning_rate": NaN}'),
  *('{"type": "AdamW", "code": 3}', '{"type": "AdamW", "code": {"file": 3}}', '{"type": {"a": 1}}'),
  *('{"type": "AdamW", "code": {"module": "os", "file": "/dev/zero", "sha256": "x"}}', '{"": 1}'),
  *('LanguageModel', 'Attention', 'AdamW', 'Block', 'Experiment', 'Config', 'Text', 'Mixture'),
  *('~nouser', '~nouser/x', '~', '.', '..', '/', '//', '../x', LONG, 'x/' * 3000, 'a/' + LONG),
  *(
    'x' * 1_000_000,
    '\udcff\udcfe',
    'runs/\udcff',
    'a\nb',
    'é',
    '\u202e',
    '%s',
    '{x}',
    '$HOME',
    '*',
  ),
  *('-', '--', '---', '-x', '=', '@', ':', '::', 'first@', 'first@²', 'first@-1', 'first@1e5'),
  *(
    'first@' + '9' * 5000,
    'first@4@4',
    'gs://',
    'ftp://x',
    'file:///x',
    'http://',
    'hf://a',
    '://',
  ),
  *('folder', 'fifo', 'loop', '/dev/zero', '/dev/full', '/dev/null', 'runs', 'runs/first', 'empty'),
  *('nothing.txt', 'corpus.txt', 'binary.dat', 'corpus.txt/x', 'first/x', 'nope.py', 'folder.py'),
  *('attribute.py', 'recurses.py', 'ends.py', 'loud.py', 'utf16.py', 'loud.py:X', 'recurses.py:X'),
  *('1e9', '1e18', '-1e5', '-.5', '3e9', '2147483648', 'v5e-' + '9' * 5000, '٣xv5e-8', 'h100:٣'),
  *('syntax.py', 'raises.py', 'leaves.py', 'latin.py', 'nul.py', 'empty.py', 'number.py'),
  *('layer.py:Leaky.Config', 'layer.py:Leaky', 'layer.py:nope', 'layer.py:', 'layer.py:.', ':X'),
  *('layer.py:Leaky.Config.type', 'layer.py:jax', 'layer.py:number', 'raises.py:X', 'leaves.py:X'),
  *('syntax.py:X', 'latin.py:X', 'nul.py:X', 'fifo.py:X', 'nope.py:X', 'layer.py:' + 'a.' * 5000),
]
NUMBERS = ['0', '1', '2', '3', '7', '8', '65536', '1e6', '1e9', '1e12', '1e18', '0.5', '1e-30']
NUMBERS += [
  '-1',
  '-0.5',
  '1e-320',
  '2147483647',
  '2147483648',
  '3.4e38',
  '3.5e38',
  '1e300',
  '1.0001',
]
NUL = 'a\0b'  # which a command line cannot have, but Python can

# Values of JSON; each is also tried where a config, a list or a plain value is expected.
JSON_ODD: list[Any] = [
  *(None, True, False, 0, -1, 1.5, 1e300, 10**30, 10**5000, -(10**30), 2**63, 2**31, float('nan')),
  *(
    float('inf'),
    float('-inf'),
    '',
    ' ',
    NUL,
    '\udcff',
    '²',
    'x',
    LONG,
    'x' * 100_000,
    [],
    {},
    [[]],
  ),
  *([None], [1, 2], ['x'], {'type': 'Nope'}, {'type': None}, {'type': 3}, {'a': 1}, [{}], {'': {}}),
  *({'type': 'LanguageModel'}, {'type': 'AdamW', 'code': []}, '/dev/zero', 'fifo', '~nouser'),
]

FILES = {
  'corpus.txt': b'one two three, four five six.\n' * 400,
  'other.txt': b'six five four.\n' * 300,
  'pairs.tsv': b'one two\teins zwei\nthree\tdrei\n' * 200,
  'binary.dat': b'\x7fELF\0\0\xff',
  'nothing.txt': b'',
  'chips.toml': b'[[chip]]\nname = 3\n',
  'layer.py': b"""import jax
import jax.numpy as jnp
from jaxformer.layers.layer import Layer, LayerConfig, Output
from jaxformer.sharding import param

number = 3


class Leaky(Layer):
  class Config(LayerConfig):
    size: int = 3

    def build(self, width, rngs, position):
      return Leaky(self, width)

    def state_size(self, width, max_len):
      return 0

  def __init__(self, config, width):
    self.scale = param(jnp.ones(width), ('norm',))

  def init_state(self, batch, max_len, memory=None):
    return jnp.zeros((batch, 0))

  def __call__(self, x_BTD, ctx, state=None):
    return Output(x_BTD * self.scale[...].astype(x_BTD.dtype), state)
""",
  'experiment.py': b'import jaxformer as jf\n\n\ndef experiment():\n'
  b"  return jf.experiment('gpt2-tiny', overrides={'training.steps': 2})\n",
  'study.py': b'from jaxformer.study.studies import STUDIES\n\n'
  b"few = STUDIES['quickstart'].entries[:1]\n"
  b"study = STUDIES['quickstart'].replace(name='small', dir='studies', entries=few)\n",
  'syntax.py': b'def f(:\n',
  'raises.py': b'raise BaseException(3)\n',
  'leaves.py': b'import sys\nsys.exit(7)\n',
  'latin.py': b'x = "\xe9"\n',
  'nul.py': b'x = 1\0\n',
  'empty.py': b'',
  'attribute.py': b'def __getattr__(name): raise KeyError(name)\n',
  'recurses.py': b'def experiment():\n  return experiment()\n\n\nstudy = experiment\n',
  'ends.py': b'raise GeneratorExit\n',
  'loud.py': b'print("loud" * 1000)\nexperiment = study = lambda: print("louder")\n',
  'utf16.py': 'experiment = 3\n'.encode('utf-16'),
  'number.py': b'experiment = 3\nstudy = 3\nprint("loud")\n',
}


def make_template(folder: Path, runs: Path) -> None:
  """Write the files that every case sees; `runs` holds the run `first`."""
  folder.mkdir(parents=True)
  shutil.copytree(runs, folder / 'runs')
  for name, content in FILES.items():
    (folder / name).write_bytes(content)
  for name in ('folder', 'folder.py', 'empty', 'home', 'tmp'):
    (folder / name).mkdir()
  (folder / 'folder' / 'x.txt').write_bytes(FILES['corpus.txt'])


def make_sandbox(template: Path, sandbox: Path) -> None:
  shutil.rmtree(sandbox, ignore_errors=True)
  shutil.copytree(template, sandbox)
  for name in ('fifo', 'fifo.py'):
    os.mkfifo(sandbox / name)
  (sandbox / 'loop').symlink_to('loop')


# ---- cases -------------------------------------------------------------------------------------

CORPUS = [
  '--data.corpus',
  'Files',
  '--data.corpus.path',
  'corpus.txt',
  '--data.split',
  'ByPosition',
]
TINY = ['gpt2-tiny', *SMALL[:-4], *CORPUS, '--data.sequence-length', '32']
# Goes on with the run `first`, two steps further.
RESUME = ['train', 'gpt2-tiny', *last([*SMALL, '--training.steps', '6', '--run.name', 'first'])]
BASES = [
  RESUME,
  ['generate', 'first', '--prompt', '-', '--max-new-tokens', '2'],
  ['generate', 'transformer-tiny', '--max-new-tokens', '2'],
  ['list'],
  ['describe', 'gpt2-tiny'],
  ['describe', 'first'],
  ['describe', 'layer.py:Leaky.Config'],
  ['train', *TINY, '--run.name', 'x'],
  ['train', *TINY, '--run.name', 'x'],
  ['train', *TINY, '--run.name', 'x'],
  ['train', *TINY, '--run.name', 'first'],
  ['train', *TINY, '--show'],
  ['train', 'experiment.py', *CORPUS],
  ['train', 'mamba', '--params', '100K', '--show'],
  [
    'train',
    'transformer-tiny',
    '--data.corpus',
    'Tsv',
    '--data.corpus.path',
    'pairs.tsv',
    '--show',
  ],
  ['eval', 'first', '--batches', '1'],
  ['eval', 'first', '--batches', '1', *CORPUS],
  ['generate', 'first', '--prompt', 'x', '--max-new-tokens', '2'],
  ['generate', 'transformer-tiny', '--source', 'x', '--max-new-tokens', '2'],
  ['align', 'transformer-tiny', '--source', 'ab', '--target', 'cd'],
  ['plan', 'gpt2-tiny'],
  ['plan', 'mixtral-8x7b', '--target', 'v5e-64'],
  ['plan', 'mamba', '--params', '1M'],
  ['plan', 'experiment.py'],
  ['bench', *TINY, '--steps', '1', '--new-tokens', '0'],
  ['compare', 'study.py', '--workers', '1', '--train-only'],
  ['compare', 'quickstart', '--show'],
  ['compare', 'scaling', '--show'],
  ['report', 'study.py'],
  ['check', 'layer.py:Leaky.Config'],
  ['convert', 'first', 'out'],
  ['data', 'info', *CORPUS],
  ['data', 'info', '--data', 'Pairs', '--data.corpus', 'Tsv', '--data.corpus.path', 'pairs.tsv'],
  ['data', 'train-tokenizer', 'out.json', *CORPUS, '--vocab-size', '300'],
  *(
    [
      'launch',
      e,
      'gpt2-tiny',
      '--target',
      'v5e-8',
      '--source',
      'git+https://x/y@1234567',
      '--dry-run',
    ]
    for e in ('sky', 'xpk', 'gcloud')
  ),
  ['launch', 'slurm', 'gpt2-tiny', '--target', 'h100:8', '--dry-run'],
]
# Commands that write new files where they succeed; `train` alone also changes a run.
WRITERS = {'train', 'compare', 'report', 'convert', 'data', 'align'}
FIRST_FILES = ['config.json', 'events.jsonl', 'metrics.jsonl', 'environment.json', 'samples.txt']
FIRST_FILES += ['tokenizer/tokenizer.json', 'tokenizer/*', 'checkpoints/4/*', 'checkpoints/4/*/*']


NEW = ['train', *TINY, '--run.name', 'x']
PARTS = ['', 'config.json', 'events.jsonl', 'metrics.jsonl', 'environment.json', 'samples.txt']
PARTS += [
  'lock.json',
  'checkpoints',
  'checkpoints/4',
  'checkpoints/9',
  'checkpoints/²',
  'tokenizer',
]
PARTS += ['undone', 'undone/1', 'undone/²', 'tensorboard']
ROWS = b'\n'.join(
  [
    *(
      b'{"step": 1e400}',
      b'{"step": -1}',
      b'{"step": 4, "eval/loss": "x"}',
      b'{"step": 4}',
      b'[1]',
    ),
    *(
      b'{"event": 3}',
      b'{"event": "start", "init_from": 3}',
      b'{"step": 4, "tokens": NaN}',
      b'"x"',
    ),
    *(b'{"step": 3, "train/loss": ' + b'9' * 5000 + b'}', b'[' * 100_000, b'\xff\xfe\0', b'{"st'),
  ]
)


@dataclasses.dataclass
class Case:
  """A command line, or a config as JSON data, and what is changed before it is tried.

  Attributes:
    words: of the command line; [] for a config.
    data: JSON data of a config.
    spoils: (file, content) to write; None removes it, 'folder' and 'fifo' make one of it, 'link' a
      link to nothing.
    text: standard input.
  """

  words: list[str]
  data: Any = None
  spoils: list[tuple[str, bytes | str | None]] = dataclasses.field(default_factory=list)
  text: str = ''


def places(config: Config, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yield the dotted path of every field of a config, and its type."""
  for name, hint in hints(type(config)).items():
    value, below = getattr(config, name), f'{path}.{name}' if path else name
    yield below, hint
    values = value if isinstance(value, tuple) else [value]
    for i, inner in enumerate(values):
      if isinstance(inner, Config):
        yield from places(inner, f'{below}.{i}' if isinstance(value, tuple) else below)


class Cases:
  """Cases by number: every case depends on the seed and its number only."""

  def __init__(self, seed: int, template: Path):
    import_configs()
    self.seed, self.types = seed, [c for c in types_of(Config) if c is not Config]
    self.experiments = [
      list(places(jf.experiment(name))) for name in ('gpt2-tiny', 'jamba-tiny', 'transformer-tiny')
    ]
    self.studies = [list(places(jf.get_study(n), 'study')) for n in ('quickstart', 'scaling')]
    self.engines = [list(places(c(), n)) for n, c in self._engines()]
    self.options = _options()
    self.first = sorted(p for p in (template / 'runs' / 'first').rglob('*') if p.is_file())
    self.root = template

  def _engines(self):
    return [(c.tag.lower(), c) for c in types_of(Engine) if c.__module__.startswith('jaxformer')]

  def __getitem__(self, number: int) -> Case:
    r = random.Random(f'{self.seed}:{number}')
    if number % 4 == 3:
      return Case([], data=self.config(r))
    case = Case(list(r.choice(BASES)))
    command = case.words[0]
    for _ in range(r.choice((1, 1, 1, 2, 3))):
      kinds = [self.option, self.override, self.override, self.word, self.spoil, self.typed]
      kinds += [self.twice, self.part]
      r.choice(kinds)(case, command, r)
    if r.random() < 0.15 and '--json' not in case.words:
      case.words.append('--json')
    if r.random() < 0.1:
      case.text = r.choice(['', 'x\n', '\0', 'x' * 100_000, 'y\n', '\udcff'])
    case.words = [w.replace('\0', '') for w in case.words]
    return case

  def option(self, case: Case, command: str, r: random.Random) -> None:
    """Give an option of the command an odd value."""
    names = self.options[command]
    if not names:
      return self.word(case, command, r)
    name, takes = r.choice(names)
    case.words += [name, r.choice(ODD)] if takes else [name]
    return None

  def twice(self, case: Case, command: str, r: random.Random) -> None:
    """Give an option of the command two values."""
    names = [name for name, takes in self.options[command] if takes]
    if not names:
      return self.word(case, command, r)
    name = r.choice(names)
    case.words += [name, r.choice(NUMBERS + ODD), name, r.choice(NUMBERS + ODD)]
    return None

  def part(self, case: Case, command: str, r: random.Random) -> None:
    """Put something else where a run has a file or a folder."""
    if command == 'train':
      case.words = list(r.choice((RESUME, [*RESUME, '--resume-from', '4'], NEW)))
    run = 'x' if case.words == NEW else 'first'
    content = r.choice([b'', ROWS, ROWS, 'folder', 'fifo', 'link'])
    case.spoils.append((f'runs/{run}/{r.choice(PARTS)}'.rstrip('/'), content))

  def override(self, case: Case, command: str, r: random.Random) -> None:
    """Give a field an odd value."""
    fields = r.choice(self.studies if command in ('compare', 'report') else self.experiments)
    if command == 'launch' and r.random() < 0.5:
      fields = r.choice(self.engines)
    elif command not in ('compare', 'report') and 'transformer-tiny' not in case.words:
      fields = self.experiments[0] if r.random() < 0.8 else fields
    path, hint = r.choice(fields)
    if r.random() < 0.1:
      path += r.choice(('.x', '.0', '.²', '.type', '.', '..', '.' + 'a.' * 3000, '.-1', '.' + LONG))
    number = {int, float} & set(union_options(hint))
    self.give(case, path, r.choice(NUMBERS if number and r.random() < 0.6 else ODD), r)

  def give(self, case: Case, path: str, value: str, r: random.Random) -> None:
    flag = f'--{path.replace("_", "-")}'
    if flag in case.words:
      case.words[case.words.index(flag) + 1] = value
    else:
      case.words += [f'{flag}={value}'] if r.random() < 0.5 else [flag, value]

  def typed(self, case: Case, command: str, r: random.Random) -> None:
    """Put a config of another type in a place, with an odd field."""
    fields = r.choice(self.studies if command in ('compare', 'report') else self.experiments)
    fitting = [(p, h) for p, h in fields if _config_types(h)]
    path, hint = r.choice(fitting)
    chosen = r.choice(_config_types(hint) if r.random() < 0.9 else self.types)
    names = list(hints(chosen))
    if not names or r.random() < 0.2:
      return self.give(case, path, chosen.tag, r)
    name = r.choice(names)
    if r.random() < 0.5:
      self.give(case, path, chosen.tag, r)
      return self.give(case, f'{path}.{name}', r.choice(ODD), r)
    data = {'type': chosen.tag, name: r.choice(JSON_ODD)}
    return self.give(case, path, dumps([data] if 'tuple' in str(hint) else data), r)

  def word(self, case: Case, command: str, r: random.Random) -> None:
    """Replace, drop, repeat or add a word."""
    if not case.words:
      return case.words.append(r.choice(ODD))
    i = r.randrange(len(case.words))
    how = r.choice(('replace', 'replace', 'drop', 'repeat', 'add', 'cut'))
    if how == 'drop':
      del case.words[i]
    elif how == 'repeat':
      case.words.insert(i, case.words[i])
    elif how == 'cut':
      del case.words[i:]
    elif how == 'add':
      case.words.insert(i + 1, r.choice(ODD))
    else:
      case.words[i] = r.choice(ODD)
    return None

  def spoil(self, case: Case, command: str, r: random.Random) -> None:
    """Damage a file of the run, or one that the command reads."""
    if command not in ('eval', 'generate', 'describe', 'convert', 'train') or r.random() < 0.2:
      name = r.choice(list(FILES))
      case.spoils.append((name, r.choice([b'', None, 'folder', 'fifo', b'\xff\xfe', b'{', b'\0'])))
      return
    if command == 'train':
      case.words = ['train', *TINY, '--run.name', 'first', '--training.steps', '5']
      case.words = [w for i, w in enumerate(case.words) if w != '--training.steps' or i > 20]
      case.words = ['train', *_without(TINY, '--training.steps'), '--run.name', 'first']
      case.words += ['--training.steps', '5']
    elif 'first' not in case.words:
      case.words = [command, 'first', *(['out'] if command == 'convert' else [])]
    if r.random() < 0.5:
      name = 'runs/first/config.json'
      data = json.loads((self.root / name).read_text())
      case.spoils.append((name, dumps(self.odd_inside(data, r)).encode('utf-8', 'replace')))
      return
    file = r.choice(self.first)
    small = [f for f in self.first if f.suffix in ('.json', '.jsonl', '.txt')]
    file = r.choice(small) if r.random() < 0.5 else file
    content, how = file.read_bytes(), r.randrange(9)
    spoiled: Any = [
      *(None, b'', 'folder', 'fifo', content[: len(content) // 2], b'\xff\xfe\0', b'[]\n3\nnull\n'),
      *(content + b'{"step": "x"}\n[1]\n"x"\n{"step": null}\n\xff\n', b'[' * 100_000),
    ][how]
    case.spoils.append((str(file.relative_to(self.root)), spoiled))

  def odd_inside(self, data: Any, r: random.Random) -> Any:
    """Return JSON data with one value, at any depth, replaced, removed or renamed."""
    spots = list(_spots(data))
    owner, key = r.choice(spots)
    how = r.random()
    if how < 0.15 and isinstance(owner, dict):
      del owner[key]
    elif how < 0.3 and isinstance(owner, dict):
      owner[r.choice(('', 'x', 'type', 'code', LONG))] = owner.pop(key)
    else:
      owner[key] = r.choice(JSON_ODD)
    return data

  def config(self, r: random.Random) -> Any:
    """Return JSON data of a config with some odd fields."""
    chosen = r.choice(self.types)
    names = list(hints(chosen))
    data: dict[str, Any] = {'type': chosen.tag}
    for name in r.sample(names, min(len(names), r.choice((1, 1, 2, 4)))):
      data[name] = self.value(hints(chosen)[name], r)
    if r.random() < 0.05:
      data[r.choice(('', 'x', 'code', 'type'))] = r.choice(JSON_ODD)
    return data

  def value(self, hint: Any, r: random.Random, depth: int = 0) -> Any:
    inner = _config_types(hint)
    if inner and depth < 3 and r.random() < 0.6:
      chosen = r.choice(inner)
      names = list(hints(chosen))
      some = r.sample(names, min(len(names), r.choice((0, 1, 2))))
      data = {'type': chosen.tag} | {n: self.value(hints(chosen)[n], r, depth + 1) for n in some}
      return [data] if any(typing.get_origin(o) is tuple for o in union_options(hint)) else data
    return r.choice(JSON_ODD)


def _without(words: Sequence[str], flag: str) -> list[str]:
  i = list(words).index(flag)
  return [*words[:i], *words[i + 2 :]]


def _spots(data: Any) -> Iterator[tuple[Any, Any]]:
  for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
    yield data, key
    yield from _spots(data[key])


def dumps(data: Any) -> str:
  limit = sys.get_int_max_str_digits()
  sys.set_int_max_str_digits(0)
  try:
    return json.dumps(data)
  finally:
    sys.set_int_max_str_digits(limit)


def _config_types(hint: Any) -> list[type[Config]]:
  """Return the types of configs that may stand where a type is expected, in a list as well."""
  inner = [
    a for o in union_options(hint) if typing.get_origin(o) is tuple for a in typing.get_args(o)
  ]
  return [c for h in (hint, *inner) for base in config_bases(h) for c in types_of(base)]


def _options() -> dict[str, list[tuple[str, bool]]]:
  """Return, for each command, its options and whether each takes a value."""
  commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
  found: dict[str, list[tuple[str, bool]]] = {}
  for name, parser in commands.choices.items():
    actions = list(parser._actions)
    for a in parser._actions:
      if isinstance(a, argparse._SubParsersAction):
        actions += [x for p in a.choices.values() for x in p._actions]
    skip = ('--help', '--yes', '--search', '--compile')
    found[name] = [
      (a.option_strings[-1], a.nargs != 0)
      for a in actions
      if a.option_strings and a.option_strings[-1] not in skip
    ]
  return found
