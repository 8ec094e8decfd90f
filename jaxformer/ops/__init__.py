"""Pure functions on arrays. An operation is a table of implementations (`ops/implementation.py`);
its 'naive' one is written from the recurrence or formula of the paper."""
