"""Safetensors files and folders: tensors are read one at a time, and written in files of bounded
size. Independent of models."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxformer.config import InputError
from jaxformer.files import os_error, regular_file, unwritable, user_path
from jaxformer.json_data import parse_json

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


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Named tensors of a file or folder.

  Attributes:
    source: the file or folder.
    info: all headers.
    read: the values of one tensor by name, in the type of the file.
  """

  source: Path
  info: Mapping[str, TensorInfo]
  read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def open_safetensors(source: str | os.PathLike) -> Generator[Tensors]:
  """The tensors of a folder or of one file. Headers are read at once.

  Raises `InputError` for a folder without safetensors, a missing or corrupt file, and an index that
  contradicts its files."""
  source = Path(source)
  folder = source.parent if source.is_file() else source
  files, index = ([source.name], {}) if source.is_file() else _files(folder)
  handles: dict[str, Any] = {}
  info: dict[str, TensorInfo] = {}

  def read(name: str) -> np.ndarray:
    file = info[name].file
    try:
      return handles[file].get_tensor(name)
    except safetensors.SafetensorError as e:
      raise InputError(str(folder / file), problem=f'tensor {name} cannot be read: {e}') from None

  with contextlib.ExitStack() as opened:
    for file in files:
      path = folder / file
      if not path.is_file():
        problem = f'names {file}, which does not exist: the download is incomplete'
        raise InputError(str(folder / INDEX), problem=problem)
      try:
        handle = opened.enter_context(safetensors.safe_open(path, 'numpy'))
      except (safetensors.SafetensorError, OSError) as e:
        raise InputError(str(path), problem=f'corrupt or truncated: {e}') from None
      handles[file] = handle
      for name in handle.keys():  # noqa: SIM118 (the handle is not a mapping)
        part = handle.get_slice(name)
        if name in info:
          raise InputError(
            str(folder), problem=f'tensor {name} is in both {info[name].file} and {file}'
          )
        info[name] = TensorInfo(tuple(part.get_shape()), str(part.get_dtype()), file)
    if lost := [n for n, file in index.items() if n not in info or info[n].file != file]:
      problem = f'lists tensors that its files do not hold: {shortened(lost)}'
      raise InputError(str(folder / INDEX), problem=problem)
    yield Tensors(source, info, read)


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
  """(safetensors files of a folder, tensors -> files in its index if it has one)."""
  if (folder / INDEX).is_file():
    index = read_json(folder / INDEX).get('weight_map')
    if (
      not isinstance(index, dict)
      or not index
      or not all(isinstance(f, str) for f in index.values())
    ):
      raise InputError(str(folder / INDEX), problem='no "weight_map" from tensors to files')
    files = sorted(set(index.values()))
    if outside := [f for f in files if Path(f).name != f or not f.endswith('.safetensors')]:
      problem = f'{outside[0]!r} is not the name of a safetensors file in the folder'
      raise InputError(str(folder / INDEX), problem=problem)
    return files, index
  if (folder / SINGLE).is_file():
    return [SINGLE], {}
  if pickles := sorted({p.name for pattern in PICKLES for p in folder.glob(pattern)}):
    raise InputError(
      str(folder),
      problem=f'holds {shortened(pickles, 3)} but no {SINGLE}. Pickled weights can run code when '
      'opened, so they are never read here. If you trust them, convert them: python -c "from '
      'transformers import AutoModelForCausalLM as M; '
      "M.from_pretrained('IN', dtype='auto').save_pretrained('OUT')\"",
    )
  raise InputError(str(folder), problem=f'neither {SINGLE} nor {INDEX} exists')


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises `InputError` if there is none."""
  try:
    value = parse_json(regular_file(path).read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise InputError(str(path), problem='no such file') from None
  except (OSError, ValueError) as e:
    raise InputError(str(path), problem=f'cannot be read as JSON: {e}') from None
  if not isinstance(value, dict):
    raise InputError(str(path), accepted='a JSON object')
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
  tensors: Iterator[tuple[str, np.ndarray]],
  dtype: np.dtype,
  max_bytes: int,
) -> None:
  """Write tensors of these shapes, which `tensors` yields in order; at most one file is in
  memory."""
  sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
  files = plan_files(sizes, max_bytes)
  for file, names in files.items():
    # transformers refuses files whose metadata name no framework
    safetensors.numpy.save_file(
      dict(itertools.islice(tensors, len(names))), folder / file, metadata={'format': 'pt'}
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
    problem = f'{name} has values up to {largest:.3g}, which overflow; use bfloat16 or float32'
    raise InputError('dtype', dtype.name, problem=problem)
  return result


@contextlib.contextmanager
def new_path(path: str | os.PathLike, *, folder: bool = False) -> Generator[Path]:
  """Yield a path to write to, for a folder an empty one, which is renamed to `path` when complete.
  Raises `InputError` if `path` exists, other than as an empty folder, or cannot be written, and
  `WriteError` if the disk is full."""
  target = user_path(path, 'out').absolute()
  if target.exists() and not (folder and target.is_dir() and not any(target.iterdir())):
    kind = ' and is not an empty folder' if folder else ''
    raise InputError(str(path), problem=f'exists already{kind}; it is not overwritten')
  partial = target.with_name(f'.{target.name}.partial-{secrets.token_hex(4)}')
  try:
    (partial if folder else partial.parent).mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, target)
  except InputError:
    raise
  except Exception as e:
    if (cause := os_error(e)) is None:
      raise
    raise unwritable(path, cause) from None
  finally:
    if folder:
      shutil.rmtree(partial, ignore_errors=True)
    else:
      partial.unlink(missing_ok=True)
