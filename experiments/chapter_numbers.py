"""The numbers of a textbook chapter on model size, each computed again.

Question: which of the chapter's figures follow from the models and formulas that it names, and where one does not, why?

    python experiments/chapter_numbers.py

Needs nothing but the package: no array is made. The chapter is the part on model architecture and size of a book on applications of
foundation models. 1 GB is 1e9 bytes, 1 GiB is 2^30.

Cost: five seconds.
Result:

    model          blocks  width  feed-forward  vocabulary  context  parameters
    llama2-7b          32  4,096        11,008      32,000    4,096   6,738,415,616
    llama2-13b         40  5,120        13,824      32,000    4,096  13,015,864,320
    llama2-70b         80  8,192        28,672      32,000    4,096  68,976,648,192
    llama3-8b          32  4,096        14,336     128,256    8,192   8,030,261,248
    llama3-70b         80  8,192        28,672     128,256    8,192  70,553,706,496
    llama3.1-405b     126 16,384        53,248     128,256  131,072 405,853,388,800
      llama2-70b: the chapter prints a feed-forward width of 22,016; the released model has 28,672, and only with that has it its
      parameters (with 22,016 it would have 55,890,419,712).
      llama3-8b: the chapter calls it 7B, and gives 128K context to all of Llama 3, which version 3.1 brought.

    7B parameters at 2 bytes: 14 GB (llama2-7b, 6,738,415,616: 13.48 GB)
    llama2-7b: 32 heads of 128 from a width of 4,096
    context 4K -> 128K changes 0 parameters and the state from 2 to 64 GiB

    GPT-3: 6 x 174,604,259,328 x 300B = 3.14e+23 FLOPs (published 3.14e+23)
    one H100 at 6e+13 FLOP/s: 5.2e+18 FLOPs a day; 256 of them: 236.61 days, 236 whole ones
    256 H100 x 24 h x 236 days x $2 / 0.7 = $4,142,811.43, the figure that the chapter prints
      its printed formula has 256 for the days, the number of GPUs again: that would be $4,493,897.14
      days at 50% (doing okay) 473, at 70% (great) 338; in bf16 at 989 TFLOP/s and 40% 35.9

    model             parameters   tokens  tokens / parameter  6 N D FLOPs  PFLOP/s-days
    LaMDA                   137B     168B                 1.2     1.38e+23         1,598
    GPT-3                   175B     300B                 1.7     3.15e+23         3,646
    Jurassic-1              178B     300B                 1.7      3.2e+23         3,708
    Gopher                  280B     300B                 1.1     5.04e+23         5,833
    MT-NLG                  530B     270B                 0.5     8.59e+23         9,938
    Chinchilla               70B   1,400B                20.0     5.88e+23         6,806
    Llama 1 65B              65B   1,400B                21.5     5.46e+23         6,319
    Llama 2 70B              70B   2,000B                28.6      8.4e+23         9,722
    Llama 3.1 405B          405B  15,000B                37.0     3.65e+25       421,875
    1 FLOP/s-day = 86,400 FLOPs; training tokens = tokens of the data set x epochs (1T tokens, 2 epochs: 2e+12)

    mixtral-8x7b: 46,702,792,704 parameters, 12,879,925,248 active; 93.4 GB at 2 bytes, 46.7 GB at 1 byte
    jamba-v0.1: 51,570,323,328 parameters, 12,110,311,296 active; 103.1 GB at 2 bytes, 51.6 GB at 1 byte
    state of one sequence of 262,144 tokens at 2 bytes:
      jamba-v0.1       4.0 GiB
      mixtral-8x7b    32.0 GiB
      llama2-7b      128.0 GiB
      llama2-70b      80.0 GiB
      Jamba on one 80 GB GPU: at 1 byte a weight 24.1 GB are left beside a cache of 256K
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from jaxformer.hardware import CHIPS
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.cost import Cost, cost

DAY = 86_400
GIB = 2**30
GPT3_FLOPS = 3.14e23  # Brown et al. 2020, table D.1
H100_FLOPS = 6e13  # the chapter's figure for FP32 (that of the NVL card)
LLAMAS = ('llama2-7b', 'llama2-13b', 'llama2-70b', 'llama3-8b', 'llama3-70b', 'llama3.1-405b')
# parameters, training tokens, as published (Hoffmann et al. 2022, table 1; Touvron et al. 2023;
# Llama team 2024)
TRAINED = (
  ('LaMDA', 137e9, 168e9),
  ('GPT-3', 175e9, 300e9),
  ('Jurassic-1', 178e9, 300e9),
  ('Gopher', 280e9, 300e9),
  ('MT-NLG', 530e9, 270e9),
  ('Chinchilla', 70e9, 1.4e12),
  ('Llama 1 65B', 65e9, 1.4e12),
  ('Llama 2 70B', 70e9, 2e12),
  ('Llama 3.1 405B', 405e9, 15e12),
)


def of(name: str) -> Cost:
  """The cost of a preset at its own context."""
  return cost(PRESETS[name].model)


def shape(name: str) -> tuple[int, int, int, int, int]:
  """Blocks, width, feed-forward width, vocabulary and context of a Llama."""
  model = PRESETS[name].model
  hidden = next(layer.hidden for layer, _ in model.layers() if hasattr(layer, 'hidden'))
  return (
    sum(g.repeats * len(g.pattern) for g in model.stack),
    model.width,
    hidden,
    model.vocab_size,
    model.context_length,
  )


def gpt3_days(gpus: int = 256) -> float:
  """Days of GPT-3's training at the full rate of so many H100s."""
  return GPT3_FLOPS / (gpus * H100_FLOPS * DAY)


