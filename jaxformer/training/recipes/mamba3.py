"""Mamba-3 (Lahoti et al. 2026): the default configuration of flash-linear-attention, which nobody
has published a training of, on the amount of data of the paper's models, with the recipe of Mamba-2
at the same size."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.mamba import FINAL, LENGTH
from jaxformer.training.recipes.recipe import FIELDS, Source, derived, each, ours, recipe
from jaxformer.training.schedule import Cosine

PAPER = Source('Lahoti et al. 2026', 'arXiv:2603.15569')
CODE = Source('flash-linear-attention 0.6.0', 'fla/models/mamba3/configuration_mamba3.py')
OFFICIAL = Source('state-spaces/mamba', 'mamba_ssm/modules/mamba3.py')
AMOUNT = 100e9
BATCH = 512
RATE = 1e-3

recipe(
  'mamba3-1.3b',
  amount=AMOUNT,
  data=Text(
    corpus=PublishedCorpus(name='FineWeb-Edu'),
    tokenizer=PublishedTokenizer(
      name='Llama SentencePiece BPE', vocab_size=32000, hub='meta-llama/Llama-2-7b-hf'
    ),
    sequence_length=LENGTH,
  ),
  batch_size=BATCH,
  optimizer=AdamW(learning_rate=RATE, beta1=0.9, beta2=0.95, eps=1e-8),
  schedule=Cosine(warmup=round(0.01 * AMOUNT / (BATCH * LENGTH)), final=FINAL / RATE),
  init='embedding and head N(0, 0.02), output projections divided by sqrt(layers), dt log-uniform '
  'in [0.001, 0.1], biases of B and C 1',
  origins={
    **each(ours('as Mamba-2 1.3B'), *FIELDS),
    'tokens': PAPER.hint('', '100B tokens of FineWeb-Edu for its own sizes, from a summary'),
    'steps': derived('100B tokens / (512 x 2,048)'),
    'warmup': ours('1 % of the steps'),
    'init': OFFICIAL.hint('', 'the layer; the embedding as Mamba-2'),
    'tokenizer': CODE.hint('', 'vocab_size = 32000; which tokenizer is ours'),
  },
  note='The architecture is a default of a library: no weights or training of it are published.',
)
