"""`python -m jaxformer`: the same as the command `jaxformer`."""

import sys

from jaxformer.cli import main

if __name__ == '__main__':
  sys.exit(main())
