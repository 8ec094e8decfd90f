"""The command line as a user starts it, and in this process."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]

# A model that trains in a second. In this process there are 8 devices, which 8 sequences suit.
SMALL = [
  *('--model.repeats', '1', '--model.width', '64', '--model.heads', '4'),
  *('--training.steps', '4', '--training.batch-size', '8', '--training.eval-batches', '1'),
  *(
    '--training.log-every',
    '1',
    '--training.trackers',
    'none',
    '--data.corpus',
    'PydocTopics',
    '--data.sequence-length',
    '32',
  ),
]


def last(words) -> list[str]:
  """The words of a command in which a setting was given again: the last one stays, since the
  command line refuses two values for one field."""
  words, kept = list(map(str, words)), []
  given = [i for i, w in enumerate(words) if w.startswith('--') and '.' in w]
  again = {i for i in given if any(words[j] == words[i] for j in given if j > i)}
  for i, word in enumerate(words):
    if i not in again and i - 1 not in again:
      kept.append(word)
  return kept


def environment(cache: Path) -> dict[str, str]:
  return os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAXFORMER_CACHE': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
  }


def start(
  words, folder: Path, cache: Path, text: str = '', program=('-m', 'jaxformer')
) -> subprocess.CompletedProcess:
  """`jaxformer WORDS` in a process of its own."""
  command, env = [sys.executable, *program, *last(words)], environment(cache)
  return subprocess.run(
    command,
    cwd=folder,
    env=env,
    input=text,
    capture_output=True,
    text=True,
    check=False,
    timeout=180,
  )


def contents(folder: Path) -> dict[str, str]:
  """Every file and folder below, with a hash of what it holds."""
  return {
    str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
    if p.is_file()
    else 'folder'
    for p in folder.rglob('*')
  }
