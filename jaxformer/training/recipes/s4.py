"""S4D classifiers, by files of state-spaces/s4 for ListOps and for a first try on images."""

from jaxformer.data import Digits, ListOps
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, memory, ours, recipe
from jaxformer.training.schedule import Cosine

LISTOPS = Source('state-spaces/s4', 'configs/experiment/lra/s4-listops.yaml')
EXAMPLE = Source('state-spaces/s4', 'example.py')
DEFAULT = 'the default of PyTorch; the file sets none'
FILE = LISTOPS.at('')

LISTOPS_ORIGINS: Origins = {
  'tokens': derived('40 epochs of 96,000 sequences'),
  **each(
    FILE, 'batch', 'length', 'steps', 'optimizer', 'warmup', 'schedule', 'dropout', 'tokenizer'
  ),
  **each(LISTOPS.hint('', DEFAULT), 'betas', 'eps'),
  'peak': FILE.noted('A and B at 0.001'),
  'minimum': LISTOPS.hint(''),
  'decay': FILE.noted('none of state-space parameters'),
  'clip': memory('none'),
  'init': FILE,
  'precision': ours('float32 there, from memory'),
}
recipe(
  's4d-listops',
  amount=40 * 96_000,
  unit='sequences',
  data=ListOps(),
  batch_size=32,
  steps=120_000,
  optimizer=AdamW(
    learning_rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05, clip=None
  ),
  schedule=Cosine(warmup=12_000, final=0.0),
  init='A and B of HiPPO-LegS, dt log-uniform in [0.001, 0.1], C complex normal',
  remat='none',
  origins=LISTOPS_ORIGINS,
  note='The file is that of S4, with BatchNorm after each layer; the preset is S4D with LayerNorm '
  'before it.',
)

CIFAR = 'of CIFAR-10, in the same file; no paper trained these images'
recipe(
  's4d-digits',
  amount=100 * 1438,
  unit='sequences',
  data=Digits(),
  batch_size=64,
  optimizer=AdamW(
    learning_rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip=None
  ),
  schedule=Cosine(warmup=0, final=0.0),
  dropout=0.1,
  init='dt log-uniform in [0.001, 0.1], C complex normal',
  remat='none',
  origins={
    'tokens': ours(f'100 epochs of 1,438 images; the epochs are those {CIFAR}'),
    'steps': ours('100 x 1,438 / 64'),
    **each(
      ours(f'that {CIFAR}'),
      'batch',
      'peak',
      'minimum',
      'warmup',
      'schedule',
      'decay',
      'clip',
      'precision',
    ),
    'length': EXAMPLE.at('', 'pixel by pixel'),
    'optimizer': EXAMPLE.at(''),
    **each(EXAMPLE.hint('', DEFAULT), 'betas', 'eps'),
    'dropout': EXAMPLE.at('', 'of whole channels, twice per layer'),
    'init': EXAMPLE.hint(''),
    'tokenizer': EXAMPLE.at('', 'none: pixels'),
  },
  note='LayerNorm follows each layer there, and precedes it in the preset.',
)
