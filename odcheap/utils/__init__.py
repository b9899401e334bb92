"""Errors, file access and random seeds."""