def gpt3_price(
  days: float, gpus: int = 256, an_hour: float = 2.0, utilization: float = 0.7
) -> float:
  """USD for so many days at full rate, which at a utilization take 1 / utilization as long."""
  return gpus * 24 * days * an_hour / utilization


def cache_bytes(name: str, context: int = 2**18) -> int:
  """Keys, values and recurrent states of one sequence at 2 bytes a number."""
  return 2 * (PRESETS[name].model.state_size(context) or 0)


def lines() -> list[str]:
  """The page."""
  page = ['model          blocks  width  feed-forward  vocabulary  context  parameters']
  for name in LLAMAS:
    blocks, width, hidden, vocabulary, context = shape(name)
    page.append(
      f'{name:14} {blocks:>6} {width:>6,} {hidden:>13,} {vocabulary:>11,} {context:>8,} '
      f'{of(name).params:>15,}'
    )
  model = PRESETS['llama2-70b'].model
  less = 3 * 80 * model.width * (28_672 - 22_016)
  page += [
    '  llama2-70b: the chapter prints a feed-forward width of 22,016; the released model has '
    '28,672, and only with that has it its',
    f'  parameters (with 22,016 it would have {of("llama2-70b").params - less:,}).',
    '  llama3-8b: the chapter calls it 7B, and gives 128K context to all of Llama 3, which version '
    '3.1 brought.',
    '',
  ]
  seven, longer = of('llama2-7b'), cost(PRESETS['llama2-7b'].model.replace(context_length=131072))
  attention = next(
    layer for layer, _ in PRESETS['llama2-7b'].model.layers() if hasattr(layer, 'heads')
  )
  page += [
    f'7B parameters at 2 bytes: {7e9 * 2 / 1e9:.0f} GB (llama2-7b, {seven.params:,}: '
    f'{seven.weight_bytes / 1e9:.2f} GB)',
    f'llama2-7b: {attention.heads} heads of {attention.head_size(4096)} from a width of 4,096',
    f'context 4K -> 128K changes {longer.params - seven.params} parameters '
    f'and the state from {cache_bytes("llama2-7b", 4096) / GIB:.0f} to '
    f'{cache_bytes("llama2-7b", 131072) / GIB:.0f} GiB',
    '',
  ]
  gpt3 = of('gpt3-175b')
  days, whole = gpt3_days(), int(gpt3_days())
  page += [
    f'GPT-3: 6 x {gpt3.params:,} x 300B = {6 * gpt3.params * 300e9:.3g} FLOPs (published '
    f'{GPT3_FLOPS:.3g})',
    f'one H100 at {H100_FLOPS:.0e} FLOP/s: {H100_FLOPS * DAY:.2g} FLOPs a day; 256 of them: '
    f'{days:.2f} days, {whole} whole ones',
    f'256 H100 x 24 h x {whole} days x $2 / 0.7 = ${gpt3_price(whole):,.2f}, the figure that the '
    'chapter prints',
    '  its printed formula has 256 for the days, the number of GPUs again: that would be '
    f'${gpt3_price(256):,.2f}',
    f'  days at 50% (doing okay) {days / 0.5:.0f}, at 70% (great) {days / 0.7:.0f}; '
    f'in bf16 at {CHIPS["h100"].peak() / 1e12:.0f} TFLOP/s and 40% '
    f'{GPT3_FLOPS / (256 * CHIPS["h100"].peak() * DAY * 0.4):.1f}',
    '',
    'model             parameters   tokens  tokens / parameter  6 N D FLOPs  PFLOP/s-days',
  ]
  page += [
    f'{name:16} {n / 1e9:>10,.0f}B {d / 1e9:>7,.0f}B {d / n:>19.1f} {6 * n * d:>12.3g} '
    f'{6 * n * d / (1e15 * DAY):>13,.0f}'
    for name, n, d in TRAINED
  ]
  page += [
    f'1 FLOP/s-day = {DAY:,} FLOPs; training tokens = tokens of the data set x epochs (1T tokens, '
    f'2 epochs: {2 * 1e12:.0e})',
    '',
  ]
  for name in ('mixtral-8x7b', 'jamba-v0.1'):
    c = of(name)
    page.append(
      f'{name}: {c.params:,} parameters, {c.active_params:,} active; {c.weight_bytes / 1e9:.1f} GB '
      'at 2 bytes, '
      f'{c.params / 1e9:.1f} GB at 1 byte'
    )
  page += ['state of one sequence of 262,144 tokens at 2 bytes:']
  page += [
    f'  {name:13} {cache_bytes(name) / GIB:>6.1f} GiB'
    for name in ('jamba-v0.1', 'mixtral-8x7b', 'llama2-7b', 'llama2-70b')
  ]
  left = 80e9 - of('jamba-v0.1').params - cache_bytes('jamba-v0.1')
  page += [
    f'  Jamba on one 80 GB GPU: at 1 byte a weight {left / 1e9:.1f} GB are left beside a cache of '
    '256K'
  ]
  return page


if __name__ == '__main__':
  print('\n'.join(lines()))
