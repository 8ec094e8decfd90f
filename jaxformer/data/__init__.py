"""What models are trained on: text, pairs of texts, and tasks, in batches that resume exactly.

Start with `dataset.py`: `open_data(Text(...))` or `open_data(Digits())` gives a `Dataset`.
"""

from jaxformer.data.cache import training_texts
from jaxformer.data.cache_folder import cache_dir
from jaxformer.data.corpora import Corpus, Files, Mixture, PydocTopics, Row, StandardLibrary
from jaxformer.data.dataset import Dataset, DatasetConfig, HeldOutPair, open_data
from jaxformer.data.hugging_face import HuggingFace
from jaxformer.data.pairs import Pairs
from jaxformer.data.parallel_corpora import Records, Tsv, TwoFiles
from jaxformer.data.published import PublishedCorpus, PublishedPairs, PublishedTokenizer
from jaxformer.data.splits import ByDocument, ByPosition, Split
from jaxformer.data.tasks.copying import SelectiveCopying
from jaxformer.data.tasks.dates import Dates
from jaxformer.data.tasks.digits import Digits
from jaxformer.data.tasks.listops import ListOps
from jaxformer.data.tasks.mqar import MultiQueryRecall
from jaxformer.data.tasks.rebinding import RebindingRecall
from jaxformer.data.tasks.recall import AssociativeRecall, InductionHead
from jaxformer.data.tasks.task import GeneratedTask, PairTask, TaskConfig
from jaxformer.data.text import DataSection, Text
from jaxformer.data.tokenizer_file import BytePairs, TokenizerFile, load_tokenizer, train_bpe
from jaxformer.data.tokenizers import Bytes, Characters, Tokenizer, TokenizerConfig
from jaxformer.task_type import Batch

__all__ = [
  'AssociativeRecall',
  'Batch',
  'ByDocument',
  'ByPosition',
  'BytePairs',
  'Bytes',
  'Characters',
  'Corpus',
  'DataSection',
  'Dataset',
  'DatasetConfig',
  'Dates',
  'Digits',
  'Files',
  'GeneratedTask',
  'HeldOutPair',
  'HuggingFace',
  'InductionHead',
  'ListOps',
  'Mixture',
  'MultiQueryRecall',
  'PairTask',
  'Pairs',
  'PublishedCorpus',
  'PublishedPairs',
  'PublishedTokenizer',
  'PydocTopics',
  'RebindingRecall',
  'Records',
  'Row',
  'SelectiveCopying',
  'Split',
  'StandardLibrary',
  'TaskConfig',
  'Text',
  'Tokenizer',
  'TokenizerConfig',
  'TokenizerFile',
  'Tsv',
  'TwoFiles',
  'cache_dir',
  'load_tokenizer',
  'open_data',
  'train_bpe',
  'training_texts',
]
