"""What the splits of a text or a parallel corpus hold, and tokenizers trained on them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxformer.config import InputError
from jaxformer.data import DataSection, DatasetConfig, open_data, train_bpe
from jaxformer.overrides import override
from jaxformer.workflows.progress import Log
from jaxformer.workflows.sizes import Pairs


@dataclasses.dataclass(frozen=True)
class DataReport:
  """Contents of the splits of a data set, as JSON data and as lines."""

  facts: dict[str, Any]
  info: list[str]

  def json(self) -> dict[str, Any]:
    return self.facts

  def lines(self) -> list[str]:
    return self.info


def section(overrides: Pairs) -> DatasetConfig:
  """Return the text or the pairs that overrides of `data` describe."""
  for path, _ in overrides:
    if path.partition('.')[0] in ('model', 'optimizer', 'schedule', 'training', 'mesh', 'run'):
      raise InputError(f'--{path}: only overrides of data are accepted')
  data = override(DataSection(), overrides).data
  data.training_texts()  # an error for a task
  return data


def data_report(overrides: Pairs, log: Log) -> DataReport:
  """Return the contents of the splits; see `jaxformer.inspect_data`."""
  dataset = open_data(section(overrides), log=log)
  return DataReport(dataset.manifest | dataset.baselines(), dataset.info())


def write_tokenizer(overrides: Pairs, vocab_size: int, out: str, log: Log) -> int:
  """Train byte pairs on the training text; see `jaxformer.train_tokenizer`."""
  size = train_bpe(section(overrides).training_texts(), vocab_size, out)
  log(f'{out}: {size} tokens')
  return size
