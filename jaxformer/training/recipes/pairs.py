"""Encoder-decoders: Sutskever et al. 2014, Bahdanau et al. 2015, Luong et al. 2015, GNMT (Wu et al.
2016) and the Transformer (Vaswani et al. 2017).

The papers with SGD sum the loss over the words of a sentence and average over sentences; here it is
the mean per token. So their rates are multiplied, and their clipping divided, by the mean number of
words of a sentence: an approximation, since sentences differ in length."""

from jaxformer.data import BytePairs, Pairs, PublishedPairs, PublishedTokenizer
from jaxformer.data.tokenizers import TokenizerConfig
from jaxformer.training.optimizer import SGD, Adadelta, AdamThenSGD, AdamW
from jaxformer.training.recipes.recipe import Origin, Origins, Source, derived, each, ours, recipe
from jaxformer.training.schedule import Constant, Noam, StepDecay

SUTSKEVER = Source('Sutskever et al. 2014', 'arXiv:1409.3215')
BAHDANAU = Source('Bahdanau et al. 2015', 'arXiv:1409.0473')
LUONG = Source('Luong et al. 2015', 'arXiv:1508.04025')
LUONG_CODE = Source('re-implementations of Luong et al. 2015', 'public repositories')
GNMT = Source('a summary of Wu et al. 2016', 'shortscience.org, arXiv:1609.08144')
VASWANI = Source('Vaswani et al. 2017', 'arXiv:1706.03762')
T2T = Source('tensorflow/tensor2tensor', 'models/transformer.py')


def words(count: int) -> PublishedTokenizer:
  return PublishedTokenizer(name='the most frequent words, others unknown', vocab_size=count)


def of_length(
  length: int, corpus: str, target: TokenizerConfig, source: TokenizerConfig | None = None
) -> Pairs:
  """Return pairs in batches of one shape, so that every batch has as many."""
  return Pairs(
    corpus=PublishedPairs(name=corpus),
    tokenizer=target,
    source_tokenizer=source,
    source_lengths=(length,),
    target_lengths=(length,),
  )


FRENCH = 'WMT 2014 English to French'
GERMAN = 'WMT 2014 English to German'
NO_DECAY: Origins = {'decay': ours('none stated'), 'precision': ours()}


def without_momentum(origin: Origin) -> Origins:
  return each(origin.noted('SGD without momentum'), 'betas', 'eps')


# ---- Sutskever et al. ----------------------------------------------------------------------------

