"""Hold an open base, and what an adapter's names mean in it: both are made once, and every stage of matching reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamer.adapters.modules import Module
from streamer.plan.architectures import Architecture, with_architecture
from streamer.plan.name_matching import Match
from streamer.plan.names import NameIndex, TiedNames
from streamer.plan.targets import Orientation
from streamer.storage.checkpoint import Checkpoint, IOMode, open_checkpoint
from streamer.weights.base import StoredTensor
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import ModelConfig, read_model_config


@dataclass(frozen=True)
class OpenBase:
    """A base, opened in files or in memory, to be matched with adapters.

    Attributes
    ----------
    names
        The names of its tensors.
    """

    checkpoint: Checkpoint
    weights: WeightView
    config: ModelConfig
    orientation: Orientation
    names: NameIndex

    @classmethod
    def at(cls, path: str | Path, io: IOMode, architecture: str | None) -> OpenBase:
        """Open a base's files."""
        checkpoint = open_checkpoint(path, io)
        config = with_architecture(read_model_config(checkpoint.directory), architecture)
        weights = open_weights(checkpoint, config)
        orientation = Orientation.of(checkpoint, config)
        names = NameIndex.of(checkpoint.weight_map, config)
        return cls(checkpoint, weights, config, orientation, names)


@dataclass(frozen=True)
class Found:
    """What an adapter's names mean in a base.

    Attributes
    ----------
    architecture
        Facts about the merged model's class; None if not known.
    ties
        Parameters with several names; none for a fine-tuned model, whose own config states the ties of the output.
    aliases
        Tied names that the base does not store, with the tensors that are read for them.
    matches
        Matches of modules, and of parameters with deltas of their own.
    matched
        Module → base tensor.
    mirrors
        Modules that repeat another module's factors, by the other's name.
    deltas
        Matches of the modules whose deltas count: all but those that repeat another's.
    """

    architecture: Architecture | None
    ties: tuple[TiedNames, ...]
    aliases: Mapping[str, StoredTensor]
    matches: Mapping[str, Match]
    matched: Mapping[str, str]
    mirrors: Mapping[str, Module]
    deltas: Mapping[str, Match]

    @property
    def placed(self) -> dict[str, str]:
        """Map module → base tensor; if only parameters show the prefix of the adapter's names in the base, also these."""
        return {
            name: match.tensor
            for name, match in self.matches.items()
            if name in self.matched or match.rule.startswith("prefix")
        }
