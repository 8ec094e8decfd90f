"""Evaluation of trained models: losses, bits per byte, the loss by position, scores of
translations."""

from jaxformer.evaluation.language_model import (
  EvalResult,
  bits_per_byte,
  evaluate,
  loss_by_position,
  loss_by_source_length,
)
from jaxformer.evaluation.translation import (
  TranslationResult,
  TranslationScores,
  evaluate_translation,
  translate_held_out,
)

__all__ = [
  'EvalResult',
  'TranslationResult',
  'TranslationScores',
  'bits_per_byte',
  'evaluate',
  'evaluate_translation',
  'loss_by_position',
  'loss_by_source_length',
  'translate_held_out',
]
