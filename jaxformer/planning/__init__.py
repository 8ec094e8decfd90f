"""What a model costs, from its config alone; and the TPU compiler as a check."""
