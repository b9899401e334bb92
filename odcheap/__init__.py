"""odcheap: small, cheap convolutional networks, trained by online distillation."""

from importlib.metadata import version

__version__ = version("odcheap")
