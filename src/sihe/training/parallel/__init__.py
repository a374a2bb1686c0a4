"""Splitting a model and its training over ranks, from outside of the model."""
