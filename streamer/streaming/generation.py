"""Let an adapted model write text: transformers' own `generate` runs on weights that are read when a module needs them.

All sequences are in step, so a step reads every weight once, for all of them. The model keeps its own cache of keys and values, or states.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamer.errors import InputError, NumericError, UnsupportedError
from streamer.storage.files import storage_errors
from streamer.streaming.groups import Group
from streamer.streaming.resume import SECONDS, STATES_FILE
from streamer.streaming.skeleton import require_transformers
from streamer.streaming.spool import in_file, moved_to_file
from streamer.streaming.sweep import SweepModel
from streamer.streaming.turn import Stop, nothing
from streamer.streaming.variants import ADAPTER_ROW
from streamer.weights.base import as_bytes

Prompt = Sequence[int]
"""Tokens with which a sequence begins, at least one."""

PAGE = 4096
"""Bytes of the smallest tensor of a cache that is worth a file."""

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
        position = ids.shape[1]
        chosen = scores.cpu().clone()
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
        saved = in_file(self.path.parent, partial(torch.save, cache))
        arrays = {"ids": ids, "cache": saved}
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
        with (
            storage_errors(self.path.parent, "write a temporary file"),
            tempfile.TemporaryFile(prefix=".streamer-", dir=self.path.parent) as file,
            torch.serialization.safe_globals([*classes]),
        ):
            file.write(as_bytes(arrays["cache"]))
            file.seek(0)
            # Through its path the file is mapped, and the cache does not count as memory.
            path = Path(f"/dev/fd/{file.fileno()}")
            mapped = path.exists()
            cache = torch.load(path if mapped else file, mmap=mapped, weights_only=True)
        return arrays["ids"].clone(), cache


class FiledCache:
    """Cache whose tensors lie in files: only the layer that runs has its keys and values in memory that the system cannot take back."""

    def __init__(self, cache: Any, directory: Path) -> None:
        self.layers = cache.layers
        self.directory = directory
        self._filed: dict[tuple[int, str], Tensor] = {}

    def move(self) -> None:
        """Move what is new to files."""
        for number, layer in enumerate(self.layers):
            for name, tensor in vars(layer).items():
                known = tensor is self._filed.get((number, name))
                if isinstance(tensor, Tensor) and tensor.nbytes >= PAGE and not known:
                    filed = moved_to_file(tensor, self.directory)
                    self._filed[number, name] = filed
                    setattr(layer, name, filed)


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
    network = model.network
    if not network.can_generate():
        raise UnsupportedError(
            f"{model.job.plan.base.path}: {type(network).__name__} cannot generate text; give --task"
        )


def write_text(
    model: SweepModel,
    prompts: Mapping[int, Prompt],
    length: int,
    seed: int,
    stop: Stop,
    after: Callable[[int], None],
    snapshot: Snapshot | None = None,
    directory: Path | None = None,
) -> Tensor:
    """Let the adapted model continue prompts to sequences of one length, each token drawn at temperature 1.

    Parameters
    ----------
    prompts
        Prompt of each sequence, by its number; see `Sampler`.
    stop
        Called before each parameter is read; may raise to stop.
    after
        Called at each step with the number of tokens that each sequence has.
    snapshot
        Where a killed run's state lies; None keeps none, and so does a model whose cache is of its own kind, or has states alone.
    directory
        Where the cache lies, in files; None keeps it in memory.

    Returns
    -------
    Tensor
        Tokens (sequences, length).

    Raises
    ------
    NumericError
        If a logit is NaN or Inf.
    """
    ids = torch.tensor([prompt[:1] for prompt in prompts.values()])
    cache = _fresh_cache(model.network)
    # A cache of states alone does not know how many tokens it holds, and `generate` would run them again.
    if cache is None or all(getattr(cache, "is_linear", [False])):
        snapshot = None
    if snapshot is not None and (found := snapshot.load(cache)) is not None:
        ids, cache = found

    def step(so_far: Tensor) -> None:
        tokens = so_far.shape[1]
        if snapshot is not None and tokens < length:
            snapshot.save(so_far, cache)
        after(tokens)

    model.limit(0, False)  # one group shares nothing with others
    leave: Stop = nothing
    if cache is not None and directory is not None:
        leave = FiledCache(cache, directory).move
    sampler = Sampler(prompts, seed, str(model.job.plan.base.path), step)
    with model.alone(Group(ids, ADAPTER_ROW), stop, leave):
        return _generated(model, ids, cache, length, sampler)


def _generated(model: SweepModel, ids: Tensor, cache: Any, length: int, sampler: Sampler) -> Tensor:
    """Continue sequences by transformers' own loop, without the stops and filters of the base's config."""
    transformers = require_transformers()
    network = model.network
    device = model.job.device
    network.generation_config = transformers.GenerationConfig()
    config = transformers.GenerationConfig(
        max_length=length, do_sample=False, use_cache=_takes_cache(network), pad_token_id=0
    )
    out: Tensor = network.generate(
        ids.to(device),
        # Or it would take a token for padding.
        attention_mask=torch.ones_like(ids, device=device),
        generation_config=config,
        logits_processor=[sampler],
        **({} if cache is None else {_cache_keyword(): cache}),
    )
    return out.cpu()


def _fresh_cache(network: Any) -> Any:
    """Make a cache of transformers' common kind; None if the model has its own kind, or none."""
    if not (network._supports_default_dynamic_cache() and _takes_cache(network)):
        return None
    config = network.config.get_text_config(decoder=True)
    return require_transformers().DynamicCache(config=config)


def _cache_keyword() -> str:
    """Return the keyword by which `generate` takes a cache; it was renamed within version 5."""
    prepare = require_transformers().GenerationMixin.prepare_inputs_for_generation
    return next(name for name in CACHES if name in inspect.signature(prepare).parameters)
