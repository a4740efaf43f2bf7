"""`--max-memory` with many adapters on a base of many small tensors, where tables take the memory: an accepted budget is kept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import measure
import pytest
import torch
from command_line import process_mib
from forks import server
from helpers import intruding_factors, write_adapter, write_sharded
from safetensors.torch import save_file
from seeds import vary

TENSORS, ADAPTERS, SIZE = 3000, 20, 16
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("tables")
    base = home / "base"
    base.mkdir()
    names = [
        f"model.layers.{i}.mlp.{which}_proj.weight" for i in range(TENSORS // 3) for which in ("gate", "up", "down")
    ]
    g = torch.Generator().manual_seed(vary(0))
    save_file({name: torch.randn(SIZE, SIZE, generator=g).bfloat16() for name in names}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for i in range(ADAPTERS):
        write_adapter(home / "adapters" / f"n{i}", {MODULE: intruding_factors(SIZE, SIZE, 2, seed=i)}, 2)
    return base, home / "adapters"


@pytest.mark.long
@pytest.mark.parametrize("command", ["detect", "merge"])
def test_many_adapters_keep_the_budget(inputs: tuple[Path, Path], command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [command, *map(str, inputs), "-o", str(out), "--quiet"]
    refused = server().run(*arguments, "--max-memory", f"{process_mib() + 1}M")
    least = re.search(r"it needs (\d+)M", refused.err)
    assert least, refused.err
    assert not out.exists()
    budget = int(least[1])
    peak = measure.watched([sys.executable, "-m", "streamer", *arguments, "--max-memory", f"{budget}M"]).anonymous
    assert len(list(out.iterdir())) == ADAPTERS
    assert 0.4 * (budget << 20) < peak <= budget << 20, f"{peak >> 20}M of {budget}M"


IN_MEMORY = """
import sys, streamer
found = streamer.detect_intruder_dimensions(*sys.argv[1:3], top_k=1.0, threshold_epsilon=1.0, max_memory=int(sys.argv[3]))
assert len(found.matrices) == 160
"""


@pytest.mark.long
def test_findings_that_stay_in_memory_are_counted(tmp_path: Path) -> None:
    """All directions of 160 matrices are intruders: 84 MB of vectors."""
    g = torch.Generator().manual_seed(vary(0))
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(160)]
    tensors = {f"{name}.weight": torch.randn(256, 256, generator=g).bfloat16() for name in names}
    base = write_sharded(tmp_path / "base", [tensors])
    adapter = write_adapter(tmp_path / "adapter", {name: intruding_factors(256, 256, 2) for name in names}, 2)
    command = [sys.executable, "-c", IN_MEMORY, str(base), str(adapter)]
    refused = subprocess.run([*command, str(process_mib() + 1 << 20)], stderr=subprocess.PIPE, text=True, check=False)
    least = re.search(r"it needs (\d+)M", refused.stderr)
    assert least, refused.stderr
    budget = int(least[1]) << 20
    command.append(str(budget))
    peak = measure.watched(command).anonymous
    assert 0.4 * budget < peak <= budget, f"{peak >> 20}M of {budget >> 20}M"
