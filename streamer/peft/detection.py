"""Detect intruders in a live model.

Plan a live model as files are planned: match each of an adapter's modules with the matrix that it changes, or refuse it.

Describe the mitigation of a live model's deltas in the same form as for files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from streamer.adapters.adapter import DeltaSource, PeftAdapter, normalize
from streamer.adapters.adapter_config import Stated
from streamer.adapters.modules import MethodModule
from streamer.adapters.reader import sorted_adapter
from streamer.adapters.rules import refuse_kinds
from streamer.api.functions import explained
from streamer.api.requests import detection_options, watched
from streamer.detection.findings import Findings, load_findings, matched_findings
from streamer.detection.findings_file import FindingsHead
from streamer.detection.matrices import choose_device, detect_matrix
from streamer.detection.options import DetectionOptions
from streamer.errors import InputError, UnsupportedError
from streamer.events import Event, Monitor
from streamer.methods import Method, NullSpace, RegMean
from streamer.options import LiveMitigation, LiveOptions
from streamer.output.job import Job
from streamer.output.write import check_counts, lacking_inputs, refuse_other_base
from streamer.peft.model import LiveFile, LiveModel, LiveTensor, entries, layer_of, open_model
from streamer.plan.architectures import architecture_for
from streamer.plan.name_matching import Match, Renames, renames_for
from streamer.plan.plan import AdapterBatch, Plan, match_plan, resident_bytes
from streamer.plan.targets import Orientation
from streamer.storage.checkpoint import Checkpoint, open_checkpoint
from streamer.storage.files import AdapterIdentity, BaseIdentity
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import ModelConfig, read_model_config

if TYPE_CHECKING:
    from streamer.api.keywords import LiveDetectKeywords


class LiveBase(Checkpoint):
    """Base in memory, with the interface of its files."""

    def identity(self) -> BaseIdentity:
        """Return names, dtypes, shapes and samples of its tensors, and the fact that it is in memory."""
        return {"in_memory": True, **self._identity}


class LiveAdapter(PeftAdapter):
    """Adapter in memory, with the interface of its directory."""

    def identity(self) -> AdapterIdentity:
        """Digest all tensors and the config."""
        digest = hashlib.sha256(self.file.header.digest.encode())
        for info in self.file.header.tensors:
            digest.update(self.file.view(info))
        config = json.dumps(dict(self.config.values), sort_keys=True)
        return {
            "weights_sha256": digest.hexdigest(),
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "modules": len(self.modules),
            "base_model_name_or_path": self.config.base_model,
        }


@dataclass(frozen=True)
class LiveOrientation(Orientation):
    """Orientation of a base whose layers are available.

    Attributes
    ----------
    conv1d
        Names of the weights of its Conv1D layers.
    """

    conv1d: frozenset[str] = frozenset()

    def seen(self, adapter: DeltaSource, weights: WeightView, names: Mapping[str, Match]) -> Orientation:
        """Return itself; there is nothing more to learn."""
        return self

    def ways(self, tensor: str, *names: str, fan_in_fan_out: bool = False) -> set[bool]:
        """Return whether the weight belongs to a Conv1D."""
        return {tensor in self.conv1d}


@dataclass(frozen=True, eq=False)
class LivePlan:
    """Plan of a live model, and its tensors.

    Attributes
    ----------
    live
        The model.
    plan
        The matrix that each module changes, by the names in memory.
    tensors
        The base's tensors; tied ones under each name.
    """

    live: LiveModel
    plan: Plan
    tensors: Mapping[str, LiveTensor]

    @cached_property
    def files(self) -> Checkpoint | None:
        """Open the files from which the model was loaded; None if these are not available, or not in safetensors."""
        directory = _directory(getattr(self.live.base, "name_or_path", None))
        try:
            return None if directory is None else open_checkpoint(directory)
        except InputError:
            return None

    @cached_property
    def names_in_files(self) -> dict[str, str]:
        """Map tensor names in memory to names in the files from which the model was loaded, if these are available."""
        if self.files is None:
            return {}
        renames = renames_for(read_model_config(self.files.path))
        by_run_time = {now: name for name, now in renames.at_run_time(self.files.weight_map).items()}
        prefix = f"{getattr(self.live.base, 'base_model_prefix', '')}."
        ways = {name: (name, name.removeprefix(prefix), prefix + name) for name in self.tensors}
        known = {name: [by_run_time[way] for way in ways[name] if way in by_run_time] for name in ways}
        found = {name: matches[0] for name, matches in known.items() if matches}
        return found if len({*found.values()}) == len(found) else {}

    def name_in_files(self, tensor: str) -> str:
        """Return a matrix's name in the files (for an expert, by its stack), or its own name if they are not available."""
        stem, bracket, index = tensor.partition("[")
        return self.names_in_files.get(stem, stem) + bracket + index

    def release(self) -> None:
        """Drop the copies that were needed to read tensors."""
        for file in (*self.plan.base.files.values(), *self.plan.adapter.files):
            assert isinstance(file, LiveFile)
            file.release()


