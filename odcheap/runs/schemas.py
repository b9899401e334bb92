"""Schemas of the files in a run's folder, with which files are checked before they are used: strangers may send them.

A metric may be missing, since earlier versions did not write all metrics, but it must not have a wrong type. Entries
that a schema does not name are ignored.
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
    """The base class of all schemas: numbers must be finite, and nothing is converted ("1" is no number)."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Status(Schema, extra="forbid"):
    """The content of `status.json`: the state of the run, the reason of a failure, and the process that wrote it."""

    state: State
    reason: str = ""
    host: str | None = None
    pid: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class Member(Schema):
    """The metrics of one network: a student, a moving average of a student's weights, the teacher, or the ensemble.

    The accuracies with the prefix `val` are those on held-out images. A teacher has a `kind`, such as "head" or
    "frozen". Students have `network` (a name), `params` and `macs` if their networks differ.
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
    """The metrics of all networks of a method, measured with the weights of the same epoch.

    `averages` are those of the moving averages of the students' weights.
    """

    students: list[Member] | None = None
    averages: list[Member] | None = None
    teacher: Member | None = None
    ensemble: Member | None = None


class Selected(Member):
    """The selected student, or moving average of a student's weights: its number, its epoch and its metrics.

    Attributes:
        student: The number of the student, from 0.
        averaged: Whether the moving average of its weights is selected, and not the student itself.
        epoch: The number of the selected epoch, from 0.
        selected_on: The images on which it was selected; "last" for student 0 of the last epoch, without any selection.
        balanced_accuracy: The mean recall of the classes on the test images.
        recall: The recall of each class on the test images, by the name of the class; None for a class without images.
    """

    student: Index | None = None
    averaged: bool | None = None
    epoch: Index | None = None
    selected_on: Literal["val", "last", "test"] | None = None
    balanced_accuracy: Accuracy | None = None
    recall: dict[str, Accuracy | None] | None = None


class NetworkCost(Schema):
    """The costs of a network: parameters, multiply-accumulates, and for a trained teacher those of its training.

    `note` says how the standard network differs from the student in more than its convolutions.
    """

    params: Count | None = None
    macs: Count | None = None
    note: str | None = None
    train_seconds: Figure | None = None
    training_macs: Figure | None = None


class Cost(Schema):
    """The costs of a student, of the standard network, of a trained teacher, and of the training.

    See `training.summary.summarize_costs`.
    """

    params: Count | None = None
    macs: Count | None = None
    standard: NetworkCost | None = None
    teacher: NetworkCost | None = None
    training_macs: Figure | None = None
    training_macs_with_teacher: Figure | None = None


class Test(Members):
    """The content of `test.json`: the metrics of a test with `test_only=true`."""

    __test__ = False  # pytest would take the class for a test case

    selected: Selected | None = None
    split: str | None = None
    versions: dict[str, str] | None = None


class Summary(Test):
    """The content of `summary.json`: the results of a run; see `training.experiment.Experiment.summarize`."""

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
    """The content of `config.yaml`: the options of a run by name, nested as in `conf/`."""

    job_dir: str | None = None
    data: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None


class SavedWeights(Schema):
    """The description of weights in a file; it is empty in files of other programs.

    Attributes:
        split: A hash of the images with which the weights were trained, and of which of them were held out.
        classes: The names of the classes, in the order of the logits.
        folded: Whether branches were folded into one convolution (see `fold_branches`), so that the network cannot be
            trained further.
    """

    split: str | None = None
    classes: list[str] | None = None
    folded: bool = False


class SavedRun(Schema):
    """The entry `odcheap` of a checkpoint, which describes the run; see `training.summary.describe_run`."""

    overrides: list[str]
    config: dict[str, Any]
    split: str
    classes: list[str]
    student: dict[str, Any]
    students: list[dict[str, Any]] | None = None


class Selection(Schema):
    """The entry `selected` of the callback `Record` in a checkpoint: what is selected so far.

    Attributes:
        candidate: The number of the selected network, from 0: the students come first, then the moving averages of
            their weights.
        epoch: The number of the selected epoch, from 0.
        score: The metric by which it was selected.
    """

    candidate: Index
    epoch: Index
    score: float | None = None


class SavedRecord(Schema):
    """The state of the callback `Record` in a checkpoint: the metrics of each epoch, and what is selected so far.

    `seconds` is the training time until then.
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
    """The entries of a checkpoint that are read before Lightning loads it."""

    odcheap: SavedRun
    callbacks: Callbacks
    epoch: Index
    loops: dict[str, Any]
    state_dict: dict[str, Any]


class SweepPlan(Schema):
    """What is known about the runs of a sweep before they start.

    Attributes:
        count: The number of runs.
        done: The number of runs that were finished when a search was continued.
        swept: The options that the sweep varies.
        runs: The names of the runs' folders; empty if they are not known before the runs start.
    """

    count: Count
    done: Count = 0
    swept: list[str] = []
    runs: list[str] = []


class SweepPlans(SweepPlan):
    """The content of `sweep.json` in a sweep's folder: the plan of the sweep that was started last.

    Attributes:
        others: The plans of earlier sweeps in this folder that have runs left.
    """

    others: list[SweepPlan] = []


class Trial(Schema):
    """A trial of a search; the fields have the names of Optuna's properties."""

    state: Literal["RUNNING", "WAITING", "COMPLETE", "PRUNED", "FAIL"]
    value: float | None = None
    params: dict[str, Any] = {}
    distributions: dict[str, str] = {}
    user_attrs: dict[str, Any] = {}
    system_attrs: dict[str, Any] = {}


class Search(Schema):
    """A search: the overrides with which it was started, and its trials in the order in which they were started."""

    overrides: list[str]
    trials: list[Trial]


class Study(Schema):
    """The content of `study.json` in the folder of a sweep: all searches that were started there."""

    searches: list[Search] = []


S = TypeVar("S", bound=BaseModel)


def validate(schema: type[S], content: Any, path: str | Path, option: str) -> S:
    """Returns the content of a file as an object of a schema.

    Args:
        schema: The schema.
        content: The content of the file.
        path: The file, for messages.
        option: The name of the option that gave the file, for messages.

    Raises:
        OptionError: The content does not fit. The message names the file, the first wrong field, and what is allowed.
    """
    try:
        return schema.model_validate(content)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise OptionError(option, path, "is nested too deeply") from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = escape_control_chars(".".join(map(str, first["loc"]))[:100]) or "its content"
        raise OptionError(option, path, f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
