"""Builds networks from settings that files store together with the weights.

Several functions have the arguments `path`, a file, and `option`, the name of the option with which the user named that
file: error messages contain both.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from odcheap.data.transforms import LARGEST_SIDE
from odcheap.layers.cheap_conv import BlockType
from odcheap.layers.fuse import fold_branches
from odcheap.models.backbone import RGB, Backbone, adapt_input, to_backbone
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import Failure, OptionError, first_line
from odcheap.utils.files import parse_json, read_safetensors
from odcheap.utils.hub import download_student, is_hub_address
from odcheap.utils.parts import OWN_PACKAGE, build_part

Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
BitDepth = Annotated[int, Field(ge=8, le=16)] | None
ImageSize = Annotated[list[Side], Field(min_length=3, max_length=3)]
Numbers = Annotated[list[float], Field(min_length=1)]
BUILD_ERRORS = (KeyError, TypeError, AttributeError, ValueError, RuntimeError, Failure)


class NetworkSettings(BaseModel):
    """The settings from which a network is built, as files store them together with the weights.

    Attributes:
        backbone: A dict with the name of the backbone in `conf/backbone` under the key "part", and with its options.
        block_type: A dict with the name of the block type in `conf/block_type` under "part", and with its options.
        classes: The names of the classes, in the order of the logits.
        folded: True if the weights are those of a network in which `fold_branches` has replaced each `RepDepthwise` by
            one convolution.
        image_size: [C, H, W] of the images that the network takes; None for RGB images of any size.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    backbone: dict[str, Any]
    block_type: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=2)]
    folded: bool = False
    image_size: ImageSize | None = None


class StudentSettings(NetworkSettings):
    """The settings of a trained network: those of `NetworkSettings`, and how images are prepared for it.

    Attributes:
        split: The fingerprint of the training data: a hexadecimal hash of the images, their labels, and the choice of
            those that are held out.
        image_size: [C, H, W] of the images that the network takes.
        shorter_side: The number of pixels to which the shorter side of an image is resized before its center is
            cropped.
        mean: The mean of each channel with which images, whose values are in [0, 1], are normalized.
        std: The standard deviation of each channel with which they are normalized.
        bit_depth: If images have 16 bits a channel, the number of bits that their values use; otherwise None.
    """

    split: str
    image_size: ImageSize  # ty: ignore[incompatible-mutable-override] - required here
    shorter_side: Side
    mean: Numbers
    std: Numbers
    bit_depth: BitDepth = None


