"""A trained network as a teacher that is not trained further, with its own normalization and image size."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers.cheap_conv import Standard
from odcheap.models.backbone import RGB
from odcheap.models.build import load_network, read_student_settings
from odcheap.models.wrappers import TimmBackbone, TorchvisionBackbone, load_pretrained
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_json, read_safetensors
from odcheap.utils.text import count_things

OPTION = "method.teacher_weights"
LIBRARIES = {"torchvision": TorchvisionBackbone, "timm": TimmBackbone}
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224  # pixels
Stds = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
TeacherWeights = str | Annotated[list[str], Field(min_length=1)]


class Teacher(nn.Module):
    """A frozen network as a teacher: it takes the students' images, normalizes and resizes them, and returns logits.

    The network always stays in eval mode. The state dict of this module contains a hash of the network's weights, not
    the weights. Loading the state dict of another teacher raises `OptionError`.

    Args:
        network: A network that maps normalized images (N, C, size, size) to logits (N, K).
        images_norm: The mean and the standard deviation, one number for each channel, with which the students' images
            are normalized.
        mean: The mean of each channel with which images for the network are normalized.
        std: The standard deviation of each channel for the same images.
        size: The side, in pixels, of the images that the network expects.
        classes: The names of the network's classes; None if they are not known.
        split: The fingerprint of the data on which the network was trained: a hash of the images, their labels, and the
            choice of those that were held out; None if it is not known.
        history: The costs of the network's training, a dict: `train_seconds` is its duration, and `training_macs` the
            number of its multiply-accumulates. None if they are not known.
        path: The file of the weights, for error messages.

    Raises:
        OptionError: The network takes images with another number of channels than the students' images.

    Shape:
        Images (N, C, H, W), normalized for the students -> logits (N, K), without gradients.
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        network: nn.Module,
        images_norm: tuple[Sequence[float], Sequence[float]],
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        classes: list[str] | None = None,
        split: str | None = None,
        history: dict[str, Any] | None = None,
        path: str = "",
    ):
        super().__init__()
        # The network is in a tuple, so that it is no submodule: checkpoints would contain its weights otherwise.
        self._networks = (network.requires_grad_(False).eval(),)
        self.size, self.classes, self.split, self.path = size, classes, split, path
        self.history = {"train_seconds": None, "training_macs": None} | (history or {})
        if len({len(values) for values in (*images_norm, mean, std)}) > 1:
            allowed = f"the teacher takes images with {count_things(len(mean), 'channel')}"
            raise OptionError(OPTION, path, f"{allowed}; the data have {len(images_norm[0])}")
        # One multiplication and one addition change the students' normalization into the teacher's:
        # (x * from_std + from_mean - to_mean) / to_std = x * scale + offset.
        from_mean, from_std, to_mean, to_std = (
            torch.tensor(list(values)).view(1, -1, 1, 1) for values in (*images_norm, mean, std)
        )
        self.register_buffer("scale", from_std / to_std, persistent=False)
        self.register_buffer("offset", (from_mean - to_mean) / to_std, persistent=False)
        self.register_load_state_dict_pre_hook(check_teacher_count)
        super().train(False)

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._networks[0]

    @property
    def teachers(self) -> list["Teacher"]:
        """A list of this teacher alone, for code that takes a `TeacherEnsemble` too."""
        return [self]

    def train(self, mode: bool = True) -> "Teacher":
        return self  # stays in eval mode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        self.network._apply(fn, recurse)  # moves and converts the network, which is no submodule
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        return digest_weights(self.network)

    def set_extra_state(self, state: Tensor) -> None:
        if not torch.equal(state.cpu(), digest_weights(self.network)):
            raise OptionError(OPTION, self.path, "is not the teacher that the run was started with")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.offset
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(images)

    def check_classes(self, classes: list[str]) -> None:
        """Raises `OptionError` if the teacher's classes, provided that they are known, differ from those of the data.

        Args:
            classes: The names of the classes of the data, in the order of the labels.
        """
        if self.classes is not None and self.classes != classes:
            own, given = (f"{', '.join(names[:3])} ..." for names in (self.classes, classes))
            raise OptionError(OPTION, self.path, f"the teacher's classes are {own}; the data's {given}")


