"""Networks for images with another number of channels than three."""

from typing import TypeVar

import torch
from torch import nn

from odcheap.utils.errors import OptionError

Network = TypeVar("Network", bound=nn.Module)
RGB = 3


def adapt_input(network: Network, channels: int) -> Network:
    """Lets a network for RGB images take images with another number of channels, and returns the network.

    The first convolution is changed in place; trained weights stay of use. For gray images its weights are summed over
    the three channels: the network computes the same as before for the gray image in all three. For n channels the
    weights are repeated, and multiplied by 3 / n. timm does the same.

    Args:
        network: The network, for RGB images.
        channels: The number of channels of the images that it should take, n.

    Raises:
        OptionError: The network's first convolution does not take RGB images, or it has groups.

    Example:
        >>> adapt_input(nn.Sequential(nn.Conv2d(3, 8, 3)), 1)
        Sequential(
          (0): Conv2d(1, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    if channels == RGB:
        return network
    stem = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is not None and stem.in_channels == channels:
        return network
    if stem is None or stem.in_channels != RGB or stem.groups != 1:
        allowed = "must be 3: the first convolution of this network is not one that other channels could be given to"
        raise OptionError("data.channels", channels, allowed)
    with torch.no_grad():
        weight = stem.weight
        if channels == 1:
            weight = weight.sum(1, keepdim=True)
        else:
            weight = weight[:, torch.arange(channels) % RGB] * (RGB / channels)
    stem.in_channels, stem.weight = channels, nn.Parameter(weight.detach().clone(), stem.weight.requires_grad)
    return network
