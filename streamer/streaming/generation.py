"""Let an adapted model write text: transformers' own `generate` runs on weights that are read when a module needs them.

All sequences are in step, so a step reads every weight once, for all of them. The model keeps its own cache of keys and values, or states.
"""

from __future__ import annotations

import inspect
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamer.errors import InputError, NumericError, UnsupportedError
from streamer.streaming.model import require_transformers
from streamer.streaming.sweep import SECONDS, STATES_FILE, Checkpoint, Group, SweepModel
from streamer.weights.base import as_bytes

Prompt = Sequence[int]
"""Tokens with which a sequence begins, at least one."""

CACHES = "cache", "past_key_values"
"""Names under which versions of transformers take a cache."""


@dataclass
class Sampler:
    """Chooses the next token of each sequence: its prompt's, or a draw from the model's distribution.

    The likeliest token by ``log p + noise``, with noise of Gumbel's distribution, is a draw from p. The noise depends on the seed, the
    sequence and the position alone: neither sequences that run beside it nor an interruption change a draw.

    Attributes
    ----------
    prompts
        Prompt of each sequence, by its number.
    name
        Name of the model, for messages.
    after
        Called at each step with the tokens so far, the last of which the model has not run yet.
    """

    prompts: Mapping[int, Prompt]
    seed: int
    name: str
    after: Callable[[Tensor], None]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores of which the largest is the chosen token's; `generate` calls this after each pass through the model."""
        if not bool(scores.isfinite().all()):
            raise NumericError(
                f"{self.name}: its logits are NaN or Inf on the text that it writes; check its weights and the adapter"
            )
        position, chosen = ids.shape[1], scores.cpu().clone()
        for row, (number, prompt) in enumerate(self.prompts.items()):
            if position < len(prompt):
                chosen[row] = -torch.inf
                chosen[row, prompt[position]] = 0
            else:
                waiting = np.random.default_rng([self.seed, number, position]).standard_exponential(
                    scores.shape[1]
                )
                chosen[row] -= torch.from_numpy(np.log(waiting)).to(chosen.dtype)
        self.after(torch.cat([ids.cpu(), chosen.argmax(-1, keepdim=True)], 1))
        return chosen.to(scores.device)


@dataclass
class Snapshot:
    """The tokens so far and the model's cache, saved between two steps, so that a killed run goes on with the same bits.

    Attributes
    ----------
    path
        The file.
    run
        Text that distinguishes the run from others.
    """

    path: Path
    run: str
    _saved: float = field(default_factory=time.monotonic)

    def save(self, ids: Tensor, cache: Any) -> None:
        """Save tokens and cache, if it is time to."""
        if time.monotonic() - self._saved < SECONDS:
            return
        file = io.BytesIO()
        torch.save(cache, file)
        arrays = {"ids": ids, "cache": torch.frombuffer(file.getbuffer(), dtype=torch.uint8)}
        STATES_FILE.save(self.path, {"run": self.run}, arrays, overwrite=True)
        self._saved = time.monotonic()

    def load(self, fresh: Any) -> tuple[Tensor, Any] | None:
        """Load what was saved, with no classes but those of a fresh cache; None if there is nothing of this run."""
        try:
            tree, arrays = STATES_FILE.read(self.path)
        except (InputError, OSError):
            return None
        if tree["run"] != self.run:
            return None
        classes = {type(fresh), *map(type, fresh.layers)}
        with torch.serialization.safe_globals([*classes]):
            cache = torch.load(io.BytesIO(as_bytes(arrays["cache"])), weights_only=True)
        return arrays["ids"].clone(), cache


def _takes_cache(network: Any) -> bool:
    """Test whether a model can use results of earlier tokens; else each step runs all tokens."""
    return not {*CACHES, "cache_params"}.isdisjoint(inspect.signature(network.forward).parameters)


def check_generates(model: SweepModel) -> None:
    """Check that a model can generate.

    Raises
    ------
    UnsupportedError
        If it cannot.
    """
    network: Any = model.network
    if not network.can_generate():
        raise UnsupportedError(
            f"{model.job.plan.base.path}: {type(network).__name__} cannot generate text; give --task"
        )


def write_text(
    model: SweepModel,
    variant: int,
    prompts: Mapping[int, Prompt],
    length: int,
    seed: int,
    checkpoint: Checkpoint,
    after: Callable[[int], None],
    snapshot: Snapshot | None = None,
) -> Tensor:
    """Let a variant continue prompts to sequences of one length, each token drawn at temperature 1.

    Parameters
    ----------
    prompts
        Prompt of each sequence, by its number; see `Sampler`.
    checkpoint
        Called before each parameter is read; may raise to stop.
    after
        Called at each step with the number of tokens that each sequence has.
    snapshot
        Where a killed run's state lies; None keeps none, and so does a model whose cache is of its own kind, or has states alone.

    Returns
    -------
    Tensor
        Tokens (sequences, length).

    Raises
    ------
    NumericError
        If a logit is NaN or Inf.
    """
    transformers = require_transformers()
    network: Any = model.network
    name = str(model.job.plan.base.path)
    ids, cache = torch.tensor([prompt[:1] for prompt in prompts.values()]), None
    if network._supports_default_dynamic_cache() and _takes_cache(network):
        cache = transformers.DynamicCache(config=network.config.get_text_config(decoder=True))
        if all(getattr(cache, "is_linear", [False])):
            snapshot = None  # such a cache does not know how many tokens it holds, and `generate` would run them again
        if snapshot is not None and (found := snapshot.load(cache)) is not None:
            ids, cache = found

    def step(so_far: Tensor) -> None:
        tokens = so_far.shape[1]
        if snapshot is not None and cache is not None and tokens < length:
            snapshot.save(so_far, cache)
        after(tokens)

    network.generation_config = (
        transformers.GenerationConfig()
    )  # without the stops and filters of the base's config
    uses_cache = _takes_cache(network)
    config = transformers.GenerationConfig(
        max_length=length, do_sample=False, use_cache=uses_cache, pad_token_id=0
    )
    sampler = Sampler(prompts, seed, name, step)
    # The keyword was renamed within version 5.
    known = inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
    keyword = next(name for name in CACHES if name in known)
    caches = {} if cache is None else {keyword: cache}
    model.limit(0, False)  # one group shares nothing with others
    with model.alone(Group(ids, variant), checkpoint):
        out: Tensor = network.generate(
            ids.to(model.job.device),
            attention_mask=torch.ones_like(
                ids, device=model.job.device
            ),  # or it would take a token for padding
            generation_config=config,
            logits_processor=[sampler],
            **caches,
        )
    return out.cpu()
