"""Students, which are networks that are trained together, and functions that run all of them on a batch.

Each function `run_...` takes the S students and, for each of them, its images (N, C, H, W). It returns the last feature
map of each student, a list of S tensors, and the logits (S, N, K). All these functions give the same numbers, except
for rounding and for the random numbers of dropout.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import cast

import torch
from torch import Tensor, nn

from odcheap.models.backbone import Backbone
from odcheap.models.wrapped_network import WrappedNetwork, to_backbone
from odcheap.utils.arguments import StudentCount, check_arguments
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import derive_seed, seed_generators, temporary_seed

MAX_EQUAL_SHARE = 0.1  # of the parameters of two students; a warning names a larger share

StudentOutputs = tuple[list[Tensor], Tensor]
RunStudents = Callable[[Sequence[Backbone], Sequence[Tensor]], StudentOutputs]


def run_sequential(members: Sequence[Backbone], views: Sequence[Tensor]) -> StudentOutputs:
    """Runs one student after the other on a batch.

    In training on a CPU each student draws its random numbers (dropout) from its own random stream, so that these
    numbers do not depend on the other students.

    Args:
        members: The S students.
        views: For each student its images (N, C, H, W).

    Returns:
        A list with the last feature map (N, C', h, w) of each student, and the logits (S, N, K).
    """
    # The seeds of the students' random streams are derived from one number of PyTorch's own stream, so that each step
    # has new ones. PyTorch's stream then goes on as if no student had drawn a number.
    features, logits = [], []
    has_own_stream = members[0].training and not views[0].is_cuda  # a CUDA graph keeps its generator
    base = int(torch.randint(2**62, ())) if has_own_stream else 0
    with torch.random.fork_rng(devices=[], enabled=has_own_stream):
        for k, (student, view) in enumerate(zip(members, views, strict=True)):
            if has_own_stream:
                seed_generators(derive_seed(base, "student", k), views[0].device)
            feature_map, output = student.features_and_logits(view)
            features.append(feature_map)
            logits.append(output)
    return features, torch.stack(logits)


def run_on_streams(members: Sequence[Backbone], views: Sequence[Tensor]) -> StudentOutputs:
    """Runs each student on its own CUDA stream; in a CUDA graph the streams become parallel branches.

    The backward pass uses the same streams, since autograd runs each operation on the stream of its forward pass. If
    the images are on a CPU, the students run one after the other.

    Args:
        members: The S students.
        views: For each student its images (N, C, H, W).

    Returns:
        A list with the last feature map (N, C', h, w) of each student, and the logits (S, N, K).
    """
    if not views[0].is_cuda:
        return run_sequential(members, views)
    # Each stream waits until the images are ready, and the current stream waits until all students are done.
    current, features, logits = torch.cuda.current_stream(), [], []
    streams = _student_streams(views[0].device, len(members))
    for student, view, stream in zip(members, views, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            feature_map, output = student.features_and_logits(view)
            features.append(feature_map)
            logits.append(output)
    for stream in streams:
        current.wait_stream(stream)
    return features, torch.stack(logits)


@lru_cache
def _student_streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Returns `count` CUDA streams, and the same ones in every call, since PyTorch keeps memory for each stream."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))


def run_auto(members: Sequence[Backbone], views: Sequence[Tensor]) -> StudentOutputs:
    """Runs the students on CUDA streams while a CUDA graph is recorded, and one after the other everywhere else.

    Args:
        members: The S students.
        views: For each student its images (N, C, H, W).

    Returns:
        A list with the last feature map (N, C', h, w) of each student, and the logits (S, N, K).
    """
    is_recorded = views[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return run_on_streams(members, views) if is_recorded else run_sequential(members, views)


def check_builder(build: object) -> None:
    """Raises `OptionError` if the argument `build` of `Students` is not a function that can make new networks.

    Args:
        build: The argument; a network (`nn.Module`) is refused although it can be called.
    """
    if isinstance(build, nn.Module) or not callable(build):
        what = "a network" if isinstance(build, nn.Module) else "no function"
        advice = "must be a function that makes a new network in each call, such as `lambda: copy.deepcopy(network)`"
        raise OptionError("build", type(build).__name__, f"{advice}; this is {what}")


def check_separate(members: Sequence[nn.Module]) -> None:
    """Raises `OptionError` if two of the given students share a parameter, such as the same network twice."""
    owners: dict[int, int] = {}
    for k, student in enumerate(members):
        own = student.network if isinstance(student, WrappedNetwork) else student
        for name, parameter in own.named_parameters():
            first = owners.setdefault(id(parameter), k)
            if first != k:
                same = set(map(id, own.parameters())) == set(map(id, members[first].parameters()))
                what = "the same network twice" if same else f"two networks that share the parameter {name}"
                advice = 'such as `lambda: copy.deepcopy(network)` or `lambda: cheapen(network, "DW")`'
                allowed = f"returned {what}; it must make a new network in each call, {advice}"
                raise OptionError("build", f"function that returns {type(own).__name__}", allowed)


def find_equal_weights(first: nn.Module, second: nn.Module) -> tuple[float, list[str]]:
    """Returns how many of the parameters of two networks with the same architecture have equal values.

    Tensors with a single value, such as the biases of a new network, are not compared, since they are equal in all
    networks. Parameters that are not trained are not compared either.

    Returns:
        The share, from 0 to 1, of the compared parameters that are equal, and the names of the equal tensors.
    """
    others = dict(second.named_parameters())
    trained = {name: own for name, own in first.named_parameters() if own.requires_grad}
    compared = {name: own for name, own in trained.items() if own.numel() and bool((own != own.flatten()[0]).any())}
    equal = [name for name, own in compared.items() if torch.equal(own, others[name])]
    total = sum(own.numel() for own in compared.values())
    return sum(compared[name].numel() for name in equal) / max(1, total), equal


def describe_equal_weights(first: nn.Module, second: nn.Module) -> str:
    """Returns a warning as text if two students start with equal weights, all or many of them; otherwise "".

    If only a part of the weights is equal, this is reported for networks in a `WrappedNetwork` only.

    Args:
        first: A student.
        second: Another student, whose parameters have the same names and shapes.
    """
    share, names = find_equal_weights(first, second)
    if share == 1:
        return "the students start with equal weights, and may never differ; add_weight_noise changes them"
    # Backbones choose their weights themselves, with options such as `backbone.noise`.
    if share <= MAX_EQUAL_SHARE or not isinstance(first, WrappedNetwork):
        return ""
    layers = list(dict.fromkeys(name.removeprefix("network.").rpartition(".")[0] for name in names))
    shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    text = f"{100 * share:.0f} % of the parameters are equal in all students at the start ({shown})"
    advice = "add_weight_noise(network, all_layers=True) changes them"
    return f"{text}, as in copies of one network, so the students differ less; {advice}"


# The values of the option `together`.
RUNS: dict[str, RunStudents] = {"auto": run_auto, "sequential": run_sequential, "streams": run_on_streams}


def check_run(run: RunStudents, device: torch.device) -> None:
    """Raises `OptionError` if the students cannot be run in the chosen way on a device.

    Args:
        run: The function that runs the students; `run_on_streams` needs a CUDA device.
        device: The device of the run.
    """
    if run is run_on_streams and device.type != "cuda":
        raise OptionError("together", "streams", f"needs a CUDA device; the run is on {device}")


def find_equal_shapes(members: Sequence[nn.Module]) -> tuple[nn.Module, nn.Module] | None:
    """Returns the first two students whose parameters have the same names and shapes; None if there are none."""
    shapes = [{name: own.shape for name, own in student.named_parameters()} for student in members]
    pairs = combinations(range(len(members)), 2)
    return next(((members[i], members[k]) for i, k in pairs if shapes[i] == shapes[k]), None)


@check_arguments("")
class Students(nn.Module):
    """The students of a method: networks that are trained together, of one architecture or of several.

    Args:
        build: A function that makes a new student in each call: a `Backbone` or any classification network
            (N, C, H, W) -> (N, K), such as the result of `cheapen`. A network that is no `Backbone` is wrapped, see
            `to_backbone`. Start students from one trained network with `add_weight_noise`, so that they differ. If the
            students have different architectures: a list with one such function for each student. Their logits must
            have the same number of classes; whether their feature maps may differ depends on the method.
        num_stu: The number of students, S.
        seed: The initial weights of student k depend on (seed, k) only.
        run: The function that runs all students on a batch: `run_auto`, `run_sequential` or `run_on_streams`.

    Attributes:
        members: The students, an `nn.ModuleList` of backbones. A wrapped network is `members[k].network`.

    Shape:
        Images (N, C, H, W); or (S, N, C, H, W), in which each of the S students has its own augmentation -> list of S
        last feature maps (N, C', H', W'), and logits (S, N, K).

    Example:
        >>> from odcheap.layers.cheap_conv import DW
        >>> from odcheap.models.cifar import CifarResNet
        >>> students = Students(lambda: CifarResNet(8, DW(), num_classes=10), num_stu=2, seed=0)
        >>> features, logits = students(torch.zeros(4, 3, 32, 32))
        >>> features[0].shape, logits.shape
        (torch.Size([4, 64, 8, 8]), torch.Size([2, 4, 10]))

    Raises:
        OptionError: `build` is no function, its networks share parameters, a network cannot be a student, or the
            networks have different numbers of classes. The message says what is wrong.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]],
        num_stu: StudentCount,
        seed: int,
        run: RunStudents = run_auto,
    ):
        super().__init__()
        # Student k is the same for every number of students: its seed is temporary and depends on k only.
        if isinstance(build, str):  # a name is a sequence too
            check_builder(build)
        builders = list(build) if isinstance(build, Sequence) else [build] * num_stu
        if len(builders) != num_stu:
            raise OptionError("num_stu", num_stu, f"must be {len(builders)}, the number of functions in `build`")
        members = []
        for k, build_one in enumerate(builders):
            check_builder(build_one)
            with temporary_seed(seed, "student", k):
                members.append(to_backbone(build_one()))
        check_separate(members)
        counts = [student.num_classes for student in members]
        if len(set(counts)) > 1:
            raise OptionError("build", "functions", f"must make networks with equal numbers of classes, not {counts}")
        self.members, self.run = nn.ModuleList(members), run
        equal = find_equal_shapes(members)
        line = "" if equal is None else describe_equal_weights(*equal)
        if line:
            warnings.warn(line, stacklevel=3)  # the caller, above `check_arguments`

    def backbones(self) -> list[Backbone]:
        """Returns the students as a list."""
        return cast("list[Backbone]", list(self.members))

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_features(self) -> int:
        """The number of channels of the last feature map of student 0."""
        return self.backbones()[0].num_features

    @property
    def total_features(self) -> int:
        """The number of channels of the last feature maps of all students together."""
        return sum(student.num_features for student in self.backbones())

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return self.backbones()[0].num_classes

    def forward(self, images: Tensor) -> StudentOutputs:
        # Four dimensions: all students get the same images. Five: the first one is the student's number.
        views = images if images.ndim == 5 else [images] * len(self)
        return self.run(self.backbones(), list(views))