class NormalizedNetwork(nn.Module):
    """A network for images with values in [0, 1]: it normalizes them, then calls another network.

    Args:
        network: The other network, which maps normalized images (N, C, H, W) to logits (N, K).
        mean: The mean of each channel, in [0, 1], which is subtracted.
        std: The standard deviation of each channel, by which the result is divided.

    Shape:
        Images (N, C, H, W) in [0, 1] -> logits (N, K).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def load_student(path: str | Path, config_dirs: Sequence[str | Path] = ()) -> NormalizedNetwork:
    """Loads a trained student from the file `student.safetensors` of a run or of an export.

    The file contains tensors and settings. No code from it is run.

    Args:
        path: The file; or `hf://user/name`, a repository of the Hugging Face Hub to which `odcheap push` has uploaded
            an export. `hf://user/name@REVISION` chooses a branch, a tag or a commit of the repository.
        config_dirs: Further `conf` directories, if the student has a backbone or a block type (a kind of cheap
            convolution) of your own.

    Returns:
        A network in eval mode that maps RGB images (N, 3, H, W) in [0, 1] to logits (N, K). If it was trained with
        `data.channels=1`, it takes gray images (N, 1, H, W). Its attribute `network` is the network without the
        normalization.

    Raises:
        OptionError: The file is damaged or of another kind, its weights do not fit its network, or it cannot be
            downloaded.
        Failure: `path` begins with `hf://`, and `huggingface_hub` is not installed.

    Example:
        This makes a file such as a run writes, here with a network that was not trained, and loads it:

        >>> import json, tempfile
        >>> from safetensors.torch import save_file
        >>> settings = {"backbone": {"part": "resnet20"}, "block_type": {"part": "DW"}, "classes": ["cat", "dog"]}
        >>> network = build_network(settings, "path", "student.safetensors")
        >>> settings |= {"split": "", "image_size": [3, 32, 32], "shorter_side": 32}
        >>> settings |= {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
        >>> path = tempfile.mkdtemp() + "/student.safetensors"
        >>> save_file(network.state_dict(), path, metadata={"odcheap": json.dumps(settings)})
        >>> load_student(path)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 2])
    """
    if is_hub_address(path):
        path = download_student(str(path))
    tensors, metadata = read_safetensors(path)
    settings = read_student_settings(metadata, "path", path)
    network = load_network(settings, tensors, "path", path, config_dirs)
    return NormalizedNetwork(network, settings["mean"], settings["std"]).eval()


def read_student_settings(metadata: Mapping[str, str], option: str, path: str | Path) -> dict[str, Any]:
    """Parses and checks the metadata of a `student.safetensors`; returns a dict with the keys of `StudentSettings`.

    Args:
        metadata: The metadata of the file, which `read_safetensors` has returned.
        option: The name of the option with which the user gave the file, for error messages.
        path: The file, for error messages.

    Raises:
        OptionError: The settings are missing or not valid.
    """
    # `parse_json` raises ValueError and RecursionError for text that is no JSON; pydantic's error is a ValueError too.
    try:
        settings = parse_json(metadata.get("odcheap", "{}"), path, option)
        StudentSettings.model_validate(settings)
    except (ValueError, RecursionError) as error:
        raise OptionError(option, path, "is no student of a run: it has no valid settings of a network") from error
    return settings


def load_network(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    option: str,
    path: str | Path,
    config_dirs: Sequence[str | Path] = (),
) -> nn.Module:
    """Builds a network from settings, and loads given weights into it.

    Args:
        settings: A dict with at least the keys `backbone`, `block_type` and `classes`, whose values are described at
            `NetworkSettings`.
        tensors: The state dict with the weights.
        option: The name of the option with which the user gave the file, for error messages.
        path: The file, for error messages.
        config_dirs: Further `conf` directories, for backbones and block types of your own.

    Raises:
        OptionError: No network can be built from the settings, or the weights do not fit it.
    """
    network = build_network(settings, option, path, config_dirs=config_dirs)
    check_state_dict(network.state_dict(), tensors, path, "its weights are another network's", option)
    network.load_state_dict(tensors)
    return network


def build_network(
    settings: Mapping[str, Any],
    option: str,
    path: str | Path,
    block_type: BlockType | None = None,
    config_dirs: Sequence[str | Path] = (),
) -> nn.Module:
    """Builds a network from settings, with new random weights.

    Args:
        settings: A dict with at least the keys `backbone`, `block_type` and `classes`, whose values are described at
            `NetworkSettings`.
        option: The name of the option with which the user gave the file of the settings, for error messages.
        path: That file, for error messages.
        block_type: The kind of cheap convolution to use; None for the one in the settings.
        config_dirs: Further `conf` directories, for backbones and block types of your own.

    Raises:
        OptionError: No network can be built from the settings.
    """
    # The file may come from a stranger: whatever is wrong with its settings becomes one line that names the file.
    folders = [Path(folder) for folder in config_dirs]
    try:
        own = {name: settings[name] for name in NetworkSettings.model_fields if name in settings}
        checked = NetworkSettings.model_validate(own)
        backbone = checked.backbone
        if "pretrained" in backbone:
            backbone = backbone | {"pretrained": None}  # the weights come from the file itself
        conv = block_type or build_part("block_type", checked.block_type, config_dirs=folders)
        build = build_part("backbone", backbone, config_dirs=folders)
        channels = checked.image_size[0] if checked.image_size else RGB
        is_compared = block_type is not None
        network = build_backbone(build, conv, len(checked.classes), channels, for_comparison=is_compared)
        return fold_branches(network) if checked.folded else network
    except ImportError as error:
        raise OptionError(
            option, path, f"its network needs a package that is not installed ({error}){OWN_PACKAGE}"
        ) from error
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise OptionError(option, path, f"its settings build no network (their {name} is missing or wrong)") from error
    except BUILD_ERRORS as error:
        reason = str(error) if isinstance(error, OptionError) else first_line(error)
        raise OptionError(option, path, f"its settings build no network ({reason})") from error


def build_backbone(
    build: Callable[..., nn.Module],
    conv: BlockType,
    num_classes: int,
    channels: int = RGB,
    *,
    for_comparison: bool = False,
) -> Backbone:
    """Builds a network with the convolutions of a block type, for images with any number of channels.

    Args:
        build: A function that takes `conv` and `num_classes` and returns a network, such as a class of backbones.
        conv: The block type, which builds the convolutions.
        num_classes: The number of classes, K.
        channels: The number of channels of the images; the first convolution is changed if it is not 3.
        for_comparison: Pass True if the network is only compared with the same network with other convolutions. It
            matters for a `CifarResNet` with standard convolutions, which has no expansion: with True, the option
            `expansion` of `build` is ignored; with False, an expansion other than 1 raises `OptionError`.
    """
    own = getattr(build, "func", build)
    if for_comparison and not conv.is_cheap and isinstance(own, type) and issubclass(own, CifarResNet):
        build = partial(build, expansion=1)
    return adapt_input(to_backbone(build(conv=conv, num_classes=num_classes)), channels)


def check_state_dict(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: str | Path, reason: str, option: str = "weights"
) -> None:
    """Raises `OptionError` if the tensors of a file have other names or shapes than those of a network.

    Args:
        own: The state dict of the network.
        given: The state dict in the file.
        path: The file, for the error message.
        reason: What such a difference means, for the error message, such as "weights of another network". The message
            also names the first difference.
        option: The name of the option with which the user gave the file, for the error message.
    """
    for name in sorted(own.keys() | given.keys()):
        mine, theirs = (tuple(state[name].shape) if name in state else "none" for state in (own, given))
        if mine != theirs:
            raise OptionError(option, path, f"{reason}: {name} is {theirs} in the file, {mine} in the network")