class TeacherEnsemble(nn.Module):
    """Several teachers as one teacher: its softened prediction is the mean of their softened predictions.

    Predictions are averaged, not logits, so that a teacher with large logits does not count more than the others.
    Source: You, Xu, Xu, Tao, "Learning from multiple teacher networks", KDD 2017, equation 4.

    Args:
        members: The teachers, a list of `Teacher` objects.
        temperature: T, by which logits are divided before the softmax.

    Attributes:
        network: The networks of all teachers, an `nn.ModuleList`.
        split: The `split` of the teachers, the fingerprint of their training data; None if they differ.
        history: A dict with the sums of the teachers' `train_seconds` and `training_macs`. A sum is None if it is not
            known for one of the teachers.

    Shape:
        Images (N, C, H, W), normalized for the students -> logits (N, K), without gradients. The softmax of these
        logits divided by T is the mean of the softened predictions.
    """

    def __init__(self, members: Sequence[Teacher], temperature: float):
        super().__init__()
        self.members, self.temperature = nn.ModuleList(members), temperature
        self.split = members[0].split if len({teacher.split for teacher in members}) == 1 else None
        costs: dict[str, list[Any]] = {
            name: [teacher.history[name] for teacher in members] for name in members[0].history
        }
        self.history = {name: None if None in values else sum(values) for name, values in costs.items()}
        self.register_load_state_dict_pre_hook(check_teacher_count)

    @property
    def teachers(self) -> list[Teacher]:
        """The teachers as a list."""
        return cast("list[Teacher]", list(self.members))

    @property
    def network(self) -> nn.Module:
        return nn.ModuleList(teacher.network for teacher in self.teachers)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        predictions = [(teacher(images) / self.temperature).log_softmax(-1) for teacher in self.teachers]
        mean = torch.stack(predictions).logsumexp(0) - math.log(len(predictions))
        return mean * self.temperature


