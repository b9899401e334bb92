"""Uploads an export to the Hugging Face Hub, in one commit.

The model card gets a block of metadata, which the Hub reads: task, library, license, data set and measured accuracy.
A new repository is private, unless --public is given. In Python, load_student("hf://user/name") loads the student.

A token is needed: hf auth login stores one, or set HF_TOKEN.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from odcheap import __version__, predict
from odcheap.utils.console import keep_going_without_output, print_error, say
from odcheap.utils.errors import Failure, OptionError, first_line
from odcheap.utils.hub import NO_TOKEN, REPOSITORY, STUDENT_FILE, import_hub, report_hub_errors

RESULTS_FILE = "results.json"
OWN_FILES = re.compile(r"student[\w-]*\.\w+")  # of an export, which a later export of other options may not have
HUB_FILES = (".gitattributes", predict.CARD_FILE)  # that a repository may have without an export in it
OPTION = "REPOSITORY"
MARK = "---"  # the line before and after the metadata of a model card
TASK = "image-classification"
DATA_SETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}
LOCAL_FILE = 'load_student("student.safetensors")'
FIRST_COMMAND = "```\npython predict.py IMAGE_OR_FOLDER"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `odcheap push`, which uploads an export to the Hugging Face Hub.

    Args:
        arguments: The command-line arguments; None to take `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 1 after an error, or 130 after Ctrl-C.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("odcheap push", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("export_dir", type=Path, metavar="EXPORT_DIR", help="the folder that odcheap export has written")
    add("repository", metavar="user/name", help="the repository, which is created if it does not exist")
    add("--public", action="store_true", help="create a public repository (default: a private one)")
    add("--license", metavar="NAME", help="license of the weights, by its name on the Hub, such as mit or apache-2.0")
    data = "data set of the training, by its name on the Hub; may be repeated (default: known for CIFAR and ImageNet)"
    add("--dataset", action="append", default=[], metavar="user/name", help=data)
    options = parser.parse_args(arguments)
    try:
        with keep_going_without_output():
            push(options)
    except (Failure, predict.PredictError, OSError) as error:
        return print_error(str(error))
    except KeyboardInterrupt:
        return print_error("interrupted") and 130
    return 0


def push(options: argparse.Namespace) -> None:
    """Uploads an export to a repository of the Hugging Face Hub, and prints the address of the repository.

    Args:
        options: The options of the command: `export_dir`, `repository`, `public`, `license` and `dataset`.

    Raises:
        OptionError: An option is wrong, or the Hub refuses the upload.
        predict.PredictError: A file was changed after the export.
        Failure: `huggingface_hub` is not installed, or there is no token.
    """
    folder, repository = options.export_dir, options.repository
    if not REPOSITORY.fullmatch(repository):
        raise OptionError(OPTION, repository, "must be user/name")
    contents, left_out = read_files(folder)
    try:
        own, card = split_metadata(predict.read_regular(folder / predict.CARD_FILE, predict.MAX_TEXT_BYTES).decode())
    except ValueError as error:
        raise OptionError("EXPORT_DIR", folder, f"{predict.CARD_FILE} cannot be read ({first_line(error)})") from error
    # What the user has written into the card comes before what is known, and the options come first.
    given = {"license": options.license, "datasets": options.dataset}
    metadata = describe_model(repository, read_results(folder), options.dataset) | own
    metadata |= {name: value for name, value in given.items() if value}
    contents[predict.CARD_FILE] = format_card(metadata, card, repository).encode()
    if left_out:
        say(f"left out, since {predict.CARD_FILE} does not list them: {predict.list_names(left_out)}")
    size = sum(map(len, contents.values()))
    say(f"{repository}: uploading {len(contents)} files, {size / 1e6:.1f} MB")
    with report_hub_errors(OPTION, repository), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Hub, for example that no license is stated
        is_private = upload_files(repository, contents, is_private=not options.public)
    if "license" not in metadata:
        say("the card states no license: with --license NAME others know how they may use the weights")
    say(f"uploaded: {import_hub().constants.ENDPOINT}/{repository} ({'private' if is_private else 'public'})")
    if STUDENT_FILE in contents:
        say(f'in Python: load_student("hf://{repository}")')


def read_files(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Reads the files of an export that its model card lists, and checks that they are unchanged (by their SHA-256).

    Args:
        folder: The folder of the export.

    Returns:
        A dict from the name of each such file to its content; and a sorted list of the names of all other files in the
        folder. The model card itself is in neither of them.

    Raises:
        OptionError: The folder is not an export.
        predict.PredictError: A file is missing or was changed after the export.
    """
    if not predict.is_export(folder):
        raise OptionError("EXPORT_DIR", folder, "is not an export; odcheap export JOB_DIR writes one")
    card = predict.read_regular(folder / predict.CARD_FILE, predict.MAX_TEXT_BYTES).decode(errors="replace")
    names = [match[2] for match in predict.CHECKSUM_LINE.finditer(card) if "/" not in match[2]]
    contents = {name: predict.read_verified(folder, name) for name in names}
    return contents, sorted({path.name for path in folder.iterdir()} - contents.keys() - {predict.CARD_FILE})


