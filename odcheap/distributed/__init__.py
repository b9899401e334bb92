"""Distributed runs: how their processes are started, how the processes connect, and how they stop together."""
