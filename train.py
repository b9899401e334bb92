"""Trains cheap students and their online teacher, the same as `odcheap train`: `python train.py block_type=DW`."""

import sys

from odcheap.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
