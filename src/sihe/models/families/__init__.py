"""config.json of the families of `transformers` that the networks here compute, read and written. Needs no torch."""
