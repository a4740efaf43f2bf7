"""Fully fine-tuned models that store a tied tensor under several names: one matrix, judged and written once."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetuned import llama, pair, tensors
from transformers import LlamaForCausalLM

import streamer
from streamer.errors import UnsupportedError
from streamer.plan.plan import make_plan


def with_a_copy(directory: Path, off: float = 0.0) -> None:
    """Store the tied head beside the embedding, as other writers do."""
    held = load_file(directory / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + off
    save_file(held, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("copied", [("base", "tuned"), ("base",), ("tuned",)])
def test_copies_of_a_tied_embedding_are_one_matrix(copied: tuple[str, ...], tmp_path: Path) -> None:
    """Judged, mitigated and written once: apart, the two would differ in a model that is said to be tied."""
    base, tuned = pair(tmp_path, functools.partial(llama, tie_word_embeddings=True))
    expected = dict(streamer.iter_merged(base, tuned, mitigation_lambda=0.0))
    for name in copied:
        with_a_copy(tmp_path / name)
    findings = streamer.detect_intruder_dimensions(base, tuned)
    assert "lm_head.weight" not in {m.tensor for m in findings}
    out = tmp_path / "out"
    streamer.merge_with_reduced_intruder_dimensions(base, tuned, out, findings=findings, mitigation_lambda=0.0)
    ours = tensors(out)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n], t) for n, t in expected.items())
    loaded, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert streamer.verify_output(out, base, tuned, sample="all")["recomputed"]
    streamer.reduce_intruder_dimension(base, tuned, tmp_path / "lora", to_lora=64, mitigation_lambda=1.0)
    tokens = torch.randint(1, 64, (3, 9))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
        theirs = LlamaForCausalLM.from_pretrained(tuned).eval()
        torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_copies_of_a_tied_embedding_that_differ(which: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, functools.partial(llama, tie_word_embeddings=True))
    for name in ("base", "tuned"):
        with_a_copy(tmp_path / name, 0.1 if name == which else 0.0)
    with pytest.raises(UnsupportedError, match=r"/(base|tuned): 'lm_head.weight' differs from .* ties it, and loaders"):
        make_plan(base, tuned)


def test_copies_in_a_model_of_an_unknown_class(tmp_path: Path) -> None:
    """Nothing tells whether they are tied; the user can name the class."""
    base, tuned = pair(tmp_path, functools.partial(llama, tie_word_embeddings=True))
    for home in (base, tuned):
        with_a_copy(home)
        config = json.loads((home / "config.json").read_text())
        kept = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "tie_word_embeddings")}
        (home / "config.json").write_text(json.dumps(kept))
    with pytest.raises(UnsupportedError, match=r"whose bytes are equal, are tied depends on .* with --architecture"):
        make_plan(base, tuned)
