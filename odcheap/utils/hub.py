"""Access to the Hugging Face Hub by the package `huggingface_hub`, which the extra `hub` installs.

The package is imported when it is first used, since the import takes half a second.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from odcheap.utils.errors import Failure, OptionError, first_line

HUB_PREFIX = "hf://"
STUDENT_FILE = "student.safetensors"
NAME = r"[A-Za-z0-9][\w.-]*"
REPOSITORY = re.compile(rf"{NAME}/{NAME}", re.ASCII)
NO_CONNECTION = {"TransportError", "ConnectionError", "LocalEntryNotFoundError"}  # names of classes of errors
NO_TOKEN = "no valid token of the Hugging Face Hub: `hf auth login` stores one, or set HF_TOKEN"


def is_hub_address(path: str | Path) -> bool:
    """Returns whether a path is the address of a repository on the Hugging Face Hub, such as `hf://user/name`."""
    return str(path).startswith(HUB_PREFIX)


def parse_address(address: str) -> tuple[str, str | None]:
    """Splits an address on the Hugging Face Hub into the repository and the revision.

    Args:
        address: `hf://user/name`, or `hf://user/name@REVISION` with a branch, a tag or a commit.

    Returns:
        The repository, such as "user/name", and the revision; the revision is None if the address names none.

    Raises:
        OptionError: The address has another form.

    Example:
        >>> parse_address("hf://user/name"), parse_address("hf://user/name@v1.0")
        (('user/name', None), ('user/name', 'v1.0'))
    """
    name, at, revision = address.removeprefix(HUB_PREFIX).partition("@")
    if not REPOSITORY.fullmatch(name) or (at and not revision):
        raise OptionError("path", address, "must be hf://user/name, or hf://user/name@REVISION")
    return name, revision or None


def import_hub() -> Any:
    """Returns the package `huggingface_hub`; raises `Failure` if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise Failure("huggingface_hub is not installed: pip install 'odcheap[hub]'") from error
    return huggingface_hub


def download_student(address: str) -> Path:
    """Downloads the weights of a student from the Hugging Face Hub, unless an earlier download is in the cache.

    Only `student.safetensors` is downloaded. It contains tensors and settings, but no code.

    Args:
        address: The repository: `hf://user/name`, or `hf://user/name@REVISION` with a branch, a tag or a commit.

    Returns:
        The path of the file in the cache of `huggingface_hub`.

    Raises:
        OptionError: The address has another form; there is no such repository, revision or file; or the Hub cannot be
            reached.
        Failure: `huggingface_hub` is not installed.
    """
    repository, revision = parse_address(address)
    with report_hub_errors("path", address):
        return Path(import_hub().hf_hub_download(repository, STUDENT_FILE, revision=revision))


@contextmanager
def report_hub_errors(option: str, value: str) -> Generator[None]:
    """A context manager that turns each error of `huggingface_hub` into an `OptionError` with a text of one line.

    Args:
        option: The name of the option with which the user named the repository, for the message.
        value: The value of that option, for the message.

    Raises:
        OptionError: An error was raised inside. A `Failure`, or an `OptionError`, is passed on unchanged.
    """
    try:
        yield
    except Failure:
        raise
    except Exception as error:  # the package raises its own errors and those of the packages below it
        raise OptionError(option, value, describe_hub_error(error)) from error


def describe_hub_error(error: Exception) -> str:
    """Returns one line that explains an error of `huggingface_hub`.

    If the Hub has answered, the line follows from the HTTP status of the answer; otherwise from the classes of the
    error and of its causes, by their names, since the classes differ between versions of `huggingface_hub`.

    Args:
        error: An error that `huggingface_hub` raised.
    """
    errors, chain = import_hub().errors, [error]
    while isinstance(cause := chain[-1].__cause__ or chain[-1].__context__, Exception):
        chain.append(cause)
    if isinstance(error, errors.GatedRepoError):
        return "its owner must first grant you access to this repository, on its page on the Hub"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, ValueError) and not hasattr(error, "response"):  # for example metadata that the Hub refuses
        return " ".join(str(error).split())
    responses = (getattr(entry, "response", None) for entry in chain)
    answer = next((response for response in responses if response is not None), None)
    if answer is None:
        names = {kind.__name__ for entry in chain for kind in type(entry).__mro__}
        line = first_line(chain[-1])
        if "OfflineModeIsEnabled" in names:
            return "the Hugging Face Hub is not asked, since HF_HUB_OFFLINE is set"
        return f"the Hugging Face Hub cannot be reached ({line})" if names & NO_CONNECTION else " ".join(line.split())
    status = answer.status_code
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return f"the repository has no {STUDENT_FILE}, so that no student can be loaded from it"
    # The Hub answers 401 to a stranger, whether a repository exists or not.
    if status == 404 or (status == 401 and isinstance(error, errors.RepositoryNotFoundError)):
        return "there is no such repository, or your token may not read it"
    said = " ".join(str(answer.headers.get("X-Error-Message") or first_line(error)).split())
    lines = {401: NO_TOKEN, 403: f"your token does not have the permission for this ({said})"}
    return lines.get(status, f"the Hugging Face Hub answers {status} ({said})")
