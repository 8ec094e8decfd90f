"""Requests to stop: by a scheduler, a user, or the maintenance of a machine."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Interrupt:
  """A context manager in which SIGTERM, SIGINT and SIGUSR2 set a flag that the loop reads after
  each step; a second SIGINT aborts.

  Nested handlers inherit and propagate the signal, so that a program of several runs can check the
  outer one between them.

  Under `jax.distributed` the processes agree on the step after which to stop. There SIGTERM belongs
  to JAX's preemption notifier, and the other two are forwarded as SIGTERM."""

  def __init__(self) -> None:
    self.signal: str | None = None
    self._old: dict[signal.Signals, Any] = {}
    self._distributed = jax.distributed.is_initialized()

  def __enter__(self) -> Interrupt:
    # Python allows handlers only there
    if threading.current_thread() is threading.main_thread():
      for s in SIGNALS:
        if not (self._distributed and s is signal.SIGTERM):
          self._old[s] = signal.signal(s, self._handle)
    for outer in self._outer():
      self.signal = self.signal or outer.signal
    return self

  def __exit__(self, *_: object) -> None:
    for s, old in self._old.items():
      signal.signal(s, old)
    for outer in self._outer():
      outer.signal = outer.signal or self.signal

  def _outer(self) -> list[Interrupt]:
    owners = (getattr(old, '__self__', None) for old in self._old.values())
    return [owner for owner in owners if isinstance(owner, Interrupt)]

  def _handle(self, number: int, frame: object) -> None:
    again = self.signal == 'SIGINT' and number == signal.SIGINT
    self.signal = signal.Signals(number).name
    if again:
      raise KeyboardInterrupt
    if self._distributed:
      os.kill(os.getpid(), signal.SIGTERM)

  def requested(self, step: int) -> bool:
    """Return whether to stop after this step. All processes must call it with the same step."""
    if self._distributed:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.signal is not None
