"""Compute what an adapter adds to a weight, in float64, by a direct reading of PEFT's formulas: LoRA, DoRA, a fine-tuned model.

LoRA: ``Δ = s·B·A`` with ``s = alpha/r``, or ``alpha/√r`` for rsLoRA; r and alpha come from the first pattern that matches the module.
DoRA: ``Δ = m·(W0 + s·B·A)/‖W0 + s·B·A‖ − W0`` with norms by row of (out, in). Fine-tuned model: ``Δ = W1 − W0``.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from streamer.plan.architectures import architecture_for
from streamer.verification.deltas import DoraDelta, LowRankDelta, TunedDelta, WitnessDelta
from streamer.verification.result import NotRecomputed
from streamer.verification.tensors import Array, Matrix, Stored, TensorFiles, open_matrix
from streamer.weights.model_config import read_model_config

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|base_layer|token_adapter)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)\.(?!weight$|bias$)[^.]+"
)
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


@dataclass(frozen=True)
class Factors:
    """One module's LoRA tensors: matrices B (out, r) and A (r, in), scaling s, and DoRA's magnitude (out,) or None."""

    B: Array
    A: Array
    scaling: float
    magnitude: Array | None
    names: dict[str, str]
    embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return len(self.B), self.A.shape[1]


class AdapterFiles:
    """Opened directory of an adapter, of a fine-tuned model used as one, or of the output of `streamer mitigate`.

    Parameters
    ----------
    base, architecture
        The base that it changes, and the class that the user named: these decide whether square layers are stored (out, in), or
        (in, out) as a Conv1D.
    """

    def __init__(self, directory: Path, base: Path | None = None, architecture: str | None = None) -> None:
        self.directory = directory
        config = read_model_config(base if base is not None and base.is_dir() else None)
        self._architecture = architecture_for(replace(config, architecture=architecture))
        self.is_model = not (directory / CONFIG_NAME).exists()
        if self.is_model:
            self.config: dict[str, Any] = {}
            paths = sorted(directory.glob("*.safetensors"))
        else:
            self.config = json.loads((directory / CONFIG_NAME).read_bytes())
            paths = [directory / WEIGHTS_NAME]
        self.files = TensorFiles(paths, "pt")

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.files.__exit__(kind, exc, tb)

    @cached_property
    def modules(self) -> dict[str, dict[str, str]]:
        """Map each module's path to its tensors' names by role."""
        found: dict[str, dict[str, str]] = {}
        for names in self.files.names.values():
            for name in names:
                if match := _TENSOR.fullmatch(self.plain_name(name)):
                    found.setdefault(match["module"], {})[match["role"]] = name
        return found

    @staticmethod
    def plain_name(name: str) -> str:
        """Strip PEFT's, DDP's, torch.compile's and FSDP's prefixes from a tensor's name."""
        plain = re.sub(r"\.+", ".", _WRAPPERS.sub(r"\1", name)).removeprefix(".").removeprefix("module.")
        return plain.removeprefix("base_model.model.")

    def saved_names(self) -> dict[str, str]:
        """Map the names that PEFT saves and finds → the file's; if two would be the same, only wrappers go."""
        stored, found = self.files.all_names, dict[str, str]()
        plain = {self.plain_name(name) for name in stored}
        for name in stored:
            kept = _NAMED.sub(r".\1", self.plain_name(name))
            short = re.sub(r"\.modules_to_save\.(?:[^.]+\.(?=.))?", ".", kept)
            copied = {short, kept.replace(".modules_to_save.", ".")} & plain
            found[f"base_model.model.{kept if copied else short}"] = name
        return found if len(found) == len(stored) else {f"base_model.model.{self.plain_name(n)}": n for n in stored}

    def factors(self, module: str, replaced: bool = False) -> Factors:
        """Read a module's LoRA tensors; set `replaced` if the caller also applies the adapter's other values for the module.

        Raises
        ------
        NotRecomputed
            If the adapter is of another kind, or has no such module.
        """
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA":
            raise NotRecomputed(f"it is changed by a {kind} adapter, for which verify has no formula")
        names = self.modules.get(module, {})
        if names.keys() & {"base_layer", "token_adapter"} and not replaced:
            raise NotRecomputed("the adapter has values for it besides its factors")
        embedding = "lora_embedding_A" in names
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if a not in names or b not in names:
            raise NotRecomputed("its factors are not in the adapter under its module's name")
        A, B = self.files.whole(names[a]), self.files.whole(names[b])
        if B.ndim != A.ndim or B.shape[1] != len(A):
            raise NotRecomputed("its factors are shared by several matrices")
        magnitude = names.get("lora_magnitude_vector")
        return Factors(
            B.reshape(len(B), -1), A.reshape(len(A), -1), self._scaling(module, len(A)),
            None if magnitude is None else self.files.whole(magnitude).ravel(), names, embedding,
        )  # fmt: skip

    def saved_weight(self, module: str) -> str | None:
        """Return the name of a module's weight if the adapter stores it whole, else None."""
        name = f"base_model.model.{module}.weight"
        return name if name in self.files else None

    def rank(self, module: str) -> int:
        """Return a module's rank according to the config."""
        return int(self._stated("rank_pattern", "r", module))

    def bias_scaling(self, bias: str) -> float:
        """Return the scaling of a bias that LoRA adds (``lora_bias``), which is its module's."""
        module = bias.removesuffix(".bias")
        return self._scaling(module, self.files.stored(self.modules[module]["lora_A"]).shape[0])

    def token_rows(self, weight: str) -> list[int]:
        """Return the rows of a weight that trained tokens replace, listed for its module or for the input embedding."""
        stated = self.config.get("trainable_token_indices")
        if isinstance(stated, dict):
            module = weight.removesuffix(".weight")
            stated = next((rows for key, rows in stated.items() if f".{module}".endswith(f".{key}")), None)
        return list(stated or ())

    def _stated(self, pattern: str, default: str, module: str) -> Any:
        patterns = self.config.get(pattern) or {}
        fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(fitting, self.config[default])

    def _scaling(self, module: str, rank: int) -> float:
        # PEFT looks up a targeted parameter's alpha by the parameter's name.
        if any(f".{module}.weight".endswith(f".{name}") for name in self.config.get("target_parameters") or ()):
            module = f"{module}.weight"
        alpha = float(self._stated("alpha_pattern", "lora_alpha", module))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def delta(
        self,
        tensor: str,
        module: str,
        transposed: bool,
        base: TensorFiles,
        source: tuple[TensorFiles, str] | None = None,
    ) -> tuple[Matrix, WitnessDelta, int]:
        """Return W0 as (out, in), Δ, and the rank of its factors, or 0 without factors.

        `transposed` is the record's statement about the base's tensor, used if its shape and class do not decide. `source` holds W0
        instead of the base, if the adapter replaces the weight before adding to it.
        """
        files, name = source or (base, tensor)
        if name not in files:
            raise NotRecomputed("it is not a tensor of the base by itself, but part of one or built from several")
        stored = files.stored(name)
        if self.is_model:
            if tensor not in self.files or self.files.stored(tensor).shape != stored.shape or len(stored.shape) != 2:
                raise NotRecomputed("the fine-tuned model has no matrix of this name and shape")
            m, n = stored.shape[::-1] if transposed else stored.shape
            W0 = open_matrix(files, name, (m, n), transposed)
            return W0, TunedDelta(open_matrix(self.files, tensor, W0.shape, transposed)), 0
        factors = self.factors(module, source is not None)
        W0 = open_matrix(files, name, factors.shape, self._transposed(factors, stored, transposed, module, tensor))
        low_rank = LowRankDelta(factors.scaling * factors.B, factors.A.T)
        delta = low_rank if factors.magnitude is None else DoraDelta(low_rank, factors.magnitude)
        return W0, delta, len(factors.A)

    def _transposed(self, factors: Factors, stored: Stored, recorded: bool, *names: str) -> bool:
        """Test whether the base stores (in, out): by shape, for square matrices by the base's class, else as recorded."""
        m, n = factors.shape
        flat = (stored.shape[0], math.prod(stored.shape[1:]))
        layers = [name.removesuffix(".weight") for name in names]
        conv1d = recorded if self._architecture is None else any(map(self._architecture.transposed, layers))
        inward = factors.embedding or (m == n and conv1d)
        if flat == (m, n) and not inward:
            return False
        if stored.shape == (n, m):
            return True
        raise NotRecomputed(
            f"its factors give a matrix of {m} by {n}, but the weight is stored as {stored.dtype} {list(stored.shape)}"
        )
