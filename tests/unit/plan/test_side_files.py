"""Files beside the weights."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest

from streamer.plan.plan import make_plan
from streamer.plan.side_files import token_count


@pytest.mark.parametrize(
    "text", ["", "{}", "[", '{"model": {"vocab": {"a": 0', '{"model": {"vocab": {"a": "b"}}}']
)
def test_what_is_no_vocabulary_is_not_counted(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert token_count(tmp_path) is None


def test_weights_beside_an_adapter_are_named(tmp_path: Path) -> None:
    """A trainer's own loader reads some of them; PEFT, whose result a merge is, reads none."""
    base, adapter = helpers.three_shards(tmp_path, hidden=32)
    for name in (
        "optimizer.pt",
        "lr_scheduler.pt",
        "training_args.bin",
        "rng_state_0.pth",
        "recipe_state.pt",
        "mp_rank_00_model_states.pt",
        "adapter_model.bin",
        "model-00001-of-00002.safetensors",
        "README.md",
    ):
        (adapter / name).write_bytes(b"x")
    assert not make_plan(base, adapter).notes
    (adapter / "non_lora_trainables.bin").write_bytes(b"x")
    (note,) = make_plan(base, adapter).notes
    assert note == (
        "non_lora_trainables.bin beside the adapter: not used, because PEFT does not load it; if the adapter's trainer does, the "
        "result lacks it"
    )
    (adapter / "model_projector.safetensors").write_bytes(b"x")
    assert (
        "model_projector.safetensors, non_lora_trainables.bin beside"
        in make_plan(base, adapter).notes[0]
    )
