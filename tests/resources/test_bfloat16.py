"""Whether products in bfloat16 are fast is found by a product, in a process whose instructions are limited."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.long
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere the variable names no instructions"
)
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE_BF16"])
def test_without_matrix_instructions_it_is_not_fast(instructions: str) -> None:
    """As on processors that lack AMX: AVX512-BF16 alone saves nothing."""
    script = "from streamer.linalg.torch_state import has_fast_bfloat16; print(has_fast_bfloat16())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
