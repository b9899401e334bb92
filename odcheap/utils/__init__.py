"""Helpers of all packages: errors, file access, checks of arguments, random seeds, text and console."""
