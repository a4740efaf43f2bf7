"""Kinds of adapters against PEFT: each is made, trained for a few steps, saved and merged by PEFT, and compared route by route.

The oracle of a merge is PEFT's own `merge_and_unload` in float64, on the values of the stored base: the exact sum, which is rounded once
to the base's dtype. PEFT's merge in the base's own dtype rounds the delta and then the sum. `detect` is compared with float64 SVDs of the
effective matrices, and so are merges at λ = 0.5 by each method; our merge at λ = 0.5 with PEFT's merge of our mitigated adapter, and of
its conversion to LoRA.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from kinds import KINDS, VOCAB, Kind, gpt2
from safetensors.torch import load_file, save_file
from seeds import vary
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

import streamer

logging.disable_progress_bar()


@dataclass
class Made:
    """A base and an adapter on disk, and PEFT's merge of them."""

    kind: Kind
    base: Path
    adapter: Path
    dtype: torch.dtype

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model that PEFT wraps, from the stored base."""
        if self.kind.load is not None:
            model = self.kind.load(self.base, self.dtype)
        else:
            torch.manual_seed(vary(0))
            made = self.kind.model()
            if isinstance(made, PreTrainedModel):
                model = type(made).from_pretrained(self.base, dtype=self.dtype)
            else:
                made.load_state_dict(load_file(self.base / "model.safetensors"))
                model = made.to(self.dtype)
        model = model.to(dtype)
        self.kind.prepare(model)
        return model.eval()

    def peft(self, adapter: Path, dtype: torch.dtype) -> peft.PeftModel:
        return self.wrap(self.load(dtype), adapter).eval()

    def wrap(self, model: nn.Module, adapter: Path) -> peft.PeftModel:
        config = peft.PeftConfig.from_pretrained(adapter)
        if self.kind.residual:  # the base is the residual already
            config.init_lora_weights = True
        return peft.PeftModel.from_pretrained(
            model, adapter, config=config, autocast_adapter_dtype=False
        )

    def merged(
        self, adapter: Path | None = None, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        """PEFT's merge, its values computed in `dtype`."""
        with quiet():
            model = self.load(dtype)
            if not self.kind.shared:
                model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
                model.config.tie_word_embeddings = False
            wrapped = self.wrap(model, adapter or self.adapter)
            return wrapped.merge_and_unload().state_dict()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's and transformers' advice."""
    with warnings.catch_warnings(action="ignore"):
        yield


def make(name: str, dtype: torch.dtype, directory: Path) -> Made:
    """A base, and an adapter of the kind that PEFT trained on it for a few steps."""
    kind = KINDS[name]
    torch.manual_seed(vary(0))
    model = kind.model().to(dtype)
    base = directory / "base"
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(base)
    else:
        base.mkdir(parents=True)
        save_file(model.state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    made = Made(kind, base, directory / "adapter", dtype)
    with quiet():
        model = made.load(dtype)
        config = kind.config()
        kind.before(model, config)
        wrapped = peft.get_peft_model(model, config)
        wrapped.base_model.model.name_or_path = str(base)
        if kind.residual:
            copy.deepcopy(wrapped).unload().save_pretrained(base)
        train(wrapped)
        wrapped.save_pretrained(made.adapter)
    return made


def train(model: nn.Module, steps: int = 4) -> None:
    """A few large steps, so that intruders appear and no factor stays zero."""
    torch.manual_seed(vary(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(steps):
        out = model(*inputs(model))
        logits = values(out)
        loss = (logits.float() - torch.randn(logits.shape)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def values(out: Any) -> Tensor:
    """What a model computes: logits, or the last layer."""
    return out if isinstance(out, Tensor) else out[0]


def inputs(model: nn.Module) -> tuple[Tensor, ...]:
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, PreTrainedModel):
        return (torch.randint(1, VOCAB, (4, 12)),)
    return (torch.randn(inner.example, dtype=next(inner.parameters()).dtype),)  # type: ignore[attr-defined]


def stored(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, in units of the largest value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    if b.numel() == 0:
        return 0.0
    return float((a.double() - b.double()).abs().max() / (b.double().abs().max() or 1.0))


def by_disk(state: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's values under the names on disk, which may lack the base model's prefix."""
    out = {
        n: state[n]
        if n in state
        else next((t for k, t in state.items() if k.endswith("." + n)), None)
        for n in names
    }
    return {n: t for n, t in out.items() if t is not None and t.is_floating_point()}


