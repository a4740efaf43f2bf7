"""Make repairs of an adapter as others have them, to compare with: as right factors or, where they change single entries, as adapters.

- LiNeS (Wang et al., arXiv 2410.17146): each layer's delta times α in the first layer, rising linearly to 1 in the last.
- Spectral Surgery (Tian et al., arXiv 2603.03995), by absolute sensitivity: of each matrix the fifth of the singular values with the
  largest derivative of the task's loss is multiplied by 1.25, the fifth with the smallest by 0.8, and the sum of all is restored. It is
  made to learn more, not to forget less; a shrink after it makes points that keep less.
- random: directions of all matrices are dropped at random until the norm of all deltas is a share of what it was.
- TIES's trimming (Yadav et al., arXiv 2306.01708) and DARE (Yu et al., arXiv 2311.03099), by PEFT's own functions: the largest entries of
  each delta are kept, or entries by chance, which are then divided by their share.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamer.linalg.operators import LowRank
from streamer.methods.files import Coefficients
from streamer.plan.plan import make_plan
from streamer.plan.targets import Target

SHARES = {
    "lines": (0.9, 0.8, 0.6, 0.4, 0.2, 0.0),
    "surgery": (0.95, 0.9, 0.85, 0.8, 0.7, 0.6),
    "random": (0.95, 0.9, 0.85, 0.8, 0.7, 0.6),
    "ties": (0.5, 0.3, 0.2, 0.1, 0.05),
    "dare": (0.9, 0.7, 0.5, 0.3, 0.1),
}
"""Points of each repair, from the mildest on: α, λ, the share of the norm, and of the entries."""

BY_FACTORS = ("lines", "surgery", "random")
BY_ENTRIES = ("ties", "dare")

AMPLIFIED = 1.25
DAMPED = 0.8
FIFTH = 0.2
"""Spectral Surgery's factors, and the part of the singular values that each is for."""

CALIBRATION = 64
BATCH = 8
"""Sequences that its derivatives are taken of, and of those together."""


@dataclass(frozen=True)
class Directions:
    """Singular directions of a delta ``L Rᵀ = U diag(s) Vᵀ``: ``U = L W``."""

    target: Target
    delta: LowRank
    W: Tensor
    S: Tensor
    V: Tensor

    def weighed(self, c: Tensor) -> Tensor:
        """Compute R' of ``L R'ᵀ = U diag(c s) Vᵀ``."""
        return (self.V * (c * self.S)) @ self.W.T


def directions(base: Path, adapter: Path) -> list[Directions]:
    """Find the directions of each matrix of a LoRA adapter."""
    found = []
    for target in (plan := make_plan(base, adapter)).targets:
        delta = plan.finite_delta(target)
        assert isinstance(delta, LowRank)
        Q, T = torch.linalg.qr(delta.L.double())
        U, S, V = torch.linalg.svd(T @ delta.R.double().T, full_matrices=False)
        assert float(
            (Q @ U * S @ V - delta.L.double() @ delta.R.double().T).norm()
        ) <= 1e-9 * float(S.norm())
        found.append(Directions(target, delta, torch.linalg.pinv(T) @ U, S, V.T))
    return found


def lines(found: Sequence[Directions], alpha: float) -> list[Tensor]:
    """Scale each layer by its depth."""
    numbers = [
        int(match[1]) for one in found if (match := re.search(r"\.(\d+)\.", one.target.tensor))
    ]
    assert len(numbers) == len(found)
    last = max(numbers)
    return [
        torch.full_like(one.S, alpha + (1 - alpha) * n / last)
        for one, n in zip(found, numbers, strict=True)
    ]


def dropped(found: Sequence[Directions], share: float, seed: int) -> list[Tensor]:
    """Drop directions in a random order while the norm is above a share of the whole."""
    energies = torch.cat([one.S for one in found]) ** 2
    order = torch.randperm(len(energies), generator=torch.Generator().manual_seed(seed))
    left = energies.sum() - energies[order].cumsum(0)
    kept = torch.ones_like(energies)
    kept[order[left >= share**2 * energies.sum()]] = 0
    return list(kept.split([len(one.S) for one in found]))


