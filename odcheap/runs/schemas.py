"""Schemas (pydantic models) of the files in a run's folder; each file is checked with its schema before it is used.

Files may come from strangers. A metric may be missing, since earlier versions did not write all metrics, but it must
not have a wrong type. Entries that a schema does not name are ignored.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from odcheap.utils.errors import OptionError
from odcheap.utils.text import escape_control_chars

Accuracy = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Index = Annotated[int, Field(ge=0, le=2**31)]
Figure = Annotated[float, Field(ge=0, le=1e30)]
State = Literal["running", "stopped", "failed", "finished"]


class Schema(BaseModel):
    """The base class of all schemas. Numbers must be finite, and no type is converted: "1" is not a number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Status(Schema, extra="forbid"):
    """The content of `status.json`: the run's state, why it failed or stopped, and the host and id of its process."""

    state: State
    reason: str = ""
    host: str | None = None
    pid: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class Member(Schema):
    """The metrics of one network: a student, a moving average of a student's weights, the teacher, or the ensemble.

    The prefix `val` is for held-out images. `kind` is set for a teacher, such as "head" or "frozen". `network` (its
    name), `params` (parameters) and `macs` (multiply-accumulates) are set if the students have different networks.
    """

    val_top1: Accuracy | None = None
    val_balanced_accuracy: Accuracy | None = None
    test_top1: Accuracy | None = None
    test_top5: Accuracy | None = None
    test_balanced_accuracy: Accuracy | None = None
    kind: str | None = None
    network: str | None = None
    params: Count | None = None
    macs: Count | None = None


class Members(Schema):
    """The metrics of all networks of a method, measured at the end of the same epoch.

    `averages` are moving averages of the students' weights; the ensemble is the mean softmax of all students.
    """

    students: list[Member] | None = None
    averages: list[Member] | None = None
    teacher: Member | None = None
    ensemble: Member | None = None


class Selected(Member):
    """The student that a run has selected as its best, with the epoch and the metrics of this student.

    Attributes:
        student: The number of the student, from 0.
        averaged: True if the moving average of the student's weights is selected, and not the student itself.
        epoch: The number of the selected epoch, from 0.
        selected_on: The images on which it was selected: "val" (held-out images) or "test". "last" means that nothing
            was compared: it is student 0 of the last epoch.
        balanced_accuracy: The mean over the classes of the recall on the test images.
        recall: The recall of each class on the test images, by the name of the class; None for a class without images.
    """

    student: Index | None = None
    averaged: bool | None = None
    epoch: Index | None = None
    selected_on: Literal["val", "last", "test"] | None = None
    balanced_accuracy: Accuracy | None = None
    recall: dict[str, Accuracy | None] | None = None


class NetworkCost(Schema):
    """The costs of one network: the standard network (with standard convolutions), or a teacher trained before.

    Attributes:
        params: The number of parameters.
        macs: The number of multiply-accumulates (MACs) for one image.
        note: How the standard network differs from the student in more than its convolutions.
        train_seconds: The time of the teacher's training.
        training_macs: The MACs of the teacher's whole training.
    """

    params: Count | None = None
    macs: Count | None = None
    note: str | None = None
    train_seconds: Figure | None = None
    training_macs: Figure | None = None


class Cost(Schema):
    """The costs of the selected student, of the networks that it is compared with, and of the training.

    Attributes:
        params: The number of parameters of the student.
        macs: The number of multiply-accumulates (MACs) of the student for one image.
        standard: The costs of the same network with standard convolutions.
        teacher: The costs of a teacher that was trained before.
        training_macs: The MACs of the whole training.
        training_macs_with_teacher: The same, plus the MACs of that teacher's training.
    """

    params: Count | None = None
    macs: Count | None = None
    standard: NetworkCost | None = None
    teacher: NetworkCost | None = None
    training_macs: Figure | None = None
    training_macs_with_teacher: Figure | None = None


class Test(Members):
    """The content of `test.json`, which an evaluation with `test_only=true` writes."""

    __test__ = False  # pytest would take the class for a test case

    selected: Selected | None = None
    split: str | None = None
    versions: dict[str, str] | None = None


class Summary(Test):
    """The content of `summary.json`: the results of a run, which are written when its training has finished."""

    finished: bool = False
    last: Members | None = None
    cost: Cost | None = None
    images_per_second: Figure | None = None
    train_seconds: Figure | None = None
    epochs: Index | None = None
    seed: int | None = None
    data: str | None = None
    images: dict[str, Count] | None = None
    classes: dict[str, dict[str, Count]] | None = None
    num_stu: Index | None = None


