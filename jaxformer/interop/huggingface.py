"""Import and export of Hugging Face folders: `config.json` and safetensors <-> a model config and
its parameters. Pickles are never read."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxformer.config import InputError, nearest
from jaxformer.interop import weights
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import match
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import new_path, open_safetensors, read_json, write
from jaxformer.interop.weights import CheckpointFormat
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params
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
    problem = 'no such folder; weights are read from a local copy of the repository'
    raise InputError('folder', str(folder), problem=problem)
  hf = Settings(read_json(path), str(path))
  name = hf.get('model_type', str)
  if name not in set(FAMILIES):
    problem = f'not supported{nearest(name, FAMILIES)}'
    raise InputError(f'{path}: model_type', name, problem=problem)
  if hf.fields.get('quantization_config') is not None:
    raise hf.fail('quantization_config', 'absent; only floating-point weights are supported')
  return FAMILIES[name], FAMILIES[name].read(hf)


def load_hf(
  folder: str | os.PathLike, dtype: Any = jnp.float32, parallel: Parallel | None = None
) -> tuple[ModelConfig, Params]:
  """The model config and parameters of a local Hugging Face folder.

  Args:
    folder: `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its files.
    dtype: of the parameters, independent of that in the files; parameters that a layer keeps in
      full precision are fp32.
    parallel: shard the parameters over its mesh, each as soon as it is read; None for the default
      device.

  Raises `InputError` for features that our layers lack, and for files that do not hold the
  parameters of the config."""
  kind, config = read_config(folder)
  with open_safetensors(folder) as file:
    return config, weights.load(kind, config, file, dtype, parallel)


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
  if max_shard_bytes < 1:
    raise InputError('max_shard_bytes', max_shard_bytes, 'positive')
  kind = match(model_config, map(FAMILIES.__getitem__, FAMILIES))
  shapes, tensors = weights.export(kind, model_config, params, dtype)
  files, token_ids = _tokenizer(tokenizer_folder)
  dtype = weights.dtype_of(dtype)
  fields = {
    'model_type': kind.name,
    **kind.write(model_config),
    **dict.fromkeys(TOKEN_IDS),
    **token_ids,
    # transformers 4 and 5
    'torch_dtype': dtype.name,
    'dtype': dtype.name,
  }
  with new_path(folder, folder=True) as partial:
    (partial / 'config.json').write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
    for file in files:
      shutil.copyfile(file, partial / file.name)
    write(partial, shapes, tensors, dtype, max_shard_bytes)


def _tokenizer(folder: str | os.PathLike | None) -> tuple[list[Path], dict[str, Any]]:
  """(tokenizer files of a folder, ids of special tokens in its `config.json`)."""
  if folder is None:
    return [], {}
  files = [Path(folder) / f for f in TOKENIZER_FILES if (Path(folder) / f).is_file()]
  if not any(f.name.startswith('tokenizer') for f in files):
    problem = 'holds no tokenizer.json, tokenizer_config.json or tokenizer.model'
    raise InputError('tokenizer_folder', str(folder), problem=problem)
  config = Path(folder) / 'config.json'
  fields = read_json(config) if config.is_file() else {}
  return files, {k: fields[k] for k in TOKEN_IDS if k in fields}
