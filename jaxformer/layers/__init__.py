"""Sequence layers and feed-forward layers with one face (`layer.py`), norms, positions and initial
values."""
