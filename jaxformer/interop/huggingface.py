"""Import and export of Hugging Face folders: `config.json` and safetensors <-> a model config and
its parameters. Pickles are never read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import InputError, nearest
from jaxformer.interop import weights
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import CheckpointFormat, match
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import DTYPES, Reader, new_folder, read_json, write
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params, define
from jaxformer.sharding import Parallel

TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def read_config(folder: str | os.PathLike) -> tuple[CheckpointFormat, ModelConfig]:
  """The format and our config of a Hugging Face folder, from its `config.json` alone."""
  path = Path(folder) / 'config.json'
  if not Path(folder).is_dir():
    raise InputError(
      f'{folder}: no such folder; weights are read from a local copy of the repository'
    )
  fields = read_json(path)
  name = fields.get('model_type')
  if not isinstance(name, str) or name not in set(FAMILIES):
    raise InputError(
      f'{path}: model_type = {name!r} is not supported{nearest(str(name), FAMILIES)}'
    )
  if fields.get('quantization_config') is not None:
    raise Settings(fields, str(path)).fail(
      'quantization_config', 'absent; only floating-point weights are supported'
    )
  return FAMILIES[name], FAMILIES[name].read(Settings(fields, str(path)))


def load_hf(
  folder: str | os.PathLike, dtype: Any = jnp.float32, parallel: Parallel | None = None
) -> tuple[ModelConfig, Params]:
  """The model config and parameters of a local Hugging Face folder.

  Args:
    folder: `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its files.
    dtype: of the parameters, independent of that in the files; parameters that a layer keeps in
      full precision are fp32.
    mesh: shard the parameters over its devices by `rules`, each as soon as it is read; None for the
      default device.

  Raises `InputError` for features that our layers lack, and for files that do not hold the
  parameters of the config."""
  kind, config = read_config(folder)
  info = define(config).info
  with Reader(folder) as reader:
    return config, weights.load(
      weights.connect(info, kind.rules(config), kind.model_type),
      info,
      reader,
      kind.names(config),
      dtype_of(dtype),
      placing(config, parallel),
    )


def placing(
  config: ModelConfig, parallel: Parallel | None
) -> Callable[[str, np.ndarray], jax.Array]:
  """A function (name, value) -> the parameter on its devices, for `load_hf`."""
  shardings = None if parallel is None else define(config).shardings(parallel)
  return lambda name, value: (
    jnp.asarray(value) if shardings is None else jax.device_put(value, shardings[name])
  )


def save_hf(
  folder: str | os.PathLike,
  model_config: ModelConfig,
  params: Params,
  dtype: Any = jnp.float32,
  tokenizer_folder: str | os.PathLike | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Write a Hugging Face folder. It appears only when it is complete; an existing folder must be
  empty.

  Args:
    model_config, params: as `load_hf` returns them; the format follows from the config.
    dtype: of the values in the files.
    tokenizer_folder: a folder whose tokenizer files are copied; the ids of special tokens are those
      of its `config.json`.
    max_shard_bytes: size limit of each file of weights.

  Raises `InputError` for a model that no format represents, with the reasons.
  """
  kind, fields = match(model_config)
  dtype = dtype_of(dtype)
  if max_shard_bytes < 1:
    raise InputError(f'max_shard_bytes = {max_shard_bytes}: must be positive')
  definition = define(model_config)
  weights.check_params(definition.info, params)
  export = weights.Export(
    weights.connect(definition.info, kind.rules(model_config), kind.model_type), params
  )
  tokens = _tokenizer(tokenizer_folder)
  # transformers 4 and 5
  fields |= dict.fromkeys(TOKEN_IDS) | tokens[1] | {'torch_dtype': dtype.name, 'dtype': dtype.name}
  with new_folder(folder) as partial:
    (partial / 'config.json').write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
    for file in tokens[0]:
      shutil.copyfile(file, partial / file.name)
    write(partial, export.shapes, export, dtype, max_shard_bytes)


def describe(folder: str | os.PathLike) -> dict[str, Any]:
  """Describe a folder as JSON data, from `config.json` and the headers of the files; no weight is
  read.

  Keys: `model_type`, `params` (of our model), `width`, `context_length`, `vocab_size`, `layers`
  (blocks), `dtypes` (number of tensors by type), `files`, `bytes`. Raises like `load_hf`."""
  kind, config = read_config(folder)
  definition = define(config)
  with Reader(folder) as reader:
    weights.check(
      weights.connect(definition.info, kind.rules(config), kind.model_type),
      reader,
      kind.names(config),
    )
    stored = [i.dtype for i in reader.info.values()]
    blocks = sum(len(g.pattern) * g.repeats for stack in config.stacks for g in stack)
    return {
      'model_type': kind.model_type,
      'params': definition.size,
      'width': config.width,
      'context_length': config.context_length,
      'vocab_size': config.task.vocab_size,
      'layers': blocks,
      'dtypes': {d: stored.count(d) for d in sorted(set(stored))},
      'files': reader.files,
      'bytes': reader.bytes,
    }


def dtype_of(dtype: Any) -> np.dtype:
  """The type of parameters in files and in memory. Raises `InputError` for an unsupported one."""
  try:
    found = np.dtype(jnp.dtype(dtype))
  except TypeError:
    found = None
  if found is None or found not in set(DTYPES.values()) - {np.dtype(np.float64)}:
    raise InputError(f'dtype = {dtype!r}: must be float32, bfloat16 or float16')
  return found


def _tokenizer(folder: str | os.PathLike | None) -> tuple[list[Path], dict[str, Any]]:
  """(tokenizer files of a folder, ids of special tokens in its `config.json`)."""
  if folder is None:
    return [], {}
  files = [Path(folder) / f for f in TOKENIZER_FILES if (Path(folder) / f).is_file()]
  if not any(f.name.startswith('tokenizer') for f in files):
    raise InputError(
      f'tokenizer_folder = {str(folder)!r}: holds no tokenizer.json, tokenizer_config.json or '
      'tokenizer.model'
    )
  config = Path(folder) / 'config.json'
  fields = read_json(config) if config.is_file() else {}
  return files, {k: fields[k] for k in TOKEN_IDS if k in fields}
