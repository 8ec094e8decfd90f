"""Pure functions on arrays. Every fast form has a `*_naive` beside it, written from the paper's
recurrence."""
