"""A run's folder: status, checkpoints, resume."""
