"""Broken and hostile inputs: every command says one line, exits as documented, and leaves everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import server
from hostile import CASES, Case, run_case


def run(*argv: object) -> tuple[int, str, str]:
    done = server().run(*argv)
    return done.code, done.out, done.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input_ends_as_documented(case: Case, tmp_path: Path) -> None:
    assert run_case(case, tmp_path, run) == []


def test_a_sound_input_would_be_told_apart(tmp_path: Path) -> None:
    """The check can fail: nothing is wrong with this one, so every command ends otherwise than a refusal."""
    sound = Case("nothing", lambda base, adapter: None, 3, "refused")
    assert len(run_case(sound, tmp_path, run)) >= 4
