"""Cheap convolutions and the operators of which they consist."""
