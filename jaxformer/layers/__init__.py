"""Sequence layers and feed-forward layers with one interface (`layer.py`), norms, positions and
initializations."""
