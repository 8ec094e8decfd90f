"""Selective copying: tokens among noise, to be said again in their order. That of Mamba, and that
of the MAD suite."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, Int64

from jaxformer.data.tasks.task import GeneratedTask, Side, distinct, integers
from jaxformer.task_type import IGNORE, Batch, TaskType


class CopyingTask(GeneratedTask, abstract=True):
  """Base of the two. There is no target but the tokens to copy, at the last positions, in training
  as in tests: the score is the fraction of them that are right.

  Attributes:
    copied: how many tokens are to be copied.
    vocab_size: with the noise and the token that asks for the copy.
    length: of the whole sequence, with the positions of the answer.
  """

  copied: int = 16
  vocab_size: int = 16
  length: int = 256

  def validate(self) -> None:
    self.require(self.copied > 0, 'copied', 'positive')
    self.require(
      self.vocab_size >= 4,
      'vocab_size',
      'at least 4: two tokens to copy, the noise and the token that asks',
    )
    self.require(
      self.length >= 2 * self.copied + 2,
      'length',
      f'at least {2 * self.copied + 2}, to copy {self.copied} tokens',
    )
    super().validate()

  @property
  def positions(self) -> int:
    return self.length

  @property
  def task(self) -> TaskType:
    return TaskType(vocab_size=self.vocab_size)

  def _batch(
    self,
    tokens_NT: Int32[np.ndarray, 'N T'],
    place_NC: Int64[np.ndarray, 'N C'],
    copy_NC: Int64[np.ndarray, 'N C'],
  ) -> Batch:
    """The tokens with those to copy at their places, asked for at the end."""
    np.put_along_axis(tokens_NT, place_NC, copy_NC.astype(np.int32), axis=1)
    targets = np.full(tokens_NT.shape, IGNORE, np.int32)
    targets[:, self.length - self.copied :] = copy_NC
    return Batch(tokens_NT, targets, None)


class SelectiveCopying(CopyingTask):
  """`. a . . b . c . => => =>`, asked for a b c, one at each marker (Gu and Dao 2023, section 4.1.1
  and appendix E.1).

  `copied` tokens stand at places drawn uniformly from all before the markers, of which there is one
  for each. Token 0 is the noise, `vocab_size` - 1 the marker, those between are copied (the layout
  of the copying task in S4's code). Sequences are made without end. The defaults are those of the
  paper; that its length of 4096 counts the markers, and the number of test sequences, are ours."""

  length: int = 4096

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    M, marker, body = self.copied, self.vocab_size - 1, self.length - self.copied
    bits = self.random_bits(side, index_N, 2 * M)
    tokens = np.zeros((index_N.size, self.length), np.int32)
    tokens[:, body:] = marker
    place_NC = np.sort(distinct(body, bits[:, :M]), axis=1)
    return self._batch(tokens, place_NC, 1 + integers(marker - 1, bits[:, M:]))


class MadSelectiveCopying(CopyingTask):
  """`. a . . b . c => . . .`, asked for a b c at the last positions (Poli et al. 2024, section 3.1
  and appendix B; the MAD suite).

  Each blank goes before one of the tokens to copy, each as likely, so that the last of them is
  followed at once by the token that asks for the copy; then one more blank for each. `vocab_size` -
  2 is the blank, `vocab_size` - 1 asks, those below are copied. The defaults are the suite's
  baseline."""

  train_sequences: int | None = 12_800
  test_sequences: int = 1280

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    M, blank, N = self.copied, self.vocab_size - 2, index_N.size
    blanks = self.length - 2 * M - 1
    bits = self.random_bits(side, index_N, M + blanks)
    tokens = np.full((N, self.length), blank, np.int32)
    tokens[:, M + blanks] = blank + 1
    before_NC = np.bincount(
      (np.arange(N)[:, None] * M + integers(M, bits[:, M:])).reshape(-1), minlength=N * M
    ).reshape(N, M)
    return self._batch(
      tokens, np.arange(M) + np.cumsum(before_NC, axis=1), integers(blank, bits[:, :M])
    )
