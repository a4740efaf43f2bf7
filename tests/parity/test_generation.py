"""Text that an adapter writes: tokens equal those of transformers' `generate` on PEFT's model with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from causal_models import CAUSAL
from evaluated import nothing
from pairs import make_pair
from seeds import vary

from streamer.errors import Interrupted
from streamer.plan.plan import make_plan
from streamer.streaming import generation
from streamer.streaming.generation import Sampler, Snapshot, write_text
from streamer.streaming.spool import moved_to_file
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import VariantSet, make_variants

LENGTH = 24
PROMPTS = {0: [1], 1: [0], 2: [2, 5, 0, 9]}

QUICK = "llama", "gemma3-text", "mixtral", "gpt2", "qwen3-next", "mamba"


def ignore(tokens: object) -> None:
    pass


def swept(base: Path, adapter: Path) -> SweepModel:
    plan = make_plan(base, adapter)
    return SweepModel(VariantSet(plan, make_variants(("shrink",), (0.5,), "all"), None))


def written(
    model: SweepModel,
    after: Callable[[int], None] = ignore,
    snapshot: Snapshot | None = None,
    directory: Path | None = None,
    **prompts: Any,
) -> torch.Tensor:
    return write_text(
        model, prompts.get("prompts", PROMPTS), LENGTH, vary(7), nothing, after, snapshot, directory
    )


def of_transformers(cls: Any, base: Path, adapter: Path) -> torch.Tensor:
    """What PEFT's model writes, each sequence by itself."""
    model = cls.from_pretrained(base, dtype=torch.float32)
    model.config.get_text_config()._experts_implementation = (
        model.config._experts_implementation
    ) = "eager"
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    model.generation_config = model.base_model.model.generation_config = (
        transformers.GenerationConfig()
    )
    config = transformers.GenerationConfig(max_length=LENGTH, do_sample=False, pad_token_id=0)
    rows = []
    for number, prompt in PROMPTS.items():
        sampler = Sampler({number: prompt}, vary(7), "", ignore)
        ids = torch.tensor([prompt[:1]])
        given = {
            "attention_mask": torch.ones_like(ids),
            "generation_config": config,
            "logits_processor": [sampler],
        }
        rows.append(model.generate(input_ids=ids, **given))
    return torch.cat(rows)


def slow_but_quick(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in names]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", slow_but_quick(CAUSAL))
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    cls, base, adapter = make_pair(name, tmp_path, CAUSAL[name][2], lora_alpha=4)
    found = written(swept(base, adapter))
    assert found.tolist() == of_transformers(cls, base, adapter).tolist()
    assert found[2, :4].tolist() == PROMPTS[2]
    assert len({tuple(row) for row in found.tolist()}) == len(PROMPTS)


@pytest.mark.parametrize("name", slow_but_quick(CAUSAL))
def test_an_interrupted_run_goes_on_with_the_same_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "SECONDS", 0.0)
    _, base, adapter = make_pair(name, tmp_path, CAUSAL[name][2], lora_alpha=4)
    model = swept(base, adapter)
    steps = list[int]()
    whole = written(model)

    def stop(tokens: int) -> None:
        steps.append(tokens)
        if tokens == LENGTH // 2:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        written(model, stop, Snapshot(tmp_path / "states", "run"))
    again = written(
        swept(base, adapter), steps.append, Snapshot(tmp_path / "states", "run"), tmp_path
    )
    assert torch.equal(again, whole)
    begun = LENGTH // 2 if (tmp_path / "states").exists() else 1
    assert steps == [*range(2, LENGTH // 2 + 1), *range(begun + 1, LENGTH + 1)]
    other = written(swept(base, adapter), ignore, Snapshot(tmp_path / "states", "another run"))
    assert torch.equal(other, whole)


@pytest.mark.parametrize("name", slow_but_quick(CAUSAL))
def test_a_cache_in_files_changes_no_token(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(generation, "PAGE", 1)
    _, base, adapter = make_pair(name, tmp_path, CAUSAL[name][2], lora_alpha=4)
    whole = written(swept(base, adapter))
    before = set(tmp_path.iterdir())
    assert torch.equal(written(swept(base, adapter), directory=tmp_path), whole)
    assert set(tmp_path.iterdir()) == before


def test_keys_and_values_lie_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(generation, "PAGE", 1)
    moved = list[torch.Tensor]()

    def move(tensor: torch.Tensor, directory: Path) -> torch.Tensor:
        moved.append(moved_to_file(tensor, directory))
        return moved[-1]

    monkeypatch.setattr(generation, "moved_to_file", move)
    _, base, adapter = make_pair("llama", tmp_path, CAUSAL["llama"][2], lora_alpha=4)
    written(swept(base, adapter), directory=tmp_path)
    keys_and_values = [tensor.shape[2] for tensor in moved]
    assert sorted(keys_and_values) == sorted([*range(1, LENGTH)] * 4)  # of two layers, once a step


def test_draws_depend_neither_on_what_runs_beside_nor_on_the_order(tmp_path: Path) -> None:
    _, base, adapter = make_pair("llama", tmp_path, CAUSAL["llama"][2], lora_alpha=4)
    whole = written(swept(base, adapter))
    for number, prompt in PROMPTS.items():
        assert torch.equal(
            written(swept(base, adapter), prompts={number: prompt})[0], whole[number]
        )


def test_tokens_are_drawn_by_their_probability() -> None:
    """Counts of 20,000 draws, against their binomial distribution: within five standard deviations."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = 20_000
    sampler = Sampler({number: [0] for number in range(draws)}, vary(3), "", ignore)
    chosen = sampler(torch.zeros(draws, 1), p.clamp_min(1e-30).log().expand(draws, -1)).argmax(-1)
    counts = torch.bincount(chosen, minlength=len(p))
    assert bool(((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt()).all())
