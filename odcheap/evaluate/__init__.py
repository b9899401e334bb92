"""Measures the accuracy of a run's student, or of an export, on other images."""
