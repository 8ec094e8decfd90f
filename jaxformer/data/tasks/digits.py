"""Handwritten digits, read pixel by pixel."""

import functools

import numpy as np
from jaxtyping import Float32

from jaxformer.config import InputError
from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.task import Side, TaskConfig, hash_of, labelled
from jaxformer.task_type import Batch, TaskType

FOLD = 5


class Digits(TaskConfig):
  """The 1,797 images of 8 x 8 pixels that come with scikit-learn (Alpaydin and Kaynak 1998, the
  test part of the UCI set), as sequences of 64 pixels in rows from the top, each a number from 0
  to 1; ten classes.

  Every fifth image is for testing (image i where i mod 5 = 4: 359), so both sides hold digits of
  the same writers."""

  @property
  def positions(self) -> int:
    return 64

  @property
  def task(self) -> TaskType:
    return TaskType(inputs='features', predicts='class', features=1, classes=10)

  @property
  def train_rows(self) -> int:
    return self.rows_of('train').size

  @property
  def test_rows(self) -> int:
    return self.rows_of('test').size

  @staticmethod
  def rows_of(side: Side) -> Index:
    """Return the indices of the images of a side in the order of scikit-learn."""
    index = np.arange(len(_images()[0]))
    return index[(index % FOLD == FOLD - 1) == (side == 'test')]

  def rows(self, side: Side, index_N: Index) -> Batch:
    images, labels = _images()
    chosen = self.rows_of(side)[index_N]
    return labelled(images[chosen], labels[chosen])

  def fingerprint(self) -> str:
    return hash_of(
      *(self.rows(side, np.arange(self.rows_of(side).size)) for side in ('train', 'test'))
    )


@functools.cache
def _images() -> tuple[Float32[np.ndarray, 'N 64 1'], Index]:
  try:
    from sklearn.datasets import load_digits
  except ImportError:
    raise InputError(
      'Digits: the images come with scikit-learn, which is not installed: pip install '
      '"jaxformer[tasks]"'
    ) from None
  data = load_digits()
  return (data.data[:, :, None] / 16.0).astype(np.float32), data.target.astype(np.int64)