def compare_merge(made: Made, out: Path) -> None:
    """`merge --lambda 1` against PEFT's merge in float64, rounded once, and in the base's own dtype."""
    streamer.merge_with_reduced_intruder_dimensions(
        made.base, made.adapter, out, mitigation_lambda=1.0, **made.kind.options
    )
    ours = stored(out)
    exact = by_disk(made.merged(), ours)
    theirs = by_disk(made.merged(dtype=made.dtype), ours)
    base = stored(made.base)
    eps = torch.finfo(made.dtype).eps
    assert ours.keys() >= base.keys()
    for name in base.keys() - exact.keys():  # of a part of the model that PEFT did not load
        assert torch.equal(ours[name].view(torch.uint8), base[name].view(torch.uint8)), name
    for name, expected in exact.items():
        assert not (name in base and ours[name].dtype != base[name].dtype), name
        # Value by value it is held to half a unit, and float32 sums.
        assert relative(ours[name], expected) <= (
            eps if made.dtype == torch.bfloat16 else 4 * eps
        ), name
        assert relative(ours[name], theirs[name]) <= 4 * eps, name
        if made.dtype == torch.bfloat16:  # float32 sums that fall on the other side of a tie
            assert float((ours[name] != expected.to(ours[name].dtype)).float().mean()) < 2e-3, name
        unit = torch.finfo(ours[name].dtype).eps
        tiny = torch.finfo(torch.float32).eps
        bound = unit / 2 * 1.01 * expected.abs() + 16 * tiny * expected.abs().max()
        assert bool(((ours[name].double() - expected).abs() <= bound).all()), name


def compare_detection(made: Made) -> streamer.Findings:
    """`detect` against dense float64 SVDs of the base's matrices and of PEFT's merged ones."""
    findings = streamer.detect_intruder_dimensions(made.base, made.adapter, **made.kind.options)
    base = {
        **by_disk(
            made.load(torch.float64).state_dict(), {m.tensor: torch.empty(0) for m in findings}
        )
    }
    merged = by_disk(made.merged(), base)
    for m in findings:
        W0, W = (t[m.tensor].reshape(t[m.tensor].shape[0], -1) for t in (base, merged))
        if W0.shape != m.shape or transposed(made, m.tensor):
            W0 = W0.T
            W = W.T
        assert tuple(W0.shape) == m.shape, m.tensor
        U0 = torch.linalg.svd(W0, full_matrices=False).U
        U, S, _ = torch.linalg.svd(W, full_matrices=False)
        k = len(m.detection.singular_values)
        sigma = torch.tensor(m.detection.singular_values, dtype=torch.float64)
        assert relative(sigma, S[:k]) < 2e-6, m.tensor
        similarity = (U0.T @ U[:, :k]).abs().amax(0)
        for j, s in enumerate(similarity.tolist()):
            assert (
                m.detection.similarity_low[j] - 1e-3 <= s <= m.detection.similarity_high[j] + 1e-3
            ), (m.tensor, j, s)
            # A residual has directions that float32 cannot hold: those that its singular values of zero leave open. The interval says so.
            settled = not m.detection.similarity_low[j] < 0.5 <= m.detection.similarity_high[j]
            assert settled or made.kind.residual or abs(s - 0.5) <= 0.02, (m.tensor, j, s)
            if settled and abs(s - 0.5) > 1e-3:
                assert (j in m.detection.intruders) == (s < 0.5), (m.tensor, j, s)
    return findings


