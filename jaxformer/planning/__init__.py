"""Cost, memory and time of a model from its config alone, and the TPU compiler as a check."""
