"""Backbones, wrappers of torchvision and timm networks, and conversion to cheap convolutions."""
