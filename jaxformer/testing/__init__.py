"""The contract of layers as checks, for the test suite and for layers of users."""