class Config(Schema, extra="allow"):
    """The content of `config.yaml`: all options of a run, nested by config groups like the files in `conf/`."""

    job_dir: str | None = None
    data: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None


class SavedWeights(Schema):
    """What a file of weights says about the weights.

    A file that another program has written does not contain these entries. It then has the defaults, None and False.

    Attributes:
        split: A hash that identifies the training images and the held-out images.
        classes: The names of the classes, in the order of the logits.
        folded: True if parallel branches were folded into one convolution (see `fold_branches`). Such a network cannot
            be trained further.
    """

    split: str | None = None
    classes: list[str] | None = None
    folded: bool = False


class SavedRun(Schema):
    """The entry `odcheap` of a checkpoint, which describes the run.

    Attributes:
        overrides: The options that the user has given, such as `num_stu=4`.
        config: All options of the run, nested by config groups.
        split: A hash that identifies the training images and the held-out images.
        classes: The names of the classes, in the order of the logits.
        student: The settings from which a student can be built.
        students: The settings of each student, if the students have different networks; otherwise None.
    """

    overrides: list[str]
    config: dict[str, Any]
    split: str
    classes: list[str]
    student: dict[str, Any]
    students: list[dict[str, Any]] | None = None


class Selection(Schema):
    """Which network and epoch a run has selected so far, as a checkpoint stores it.

    Attributes:
        candidate: The number of the selected network, from 0. The students come first, then the moving averages of
            their weights.
        epoch: The number of the selected epoch, from 0.
        score: The metric by which the network was selected.
    """

    candidate: Index
    epoch: Index
    score: float | None = None


class SavedRecord(Schema):
    """The state of the callback `Record` in a checkpoint: the metrics of each epoch, and the selected network.

    `seconds` is the training time so far.
    """

    # Metrics of a run that diverges may be NaN.
    history: list[dict[str, Annotated[float, Field(allow_inf_nan=True)] | None]]
    selected: Selection
    seconds: Figure | None = None


class Callbacks(Schema):
    """The states of the callbacks in a checkpoint, by the names of their classes."""

    Record: SavedRecord
    LoggerRuns: dict[str, str] | None = None


class Checkpoint(Schema):
    """The type of a checkpoint's content: its fields are the entries that are read before Lightning loads the file."""

    odcheap: SavedRun
    callbacks: Callbacks
    epoch: Index
    loops: dict[str, Any]
    state_dict: dict[str, Any]


class SweepPlan(Schema):
    """What is known about the runs of a sweep before they start.

    Attributes:
        count: The number of runs, including those in `done`.
        done: The number of runs that were already finished, if the sweep continues an earlier search; otherwise 0.
        swept: The names of the options that the sweep varies.
        runs: The names of the runs' folders; empty if they are not known before the runs start.
    """

    count: Count
    done: Count = 0
    swept: list[str] = []
    runs: list[str] = []


class SweepPlans(SweepPlan):
    """The content of `sweep.json` in a sweep's folder: the plan of the sweep that was started last.

    Attributes:
        others: The plans of earlier sweeps in this folder that have unfinished runs.
    """

    others: list[SweepPlan] = []


class Trial(Schema):
    """One trial of a search by Optuna. The fields have the names of the properties of Optuna's `FrozenTrial`."""

    state: Literal["RUNNING", "WAITING", "COMPLETE", "PRUNED", "FAIL"]
    value: float | None = None
    params: dict[str, Any] = {}
    distributions: dict[str, str] = {}
    user_attrs: dict[str, Any] = {}
    system_attrs: dict[str, Any] = {}


class Search(Schema):
    """A search by Optuna: the overrides with which it was started, and its trials, the earliest first."""

    overrides: list[str]
    trials: list[Trial]


class Study(Schema):
    """The content of `study.json` in the folder of a sweep: all searches by Optuna that were started there."""

    searches: list[Search] = []


S = TypeVar("S", bound=BaseModel)


def validate(schema: type[S], content: Any, path: str | Path, option: str) -> S:
    """Checks the content of a file with a schema, and returns it as an object of the schema.

    Args:
        schema: The schema: a pydantic model such as `Summary`.
        content: The content of the file, as dicts and lists.
        path: The file, for messages.
        option: The name of the option that gave the file, for messages.

    Raises:
        OptionError: The content does not fit the schema. The message names the file, the first wrong field, and what is
            allowed.
    """
    try:
        return schema.model_validate(content)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise OptionError(option, path, "is nested too deeply") from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = escape_control_chars(".".join(map(str, first["loc"]))[:100]) or "its content"
        raise OptionError(option, path, f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