def sensitivities(
    base: Path, adapter: Path, found: Sequence[Directions], rows: Tensor
) -> list[Tensor]:
    """Take the derivatives of the loss on rows of token ids by each singular value, from PEFT's by lora_A: ``dL/dA = Lᵀ dL/dW``."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    parameters = {name.replace(".default.", "."): p for name, p in model.named_parameters()}
    wanted = {one.target.module.factors.a for one in found}  # type: ignore[union-attr]
    for p in parameters.values():
        p.requires_grad = False
    for name in wanted:
        parameters[name].requires_grad = True
    for batch in rows.split(BATCH):
        (model(input_ids=batch, labels=batch).loss * len(batch) / len(rows)).backward()
    out = []
    for one in found:
        lora = one.target.module.factors
        by_a = parameters[lora.a].grad[lora.expert_slices[0]].double()  # type: ignore[union-attr,index]
        out.append(((one.W.T @ by_a) * one.V.T).sum(1))
    return out


def operated(gradients: Tensor, S: Tensor) -> Tensor:
    """Weigh the singular values of a matrix by the size of their derivatives, and restore their sum."""
    order = gradients.abs().argsort()
    few = round(FIFTH * len(S))
    c = torch.ones_like(S)
    c[order[:few]], c[order[len(S) - few :]] = DAMPED, AMPLIFIED
    return c * (S.sum() / (c * S).sum())


def by_factors(
    base: Path, adapter: Path, facts: Mapping[str, object], rows: Tensor, seed: int
) -> dict[str, list[Coefficients]]:
    """Make the repairs that weigh directions, of the facts of a fit to the same adapter; what each keeps is a number, not a share."""
    found = directions(base, adapter)
    weights = [
        operated(g, one.S)
        for g, one in zip(sensitivities(base, adapter, found, rows), found, strict=True)
    ]
    make: dict[str, Callable[[float], list[Tensor]]] = {
        "lines": lambda alpha: lines(found, alpha),
        "surgery": lambda by: [c * by for c in weights],
        "random": lambda share: dropped(found, share, seed),
    }
    out: dict[str, list[Coefficients]] = {name: [] for name in BY_FACTORS}
    for name in BY_FACTORS:
        for number, share in enumerate(SHARES[name]):
            made = {
                one.target.tensor: one.weighed(c).float()
                for one, c in zip(found, make[name](share), strict=True)
            }
            out[name].append(Coefficients(1 - number / 100, made, facts))
    return out


def by_entries(adapter: Path, name: str, share: float, out: Path, seed: int) -> None:
    """Write the adapter of TIES's trimming or of DARE, of as much rank as its deltas need."""
    from peft.utils.merge_utils import prune

    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    given = load_file(adapter / "adapter_model.safetensors")
    made = {}
    names = [one.removesuffix("lora_A.weight") for one in given if one.endswith("lora_A.weight")]
    rank = max(
        min(len(given[one + "lora_B.weight"]), given[one + "lora_A.weight"].shape[1])
        for one in names
    )
    torch.manual_seed(seed)
    for one in names:
        delta = scaling * given[one + "lora_B.weight"] @ given[one + "lora_A.weight"]
        left = prune(
            delta, share, method="magnitude" if name == "ties" else "random", rescale=name == "dare"
        )
        m, n = left.shape
        identity = torch.eye(min(m, n), rank)
        B, A = (
            (identity, torch.zeros(rank, n))
            if m <= n
            else (torch.zeros(m, rank), identity.T.clone())
        )
        (A[:m] if m <= n else B[:, :n]).copy_(left)
        made |= {one + "lora_A.weight": A.contiguous(), one + "lora_B.weight": B.contiguous()}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(made, out / "adapter_model.safetensors", metadata={"format": "pt"})
