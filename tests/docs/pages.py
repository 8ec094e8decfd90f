"""Blocks of README and docs, and how their commands run in a test: made small. In place of a study
of the package, which trains for long, the page's own small one runs."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'(?:<!-- ([\w ]+) -->\n)?^```(\w*)\n(.*?)^```$', re.M | re.S)

# Commands that set up a machine. `.ci/run` runs the lines of the README and the checks.
SET_UP = (
  'pip install',
  'python -m venv',
  'python3 -m venv',
  'source ',
  'pytest',
  'ruff',
  'ty ',
  '.ci/run',
)


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block: its page, its language, its marker (`<!-- ... -->` above it) and its text."""

  page: str
  language: str
  marker: str
  text: str

  @property
  def id(self) -> str:
    return f'{self.page}: {self.text.strip().splitlines()[0][:60]}'

  @property
  def commands(self) -> list[str]:
    """Lines of a shell block; of a session only what follows the prompt."""
    text = self.text.replace('\\\n', ' ')
    lines = [line.partition('  #')[0].strip() for line in text.splitlines()]
    session = any(line.startswith('$ ') for line in lines)
    return [
      line.removeprefix('$ ') for line in lines if line and (line.startswith('$ ') or not session)
    ]


def blocks(page: pathlib.Path) -> list[Block]:
  found = BLOCK.findall(page.read_text())
  return [Block(page.name, language, marker, text) for marker, language, text in found]


# What a command gets in addition, so that it runs for seconds: the first pattern that fits.
TRAIN = (
  '--training.steps 2 --training.batch-size 8 --training.eval-batches 1 --training.trackers none'
)
TEXT = '--data.corpus PydocTopics --data.sequence-length 32'
SMALLER = (
  (r'train .*(--show|--help)', ''),
  (r'train (transformer|rnnsearch)', TRAIN),
  (r'train (s4d-digits|.*mad_tasks)', TRAIN),
  (r'train .*(--data\.corpus|--data )', f'{TRAIN} --data.sequence-length 32'),
  (r'train ', f'{TRAIN} {TEXT}'),
  (r'eval transformer', '--batches 1 --translations 2'),
  (r'eval ', '--batches 1'),
  (r'generate ', '--max-new-tokens 4'),
  (r'compare (scaling|standard)', '--show'),
  (
    r'(compare|report) ',
    '--study.tokens 512 --study.batch-size 4 --study.eval-batches 1 --study.target 1e5',
  ),
)


def shortened(command: str) -> list[str]:
  """The words of a command, with settings that make it short in place of its own."""
  command = command.replace('compare quickstart', 'compare small.py')
  command = command.replace('report quickstart', 'report small.py')
  words = shlex.split(command)
  extra = next((e for p, e in SMALLER if re.search(rf'jaxformer {p}', command)), '').split()
  replaced = {w for w in extra if w.startswith('--')}
  kept, i = [], 0
  while i < len(words):
    if words[i] in replaced and words[i] not in ('--data.corpus', '--show'):
      i += 2
    else:
      kept.append(words[i])
      i += 1
  if '--data.corpus' in kept and '--data.corpus' in extra:
    i = extra.index('--data.corpus')
    extra = extra[:i] + extra[i + 2 :]
  return kept + extra