def read_results(folder: Path) -> dict[str, Any]:
    """Reads the name of the data set and the test accuracy from the `results.json` of an export.

    Args:
        folder: The folder of the export.

    Returns:
        A dict with two keys: `data`, the name of the data set or None; and `test`, a dict with the test accuracy under
        the key `top1` (a fraction), or None.

    Raises:
        OptionError: There is no such file, it was changed after the export, or an entry is missing.
    """
    try:
        results = json.loads(predict.read_verified(folder, RESULTS_FILE))
        return {"data": results["data"], "test": results["test"] and {"top1": float(results["test"]["top1"])}}
    except (ValueError, KeyError, TypeError) as error:
        again = "odcheap export JOB_DIR --overwrite writes it anew"
        raise OptionError("EXPORT_DIR", folder, f"its {RESULTS_FILE} is missing or not valid: {again}") from error


def upload_files(repository: str, contents: dict[str, bytes], is_private: bool) -> bool:
    """Uploads files to a repository of the Hugging Face Hub in one commit.

    Files of an older export in the repository that are not among the new files are removed.

    Args:
        repository: The name of the repository, `user/name`, which is created if it does not exist.
        contents: The content of each file, by its name.
        is_private: Whether a new repository is private. An existing repository is not changed by this.

    Returns:
        Whether the repository is private.

    Raises:
        OptionError: The repository contains files, and they are not those of an export.
        Failure: There is no token, or `huggingface_hub` is not installed.
    """
    hub = import_hub()
    if hub.get_token() is None:
        raise Failure(NO_TOKEN)
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    api = hub.HfApi(library_name="odcheap", library_version=__version__)
    api.create_repo(repository, private=is_private, exist_ok=True)
    older = set(api.list_repo_files(repository))
    if predict.PREPROCESS_FILE not in older and older - set(HUB_FILES):
        found = predict.list_names(sorted(older - set(HUB_FILES)))
        raise OptionError(OPTION, repository, f"has other files than an export ({found}): name another repository")
    operations: list[Any] = [hub.CommitOperationAdd(name, content) for name, content in contents.items()]
    outdated = filter(OWN_FILES.fullmatch, sorted(older - contents.keys()))
    operations += map(hub.CommitOperationDelete, outdated)
    api.create_commit(repository, operations, commit_message="Export of odcheap")
    return bool(api.model_info(repository).private)


def describe_model(repository: str, results: dict[str, Any], data_sets: Sequence[str]) -> dict[str, Any]:
    """Returns the metadata of a model card, by which the Hugging Face Hub shows and filters models.

    Args:
        repository: The name of the repository, `user/name`.
        results: The name of the data set and the test accuracy, as `read_results` returns them.
        data_sets: The names of the training data sets on the Hub. If it is empty, the name is found for CIFAR-10,
            CIFAR-100 and ImageNet, and is left out for other data sets.

    Returns:
        A dict with the Hub's keys `library_name`, `pipeline_tag` and `tags`; `datasets` if they are known; and, if
        there is a test accuracy, `metrics` and `model-index`, which contains the accuracy.
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
        result = {
            "task": {"type": TASK},
            "dataset": {"type": known[0] if known else data or "unknown", "name": data or "unknown", "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(test["top1"], 6), "name": "Test accuracy"}],
        }
        index = [{"name": repository.partition("/")[2], "results": [result]}]
        metadata |= {"metrics": ["accuracy"], "model-index": index}
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
    """Returns the text of a model card for the Hugging Face Hub: the metadata in YAML, then the export's own card.

    In the examples of the card, the student is loaded from the Hub and not from a file.

    Args:
        metadata: The metadata, as `describe_model` returns them.
        card: The text of the export's card, without metadata.
        repository: The name of the repository, `user/name`.
    """
    download = f"hf download {repository} --local-dir student && cd student"
    card = card.replace(LOCAL_FILE, f'load_student("hf://{repository}")')
    card = card.replace(FIRST_COMMAND, FIRST_COMMAND.replace("python", f"{download}\npython"), 1)
    return f"{MARK}\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}{MARK}\n\n{card}"


if __name__ == "__main__":
    raise SystemExit(main())
