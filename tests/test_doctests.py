"""The examples in docstrings, and what an import costs."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import odcheap

MODULES = [
    module.name
    for module in pkgutil.walk_packages(odcheap.__path__, "odcheap.")
    if not module.name.endswith("__main__")
]


# Optuna 2, which hydra-optuna-sweeper needs, calls a function that SQLAlchemy 2 has moved.
@pytest.mark.filterwarnings("ignore:.*declarative_base:DeprecationWarning")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name, request):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("odcheap"):
            raise
        pytest.skip(f"needs {error.name}")
    given = {"torch": torch, "nn": torch.nn}
    if name == "odcheap.runs.reference":
        given["path"] = request.getfixturevalue("golden") / "reference_dw_resnet8.pt"
    assert not doctest.testmod(module, extraglobs=given, optionflags=doctest.IGNORE_EXCEPTION_DETAIL).failed


@pytest.mark.parametrize("name", odcheap.__all__)
def test_public_names_have_an_example(name):
    public = getattr(odcheap, name)
    assert ">>> " in public.__doc__
    assert "Args:" in public.__doc__ or name == "BlockType"


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "numpy", "pydantic", "hydra", "pytorch_lightning")
    code = f"import sys, odcheap; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_student_is_loaded_without_lightning_and_hydra():
    code = "import sys; from odcheap import load_student; "
    code += "print([name for name in ('hydra', 'omegaconf', 'pytorch_lightning', 'sklearn') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
