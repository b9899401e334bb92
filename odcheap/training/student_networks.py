"""Builds the students of a run, which may have different architectures, loads their first weights, and checks them.

The same networks with standard convolutions, with which costs are compared, are built here, too.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from hydra.utils import instantiate
from torch import nn

from odcheap.data.base import ImageData
from odcheap.layers.cheap_conv import BlockType, Standard
from odcheap.layers.fuse import fold_branches
from odcheap.methods.base import Method
from odcheap.methods.students import RUNS, Students
from odcheap.models.backbone import RGB, Backbone
from odcheap.models.build import build_backbone
from odcheap.models.student_shapes import GROUPS, Shape, name_shape
from odcheap.models.wrappers import check_image_size, find_map_size
from odcheap.runs.load import describe_classes, load_weights, read_weights
from odcheap.runs.resume import Start
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import build_part
from odcheap.utils.seeds import temporary_seed


class StudentBuilder(NamedTuple):
    """Builds one student of a run.

    Attributes:
        backbone: The name of the backbone, such as "resnet20".
        build: A function that builds the network from two keyword arguments: `conv`, a `BlockType` such as `DW()`, and
            `num_classes`.
        make_conv: A function without arguments that returns the `BlockType` for `conv`.
        channels: The number of channels of the images.
        explain: A function that is called with an `OptionError` about this student, and returns the error to raise. It
            may replace the name of the option by the full name, such as `students.1.block_type.groups`.
    """

    backbone: str
    build: Callable[..., nn.Module]
    make_conv: Callable[[], BlockType]
    channels: int = RGB
    explain: Callable[[OptionError], OptionError] = lambda error: error

    def build_student(self, num_classes: int) -> nn.Module:
        """Returns a new student for `num_classes` classes.

        Raises:
            OptionError: An option of the student is wrong. The message has the full name of the option.
        """
        try:
            return build_backbone(self.build, self.make_conv(), num_classes, self.channels)
        except OptionError as error:
            raise self.explain(error) from error


def list_builders(start: Start, channels: int) -> list[StudentBuilder]:
    """Returns a `StudentBuilder` for each student of a run.

    Args:
        start: The run's config, and the checkpoint from which it continues, if there is one.
        channels: The number of channels of the images, such as 3.
    """
    # A resumed run needs no pretrained weights: they are in its checkpoint, and their file may be gone.
    cfg, forgotten = start.cfg, {"pretrained": None} if start.content is not None else {}
    shapes = start.config.student_shapes()
    if shapes is None:
        loaded = forgotten if "pretrained" in cfg.backbone else {}
        own = instantiate(cfg.backbone, **loaded)
        builder = StudentBuilder(start.config.parts["backbone"], own, lambda: instantiate(cfg.block_type), channels)
        return [builder] * cfg.num_stu

    built: dict[str, Callable[..., nn.Module]] = {}

    def list_one(number: int, shape: Shape) -> StudentBuilder:
        backbone = shape["backbone"] | (forgotten if "pretrained" in shape["backbone"] else {})
        build = built.setdefault(repr(backbone), build_part("backbone", backbone))  # so that equal backbones are equal
        make_conv = partial(build_part, "block_type", shape["block_type"])
        explain = partial(name_entry, number, shape, start.config.own_shape())
        return StudentBuilder(shape["backbone"]["part"], build, make_conv, channels, explain)

    return [list_one(number, shape) for number, shape in enumerate(shapes)]


def name_entry(number: int, shape: Shape, own: Shape, error: OptionError) -> OptionError:
    """Returns an error whose option has the prefix `students.NUMBER.` if the wrong option is set in that entry.

    Args:
        number: The index of the student in the option `students`.
        shape: The backbone and the block type (kind of cheap convolution) of this student.
        own: The backbone and the block type of the run, which an entry of `students` can replace. If the wrong option
            is equal in `shape` and `own`, the error is returned unchanged.
        error: An error about an option such as `block_type.groups`.
    """
    group, _, option = str(error).partition("=")[0].partition(".")
    if group not in GROUPS:
        return error
    is_own = all(shape[group].get(key) == own[group].get(key) for key in ("part", option))
    return error if is_own else error.with_group(f"students.{number}")


def build_students(start: Start, builders: Sequence[StudentBuilder], num_classes: int) -> Students:
    """Builds the students of a run.

    Args:
        start: The run, whose config has the seed of the initial weights.
        builders: The builder of each student, from `list_builders`.
        num_classes: The number of classes, K.
    """
    cfg = start.cfg
    functions = [partial(builder.build_student, num_classes) for builder in builders]
    return Students(functions, len(functions), cfg.seed, RUNS[cfg.together])


def build_standards(start: Start, builders: Sequence[StudentBuilder], num_classes: int) -> list[Backbone]:
    """Returns for each student the same backbone with standard convolutions, to compare costs.

    If students have the same backbone, the list has the same object for all of them.

    Args:
        start: The run, whose config has the seed of the initial weights.
        builders: The builder of each student, from `list_builders`.
        num_classes: The number of classes, K.
    """
    built: dict[Any, Backbone] = {}
    for builder in builders:
        if builder.build not in built:
            options = Standard(), num_classes, builder.channels
            with temporary_seed(start.cfg.seed, "standard"):
                built[builder.build] = build_backbone(builder.build, *options, for_comparison=True)
    return [built[builder.build] for builder in builders]


def check_networks(method: Method, builders: Sequence[StudentBuilder], image_size: tuple[int, int, int]) -> None:
    """Checks that students can take images of this size, and that the method can use the students together.

    Args:
        method: The training method with the students.
        builders: The builder of each student, from `list_builders`.
        image_size: (C, H, W) of the images.

    Raises:
        OptionError: The images are too large or too small for a student. Or the method joins the students' last feature
            maps, but their sizes differ.
    """
    members = method.students.backbones()
    firsts = dict(zip(builders, members, strict=True))  # one student of each shape
    for builder, student in firsts.items():
        check_image_size(student, image_size, builder.backbone)
    if method.joins_maps and len(firsts) > 1:
        sizes = [find_map_size(student, image_size) for student in members]
        if len(set(sizes)) > 1:
            shown = ", ".join(f"{rows} x {columns}" for rows, columns in sizes)
            name = type(method).__module__.rpartition(".")[2]
            allowed = f"joins the students' last feature maps, which must have equal sizes, and these have {shown}"
            raise OptionError("method", name, f"{allowed}; alone, dml, kd, kdcl, lmcl, one and pcl take such students")


def name_students(start: Start) -> list[str] | None:
    """Returns a short name for each student of a run, such as "DW resnet20"; None if all have one architecture."""
    shapes = start.config.student_shapes()
    return None if shapes is None else [name_shape(shape, shapes) for shape in shapes]


def load_start_weights(start: Start, method: Method, data: ImageData) -> None:
    """Loads the file of the option `weights` into the students of a new run.

    If the run continues from a checkpoint, nothing is loaded. Instead it is checked that the images are the same.

    Args:
        start: The run's config, and the checkpoint from which it continues, if there is one.
        method: The training method, whose weights are changed in place.
        data: The data set; its method `read` has been called.

    Raises:
        OptionError: The images or classes are not those of the checkpoint, or the weights do not fit.
    """
    cfg = start.cfg
    method.check_classes(data.classes)
    check_same_images(start, data)
    if cfg.weights is None or start.checkpoint is not None:
        return
    weights = read_weights(cfg.weights)
    if weights.folded:
        if not cfg.test_only:
            allowed = "holds a folded network, which cannot be trained; the run's own student.safetensors can"
            raise OptionError("weights", cfg.weights, allowed)
        for network in method.candidates():  # in place, since the method may have hooks on parts of them
            fold_branches(network, in_place=True)
    say(load_weights(method, weights, cfg.weights_head == "new", data.classes))
    if cfg.test_only and len(weights.students) < len(method.students.members):
        say("warning: the file has one student; the results of the others, and of a teacher, are of untrained networks")
    is_same_data = weights.classes in (None, list(data.classes))  # splits of different data sets say nothing
    if is_same_data and weights.split not in (None, data.fingerprint):
        say("warning: the weights were selected under another split; held-out images may have been trained on")


def check_finished(start: Start) -> None:
    """Reads the data set, and checks that a finished run was trained on these images.

    Args:
        start: The run's config, and its newest checkpoint.

    Raises:
        OptionError: The run was trained on other images, or the images cannot be read.
    """
    data = instantiate(start.cfg.data)
    data.read()
    check_same_images(start, data)


def check_same_images(start: Start, data: ImageData) -> None:
    """Checks that a checkpoint was trained with the same classes and images, and the same held-out images.

    Args:
        start: The run's config and the checkpoint. If there is no checkpoint, nothing is checked.
        data: The data set; its method `read` has been called.

    Raises:
        OptionError: The classes, the images or the held-out images differ.
    """
    cfg = start.cfg
    if start.content is not None and start.content["odcheap"]["classes"] != list(data.classes):
        own, given = describe_classes(data.classes), describe_classes(start.content["odcheap"]["classes"])
        allowed = f"has {own}, the checkpoint {given}; weights=CHECKPOINT matches classes by their names"
        raise OptionError("data_dir", cfg.data_dir, allowed)
    if start.content is not None and start.content["odcheap"]["split"] != data.fingerprint:
        allowed = "has other images than those with which the resumed run was started"
        if cfg.test_only:
            run = cfg.resume if os.path.isdir(cfg.resume) else "RUN"
            allowed = f"has other images than the run; odcheap evaluate {run} FOLDER evaluates all images of a folder"
        raise OptionError("data_dir", cfg.data_dir, allowed)