def check_teacher_count(
    teacher: Teacher | TeacherEnsemble, state_dict: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Raises `OptionError` if a state dict was saved with another number of teachers; a hook that runs before loading.

    Args:
        teacher: The module into which the state dict will be loaded: one teacher, or several.
        state_dict: The state dict, which has a hash for each teacher with which it was saved, or no hash at all.
        prefix: The prefix of the names of the teachers' entries in the state dict.
        *_: Further arguments, which PyTorch passes to such hooks.
    """
    saved = sum(name.startswith(prefix) and name.endswith("_extra_state") for name in state_dict)
    if saved not in (0, len(teacher.teachers)):
        paths = [member.path for member in teacher.teachers]
        value = paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"
        were = "was" if saved == 1 else "were"
        own = count_things(len(paths), "teacher")
        raise OptionError(OPTION, value, f"names {own}; there {were} {saved} when the run was started")


def digest_weights(network: nn.Module) -> Tensor:
    """Returns a hash of a network's weights, (16,) uint8; it is the same for the weights rounded to bfloat16."""
    # The rounding makes the digest the same for a teacher in float32 and in bfloat16 (trainer.precision).
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous().flatten()
        digest.update(name.encode() + rounded.view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def load_teacher(
    path: str,
    network_name: str | None,
    num_classes: int,
    images_norm: tuple[Sequence[float], Sequence[float]],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> Teacher:
    """Loads a teacher from the folder of a run, or from a local file of published weights.

    Args:
        path: The folder of a run, its `student.safetensors`, or a file of published weights.
        network_name: The network that published weights belong to, such as `torchvision/resnet50` or `timm/resnet18d`;
            None for the teacher of a run.
        num_classes: The number of classes of the data, K.
        images_norm: The mean and the standard deviation, one number for each channel, with which the students' images
            are normalized.
        mean: The mean of each channel with which the teacher's images are normalized. None takes the one of the
            teacher's run, or ImageNet's for published weights.
        std: The standard deviation of each channel for the same images; None as for `mean`.
        size: The side, in pixels, of the images that the teacher expects. None takes the one of the teacher's run, or
            224 for published weights.

    Raises:
        OptionError: The file is of another kind, its weights do not fit the network, the network has another number of
            classes than the data, or a mean or a standard deviation does not have one number for each channel.
    """
    about: dict[str, Any] = {}
    if network_name is not None:  # no file says what images the network expects, so ImageNet's values are the default
        network = load_published_network(network_name, path, num_classes)
        norm, channels, side = IMAGENET_NORM, RGB, IMAGENET_SIZE
    else:  # a student of a run: its settings build the network and say what images it expects
        file = Path(path) / "student.safetensors" if Path(path).is_dir() else Path(path)
        tensors, metadata = read_safetensors(file, OPTION)
        hint = f"{path} (for published weights method.teacher_network names the network)"
        settings = read_student_settings(metadata, OPTION, hint)
        network = load_network(settings, tensors, OPTION, path)
        if len(settings["classes"]) != num_classes:
            allowed = f"the teacher has {len(settings['classes'])} classes, the data {num_classes}"
            raise OptionError(OPTION, path, allowed)
        norm, (channels, *_, side) = (settings["mean"], settings["std"]), settings["image_size"]
        about = {name: settings[name] for name in ("classes", "split")} | {"history": read_training_costs(file)}
    for option, values in (("teacher_mean", mean), ("teacher_std", std)):
        if values is not None and len(values) != channels:
            allowed = f"must have {count_things(channels, 'number')}, one for each channel of the teacher's images"
            raise OptionError(f"method.{option}", list(values), allowed)
    return Teacher(network, images_norm, mean or norm[0], std or norm[1], size or side, path=path, **about)


def read_training_costs(student: Path) -> dict[str, Any]:
    """Reads the costs of a student's training from the `summary.json` in the folder of its file.

    Args:
        student: The path of a `student.safetensors`.

    Returns:
        A dict with two keys. Their values are None if there is no summary, or if it does not contain them.

        - `train_seconds`: the duration of the training in seconds.
        - `training_macs`: the number of multiply-accumulates of the training.

    Raises:
        OptionError: The summary is damaged.
    """
    # A student that was copied out of its run has no summary beside it: its costs are then unknown, not an error.
    path = student.with_name("summary.json")
    summary = read_json(path, OPTION) if path.is_file() else {}
    cost = summary.get("cost") or {} if isinstance(summary, dict) else None
    if not isinstance(cost, dict):
        raise OptionError(OPTION, path, "cost: must be figures by name")
    figures = {"train_seconds": summary.get("train_seconds"), "training_macs": cost.get("training_macs")}
    for name, figure in figures.items():
        if figure is not None and (isinstance(figure, bool) or not isinstance(figure, int | float) or figure < 0):
            raise OptionError(OPTION, path, f"{name}: must be a number of 0 or more")
    return figures


def load_published_network(name: str, path: str, num_classes: int) -> nn.Module:
    """Returns a network of torchvision or timm with published weights, which are read from a local file.

    Args:
        name: The library and the network's name in it, such as `torchvision/resnet50` or `timm/resnet18d`.
        path: The file of the weights.
        num_classes: The number of classes.

    Raises:
        OptionError: The library or the name is unknown, or the weights do not fit.
    """
    library, _, network_name = name.partition("/")
    if library not in LIBRARIES or not network_name:
        raise OptionError("method.teacher_network", name, "must be torchvision/NAME or timm/NAME")
    backbone: Any = LIBRARIES[library](network_name, Standard(), num_classes)
    load_pretrained(backbone.network, path, num_classes, OPTION, new_head=False)
    return backbone
