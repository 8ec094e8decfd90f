"""RWKV-4 (Peng et al. 2023), RWKV-5 and RWKV-6 (Peng et al. 2024), RWKV-7 (Peng et al. 2025)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.mamba import NEOX, PILE
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, ours, recipe
from jaxformer.training.schedule import Cosine, Exponential

RWKV4 = Source('Peng et al. 2023', 'arXiv:2305.13048')
CODE4 = Source('BlinkDL/RWKV-LM', 'RWKV-v4neo')
RWKV56 = Source('Peng et al. 2024', 'arXiv:2404.05892')
RWKV7 = Source('Peng et al. 2025', 'arXiv:2503.14456')
CODE7 = Source('BlinkDL/RWKV-LM', 'RWKV-v7/train_temp')

WORLD = PublishedTokenizer(
  name='RWKV World trie (rwkv_vocab_v20230424.txt, which is no tokenizer.json)', vocab_size=65536
)
L2WRAP = 1e-4  # `L2Wrap` of src/model.py of each version
PENALTY = 'Beside the loss, half the square of the largest logit of each token, times 1e-4.'
FROM_CODE = 'of the repository: orthogonal matrices, many zeros, embedding U(-1e-4, 1e-4)'
FROM_CODE4 = 'of the repository: orthogonal matrices, many zeros, embedding U(-rate, rate)'

# ---- RWKV-4: the Pile once, in mini-epochs of 40,320 sequences of 1,024 tokens -------------------

MINI_EPOCH = 40_320
BATCH4 = 128
ORIGINS4: Origins = {
  'tokens': RWKV4.at('appendix G', '8,043 mini-epochs of 40,320 x 1,024 tokens'),
  'batch': ours('"128 or 256", switched during the run; when, is not given'),
  **each(
    RWKV4.at('appendix G, table 3'),
    'length',
    'optimizer',
    'betas',
    'peak',
    'minimum',
    'precision',
    'decay',
  ),
  **each(CODE4.at('train.py'), 'eps', 'clip', 'dropout'),
  'steps': derived('8,043 x 40,320 / 128'),
  'warmup': RWKV4.at('appendix G', 'none: its "warm-up" is the constant phase'),
  'schedule': RWKV4.at('appendix G, table 3', 'constant, then exponential decay'),
  'init': CODE4.at('src/model.py'),
  'tokenizer': RWKV4.at('', 'padded in the preset'),
}

for name, rate, final, hold in (  # table 3: rates, and mini-epochs at the first one
  ('rwkv4-169m', 6e-4, 1e-5, 361),
  ('rwkv4-430m', 4e-4, 1e-5, 411),
  ('rwkv4-1b5', 3e-4, 1e-5, 443),
  ('rwkv4-3b', 1.5e-4, 1e-5, 451),
  ('rwkv4-7b', 1.5e-4, 1e-5, 465),
  ('rwkv4-14b', 1e-4, 7e-6, 544),
):
  recipe(
    name,
    amount=8043 * MINI_EPOCH * 1024,
    data=Text(corpus=PILE, tokenizer=NEOX, sequence_length=1024),
    batch_size=BATCH4,
    max_logit_loss=L2WRAP,
    optimizer=AdamW(
      learning_rate=rate, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, clip=1.0
    ),
    schedule=Exponential(warmup=0, hold=hold * MINI_EPOCH // BATCH4, final=final / rate),
    init=FROM_CODE4,
    precision='bfloat16',
    origins=ORIGINS4,
    note=PENALTY,
  )

# ---- RWKV-5 and RWKV-6 ---------------------------------------------------------------------------

ORIGINS56: Origins = {
  'tokens': RWKV56.at('section 6', 'World v2'),
  **each(
    RWKV56.at('appendix H, table 17'),
    'batch',
    'length',
    'optimizer',
    'betas',
    'peak',
    'minimum',
    'schedule',
    'decay',
    'precision',
  ),
  'steps': derived('1.12T tokens / (batch x length)'),
  'eps': ours('not published; the default of the code of the time'),
  'warmup': RWKV56.at('appendix H', 'from 20 % of the rate; here from 10 %'),
  'clip': CODE4.hint('train.py'),
  'dropout': ours(),
  'init': CODE4.hint('src/model.py'),
  'tokenizer': RWKV56.at(''),
}
FILE_NAMES = Source('names of the released files', 'BlinkDL on Hugging Face').hint('', 'ctx4096')
# Finch 7B and 14B are not in the paper.
CONTINUED: Origins = (
  each(ours('not published; the 7B column of table 17'), *ORIGINS56)
  | {key: ORIGINS56[key] for key in ('init', 'tokenizer')}
  | {'length': FILE_NAMES}
)
RATE_14B = ours('not published; those of RWKV-4 14B')

for name, batch, rate, final in (  # table 17: sequences of 4,096 tokens, rates
  ('rwkv5-0.4b', 192, 4e-4, 2e-5),
  ('rwkv5-1.5b', 384, 3e-4, 2e-5),
  ('rwkv5-3b', 192, 2e-4, 1.5e-5),
  ('rwkv5-7b', 576, 1.5e-4, 1e-5),
  ('rwkv6-1.6b', 384, 3e-4, 2e-5),
  ('rwkv6-3b', 192, 2e-4, 1.5e-5),
  ('rwkv6-7b', 576, 1.5e-4, 1e-5),
  ('rwkv6-14b', 576, 1e-4, 7e-6),
):
  origins, note = ORIGINS56, 'The rate of the decay parameters is twice the others.'
  if name in ('rwkv6-7b', 'rwkv6-14b'):
    origins = CONTINUED
    note = 'The published weights are not in the paper and were continued from RWKV-5 7B.'
  elif name.startswith('rwkv6'):
    note += ' The released weights (v2.1) saw 1.4T further tokens.'
  if name == 'rwkv6-14b':
    origins = origins | each(RATE_14B, 'peak', 'minimum')
  recipe(
    name,
    amount=1.12e12,
    data=Text(corpus=PublishedCorpus(name='RWKV World v2'), tokenizer=WORLD, sequence_length=4096),
    batch_size=batch,
    max_logit_loss=L2WRAP,
    optimizer=AdamW(
      learning_rate=rate, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.001, clip=1.0
    ),
    schedule=Cosine(warmup=10, final=final / rate),
    init=FROM_CODE,
    precision='bfloat16, WKV in float32',
    origins=origins,
    note=note,
  )

# ---- RWKV-7: rates and batches of the World models are not published -----------------------------

SCRIPT = 'of the run on the Pile'
ORIGINS7: Origins = {
  'tokens': RWKV7.at('table 2', 'as RWKV-7, after the tokens of the model it was converted from'),
  'batch': ours('not found; that of the script for the Pile, or of RWKV-6'),
  'length': FILE_NAMES,
  'steps': ours('tokens / (batch x length)'),
  **each(
    CODE7.hint('demo-training-run-v7-pile.sh', SCRIPT),
    'optimizer',
    'betas',
    'eps',
    'warmup',
    'schedule',
    'decay',
    'precision',
  ),
  **each(CODE7.hint('train.py'), 'clip', 'dropout'),
  'peak': ours('not found; the comment in train.py for this shape'),
  'minimum': ours('not found; as RWKV-5 and RWKV-6'),
  'init': CODE7.hint('src/model.py'),
  'tokenizer': RWKV7.at(''),
}
SMALLEST = CODE7.hint('demo-training-run-v7-pile.sh', SCRIPT)

for name, tokens, batch, rate, final, before in (
  ('rwkv7-0.1b', 1.0e12, 240, 8e-4, 3e-5, 'RWKV-5 World v1 (0.6T)'),
  ('rwkv7-0.4b', 2.0e12, 240, 4e-4, 2e-5, 'RWKV-5 World v2 (1.1T)'),
  ('rwkv7-1.5b', 3.1e12, 384, 3e-4, 2e-5, 'RWKV-6 World v2.1 (2.5T)'),
  ('rwkv7-2.9b', 3.1e12, 384, 2e-4, 1.5e-5, 'RWKV-6 World v2.1 (2.5T)'),
):
  changed: Origins = {}
  if name == 'rwkv7-0.1b':
    changed = each(SMALLEST, 'peak', 'minimum')
  elif name == 'rwkv7-2.9b':
    changed = {'peak': ours('not found; as RWKV-6 3B')}
  recipe(
    name,
    amount=tokens,
    data=Text(corpus=PublishedCorpus(name='RWKV World v3'), tokenizer=WORLD, sequence_length=4096),
    batch_size=batch,
    max_logit_loss=L2WRAP,
    optimizer=AdamW(
      learning_rate=rate, beta1=0.9, beta2=0.99, eps=1e-18, weight_decay=0.1, clip=1.0
    ),
    schedule=Cosine(warmup=10, final=final / rate),
    init=FROM_CODE,
    precision='bfloat16',
    origins=ORIGINS7 | changed,
    note=f'The published weights were converted from {before}, not trained from scratch. Only '
    'matrices decay there.',
  )
