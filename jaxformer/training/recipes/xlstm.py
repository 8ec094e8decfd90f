"""xLSTM-7B (Beck et al. 2025)."""

from jaxformer.data import PublishedCorpus, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.mamba import NEOX
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, memory, ours, recipe
from jaxformer.training.schedule import Exponential

SUMMARY = Source('a summary of Beck et al. 2025', 'arXiv:2503.13427')
TRANSFORMERS = Source('transformers', 'models/xlstm')

ORIGINS: Origins = {
  'tokens': SUMMARY.hint('abstract', '2.3T'),
  'length': SUMMARY.hint('abstract'),
  'steps': derived('2.3T tokens / (batch x length)'),
  **each(memory(), 'batch', 'optimizer', 'betas', 'peak', 'warmup', 'decay', 'clip', 'tokenizer'),
  'eps': ours('the default of PyTorch'),
  'minimum': ours('follows from the schedule'),
  'schedule': ours('from memory: exponential, then a linear cooldown, which is left out'),
  'dropout': ours('none stated'),
  'init': TRANSFORMERS.hint('modeling_xlstm.py', 'gates 0, their biases -10 and 3 to 6'),
  'precision': ours(),
}

recipe(
  'xlstm-7b',
  amount=2.3e12,
  data=Text(corpus=PublishedCorpus(name='DCLM'), tokenizer=NEOX, sequence_length=8192),
  batch_size=512,
  optimizer=AdamW(learning_rate=5e-4, beta1=0.99, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=0.5),
  schedule=Exponential(warmup=3000, final=0.1),
  init='N(0, sqrt(2 / 5 D)), residual projections N(0, 2 / (layers sqrt(fan-in)))',
  origins=ORIGINS,
  note='The preset has the vocabulary padded to 50,304, as the released weights.',
)
