"""Cheap convolutions and the operators they are made of."""
