"""State dicts in `.pth` files: read with PyTorch's `weights_only` unpickler, which runs no code,
and written.

PyTorch is imported only here, and only for such files.
"""

import contextlib
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxformer.config import InputError
from jaxformer.interop.tensors import TensorInfo, Tensors

_NAMES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}


@contextlib.contextmanager
def open_torch(source: str | os.PathLike) -> Generator[Tensors]:
  """The tensors of a state dict. The file is memory mapped. Raises `InputError` without PyTorch,
  and for a file with anything but tensors by name."""
  torch = _torch()
  try:
    tensors = _load(torch, source)
  except Exception as e:  # the unpickler raises anything on invalid bytes
    why = str(e).partition('\n')[0] or type(e).__name__
    problem = f'not a state dict that can be read without running code: {why}'
    raise InputError(str(source), problem=problem) from None
  if not isinstance(tensors, dict) or not all(
    isinstance(n, str) and torch.is_tensor(t) for n, t in tensors.items()
  ):
    raise InputError(str(source), accepted='the state dict of a model, tensors by name')
  kinds = {n: str(t.dtype).removeprefix('torch.') for n, t in tensors.items()}

  def read(name: str) -> np.ndarray:
    tensor = tensors[name].detach().contiguous()
    if kinds[name] == 'bfloat16':
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  yield Tensors(
    Path(source),
    {
      n: TensorInfo(tuple(t.shape), _NAMES.get(kinds[n], kinds[n]), Path(source).name)
      for n, t in tensors.items()
    },
    read,
  )


def _load(torch: Any, path: str | os.PathLike) -> Any:
  try:
    return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except RuntimeError as e:
    if 'mmap' not in str(e):
      raise
    # files from before PyTorch 1.6 cannot be memory-mapped
    return torch.load(path, map_location='cpu', weights_only=True)


def write_torch(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
  """Write a state dict."""
  torch = _torch()

  def tensor(array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:  # torch.tensor does not accept this numpy type
      return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)

  torch.save({name: tensor(array) for name, array in arrays.items()}, path)


def _torch() -> Any:
  try:
    import torch
  except ModuleNotFoundError:
    raise InputError(
      '.pth files need PyTorch: pip install torch; .safetensors files need nothing more'
    ) from None
  return torch
