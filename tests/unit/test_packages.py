"""Optional packages: a message says what needs which, and how it is installed."""

from __future__ import annotations

import numpy
import pytest

from streamer.errors import MissingPackageError
from streamer.packages import require_package


def test_an_installed_package_is_given() -> None:
    assert require_package("numpy", (1, 9), "it needs numpy 1.9", "them") is numpy


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package", r"it needs numpy 999\.1, which is not installed; pip install 'intruder-streamer\[them\]'"),
        ("numpy", rf"it needs numpy 999\.1, found {numpy.__version__}; pip install -U 'intruder-streamer\[them\]'"),
    ],
)
def test_a_missing_or_old_one_is_named(name: str, words: str) -> None:
    with pytest.raises(MissingPackageError, match=words):
        require_package(name, (999, 1), "it needs numpy 999.1", "them")
