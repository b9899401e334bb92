"""Reads the folders of runs, and compares the runs in tables and figures."""
