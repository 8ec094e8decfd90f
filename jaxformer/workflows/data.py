"""What the splits of a text or a parallel corpus hold, and tokenizers trained on them."""

import os

from jaxformer.config import InputError
from jaxformer.data import DataSection, DatasetConfig, open_data, train_bpe
from jaxformer.overrides import override
from jaxformer.workflows.overrides import Overrides, pairs_of
from jaxformer.workflows.progress import Log, log_progress
from jaxformer.workflows.tables import Answer


def inspect_data(*, overrides: Overrides = (), log: Log = log_progress) -> Answer:
  """Return what the splits of a text or parallel corpus hold. Overrides are of `data`."""
  dataset = open_data(_data(overrides), log=log)
  return Answer(dataset.manifest, dataset.info())


def train_tokenizer(
  out: str | os.PathLike[str],
  *,
  vocab_size: int = 4096,
  overrides: Overrides = (),
  log: Log = log_progress,
) -> int:
  """Train byte pairs (BPE) on the training text and write them to `out`, a tokenizer.json. Return
  the size of the vocabulary. Overrides are of `data`."""
  size = train_bpe(_data(overrides).training_texts(), vocab_size, os.fspath(out))
  log(f'{out}: {size} tokens')
  return size


def _data(overrides: Overrides) -> DatasetConfig:
  """Return the text or the pairs that overrides of `data` describe."""
  pairs = pairs_of(overrides)
  for path, _ in pairs:
    if path.partition('.')[0] in ('model', 'optimizer', 'schedule', 'training', 'mesh', 'run'):
      raise InputError(f'--{path}: only overrides of data are accepted')
  data = override(DataSection(), pairs).data
  data.training_texts()  # an error for a task
  return data
