"""Import and export of Hugging Face folders: `config.json` and safetensors <-> a model config and
its parameters. Pickles are never read."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxformer.config import InputError, differences, nearest
from jaxformer.interop import weights
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import functional, match
from jaxformer.interop.generation import FILE as GENERATION_FILE
from jaxformer.interop.generation import OF_GENERATION, with_token_ids
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import new_path, open_safetensors, read_json, shortened, write
from jaxformer.interop.weights import CheckpointFormat
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params
from jaxformer.sharding import Parallel

logger = logging.getLogger('jaxformer')

TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'target_vocab.json',
  'merges.txt',
  'source.spm',
  'target.spm',
  'chat_template.jinja',
  'chat_template.json',
)


ABOUT_THE_FILE = ('model_type', 'architectures', 'transformers_version', 'torch_dtype', 'dtype')
"""Fields of a `config.json` that say what the file is; of `architectures`, the weights decide."""


def read_config(folder: str | os.PathLike) -> tuple[CheckpointFormat, ModelConfig]:
  """The format and our config of a Hugging Face folder, from its `config.json` alone."""
  kind, config, _ = _read_config(folder)
  return kind, config


def _read_config(folder: str | os.PathLike) -> tuple[CheckpointFormat, ModelConfig, list[str]]:
  """(format, config, names of the fields that were not read because the model's function does not
  depend on them)."""
  path = Path(folder) / 'config.json'
  if not Path(folder).is_dir():
    problem = 'no such folder; weights are read from a local copy of the repository'
    raise InputError('folder', str(folder), problem=problem)
  hf = Settings(read_json(path), str(path))
  if is_of_mamba_authors(hf.fields):
    problem = (
      'is missing: the file is of the format of state-spaces/mamba; use the folder of the same '
      'weights for transformers, whose name ends in -hf, as state-spaces/mamba-130m-hf'
    )
    raise InputError(f'{path}: model_type', problem=problem)
  name = hf.get('model_type', str)
  if name not in set(FAMILIES):
    problem = f'not supported{nearest(name, FAMILIES)}'
    raise InputError(f'{path}: model_type', name, problem=problem)
  if hf.value('quantization_config') is not None:
    raise hf.fail('quantization_config', 'absent; only floating-point weights are supported')
  kind = FAMILIES[name]
  config = kind.read(hf)
  for other, field in kind.aliases.items():
    hf.only(other, None, hf.value(field))
  unread = set(hf.unread()) - {*ABOUT_THE_FILE, *OF_GENERATION}
  return kind, config, sorted(unread)


def is_of_mamba_authors(fields: Mapping[str, Any]) -> bool:
  """Whether these are the fields of a `config.json` of state-spaces/mamba."""
  return 'model_type' not in fields and {'d_model', 'n_layer'} <= fields.keys()


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

  Logs which fields of `config.json` are not read, as they are not used in inference. Raises
  `InputError` for features that our layers lack, and for files that do not hold the parameters of
  the config."""
  kind, config, unread = _read_config(folder)
  if unread:
    path = Path(folder) / 'config.json'
    logger.info(f'{path}: not used in inference, and not read: {", ".join(unread)}')
  with open_safetensors(folder) as file:
    return config, weights.load(kind, config, file, dtype, parallel)


def save_hf(
  folder: str | os.PathLike,
  model_config: ModelConfig,
  params: Params,
  dtype: Any = jnp.float32,
  tokenizer_folder: str | os.PathLike | None = None,
  max_shard_bytes: int = 5_000_000_000,
  *,
  source: str | os.PathLike | None = None,
  token_ids: Mapping[str, Any] | None = None,
  texts: Mapping[str, str] | None = None,
) -> None:
  """Write a Hugging Face folder. It appears only when it is complete; an existing folder must be
  empty.

  Args:
    model_config, params: as `load_hf` returns them; the format follows from the config.
    dtype: of the values in the files.
    tokenizer_folder: a folder whose tokenizer files are copied; the ids of special tokens and the
      rules of generation are those of its `config.json` and `generation_config.json`.
    max_shard_bytes: size limit of each file of weights.
    source: the Hugging Face folder that the weights are from: its format and every field of its
      `config.json` but the dtype are kept, and its tokenizer files.
    token_ids: ids of special tokens that no such folder has, by their names in `config.json`.
    texts: further files, where no such folder has them.

  Raises `InputError` for a model that no format represents, with the reasons.
  """
  if max_shard_bytes < 1:
    raise InputError('max_shard_bytes', max_shard_bytes, 'positive')
  kind, fields = _format(model_config, source)
  shapes, tensors = weights.export(kind, model_config, params, dtype)
  files = _tokenizer(source, tokenizer_folder)
  config, generation = with_token_ids(fields, source or tokenizer_folder, token_ids or {})
  dtype = weights.dtype_of(dtype)
  config |= {'torch_dtype': dtype.name, 'dtype': dtype.name}  # transformers 4 and 5
  written = {'config.json': config} | ({GENERATION_FILE: generation} if generation else {})
  texts = {name: json.dumps(value, indent=2) + '\n' for name, value in written.items()} | {
    name: text for name, text in (texts or {}).items() if name not in {f.name for f in files}
  }
  with new_path(folder, folder=True) as partial:
    for name, text in texts.items():
      (partial / name).write_text(text, encoding='utf-8')
    for file in files:
      shutil.copyfile(file, partial / file.name)
    write(partial, shapes, tensors, dtype, max_shard_bytes)


def _format(
  model_config: ModelConfig, source: str | os.PathLike | None
) -> tuple[CheckpointFormat, dict[str, Any]]:
  """(the format of a model, its `config.json`): those of the folder that it is from, if any."""
  if source is None:
    kind = match(model_config, map(FAMILIES.__getitem__, FAMILIES))
    return kind, {'model_type': kind.name, **kind.write(model_config)}
  kind, theirs = read_config(source)
  if differ := differences(functional(theirs), functional(model_config)):
    problem = f'holds another model: {shortened(differ, 3)}'
    raise InputError('source', str(source), problem=problem)
  return kind, read_json(Path(source) / 'config.json')


def _tokenizer(
  source: str | os.PathLike | None, tokenizer_folder: str | os.PathLike | None
) -> list[Path]:
  """The tokenizer files of a folder."""
  folder = tokenizer_folder if source is None else source
  if folder is None:
    return []
  files = [Path(folder) / f for f in TOKENIZER_FILES if (Path(folder) / f).is_file()]
  if source is None and not any(f.name.startswith('tokenizer') for f in files):
    problem = 'holds no tokenizer.json, tokenizer_config.json or tokenizer.model'
    raise InputError('tokenizer_folder', str(folder), problem=problem)
  return files