def compare_methods(made: Made, findings: streamer.Findings) -> None:
    """Merges at λ = 0.5 by each method against its formula in float64, on PEFT's matrices."""
    by_tensor = {m.tensor: m for m in findings}
    base = by_disk(
        made.load(torch.float64).state_dict(), {m.tensor: torch.empty(0) for m in findings}
    )
    merged = by_disk(made.merged(), base)
    for method in ("paper", "project", "shrink"):
        options = {
            "findings": findings,
            "mitigation_lambda": 0.5,
            "method": method,
            **made.kind.options,
        }
        for name, ours in streamer.iter_merged(made.base, made.adapter, **options):
            if name not in by_tensor:
                continue
            W0, W, found = (
                t.double().reshape(t.shape[0], -1) for t in (base[name], merged[name], ours)
            )
            if transposed(made, name):
                W0 = W0.T
                W = W.T
                found = found.T
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            chosen = list(by_tensor[name].detection.intruders)
            U = U[:, chosen]
            S = S[chosen]
            Vh = Vh[chosen]
            expected = {
                "paper": W - 0.5 * (U * S) @ Vh,
                "project": W - 0.5 * U @ (U.T @ (W - W0)),
                "shrink": W0 + 0.5 * (W - W0),
            }[method]
            # singular vectors in float32, and their gaps
            assert relative(found, expected) <= max(torch.finfo(made.dtype).eps, 2e-5), (
                method,
                name,
            )


def transposed(made: Made, tensor: str) -> bool:
    """Whether the base stores the matrix as (in, out)."""
    return (
        (made.kind.model is gpt2 and ".c_" in tensor)
        or "embed_tokens" in tensor
        or "word_embeddings" in tensor
    )


def unstamped(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header without what says what it was made from, and the bytes of its tensors."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.get("__metadata__", {}).pop("streamer", None)
    return header, raw[start:]


def compare_mitigation(made: Made, findings: streamer.Findings, directory: Path) -> None:
    """λ = 1 keeps every byte; at λ = 0.5 PEFT's merge of the mitigated adapter is our merge (``project``, which truncates nothing)."""
    streamer.reduce_intruder_dimension(
        made.base, made.adapter, directory / "same", mitigation_lambda=1.0, **made.kind.options
    )
    same, given = (d / "adapter_model.safetensors" for d in (directory / "same", made.adapter))
    assert unstamped(same) == unstamped(given)
    name = "adapter_config.json"
    assert (directory / "same" / name).read_bytes() == (made.adapter / name).read_bytes()
    options = {
        "findings": findings,
        "mitigation_lambda": 0.5,
        "method": "project",
        **made.kind.options,
    }
    streamer.reduce_intruder_dimension(made.base, made.adapter, directory / "half", **options)
    streamer.merge_with_reduced_intruder_dimensions(
        made.base, made.adapter, directory / "merged-half", **options
    )
    ours = stored(directory / "merged-half")
    for name, tensor in by_disk(
        made.merged(directory / "half"), ours
    ).items():  # the factors were rounded as well
        assert relative(ours[name], tensor) <= 4 * torch.finfo(made.dtype).eps, name
    for name, tensor in streamer.iter_merged(made.base, made.adapter, **options):
        assert torch.equal(tensor, ours[name]), name


def compare_conversion(made: Made, findings: streamer.Findings, directory: Path) -> None:
    """The mitigated delta as a LoRA adapter, of a rank that leaves nothing out: PEFT's merge of it is our merge (``paper``, λ = 0.5)."""
    options = {"findings": findings, "mitigation_lambda": 0.5, **made.kind.options}
    record = streamer.reduce_intruder_dimension(
        made.base, made.adapter, directory / "lora", to_lora=48, **options
    )
    assert record["totals"]["dropped_max"] < 1e-5
    ours = dict(streamer.iter_merged(made.base, made.adapter, **options))
    theirs = by_disk(made.merged(directory / "lora"), ours)
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) <= max(4 * torch.finfo(made.dtype).eps, 2e-5), name


def compare(name: str, dtype: torch.dtype, directory: Path) -> None:
    """Make a kind and compare every route."""
    made = make(name, dtype, directory)
    with quiet():
        compare_merge(made, directory / "merged")
        findings = compare_detection(made)
        assert findings.intruders > 0 or not (made.kind.mitigate or "DoRA" in name)
        compare_methods(made, findings)
        if made.kind.mitigate:
            compare_mitigation(made, findings, directory)
        if made.kind.plain:
            compare_conversion(made, findings, directory)
