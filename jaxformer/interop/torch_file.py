"""State dicts in `.pth` files: read with PyTorch's `weights_only` unpickler, which runs no code,
and written.

PyTorch is imported only here, and only for such files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxformer.config import InputError
from jaxformer.interop.tensors import TensorInfo, cast, new_file

_NAMES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}


class TorchReader:
  """The tensors of a state dict, with the interface of `tensors.Tensors`. The file is memory
  mapped. Raises `InputError` without PyTorch, and for a file with anything but tensors by name."""

  def __init__(self, source: str | os.PathLike):
    torch, self.source = _torch(source), Path(source)
    try:
      tensors = _load(torch, self.source)
    except Exception as e:  # the unpickler raises anything on invalid bytes
      why = str(e).partition('\n')[0] or type(e).__name__
      raise InputError(
        f'{source}: not a state dict that can be read without running code: {why}'
      ) from None
    if not isinstance(tensors, dict) or not all(
      isinstance(n, str) and torch.is_tensor(t) for n, t in tensors.items()
    ):
      raise InputError(f'{source}: must hold the state dict of a model, tensors by name')
    self._tensors: Mapping[str, Any] = tensors
    kinds = {n: str(t.dtype).removeprefix('torch.') for n, t in tensors.items()}
    self.info = {
      n: TensorInfo(tuple(t.shape), _NAMES.get(kinds[n], kinds[n]), self.source.name)
      for n, t in tensors.items()
    }

  def read(self, name: str) -> np.ndarray:
    """One tensor, in the type of the file."""
    tensor = self._tensors[name].detach().contiguous()
    if self.info[name].dtype == 'BF16':
      return tensor.view(_torch(self.source).int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _load(torch: Any, path: Path) -> Any:
  try:
    return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except RuntimeError as e:
    if 'mmap' not in str(e):
      raise
    # files from before PyTorch 1.6 cannot be memory-mapped
    return torch.load(path, map_location='cpu', weights_only=True)


def write_torch(
  path: str | os.PathLike, names: Sequence[str], value: Callable[[str], np.ndarray], dtype: np.dtype
) -> None:
  """Write tensors as a state dict, with values from `value`."""
  torch = _torch(path)

  def tensor(name: str) -> Any:
    array = cast(name, value(name), dtype)
    if dtype == ml_dtypes.bfloat16:  # torch.tensor does not accept this numpy type
      return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)

  with new_file(path) as partial:
    torch.save({name: tensor(name) for name in names}, partial)


def _torch(path: str | os.PathLike) -> Any:
  try:
    import torch
  except ModuleNotFoundError:
    raise InputError(
      f'{path}: .pth files need PyTorch: pip install torch; .safetensors files need nothing more'
    ) from None
  return torch