def plan_live(peft_model: nn.Module, adapter_name: str, ignore_keys: Sequence[str]) -> LivePlan:
    """Match an adapter of a live model with the model's matrices.

    The delta is added to the base in memory, so an adapter relative to a residual, such as PiSSA's, finds the right base.

    Raises
    ------
    UsageError, UnsupportedError, MismatchError
        For the same reasons as for files, or because of the model's state.
    """
    live = open_model(peft_model, adapter_name)
    # PEFT's layers use PEFT's column order, no matter what trained the adapter.
    config = replace(live.adapter_config(), stated=Stated(True, "rank_major", ignore_keys))
    refuse_kinds(config)
    adapter_file = LiveFile(live.adapter_title, live.adapter_tensors())
    found = sorted_adapter(Path(live.adapter_title), config, adapter_file)
    adapter = LiveAdapter(found.path, found.config, found.files, found.modules, found.carried, found.wrapped)
    tensors = dict(entries(live.base, "", base_only=True))
    first = {tensor.storage: name for name, tensor in reversed(tensors.items())}
    own = {
        name: tensor for name, tensor in tensors.items() if first[tensor.storage] == name
    }  # tied ones once, as in files
    title = f"{type(live.base).__name__} in memory"
    base = LiveBase(Path(title), {title: LiveFile(title, own)}, dict.fromkeys(own, title), None)
    model = _config(live.base, tied=len(own) < len(tensors))
    kinds = {name: {c.__name__ for c in type(t.module).__mro__} for name, t in own.items() if t.key == "weight"}
    conv1d = frozenset(name for name in kinds if "Conv1D" in kinds[name])
    orientation = LiveOrientation(Orientation.of(base, model).architectures, conv1d=conv1d)
    weights = open_weights(base, model)
    plan = match_plan(base, weights, model, orientation, adapter, Renames("", (), ()))
    _refuse_other_scalings(live, plan)
    return LivePlan(live, plan, tensors)


def _config(base_model: nn.Module, tied: bool) -> ModelConfig:
    """Return the model's config, with the model's class or a known class from which it is derived.

    For an unknown class, state that nothing is tied unless a parameter has two names.
    """
    config: Any = getattr(base_model, "config", None)
    values = json.loads(config.to_json_string(use_diff=False)) if hasattr(config, "to_json_string") else {}
    named = (ModelConfig({**values, "architectures": [cls.__name__]}) for cls in type(base_model).__mro__)
    known = next((config for config in named if architecture_for(config) is not None), None)
    if known is not None:
        return known
    apart = {} if tied else {"tie_word_embeddings": False}
    return ModelConfig({**values, "architectures": [type(base_model).__name__], **apart})


def _refuse_other_scalings(live: LiveModel, plan: Plan) -> None:
    """Refuse an adapter whose layers were scaled after loading, so that the config's scaling is wrong."""
    layers = {name: layer for name, layer in live.layers() if isinstance(getattr(layer, "scaling", None), dict)}
    for target in plan.targets:
        if isinstance(target.module, MethodModule) and not target.module.method.scaled:
            continue
        path = layer_of(target, layers)
        scaling = layers[path].scaling.get(live.adapter_name) if path else None
        if scaling is not None and abs(scaling - target.module.scaling) > 1e-6 * abs(scaling):
            where = normalize(f"{path}.")[:-1].replace(".base_layer", "")
            raise UnsupportedError(
                f"{where}: is scaled by {scaling:g}, but the config of adapter {live.adapter_name!r} says "
                f"{target.module.scaling:g}; reset the scale (unscale_layer), or change the config's lora_alpha to match"
            )


def _directory(stated: object) -> Path | None:
    """Find the directory from which a model was loaded, by its path or by its id in the hub's cache."""
    if not isinstance(stated, str) or not stated:
        return None
    if Path(stated).is_dir():
        return Path(stated)
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(stated, "config.json")
    except (ImportError, ValueError):  # not a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


