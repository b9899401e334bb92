"""Training methods, one file each; `methods.base.Method` is their interface."""
