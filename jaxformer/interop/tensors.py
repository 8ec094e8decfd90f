"""Safetensors files and folders: tensors are read one at a time, and written in files of bounded
size. Independent of models."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxformer.config import InputError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pth', '*.pt', '*.ckpt')

DTYPES: Mapping[str, np.dtype] = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
"""Supported types by their safetensors name. Integers (quantized weights, buffers) are not."""

Shape = tuple[int, ...]


class TensorInfo(NamedTuple):
  """The header of a tensor. `dtype` is the name in safetensors, such as `BF16`."""

  shape: Shape
  dtype: str
  file: str


class Tensors(Protocol):
  """Named tensors of a file or folder `source`: all headers, and values on request."""

  @property
  def source(self) -> Path: ...
  @property
  def info(self) -> Mapping[str, TensorInfo]: ...

  def read(self, name: str) -> np.ndarray:
    """The values of one tensor, in the type of the file."""
    ...


class Reader:
  """The tensors of a folder or of one file, by name. The constructor reads the headers, `read` the
  values of one tensor.

  Raises `InputError` for a folder without safetensors, a missing or corrupt file, and an index that
  contradicts its files."""

  def __init__(self, source: str | os.PathLike):
    self.source = Path(source)
    self.folder = self.source.parent if self.source.is_file() else self.source
    self._files = contextlib.ExitStack()
    self._open: dict[str, Any] = {}
    self.info: dict[str, TensorInfo] = {}
    try:
      self._read_headers(
        *(([self.source.name], None) if self.source.is_file() else _files(self.folder))
      )
    except BaseException:
      self.close()
      raise

  def _read_headers(self, files: Sequence[str], index: Mapping[str, str] | None) -> None:
    for file in files:
      path = self.folder / file
      if not path.is_file():
        raise InputError(
          f'{self.folder / INDEX} names {file}, which does not exist: the download is incomplete'
        )
      try:
        handle = self._files.enter_context(safetensors.safe_open(path, 'numpy'))
      except (safetensors.SafetensorError, OSError) as e:
        raise InputError(f'{path} is corrupt or truncated: {e}') from None
      self._open[file] = handle
      for name in handle.keys():  # noqa: SIM118 (the handle is not a mapping)
        part = handle.get_slice(name)
        if name in self.info:
          raise InputError(
            f'{self.folder}: tensor {name} is in both {self.info[name].file} and {file}'
          )
        self.info[name] = TensorInfo(tuple(part.get_shape()), str(part.get_dtype()), file)
    if index is not None and (
      lost := [n for n, file in index.items() if n not in self.info or self.info[n].file != file]
    ):
      raise InputError(
        f'{self.folder / INDEX} lists tensors that its files do not hold: {shortened(lost)}'
      )

  @property
  def bytes(self) -> int:
    """Total size of the files."""
    return sum((self.folder / file).stat().st_size for file in self._open)

  @property
  def files(self) -> list[str]:
    return list(self._open)

  def read(self, name: str) -> np.ndarray:
    """The values of one tensor, in the type of the file."""
    try:
      return self._open[self.info[name].file].get_tensor(name)
    except safetensors.SafetensorError as e:
      raise InputError(
        f'{self.folder / self.info[name].file}: tensor {name} cannot be read: {e}'
      ) from None

  def close(self) -> None:
    self._files.close()

  def __enter__(self) -> Reader:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
  """(safetensors files of a folder, its index or None)."""
  if not folder.is_dir():
    raise InputError(
      f'{folder}: no such folder; weights are read from a local copy of the repository'
    )
  if (folder / INDEX).is_file():
    index = read_json(folder / INDEX).get('weight_map')
    if (
      not isinstance(index, dict)
      or not index
      or not all(isinstance(f, str) for f in index.values())
    ):
      raise InputError(f'{folder / INDEX}: no "weight_map" from tensors to files')
    files = sorted(set(index.values()))
    if outside := [f for f in files if Path(f).name != f or not f.endswith('.safetensors')]:
      raise InputError(
        f'{folder / INDEX}: {outside[0]!r} is not the name of a safetensors file in the folder'
      )
    return files, index
  if (folder / SINGLE).is_file():
    return [SINGLE], None
  if pickles := sorted({p.name for pattern in PICKLES for p in folder.glob(pattern)}):
    raise InputError(
      f'{folder} holds {shortened(pickles, 3)} but no {SINGLE}. Pickled weights can run code when '
      'opened, so they are never read here. If you trust them, convert them: python -c "from '
      'transformers import AutoModelForCausalLM as M; '
      "M.from_pretrained('IN', dtype='auto').save_pretrained('OUT')\""
    )
  raise InputError(f'{folder}: neither {SINGLE} nor {INDEX} exists')


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises `InputError` if there is none."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise InputError(f'{path}: no such file') from None
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
    raise InputError(f'{path}: cannot be read as JSON: {e}') from None
  if not isinstance(value, dict):
    raise InputError(f'{path}: expected a JSON object, found {type(value).__name__}')
  return value


def shortened(names: Iterable[object], most: int = 12) -> str:
  """'a, b, c and 7 more'."""
  names = [str(n) for n in names]
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


# ---- writing -----------------------------------------------------------------------------------


def plan_files(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
  """File name -> its tensors, in order; no file of several tensors exceeds `max_bytes`."""
  parts: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if parts[-1] and filled + size > max_bytes:
      parts.append([])
      filled = 0
    parts[-1].append(name)
    filled += size
  if len(parts) == 1:
    return {SINGLE: parts[0]}
  return {f'model-{i:05}-of-{len(parts):05}.safetensors': names for i, names in enumerate(parts, 1)}


def write(
  folder: Path,
  shapes: Mapping[str, Shape],
  value: Callable[[str], np.ndarray],
  dtype: np.dtype,
  max_bytes: int,
) -> None:
  """Write tensors of known shapes, with values from `value`; at most one file is in memory.

  Raises `InputError` if a finite value overflows in `dtype`.
  """
  sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
  files = plan_files(sizes, max_bytes)
  for file, names in files.items():
    # transformers refuses files whose metadata name no framework
    safetensors.numpy.save_file(
      {n: cast(n, value(n), dtype) for n in names}, folder / file, metadata={'format': 'pt'}
    )
  if len(files) > 1:
    where = {name: file for file, names in files.items() for name in names}
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')


def cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """`value` as a contiguous array of a type. Raises `InputError` if a finite value overflows."""
  with np.errstate(over='ignore'):
    # safetensors writes the memory of an array, ignoring its strides
    result = np.asarray(value, dtype=dtype, order='C')
  narrower = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(value.dtype).max
  if narrower and not np.isfinite(result).all() and np.isfinite(value).all():
    largest = float(np.abs(value).max())
    raise InputError(
      f'dtype = {dtype}: {name} has values up to {largest:.3g}, which overflow; use bfloat16 '
      'or float32'
    )
  return result


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Generator[Path]:
  """Yield a path to write to, which is renamed to `path` when complete. Raises `InputError` if
  `path` exists."""
  target = Path(path).absolute()
  if target.exists():
    raise InputError(f'{path}: exists already and is not overwritten')
  partial = target.with_name(f'.{target.name}.partial-{secrets.token_hex(4)}')
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, target)
  except OSError as e:
    raise InputError(f'{path}: cannot be written: {e}') from None
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Generator[Path]:
  """Yield a folder to fill, which is renamed to `folder` when complete. Raises `InputError` if
  `folder` exists and is not empty."""
  target = Path(folder).absolute()
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise InputError(f'{folder}: exists already, is not an empty folder, and is not overwritten')
  partial = target.with_name(f'.{target.name}.partial-{secrets.token_hex(4)}')
  try:
    partial.mkdir(parents=True)
  except OSError as e:
    raise InputError(f'{folder}: cannot be created: {e}') from None
  try:
    yield partial
    try:
      os.replace(partial, target)
    except OSError as e:
      raise InputError(f'{folder}: cannot be renamed: {e}') from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)
