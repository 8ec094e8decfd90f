"""What the functions of `jaxformer.api` do: from the names that users give to results that print
and serialize."""