EPOCH = 12_000_000 // 128  # steps
WORDS = 29  # of a French sentence: 348M in 12M pairs
DETAILS = SUTSKEVER.at('section 3.4')
recipe(
  'seq2seq-lstm',
  amount=7.5 * 12e6,
  unit='pairs',
  data=of_length(50, f'12M pairs of {FRENCH}', words(80_000), words(160_000)),
  batch_size=128,
  optimizer=SGD(learning_rate=0.7 * WORDS, weight_decay=0.0, clip=5 / WORDS),
  schedule=StepDecay(warmup=0, hold=5 * EPOCH, every=EPOCH // 2, decay=0.5),
  init='U(-0.08, 0.08)',
  remat='none',
  origins=NO_DECAY
  | without_momentum(DETAILS)
  | each(DETAILS, 'batch', 'optimizer', 'warmup', 'init')
  | {
    'tokens': derived('7.5 epochs of 12M pairs, 348M French words'),
    'length': ours('the paper does not cut; 50 is the context of the preset'),
    'steps': derived('7.5 x 12M / 128'),
    'peak': derived(f'0.7 x {WORDS}: the loss here is a mean over the words of a sentence'),
    'minimum': derived('peak / 2^5'),
    'schedule': DETAILS.noted('constant for 5 epochs, then halved every half epoch'),
    'clip': derived(f'5 / {WORDS} for the same reason'),
    'dropout': ours('none stated'),
    'tokenizer': SUTSKEVER.at('section 3.1', '160,000 source words, 80,000 target words'),
  },
  note='Batches of the paper hold sentences of about one length; here they are padded to 50.',
)

# ---- Bahdanau et al. -----------------------------------------------------------------------------

TRAINING = BAHDANAU.at('appendix B.2')
recipe(
  'rnnsearch',
  amount=667_000 * 80,
  unit='pairs',
  data=of_length(50, FRENCH, words(30_000), words(30_000)),
  batch_size=80,
  steps=667_000,
  optimizer=Adadelta(learning_rate=1.0, rho=0.95, eps=1e-6, weight_decay=0.0, clip=1.0),
  schedule=Constant(warmup=0),
  init='recurrent matrices orthogonal, attention N(0, 0.001), others N(0, 0.01), biases 0',
  remat='none',
  origins=NO_DECAY
  | each(TRAINING, 'batch', 'optimizer', 'betas', 'eps', 'warmup', 'schedule')
  | {
    'tokens': BAHDANAU.at('table 2', 'updates x 80 pairs, of the longest run (RNNsearch-50*)'),
    'length': BAHDANAU.at('section 4.2'),
    'steps': BAHDANAU.at('table 2'),
    **each(TRAINING.noted('Adadelta has no learning rate'), 'peak', 'minimum'),
    'clip': TRAINING.noted('whether of a sum or of a mean over words, is not stated'),
    'dropout': ours('none stated'),
    'init': BAHDANAU.at('appendix B.1'),
    'tokenizer': BAHDANAU.at('section 4.1', '30,000 words on each side'),
  },
)

# ---- Luong et al. --------------------------------------------------------------------------------

EPOCH, WORDS = 4_500_000 / 128, 24  # 110M German words in 4.5M pairs
DETAILS = LUONG.at('section 4.1')
recipe(
  'luong',
  amount=12 * 4.5e6,
  unit='pairs',
  data=of_length(50, GERMAN, words(50_000), words(50_000)),
  batch_size=128,
  optimizer=SGD(learning_rate=1.0 * WORDS, weight_decay=0.0, clip=5 / WORDS),
  schedule=StepDecay(warmup=0, hold=round(8 * EPOCH), every=round(EPOCH), decay=0.5),
  dropout=0.2,
  init='U(-0.1, 0.1)',
  remat='none',
  origins=NO_DECAY
  | without_momentum(DETAILS)
  | each(DETAILS, 'batch', 'length', 'optimizer', 'warmup')
  | {
    'tokens': derived('12 epochs of 4.5M pairs'),
    'steps': derived('12 x 4.5M / 128'),
    'peak': derived(f'1.0 x {WORDS}: the loss here is a mean over the words of a sentence'),
    'minimum': derived('peak / 2^4'),
    'schedule': DETAILS.noted('with dropout: constant for 8 of 12 epochs, then halved each epoch'),
    'clip': derived(f'5 / {WORDS} for the same reason'),
    'dropout': LUONG_CODE.hint(''),
    'init': LUONG_CODE.hint(''),
    'tokenizer': LUONG.at('section 4.1', '50,000 words on each side'),
  },
)

# ---- GNMT ----------------------------------------------------------------------------------------

SUMMARY = GNMT.hint('')
recipe(
  'gnmt',
  amount=2_000_000 * 128,
  unit='pairs',
  data=of_length(50, f'36M pairs of {FRENCH}', BytePairs(vocab_size=32_000)),
  batch_size=128,
  steps=2_000_000,
  optimizer=AdamThenSGD(
    learning_rate=0.5, adam_learning_rate=2e-4, adam_steps=60_000, weight_decay=0.0, clip=5.0
  ),
  schedule=StepDecay(warmup=0, hold=1_200_000, every=200_000, decay=0.5),
  dropout=0.2,
  init='U(-0.04, 0.04)',
  remat='none',
  origins={
    'tokens': derived('2.0M steps of 128 pairs, 7.1 epochs of 36M'),
    'length': ours('not found; tensorflow/nmt cuts at 50'),
    'steps': GNMT.hint('', '1.2M + 4 x 200,000'),
    **each(SUMMARY, 'batch', 'optimizer', 'init'),
    **each(ours('not found; the defaults of Kingma and Ba 2015'), 'betas', 'eps'),
    'peak': GNMT.hint('', 'Adam 2e-4, SGD 0.5; whether of a sum or a mean over words, not stated'),
    'minimum': derived('0.5 / 2^4'),
    'warmup': GNMT.hint('', 'none'),
    'schedule': GNMT.hint('', 'constant for 1.2M steps, then halved every 200,000'),
    'decay': ours('none stated'),
    'clip': GNMT.hint('', 'in the unit of the peak'),
    'dropout': GNMT.hint('', 'of English to French; 0.3 to German'),
    'precision': ours('float32 there, from memory'),
    'tokenizer': ours('shared wordpieces of 32,000, not released; byte pairs on both sides'),
  },
)

# ---- the Transformer -----------------------------------------------------------------------------

# "Approximately 25000" target tokens, as 96 rows of the last bucket or twice as many of half the
# length, which 8 to 32 devices divide.
ROWS = 96
for name, width, steps, dropout, averaged in (
  ('transformer-base', 512, 100_000, 0.1, 5),
  ('transformer-big', 1024, 300_000, 0.3, 20),
):
  recipe(
    name,
    amount=ROWS * 256 * steps,
    data=Pairs(corpus=PublishedPairs(name=GERMAN), tokenizer=BytePairs(vocab_size=37_000)),
    batch_size=ROWS,
    steps=steps,
    optimizer=AdamW(
      learning_rate=1.0, beta1=0.9, beta2=0.98, eps=1e-9, weight_decay=0.0, clip=None
    ),
    schedule=Noam(width=width, warmup=4000),
    label_smoothing=0.1,
    dropout=dropout,
    init='Glorot uniform, embedding N(0, 1 / width)',
    remat='none',
    origins={
      'tokens': derived(f'{steps:,} steps; target tokens, padding included'),
      'batch': Origin(
        'derived',
        VASWANI.at('section 5.1').source,
        '"approximately 25000" source and target tokens',
      ),
      'length': T2T.hint('', 'up to 256'),
      'steps': VASWANI.at('section 5.2'),
      **each(VASWANI.at('section 5.3'), 'optimizer', 'betas', 'eps', 'warmup', 'schedule'),
      'peak': derived('(width x 4,000)^-0.5'),
      'minimum': derived('(width x steps)^-0.5'),
      'decay': T2T.at('', 'transformer_base_v1'),
      'clip': T2T.at('', 'transformer_base_v1'),
      'dropout': VASWANI.at('section 5.4 and table 3'),
      'init': T2T.hint('', 'not in the paper; version 1.15.7: `uniform_unit_scaling`, gain 1'),
      'precision': ours(),
      'tokenizer': ours('a shared BPE of about 37,000, not released; byte pairs on both sides'),
    },
    note=f'Label smoothing 0.1 (section 5.4). The paper averages the last {averaged} checkpoints.',
  )
