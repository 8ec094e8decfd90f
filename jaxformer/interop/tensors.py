"""Safetensors files, alone or in folders: tensors read one at a time, written in files of bounded
size. Nothing here knows a model."""

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
"""Floating-point types by the name that safetensors gives them. Integers (quantised weights,
buffers) are not among them."""

Shape = tuple[int, ...]


class TensorInfo(NamedTuple):
  """What a file's header says of a tensor. `dtype` is safetensors' own name, such as `BF16`."""

  shape: Shape
  dtype: str
  file: str


class Tensors(Protocol):
  """Named tensors of a file or folder `source`: what is known of each at once, and its value when
  it is asked for."""

  @property
  def source(self) -> Path: ...
  @property
  def info(self) -> Mapping[str, TensorInfo]: ...

  def read(self, name: str) -> np.ndarray:
    """One tensor, in the type of the file."""
    ...


class Reader:
  """The tensors of a folder or of one file, by name. Headers are read at once, values only by
  `read`, one tensor at a time.

  Raises `InputError` for a folder without safetensors, a missing or damaged file, and an index that
  disagrees with its files."""

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
          f'{self.folder / INDEX} names {file}, which is not there: the download is not complete'
        )
      try:
        handle = self._files.enter_context(safetensors.safe_open(path, 'numpy'))
      except (safetensors.SafetensorError, OSError) as e:
        raise InputError(f'{path} is damaged or cut short: {e}') from None
      self._open[file] = handle
      for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
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
        f'{self.folder / INDEX} promises tensors that its files do not hold: {shortened(lost)}'
      )

  @property
  def bytes(self) -> int:
    """Size of the files together."""
    return sum((self.folder / file).stat().st_size for file in self._open)

  @property
  def files(self) -> list[str]:
    return list(self._open)

  def read(self, name: str) -> np.ndarray:
    """One tensor, in the type of the file."""
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
  """The safetensors files of a folder, and the index where there is one."""
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
      'they are opened, so they are '
      'never read here. Convert them once where you trust them: python -c "from transformers '
      'import AutoModelForCausalLM as M; '
      "M.from_pretrained('IN', dtype='auto').save_pretrained('OUT')\""
    )
  raise InputError(f'{folder}: neither {SINGLE} nor {INDEX} is there')


def read_json(path: Path) -> dict[str, Any]:
  """The object that a JSON file holds. Raises `InputError` where it is missing or holds something
  else."""
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
  """File -> its tensors, in order: a file is closed when the next tensor would take it past
  `max_bytes` (one alone may)."""
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
  """Writes tensors of known shapes, asking `value` for one after the other; at most one file's
  worth is in memory.

  Raises `InputError` where a finite number does not fit `dtype`.
  """
  sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
  files = plan_files(sizes, max_bytes)
  for file, names in files.items():
    # The format says 'pt' because transformers refuses files that do not say which framework they
    # suit.
    safetensors.numpy.save_file(
      {n: cast(n, value(n), dtype) for n in names}, folder / file, metadata={'format': 'pt'}
    )
  if len(files) > 1:
    where = {name: file for file, names in files.items() for name in names}
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')


def cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """`value` as a contiguous array of another type. Raises `InputError` where a finite number
  becomes infinite."""
  with np.errstate(over='ignore'):
    # Contiguous, because safetensors writes the memory of an array as it lies, transposed or not.
    result = np.asarray(value, dtype=dtype, order='C')
  narrower = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(value.dtype).max
  if narrower and not np.isfinite(result).all() and np.isfinite(value).all():
    largest = float(np.abs(value).max())
    raise InputError(
      f'dtype = {dtype}: {name} holds numbers up to {largest:.3g}, too large for it; use bfloat16 '
      'or float32'
    )
  return result


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Generator[Path]:
  """A file to write, which appears under its name only when it is whole. Raises `InputError` where
  that name is taken."""
  target = Path(path).absolute()
  if target.exists():
    raise InputError(f'{path}: already there; nothing is overwritten')
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
  """A folder to fill, which appears under its name only when all is written. Raises `InputError`
  where that name is taken."""
  target = Path(folder).absolute()
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise InputError(f'{folder}: already there and not an empty folder; nothing is overwritten')
  partial = target.with_name(f'.{target.name}.partial-{secrets.token_hex(4)}')
  try:
    partial.mkdir(parents=True)
  except OSError as e:
    raise InputError(f'{folder}: cannot be made: {e}') from None
  try:
    yield partial
    try:
      os.replace(partial, target)
    except OSError as e:
      raise InputError(f'{folder}: cannot be put in place: {e}') from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)
