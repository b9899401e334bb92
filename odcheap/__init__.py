"""odcheap: small, cheap convolutional networks, trained by online distillation."""

__version__ = "0.1.0"
