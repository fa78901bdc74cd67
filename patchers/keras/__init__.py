"""Keras models of every kind."""
