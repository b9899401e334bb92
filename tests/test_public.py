"""The public interface: what `from odcheap import ...` offers."""

import subprocess
import sys

import pytest

import odcheap


@pytest.mark.parametrize("name", odcheap.__all__)
def test_every_public_name_is_there_and_explained(name):
    found = getattr(odcheap, name)
    assert found.__name__ == name
    assert found.__doc__


def test_an_unknown_name_is_no_attribute():
    assert not hasattr(odcheap, "cheapn")


def test_predict_starts_without_torch():
    code = "import sys, odcheap.predict; assert not {'torch', 'hydra', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
