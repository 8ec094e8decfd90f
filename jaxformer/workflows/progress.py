"""Progress and remarks: the logger 'jaxformer', on standard error unless it has a handler."""

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any

Log = Callable[[str], Any]

_logger = logging.getLogger('jaxformer')


def log_progress(line: str) -> None:
  """Log a line about progress."""
  _logger.info(line)


class _StandardError(logging.Handler):
  """Writes messages to whatever `sys.stderr` is at that moment."""

  def emit(self, record: logging.LogRecord) -> None:
    with contextlib.suppress(OSError):  # no reason to stop a run: a full disk, or nobody reads on
      print(self.format(record), file=sys.stderr, flush=True)


if not _logger.handlers:
  _logger.addHandler(_StandardError())
  _logger.propagate = False
if _logger.level == logging.NOTSET:
  _logger.setLevel(logging.INFO)
