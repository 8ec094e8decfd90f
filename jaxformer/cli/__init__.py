"""The command line: `main.py` reads it, each command has a file of its own."""

from jaxformer.cli.main import main

__all__ = ['main']
