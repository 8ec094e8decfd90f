"""Mamba (Gu and Dao 2023) and Mamba-2 (Dao and Gu 2024): the recipe of GPT-3 at the same size, with
five times its rate."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.gpt import GPT3, WARMUP
from jaxformer.training.recipes.recipe import Origin, Origins, Source, derived, each, ours, recipe
from jaxformer.training.schedule import Cosine

MAMBA = Source('Gu and Dao 2023', 'arXiv:2312.00752')
MAMBA2 = Source('Dao and Gu 2024', 'arXiv:2405.21060')
CODE = Source('state-spaces/mamba', 'repository')
LENGTH = 2048
FINAL = 1e-5  # the learning rate at the end
PILE = PublishedCorpus(name='the Pile')
NEOX = PublishedTokenizer(name='GPT-NeoX BPE', vocab_size=50277, hub='EleutherAI/gpt-neox-20b')


def origins(paper: Source, recipe_at: str, table: str, length: Origin, batch: Origin) -> Origins:
  """Return the origins of the runs on the Pile of one of the papers."""
  return {
    'tokens': CODE.at('README.md'),
    'batch': batch,
    'length': length,
    'steps': derived('300B tokens / (batch x length)'),
    **each(
      paper.at(recipe_at, 'the "improved recipe"'),
      'optimizer',
      'betas',
      'minimum',
      'schedule',
      'decay',
      'clip',
      'dropout',
    ),
    'eps': ours('as GPT-3, and the default of PyTorch'),
    'peak': Origin('derived', GPT3.at('table 2.1').source, f'5 x GPT-3 of this size ({table})'),
    'warmup': ours('375M tokens, as GPT-3; the paper: "linear", without a length for text'),
    'init': CODE.hint('', 'embedding 0.02, output projection divided by sqrt(layers)'),
    'precision': CODE.at(
      'README.md', 'AMP with float32 parameters; which half precision is not given'
    ),
    'tokenizer': CODE.at('benchmarks', 'padded in the preset'),
  }


MAMBA_LENGTH = MAMBA.at('section 4.2.2')
MAMBA2_LENGTH = ours('as Mamba; the paper does not state it for these runs')
BATCH_27B = ours('"1M" tokens, as GPT-3 2.7B; the text names 1.3B only')


def batch_of(paper: Source, table: str, words: str) -> Origin:
  return paper.at(table, f'"{words}" tokens; the number of sequences is derived')


for paper, at, table, length, rows in (
  (
    MAMBA,
    'appendix E.2.1',
    'table 12',
    MAMBA_LENGTH,
    ('mamba-130m', 'mamba-370m', 'mamba-790m', 'mamba-1.4b', 'mamba-2.8b'),
  ),
  (
    MAMBA2,
    'appendix D.2',
    'table 9',
    MAMBA2_LENGTH,
    ('mamba2-130m', 'mamba2-370m', 'mamba2-780m', 'mamba2-1.3b', 'mamba2-2.7b'),
  ),
):
  for name, batch, rate in zip(  # sequences, and the rate of GPT-3
    rows, (256, 256, 256, 512, 512), (6.0e-4, 3.0e-4, 2.5e-4, 2.0e-4, 1.6e-4), strict=True
  ):
    words = '0.5M' if batch == 256 else '1M'
    unnamed = name == 'mamba-2.8b'
    recipe(
      name,
      amount=300e9,
      data=Text(corpus=PILE, tokenizer=NEOX, sequence_length=LENGTH),
      batch_size=batch,
      optimizer=AdamW(learning_rate=5 * rate, beta1=0.9, beta2=0.95, eps=1e-8),
      schedule=Cosine(warmup=round(WARMUP / (batch * LENGTH)), final=FINAL / (5 * rate)),
      init='embedding N(0, 0.02), output projections divided by sqrt(layers), dt log-uniform in '
      '[0.001, 0.1]',
      origins=origins(
        paper, at, table, length, BATCH_27B if unnamed else batch_of(paper, table, words)
      ),
    )
