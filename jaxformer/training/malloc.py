"""Settings of the C library's allocator for runs on a CPU."""

import ctypes
import sys

# names of glibc's malloc.h, without the M_
ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
  """Let the C library keep freed memory for the next step.

  XLA:CPU allocates the temporaries of every step by malloc and frees them, and glibc returns blocks
  of that size to the system: the next step then has a page fault per 4 KiB, a tenth of the time of
  a small model. It has no effect without glibc.
  """
  if sys.platform != 'linux':
    return
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:
    return
  for option, value in ((ARENA_MAX, 1), (MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, LARGEST)):
    mallopt(option, value)
