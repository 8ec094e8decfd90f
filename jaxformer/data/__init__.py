"""Text as batches of tokens: sources, tokenizers, a cache on disk, and one pipeline that resumes exactly.

Start with `pipeline.py`: `open_data(DataConfig(...))` gives a `Dataset`.
"""

from jaxformer.data.pipeline import Batch, DataConfig, Dataset, Packed, Packing, RandomWindows, Stream, TrainBatches, open_data
from jaxformer.data.readers import Document
from jaxformer.data.sources import Files, HuggingFace, Mixture, Part, PydocTopics, Source, StandardLibrary
from jaxformer.data.splits import ByDocument, ByPosition, Split
from jaxformer.data.storage import cache_dir
from jaxformer.data.tokenizers import (
  BytePairs,
  Bytes,
  Characters,
  Tokenizer,
  TokenizerConfig,
  TokenizerFile,
  load_tokenizer,
  train_bpe,
)

__all__ = [
  'Batch',
  'ByDocument',
  'ByPosition',
  'BytePairs',
  'Bytes',
  'Characters',
  'DataConfig',
  'Dataset',
  'Document',
  'Files',
  'HuggingFace',
  'Mixture',
  'Packed',
  'Packing',
  'Part',
  'PydocTopics',
  'RandomWindows',
  'Source',
  'Split',
  'StandardLibrary',
  'Stream',
  'Tokenizer',
  'TokenizerConfig',
  'TokenizerFile',
  'TrainBatches',
  'cache_dir',
  'load_tokenizer',
  'open_data',
  'train_bpe',
]
