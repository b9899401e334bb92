"""Runs of several processes: how they are started, find each other, and stop together."""
