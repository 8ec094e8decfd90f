"""Hugging Face folders, both ways: `config.json` and safetensors <-> a model config and its
parameters. Never pickle."""

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
from jax.sharding import Mesh

from jaxformer.config import InputError, nearest
from jaxformer.interop import weights
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import CheckpointFormat, match
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import DTYPES, Reader, new_folder, read_json, write
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params, define
from jaxformer.sharding import Rules

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
  """The family and our config of a Hugging Face folder, from its `config.json` alone."""
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
      'quantization_config', 'absent; weights are read in floating point only'
    )
  return FAMILIES[name], FAMILIES[name].read(Settings(fields, str(path)))


def load_hf(
  folder: str | os.PathLike,
  dtype: Any = jnp.float32,
  mesh: Mesh | None = None,
  rules: Rules | str = 'fsdp_tensor',
) -> tuple[ModelConfig, Params]:
  """The model config and parameters of a local Hugging Face folder.

  Args:
    folder: `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its files.
    dtype: of the parameters, whatever the type in the files (those that a layer keeps in full
      precision stay fp32).
    mesh: where given, parameters go to its devices as `rules` divide them, each as soon as it is
      read.

  Raises `InputError` for what our layers do not compute, and for files that do not hold what the
  config needs."""
  kind, config = read_config(folder)
  info = define(config).info
  with Reader(folder) as reader:
    return config, weights.load(
      weights.connect(info, kind.rules(config), kind.model_type),
      info,
      reader,
      kind.names(config),
      dtype_of(dtype),
      placing(config, mesh, rules),
    )


def placing(
  config: ModelConfig, mesh: Mesh | None, rules: Rules | str
) -> Callable[[str, np.ndarray], jax.Array]:
  """A function that puts a parameter, by its name, where `load_hf` says."""
  shardings = None if mesh is None else define(config).shardings(mesh, rules)
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
  """Writes a Hugging Face folder, which appears only when it is whole; one that is there and not
  empty is left alone.

  Args:
    folder: to write.
    model_config, params: as `load_hf` gives them; the family is found from the config.
    dtype: of the numbers in the files.
    tokenizer_folder: a folder whose tokenizer files are copied along; the ids of special tokens
      come from its `config.json`.
    max_shard_bytes: the weights are divided into files of up to this size.

  Raises `InputError` for a model that no family computes, saying which part.
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
  """What a folder holds, as JSON data, from `config.json` and the headers of the files; no weight
  is read.

  `model_type`, `params` (of our model), `width`, `layers`, `context`, `vocab_size` where the model
  has them, `dtypes` (number of tensors by type), `files`, `bytes`. Raises what `load_hf` would."""
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
  """A type that parameters may have in files and in memory; `InputError` for another."""
  try:
    found = np.dtype(jnp.dtype(dtype))
  except TypeError:
    found = None
  if found is None or found not in set(DTYPES.values()) - {np.dtype(np.float64)}:
    raise InputError(f'dtype = {dtype!r}: must be float32, bfloat16 or float16')
  return found


def _tokenizer(folder: str | os.PathLike | None) -> tuple[list[Path], dict[str, Any]]:
  """The tokenizer files of a folder, and the special tokens that its `config.json` names."""
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
