"""What a trained model is worth: exact losses, bits per byte, the loss by position."""

from __future__ import annotations

from jaxformer.evaluation.language_model import EvalResult, PositionLoss, bits_per_byte, evaluate, loss_by_position

__all__ = ['EvalResult', 'PositionLoss', 'bits_per_byte', 'evaluate', 'loss_by_position']
