"""Students (networks that are trained together), their moving averages, and functions that run all on a batch.

Each function `run_...` takes the S students and, for each of them, its images (N, C, H, W). It returns the last feature
map of each student, a list of S tensors, and the logits (S, N, K). All these functions give the same numbers, except
for rounding and for the random numbers of dropout.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from odcheap.models.backbone import Backbone, WrappedNetwork, to_backbone
from odcheap.utils.arguments import StudentCount, check_arguments
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import derive_seed, seed_generators, temporary_seed

MAX_EQUAL_SHARE = 0.1  # of the parameters of two students; a warning names a larger share

StudentOutputs = tuple[list[Tensor], Tensor]
RunStudents = Callable[[Sequence[Backbone], Sequence[Tensor]], StudentOutputs]
AverageDecay = Annotated[float, Field(ge=0, lt=1)]


def run_sequential(members: Sequence[Backbone], views: Sequence[Tensor]) -> StudentOutputs:
    """Runs one student after the other on a batch.

    In training on a CPU each student draws random numbers, as for dropout, from its own stream. Its numbers do not
    depend on the other students then.

    Args:
        members: The S students.
        views: A list with the images (N, C, H, W) of each student.

    Returns:
        A list with the last feature map (N, C', h, w) of each student, and the logits (S, N, K).
    """
    # The seeds of the students' random streams are derived from one number of PyTorch's own stream, so that each step
    # has new ones. PyTorch's stream then goes on as if no student had drawn a number.
    outputs = []
    has_own_stream = members[0].training and not views[0].is_cuda  # a CUDA graph keeps its generator
    base = int(torch.randint(2**62, ())) if has_own_stream else 0
    with torch.random.fork_rng(devices=[], enabled=has_own_stream):
        for k, (student, view) in enumerate(zip(members, views, strict=True)):
            if has_own_stream:
                seed_generators(derive_seed(base, "student", k), views[0].device)
            outputs.append(student.features_and_logits(view))
    return join_outputs(outputs)


def run_on_streams(members: Sequence[Backbone], views: Sequence[Tensor]) -> StudentOutputs:
    """Runs the students on a batch, each on its own CUDA stream, so that a GPU may compute them at the same time.

    The backward pass uses the same streams. If the images are on a CPU, the students run one after the other.

    Args:
        members: The S students.
        views: A list with the images (N, C, H, W) of each student.

    Returns:
        A list with the last feature map (N, C', h, w) of each student, and the logits (S, N, K).
    """
    if not views[0].is_cuda:
        return run_sequential(members, views)
    # Each stream waits until the images are ready, and the current stream waits until all students are done.
    current, outputs = torch.cuda.current_stream(), []
    streams = _student_streams(views[0].device, len(members))
    for student, view, stream in zip(members, views, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs.append(student.features_and_logits(view))
    for stream in streams:
        current.wait_stream(stream)
    return join_outputs(outputs)


def join_outputs(outputs: Sequence[tuple[Tensor, Tensor]]) -> StudentOutputs:
    """Returns a list of all last feature maps and the logits (S, N, K), given a pair (map, logits) of each student."""
    features, logits = zip(*outputs, strict=True)
    return list(features), torch.stack(logits)


@lru_cache
def _student_streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Returns `count` CUDA streams, and the same ones in every call, since PyTorch keeps memory for each stream."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))


def run_auto(members: Sequence[Backbone], views: Sequence[Tensor]) -> StudentOutputs:
    """Runs the students on CUDA streams while a CUDA graph is recorded, otherwise one after the other.

    Args:
        members: The S students.
        views: A list with the images (N, C, H, W) of each student.

    Returns:
        A list with the last feature map (N, C', h, w) of each student, and the logits (S, N, K).
    """
    is_recorded = views[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return run_on_streams(members, views) if is_recorded else run_sequential(members, views)


def check_builder(build: object) -> None:
    """Raises `OptionError` if an object is not a function that can make new networks.

    Args:
        build: The object that a user gave as the argument `build` of `Students`. A network (`nn.Module`) is refused,
            although it can be called.
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


def describe_equal_weights(members: Sequence[nn.Module]) -> str:
    """Returns the text of a warning if two students start with equal weights; otherwise the empty string.

    Only the first two students of the same architecture are compared. Parameters that are not trained do not count, nor
    do tensors whose elements are all equal, such as the biases of a new network. The text is also returned if more than
    a tenth of the weights are equal and the students are networks of a `WrappedNetwork`.
    """
    # The first two students whose parameters have the same names and shapes.
    parameters = [dict(student.named_parameters()) for student in members]
    shapes = [{name: own.shape for name, own in named.items()} for named in parameters]
    pairs = combinations(range(len(members)), 2)
    pair = next(((i, k) for i, k in pairs if shapes[i] == shapes[k]), None)
    if pair is None:
        return ""
    first, second = (parameters[k] for k in pair)
    trained = {name: own for name, own in first.items() if own.requires_grad}
    compared = {name: own for name, own in trained.items() if own.numel() and bool((own != own.flatten()[0]).any())}
    equal = [name for name, own in compared.items() if torch.equal(own, second[name])]
    share = sum(first[name].numel() for name in equal) / max(1, sum(own.numel() for own in compared.values()))
    if share == 1:
        return "the students start with equal weights, and may never differ; add_weight_noise changes them"
    # Backbones choose their weights themselves, with options such as `backbone.noise`.
    if share <= MAX_EQUAL_SHARE or not isinstance(members[pair[0]], WrappedNetwork):
        return ""
    layers = list(dict.fromkeys(name.removeprefix("network.").rpartition(".")[0] for name in equal))
    shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    text = f"{100 * share:.0f} % of the parameters are equal in all students at the start ({shown})"
    advice = "add_weight_noise(network, all_layers=True) changes them"
    return f"{text}, as in copies of one network, so the students differ less; {advice}"


# The values of the option `together`.
RUNS: dict[str, RunStudents] = {"auto": run_auto, "sequential": run_sequential, "streams": run_on_streams}


def check_run(run: RunStudents, device: torch.device) -> None:
    """Raises `OptionError` if the students should run on CUDA streams, but the device is not a GPU.

    Args:
        run: The function that runs the students; only `run_on_streams` needs a CUDA device.
        device: The device on which the students are trained.
    """
    if run is run_on_streams and device.type != "cuda":
        raise OptionError("together", "streams", f"needs a CUDA device; the run is on {device}")


@check_arguments("")
class Students(nn.Module):
    """The students: networks that are trained together, of one architecture or of several.

    Args:
        build: A function that makes a new student in each call: a `Backbone`, or any classification network
            (N, C, H, W) -> (N, K), such as the result of `cheapen`. A network that is no `Backbone` is put into a
            `WrappedNetwork`. If all students start from one trained network, the function should call
            `add_weight_noise`, so that they differ. For students of different architectures, pass a list with one such
            function for each student. All students must have the same number of classes.
        num_stu: The number of students, S.
        seed: The seed of the initial weights. Those of student k depend only on the seed and k, not on S.
        run: The function that runs all students on a batch: `run_auto`, `run_sequential` or `run_on_streams`.

    Attributes:
        members: The students, an `nn.ModuleList` of backbones. If a network was wrapped, `members[k].network` is the
            network itself.

    Shape:
        - Input: images (N, C, H, W); or (S, N, C, H, W), in which each of the S students has its own augmentation.
        - Output: a list with the last feature map (N, C', H', W') of each student, and the logits (S, N, K).

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
        builders: list[Any] = [build] * num_stu  # for a string too, which is refused below
        if isinstance(build, Sequence) and not isinstance(build, str):
            builders = list(build)
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
        if line := describe_equal_weights(members):
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


@check_arguments("method")
class AveragedStudents(Students):
    """Copies of the students whose weights are exponential moving averages of the students' weights.

    After optimizer step g (from 0) each averaged weight becomes d times its old value plus (1 - d) times the student's
    weight, with d = min(1 - 1 / (g + 1), average_decay). In the first steps this is the plain mean of the weights after
    all steps. Source: Tarvainen, Valpola, "Mean teachers are better role models", 2017, section 2.

    Batch norm statistics are not averaged. Instead the copies run on the training batches too, and update their own.

    Args:
        students: The students; they are copied and not changed.
        average_decay: The largest d, in [0, 1).

    Attributes:
        steps: The number of updates so far, a scalar.
    """

    # `torch.optim.swa_utils.AveragedModel` cannot be used: it reads its step count from the GPU, which is not possible
    # in a CUDA graph, and it copies the students' batch norm statistics.

    steps: Tensor

    def __init__(self, students: Students, average_decay: AverageDecay):
        nn.Module.__init__(self)  # not that of `Students`, which would build new networks
        self.members, self.run = copy.deepcopy(students.members).requires_grad_(False), students.run
        self.decay = average_decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns the logits (S, N, K) of the S averaged networks, without gradients.

        Args:
            images: (N, C, H, W); or (S, N, C, H, W), in which each of the S copies has its own augmentation.
        """
        return self(images)[1]

    @torch.no_grad()
    def update(self, students: Students) -> None:
        """Updates the averaged weights with the students' weights; it must be called after each optimizer step.

        Args:
            students: The students of which these are the averages.

        Raises:
            OptionError: The students' weights have fewer than 32 bits.
        """
        # The step count is a tensor, and nothing is read from the GPU, so that a CUDA graph can record the update.
        self.steps += 1
        decay = (1 - 1 / self.steps).clamp(max=self.decay)
        for average, weight in zip(self.members.parameters(), students.members.parameters(), strict=True):
            require_single_precision(str(weight.dtype).removeprefix("torch."))
            average.lerp_(weight, (1 - decay).to(weight.dtype))

    def copy_weights(self, students: Students) -> None:
        """Sets the averaged weights to the students' weights, and copies the students' batch norm statistics too."""
        self.members.load_state_dict(students.members.state_dict())


def require_single_precision(precision: str) -> None:
    """Raises `OptionError` if a network of the given precision has weights with fewer than 32 bits.

    Args:
        precision: A precision of Lightning, such as "bf16-true", or the name of a dtype, such as "bfloat16".
    """
    if precision in ("bf16-true", "16-true", "bfloat16", "float16"):
        allowed = "averages, which move by thousandths, need weights in 32 bits (bf16-mixed has them)"
        raise OptionError("trainer.precision", precision, allowed)
