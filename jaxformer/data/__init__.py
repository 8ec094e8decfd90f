"""What models are trained on: text (sources, tokenizers, a cache on disk), pairs of texts, and
tasks, in batches that resume exactly.

Start with `dataset.py`: `open_data(DataConfig(...))` or `open_data(Digits())` gives a `Dataset`.
"""

from jaxformer.data.dataset import Dataset, DatasetConfig, HeldOutPair, TrainBatches, open_data
from jaxformer.data.pair_tokenizer import PairTokenizer, source_of
from jaxformer.data.pairs import PairDataset, Pairs
from jaxformer.data.parallel import JsonLines, Pair, PairCorpus, Parquet, Tsv, TwoFiles
from jaxformer.data.pipeline import DataConfig, Packed, Packing, RandomWindows, Stream, TextDataset
from jaxformer.data.readers import Document
from jaxformer.data.sources import (
  Files,
  HuggingFace,
  Mixture,
  Part,
  PydocTopics,
  Source,
  StandardLibrary,
)
from jaxformer.data.splits import ByDocument, ByPosition, Split
from jaxformer.data.storage import cache_dir
from jaxformer.data.tasks.copying import MadSelectiveCopying, SelectiveCopying
from jaxformer.data.tasks.dates import Dates
from jaxformer.data.tasks.digits import Digits
from jaxformer.data.tasks.listops import ListOps
from jaxformer.data.tasks.mad import (
  Compression,
  FuzzyInContextRecall,
  InContextRecall,
  Memorization,
  NoisyInContextRecall,
  mad_suite,
)
from jaxformer.data.tasks.mqar import MultiQueryRecall
from jaxformer.data.tasks.pair_task import PairTask
from jaxformer.data.tasks.recall import AssociativeRecall, InductionHead
from jaxformer.data.tasks.task import TaskConfig
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
from jaxformer.task_type import IGNORE, Batch

__all__ = [
  'IGNORE',
  'AssociativeRecall',
  'Batch',
  'ByDocument',
  'ByPosition',
  'BytePairs',
  'Bytes',
  'Characters',
  'Compression',
  'DataConfig',
  'Dataset',
  'DatasetConfig',
  'Dates',
  'Digits',
  'Document',
  'Files',
  'FuzzyInContextRecall',
  'HeldOutPair',
  'HuggingFace',
  'InContextRecall',
  'InductionHead',
  'JsonLines',
  'ListOps',
  'MadSelectiveCopying',
  'Memorization',
  'Mixture',
  'MultiQueryRecall',
  'NoisyInContextRecall',
  'Packed',
  'Packing',
  'Pair',
  'PairCorpus',
  'PairDataset',
  'PairTask',
  'PairTokenizer',
  'Pairs',
  'Parquet',
  'Part',
  'PydocTopics',
  'RandomWindows',
  'SelectiveCopying',
  'Source',
  'Split',
  'StandardLibrary',
  'Stream',
  'TaskConfig',
  'TextDataset',
  'Tokenizer',
  'TokenizerConfig',
  'TokenizerFile',
  'TrainBatches',
  'Tsv',
  'TwoFiles',
  'cache_dir',
  'load_tokenizer',
  'mad_suite',
  'open_data',
  'source_of',
  'train_bpe',
]
