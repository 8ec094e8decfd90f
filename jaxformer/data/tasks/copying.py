"""Selective copying: repeat tokens among noise in their order, as in Mamba."""

import numpy as np

from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.task import Side, TokenTask, distinct, integers
from jaxformer.task_type import IGNORE, Batch


class SelectiveCopying(TokenTask):
  """`. a . . b . c => => =>`, with targets a b c, one at each marker (Gu and Dao 2023, section
  4.1.1 and appendix E.1).

  `copied` tokens are at positions drawn uniformly from all before the markers, of which there is
  one per token. Token 0 is the noise, `vocab_size` - 1 the marker, those between are copied (the
  layout of the copying task in the code of S4). The only targets are the copied tokens, at the last
  positions, in training and in tests: the score is the accuracy on them. The defaults are those of
  the paper, with endless sequences; that its length of 4096 counts the markers, and the number of
  test sequences, are ours.

  Attributes:
    copied: number of tokens to copy.
    vocab_size: with the noise and the marker.
    length: of the sequence with the positions of the answer.
  """

  copied: int = 16
  vocab_size: int = 16
  length: int = 4096

  def validate(self) -> None:
    self.require_positive('copied')
    self.require(
      self.vocab_size >= 4, 'vocab_size', 'at least 4: two tokens to copy, the noise and the marker'
    )
    least = 2 * self.copied + 2
    self.require(self.length >= least, 'length', f'at least {least}, to copy {self.copied} tokens')
    super().validate()

  def rows(self, side: Side, index_N: Index) -> Batch:
    M, marker, body = self.copied, self.vocab_size - 1, self.length - self.copied
    bits = self.random_bits(side, index_N, 2 * M)
    tokens = np.zeros((index_N.size, self.length), np.int32)
    tokens[:, body:] = marker
    place_NC = np.sort(distinct(body, bits[:, :M]), axis=1)
    copy_NC = 1 + integers(marker - 1, bits[:, M:])
    np.put_along_axis(tokens, place_NC, copy_NC.astype(np.int32), axis=1)
    targets = np.full(tokens.shape, IGNORE, np.int32)
    targets[:, body:] = copy_NC
    return Batch(tokens, targets)
