"""Requests to stop: by a scheduler, a user, or the maintenance of a machine."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

# SIGTERM is sent by Slurm, Kubernetes and clouds before they end a process, SIGUSR1 by Slurm's
# `--signal` as most users set it, SIGUSR2 by submitit, SIGHUP when a terminal or an SSH session
# ends (unless `nohup` told the process to ignore it).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Moments at which the processes could stop, over all runs of this program: JAX's agreement on one
# of them needs numbers that rise by one.
_MOMENTS = itertools.count(1)

T = TypeVar('T')


class Stopped(Exception):
  """A stop was requested in the middle of an evaluation or a sample."""


class Interrupt:
  """A context manager in which each of `SIGNALS` sets a flag that the loop reads after each step,
  between the batches of an evaluation and between the pieces of a sample; a second SIGINT aborts.

  Nested handlers inherit and propagate the signal, so that a program of several runs can check the
  outer one between them.

  Under `jax.distributed` the processes agree on the moment at which to stop. There SIGTERM belongs
  to JAX's preemption notifier, and the others are forwarded as SIGTERM."""

  def __init__(self) -> None:
    self.signal: str | None = None
    self._old: dict[signal.Signals, Any] = {}
    self._distributed = jax.distributed.is_initialized()
    self._agreed = False

  def __enter__(self) -> Interrupt:
    # Python allows handlers only there
    if threading.current_thread() is threading.main_thread():
      for s in SIGNALS:
        ignored = s is signal.SIGHUP and signal.getsignal(s) is signal.SIG_IGN
        if not ignored and not (self._distributed and s is signal.SIGTERM):
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

  def requested(self) -> bool:
    """Return whether to stop now. All processes must call it equally often, at the same points of
    the program: between them they agree on one of these moments, without waiting for each
    other."""
    if self._distributed and not self._agreed:
      self._agreed = multihost_utils.reached_preemption_sync_point(next(_MOMENTS))
    return self._agreed if self._distributed else self.signal is not None

  def until(self, items: Iterable[T]) -> Iterator[T]:
    """Yield the items; raise `Stopped` where a stop is requested before one of them."""
    for item in items:
      if self.requested():
        raise Stopped
      yield item
