"""The contract of layers as checks, for your own layers and for the test suite.

for verdict in jaxformer.testing.check_layer(MyLayer.Config()):
  print(verdict.line)
"""

from jaxformer.testing.contract import Verdict, check_layer, checked_examples

__all__ = ['Verdict', 'check_layer', 'checked_examples']
