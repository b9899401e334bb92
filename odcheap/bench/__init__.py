"""The speed benchmark, `odcheap bench`."""
