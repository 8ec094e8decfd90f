"""Exit codes of every command; launchers of jobs act on them."""

from typing import Final

DONE: Final = 0
FAILED: Final = 1  # any failure without a code of its own
BAD_INPUT: Final = 2
NOT_FINITE: Final = 70  # a loss, gradients, weights or logits are not finite
PREEMPTED: Final = 75  # stopped by a signal, state saved: run the same command again
INTERRUPTED: Final = 130  # aborted by the user, nothing saved


class Failure(RuntimeError):
  """An error whose cause is not what the user gave, with a message of one line: a full disk, or a
  lost lock. Commands end with its `code`."""

  code: int = FAILED


class NotFiniteError(Failure):
  """Weights, logits or a loss that are not finite."""

  code = NOT_FINITE
