"""Writes the model card for the Hugging Face Hub: a block of metadata in YAML, and after it the card of the export.

The Hub shows and filters models by this block; see https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Sequence
from typing import Any

import yaml

MARK = "---"  # the line before and after the block
TASK = "image-classification"
DATA_SETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}
LOCAL_FILE = 'load_student("student.safetensors")'
FIRST_COMMAND = "```\npython predict.py IMAGE_OR_FOLDER"


def describe_model(repository: str, results: dict[str, Any], data_sets: Sequence[str]) -> dict[str, Any]:
    """Returns the metadata of a model card, by which the Hub shows and filters models.

    Args:
        repository: The name of the repository, `user/name`.
        results: The entries `data` (the name of the run's data set, or None) and `test` (a dict with the test accuracy
            `top1` as a fraction, or None) of the export's `results.json`.
        data_sets: The names on the Hub of the data sets of the training. If there are none, the name of the run's data
            set is used; it is known for CIFAR-10, CIFAR-100 and ImageNet.

    Returns:
        A dict with the Hub's keys `library_name`, `pipeline_tag`, `tags`, and `datasets` if they are known; with a test
        accuracy also `metrics` and `model-index`, which contains it.
    """
    data, test = results["data"], results["test"]
    known = list(data_sets) or ([DATA_SETS[data]] if data in DATA_SETS else [])
    metadata: dict[str, Any] = {
        "library_name": "odcheap",
        "pipeline_tag": TASK,
        "tags": ["odcheap", "onnx"],
        "datasets": known,
    }
    if test is not None:
        metadata["metrics"] = ["accuracy"]
        result = {
            "task": {"type": TASK},
            "dataset": {"type": known[0] if known else data or "unknown", "name": data or "unknown", "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(test["top1"], 6), "name": "Test accuracy"}],
        }
        metadata["model-index"] = [{"name": repository.partition("/")[2], "results": [result]}]
    return {name: value for name, value in metadata.items() if value}


def split_metadata(card: str) -> tuple[dict[str, Any], str]:
    """Splits a model card into its metadata and its text.

    Args:
        card: The text of the card, which may begin with a block of metadata in YAML between two lines `---`.

    Returns:
        The metadata as a dict, which is empty if there is no such block, and the text after the block.

    Raises:
        ValueError: The block of metadata is not valid.
    """
    if not card.startswith(f"{MARK}\n"):
        return {}, card
    block, end, rest = card.removeprefix(f"{MARK}\n").partition(f"\n{MARK}\n")
    try:
        metadata = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise ValueError("its metadata are not valid YAML") from error
    if not end or not isinstance(metadata, dict):
        raise ValueError("its metadata are not valid")
    return metadata, rest.lstrip("\n")


def format_card(metadata: dict[str, Any], card: str, repository: str) -> str:
    """Returns a model card for the Hub: the metadata, then the card with examples that load the student from the Hub.

    Args:
        metadata: The metadata; see `describe_model`.
        card: The text of the export's card, without metadata.
        repository: The name of the repository, `user/name`.
    """
    download = f"hf download {repository} --local-dir student && cd student"
    card = card.replace(LOCAL_FILE, f'load_student("hf://{repository}")')
    card = card.replace(FIRST_COMMAND, FIRST_COMMAND.replace("python", f"{download}\npython"), 1)
    return f"{MARK}\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}{MARK}\n\n{card}"
