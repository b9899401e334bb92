"""The folder of a run: its files, their schemas, and how a run is resumed from them."""