@explained(LiveOptions)
def detect_intruder_dimensions(peft_model: nn.Module, adapter_name: str = "default", top_k: int | float | None = None,
                               threshold_epsilon: float | None = None,
                               **options: Unpack[LiveDetectKeywords]) -> Findings:  # fmt: skip
    """Find the intruder dimensions of every matrix that an adapter of a live model changes; the model stays unchanged.

    Parameters
    ----------
    peft_model
        A `PeftModel`, or a model with injected adapters (PEFT's ``inject_adapter_in_model``, which transformers' ``add_adapter`` calls).
    adapter_name
        The adapter, active or not; others are ignored.

    Returns
    -------
    Findings
        As from files. `Findings.save` writes them. Mitigate and merge on files accept them if base and adapter are the same; `diff`, and
        reports with coefficients or an evaluation, do not.

    Raises
    ------
    MissingPackageError
        If PEFT is not installed.
    StreamerError
        Of the class for the kind of error (see `streamer.errors`).
    """
    given = LiveOptions(top_k=top_k, threshold_epsilon=threshold_epsilon, **options)
    detection = detection_options(given)
    with watched(given) as monitor:
        live = plan_live(peft_model, adapter_name, given.ignore_keys)
        monitor.warn(live.plan.warnings)
        return named_as_files(live, detect_live(live, detection, choose_device(given.device), monitor))


def detect_live(live: LivePlan, options: DetectionOptions, device: torch.device, monitor: Monitor) -> Findings:
    """Detect in one matrix after another; the findings use the names in memory."""
    plan = live.plan
    total, done, matrices = sum(options.cost(target.module.shape) for target in plan.targets), 0, []
    resident = resident_bytes(AdapterBatch(plan.base, (plan,)))
    for items, target in enumerate(plan.targets):
        monitor.checkpoint()
        monitor.emit(Event("detect", live.name_in_files(target.tensor), done, total, items, len(plan.targets)))
        matrices.append(detect_matrix(plan, target, options, device, resident, monitor=monitor))
        live.release()
        done += options.cost(target.module.shape)
    monitor.emit(Event("detect", "", total, total, len(plan.targets), len(plan.targets)))
    findings = Findings.of(FindingsHead.of(plan, options), matrices)
    monitor.warn(findings.warnings)
    return findings


def named_as_files(live: LivePlan, findings: Findings) -> Findings:
    """Rename findings on a live model to the names in the base's files."""
    return replace(findings, matrices=tuple(replace(m, tensor=live.name_in_files(m.tensor)) for m in findings))


def live_job(live: LivePlan, method: Method, given: LiveMitigation, monitor: Monitor) -> tuple[Job, Findings | None]:
    """Run detection, or use the given findings, if the method needs them; give findings, factors and maps the names in memory.

    Raises
    ------
    UnsupportedError
        If a map is given, but it is unknown from which files the base was loaded.
    MismatchError
        If findings, factors or a map belong to another base or adapter, or findings were made with different options.

    Returns
    -------
    Job, Findings or None
        The findings use the names in memory; None if the method needs none.
    """
    plan, findings = live.plan, given.findings
    detection, device = detection_options(given), choose_device(given.device)
    monitor.warn(plan.warnings)
    found, named = None, isinstance(method, RegMean | NullSpace)
    names = {live.name_in_files(target.tensor): target.tensor for target in plan.targets if named}
    if isinstance(method, RegMean):
        matrices = {names.get(name, name): R for name, R in method.coefficients.matrices.items()}
        method = replace(method, coefficients=replace(method.coefficients, matrices=matrices))
        check_counts(plan, method.coefficients)
    if isinstance(method, NullSpace):
        inputs = method.map
        if live.files is None:
            raise UnsupportedError(
                f"{inputs.name}: is a map of a base's files, but the model's files are unknown; load the model from their directory"
            )
        theirs = {key: value for key, value in inputs.facts["base"].items() if key != "architecture"}
        refuse_other_base(inputs, theirs, {**live.files.identity()})
        mine = (replace(one, names=tuple(names[n] for n in one.names if n in names)) for one in inputs.inputs)
        inputs = replace(inputs, inputs=tuple(one for one in mine if one.names))
        monitor.warn(lacking_inputs(plan, inputs))
        method = replace(method, map=inputs)
    if method.needs_detection and findings is None:
        found = detect_live(live, detection, device, monitor)
    elif method.needs_detection and findings is not None:
        loaded = findings if isinstance(findings, Findings) else load_findings(findings)
        found = matched_findings(plan, loaded, loaded.name)
        live.release()
        found.check_matches(plan.base_identity, plan.adapter_identity, detection_options(given, None, loaded))
    return Job(plan, method, detection, device, found), found
