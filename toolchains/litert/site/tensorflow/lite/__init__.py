"""Stands in for the part of TensorFlow that litert-torch imports and does not require."""
