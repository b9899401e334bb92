"""Runs of several processes: how they are started, how they connect, and how they stop together."""
