"""Detect intruders in a live model, and merge its mitigated adapter in place or add it as a new adapter.

A live model is planned as files are: each of an adapter's modules is matched with the matrix that it changes, or refused.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from streamer.adapters.adapter import DeltaSource, PeftAdapter, normalize, sorted_adapter
from streamer.adapters.adapter_config import Stated, refuse_kinds
from streamer.adapters.modules import MethodModule
from streamer.api.functions import explained
from streamer.api.requests import chosen_method, detection_options, watched
from streamer.detection.detect import choose_device, detect_matrix
from streamer.detection.findings import Findings, load_findings, matched_findings
from streamer.detection.options import DetectionOptions
from streamer.errors import InputError, NumericError, UnsupportedError, UsageError
from streamer.events import Event, Monitor, Progress
from streamer.linalg.operators import all_finite
from streamer.linalg.torch_state import threads
from streamer.methods import Method, NullSpace, Project, RegMean
from streamer.options import LiveMitigation, LiveOptions
from streamer.output.adapter_writer import MitigatedFactors, refuse_dense
from streamer.output.job import Job, MitigatedMatrix
from streamer.output.model_writer import AddBias, Cast, CopyBytes, OutputTensor, plan_merged
from streamer.output.write import check_counts, lacking_inputs, refuse_other_base, truncation_warnings
from streamer.peft.model import LiveFile, LiveModel, LiveTensor, entries, layer_of, open_model, quiet_peft, require_peft
from streamer.plan.architectures import architecture_for
from streamer.plan.name_matching import Match, Renames, renames_for
from streamer.plan.plan import AdapterBatch, Plan, match_plan, resident_bytes
from streamer.plan.targets import Orientation
from streamer.storage.atomic_file import gather
from streamer.storage.checkpoint import Checkpoint, open_checkpoint
from streamer.storage.files import AdapterIdentity, BaseIdentity
from streamer.weights.base import TORCH_DTYPES, as_tensor
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import ModelConfig, read_model_config

if TYPE_CHECKING:
    from streamer.api.keywords import LiveDetectKeywords, LiveKeywords


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
    # Tied ones once, as in files.
    own = {name: tensor for name, tensor in tensors.items() if first[tensor.storage] == name}
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
    total, matrices = sum(options.cost(target.module.shape) for target in plan.targets), []
    progress = Progress(monitor, "detect", total, len(plan.targets))
    resident = resident_bytes(AdapterBatch(plan.base, (plan,)))
    for target in plan.targets:
        progress.begin(live.name_in_files(target.tensor))
        matrices.append(detect_matrix(plan, target, options, device, resident, monitor=monitor))
        live.release()
        progress.add(options.cost(target.module.shape))
    progress.end()
    findings = Findings.of(plan, options, matrices)
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


@explained(LiveMitigation)
def merge_and_unload_with_reduced_intruder_dimensions(peft_model: nn.Module, adapter_name: str = "default",
                                                      top_k: int | float | None = None,
                                                      threshold_epsilon: float | None = None,
                                                      mitigation_lambda: float | None = None,
                                                      **options: Unpack[LiveKeywords]) -> nn.Module:  # fmt: skip
    """Merge an adapter with its intruders scaled by `mitigation_lambda` into the base, and return the base without PEFT.

    Weights are changed in place, one matrix after another, in the base's dtypes and on its devices; each is rounded once from a float32
    sum. Everything is detected and checked before the first weight changes. If the run is stopped after that, the model is partly merged
    and must be loaded again. Other adapters are dropped, and `peft_model` must not be used any more. If an embedding and a head share one
    tensor and the adapter changes only one of them, they are separated, and the base's config states it.

    Parameters
    ----------
    peft_model
        A `PeftModel`, or a model with injected adapters (PEFT's ``inject_adapter_in_model``, which transformers' ``add_adapter`` calls).
    adapter_name
        An adapter of any kind that ``streamer merge`` supports.
    findings
        From `detect_intruder_dimensions` of this module or on the files, or the path of their file; no weight is then decomposed.

    Returns
    -------
    torch.nn.Module
        The base model; for a `PeftModel`, the result of ``get_base_model()``.

    Raises
    ------
    MissingPackageError
        If PEFT is not installed.
    UnsupportedError
        If weights are quantized or offloaded to disk.
    StreamerError
        Of the class for the kind of error (see `streamer.errors`).
    """
    given = LiveMitigation(
        top_k=top_k, threshold_epsilon=threshold_epsilon, mitigation_lambda=mitigation_lambda, **options
    )
    method = chosen_method(given)
    with watched(given) as monitor:
        live = plan_live(peft_model, adapter_name, given.ignore_keys)
        outputs = _checked(live, list(_changed(live)))
        job, _ = live_job(live, method, given, monitor)
        # Compute everything once before the first change, so that wrong coefficients or an overflow are refused here.
        for output in outputs:
            monitor.checkpoint()
            _values(job, output)
            live.release()
        # Activate before any weight changes, because it may fail: a model loaded in inference mode allows no gradients.
        with quiet_peft():
            live.live.activate(adapter_name)
        total, done = sum(_nbytes(output) for output in outputs), 0
        for items, output in enumerate(outputs):
            monitor.emit(Event("write", output.name, done, total, items, len(outputs)))
            values, tensor = _values(job, output), live.tensors[output.name]
            if output.name in live.plan.base.weight_map:
                tensor.write(values)
            else:  # the parameter still belongs to another module
                tensor.untie(values)
            live.release()
            done += _nbytes(output)
        monitor.emit(Event("write", "", total, total, len(outputs), len(outputs)))
        config: Any = getattr(live.live.base, "config", None)
        for *path, key in live.plan.edits.untied:  # head and embedding are separate now
            setattr(functools.reduce(getattr, path, config), key, False)
        with quiet_peft():
            return unloaded(live.live)


def _changed(live: LivePlan) -> Iterator[OutputTensor]:
    """List the tensors of the base that the merge changes, starting with those that get a parameter of their own.

    Modules that the adapter saves are already in the model; they replace the base's when PEFT is removed.
    """
    plan = live.plan
    outputs = [output for outputs in plan_merged(plan).files.values() for output in outputs]
    for output in sorted(outputs, key=lambda output: output.name in plan.base.weight_map):
        source = plan.edits.sources.get(output.name)
        saved = source is not None and source.file is plan.adapter.file
        own = isinstance(output.recipe, CopyBytes) and output.name in plan.base.weight_map
        if own or (saved and isinstance(output.recipe, CopyBytes | Cast)):
            continue
        if saved and not isinstance(output.recipe, AddBias):
            raise UnsupportedError(
                f"{plan.adapter.path}: saves {output.name!r} and also changes it, which is not supported in memory; merge its files "
                "with `streamer merge`"
            )
        yield output


def _checked(live: LivePlan, outputs: list[OutputTensor]) -> list[OutputTensor]:
    """Refuse, before anything changes, tensors that cannot be written and adapters with values that are not finite."""
    architecture = live.plan.architecture
    ties = {name for tie in (architecture.ties if architecture else ()) if tie.tied for name in (tie.name, tie.source)}
    ties |= {output.name for output in outputs}
    shared = {_place(tensor): name for name, tensor in live.tensors.items() if name not in ties}
    for output in outputs:
        tensor = live.tensors.get(output.name)
        if tensor is None or tensor.on_disk:
            why = "is offloaded to the disk, which is not written to" if tensor else "is not a parameter of the model"
            raise UnsupportedError(
                f"{live.plan.base.path}: {output.name!r} {why}; load the model without disk in its device_map, or merge its files with "
                "`streamer merge`"
            )
        if output.name in live.plan.base.weight_map and (other := shared.get(_place(tensor))):
            raise UnsupportedError(
                f"{live.plan.base.path}: {output.name!r} and {other!r} are one parameter, but the adapter changes only the former; give "
                "each module a parameter of its own"
            )
    for name, stored in live.plan.adapter.tensors.items():
        values = stored.whole()
        if values.is_floating_point() and not all_finite(values):
            raise NumericError(f"{live.plan.adapter.path}: {name!r} holds NaN or Inf; check the adapter")
    return outputs


def _place(tensor: LiveTensor) -> tuple[str, int]:
    """Return a key for a tensor's values, which parameters with the same memory share."""
    values = tensor.tensor
    return tensor.storage if tensor.offloaded or values.numel() == 0 else (str(values.device), values.data_ptr())


def _nbytes(output: OutputTensor) -> int:
    return torch.Size(output.shape).numel() * TORCH_DTYPES[output.dtype].itemsize


def _values(job: Job, output: OutputTensor) -> Tensor:
    """Compute a tensor's values in its own dtype."""
    with threads():
        data = gather(output.recipe.pieces(job.mitigated), _nbytes(output))
    return as_tensor(data, TORCH_DTYPES[output.dtype], output.shape)


def unloaded(live: LiveModel) -> nn.Module:
    """Remove PEFT's layers from the base in place, keep what the active adapter saves, and return the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    base: Any = live.base
    outermost: list[str] = []
    for name, module in base.named_modules():
        if isinstance(module, wrappers) and not any(name.startswith(f"{above}.") for above in outermost):
            outermost.append(name)
    for name in outermost:
        wrapper: Any = base.get_submodule(name)
        if hasattr(wrapper, "unload_and_optionally_merge_module"):
            inner = wrapper.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        else:
            inner = wrapper.get_base_layer()
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, inner)
    if hasattr(base, "peft_config"):
        del base.peft_config
    if getattr(base, "_hf_peft_config_loaded", False):
        base._hf_peft_config_loaded = False
    return live.base


LoggingSink = Callable[[str], Any]


@explained(LiveMitigation)
def reduce_intruder_dimension(peft_model: nn.Module, old_adapter_name: str = "default",
                              new_adapter_name: str = "intruder_reduced", top_k: int | float | None = None,
                              threshold_epsilon: float | None = None, mitigation_lambda: float | None = None,
                              logging_sink: LoggingSink | None = None,
                              **options: Unpack[LiveKeywords]) -> Findings | None:  # fmt: skip
    """Add an adapter whose delta has its intruders scaled by `mitigation_lambda`, and make it active.

    The mitigated delta is projected onto ``lora_A`` and ``lora_B`` at the adapter's rank, with a warning if more than 1 % of a matrix's
    delta is lost in projection. The new adapter also gets the old one's saved modules, biases and tokens. The old adapter stays unchanged.
    If anything is refused or fails, the model stays unchanged.

    Parameters
    ----------
    peft_model
        A `PeftModel`, or a model with injected adapters (PEFT's ``inject_adapter_in_model``, which transformers' ``add_adapter`` calls).
    old_adapter_name
        A LoRA adapter, active or not.
    new_adapter_name
        Name of the new adapter, not used in the model so far.
    logging_sink
        Called with one line for each of PEFT's layers, as PEFT's function prints them; None prints nothing.
    findings
        From `detect_intruder_dimensions` of this module or on the files, or the path of their file; no weight is then decomposed.

    Returns
    -------
    Findings or None
        The findings used; None if no detection was needed (``shrink``, coefficients or factors of a fit, λ = 1).

    Raises
    ------
    MissingPackageError
        If PEFT is not installed.
    UnsupportedError
        If an adapter of this kind, such as DoRA, cannot represent the mitigated delta.
    StreamerError
        Of the class for the kind of error (see `streamer.errors`).
    """
    given = LiveMitigation(
        top_k=top_k, threshold_epsilon=threshold_epsilon, mitigation_lambda=mitigation_lambda, **options
    )
    method = chosen_method(given)
    try:  # PEFT keeps an adapter's tensors in modules of its name
        nn.ModuleDict().add_module(new_adapter_name, None)
    except (KeyError, TypeError):
        raise UsageError(
            f"new_adapter_name: expected a name without dots that is not an attribute of a torch module, found {new_adapter_name!r}"
        ) from None
    with watched(given) as monitor:
        live = plan_live(peft_model, old_adapter_name, given.ignore_keys)
        if new_adapter_name in live.live.configs:
            raise UsageError(
                f"adapter {new_adapter_name!r}: the model has one of this name; choose another, or call delete_adapter"
            )
        merge = "merge_and_unload_with_reduced_intruder_dimensions"
        files = "for files `streamer mitigate --to-lora RANK` writes it as a LoRA adapter"
        refuse_dense(live.plan, f"{merge} merges it into the base, and {files}")
        job, found = live_job(live, method, given, monitor)
        factors, new = MitigatedFactors(job), dict[str, Tensor | None]()
        metrics: list[MitigatedMatrix] = []
        for name, targets in factors.targets.items():
            if name not in new:
                new |= factors.tensors(targets, metrics)
        way = f'method="{Project.name}" or ' if not method.keeps_rank else ""
        remedy = f"{way}{merge} loses nothing"
        monitor.warn(truncation_warnings(metrics, lambda: remedy))
        _add(live.live, new_adapter_name, {name: values for name, values in new.items() if values is not None})
        if logging_sink is not None:
            _log(live, found, new_adapter_name, logging_sink)
        return None if found is None else named_as_files(live, found)


def _add(live: LiveModel, name: str, new: Mapping[str, Tensor]) -> None:
    """Add an adapter like the old one, with new values for some of its tensors, and make it active.

    Parameters
    ----------
    new
        New values by the names under which PEFT saves tensors.
    """
    old = live.adapter_tensors()
    with _added(live, name):
        made = live.adapter_tensors(name)
        if other := sorted(made.keys() ^ old.keys()):
            raise UnsupportedError(
                f"adapter {live.adapter_name!r}: PEFT gives a second adapter with its config other tensors, {other[0]!r} first (as with "
                "ensure_weight_tying); merge_and_unload_with_reduced_intruder_dimensions and files do not need a second adapter"
            )
        for saved, tensor in made.items():
            values = new.get(saved)
            source = old[saved]
            _assign(tensor, source.values() if values is None else values, source)
        for module in live.model.modules():
            if isinstance(module, nn.ModuleDict) and name in module and live.adapter_name in module:
                module[name].train(module[live.adapter_name].training)
        live.activate(name)


@contextlib.contextmanager
def _added(live: LiveModel, name: str) -> Iterator[None]:
    """Add an adapter with the old one's config, and remove it if the body fails.

    Raises
    ------
    UnsupportedError
        If PEFT refuses a second adapter of this kind.
    """
    peft = require_peft()
    stated = live.configs[live.adapter_name]
    config = copy.deepcopy(stated)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other initialisations read the base, and some change it
    try:
        with quiet_peft():
            if isinstance(live.model, peft.PeftModel):
                live.model.add_adapter(name, config, autocast_adapter_dtype=False)
            else:
                peft.inject_adapter_in_model(config, live.model, name)
    except ValueError as e:
        live.configs.pop(name, None)  # only a PeftModel removes it itself
        raise UnsupportedError(
            f"adapter {live.adapter_name!r}: PEFT adds no second one beside it ({next(iter(str(e).splitlines()), '')}); "
            "merge_and_unload_with_reduced_intruder_dimensions needs none"
        ) from e
    for key in ("init_lora_weights", "modules_to_save"):
        if hasattr(stated, key):
            setattr(live.configs[name], key, copy.deepcopy(getattr(stated, key)))
    try:
        yield
    except BaseException:  # also on Ctrl-C, the model keeps no half-made adapter
        live.delete(name)
        raise


def _assign(tensor: LiveTensor, values: Tensor, source: LiveTensor) -> None:
    """Set a parameter of the new adapter, with the dtype of the old adapter's parameter and on the device where that is used."""
    made = values.to(source.device, source.tensor.dtype, copy=True).reshape(source.tensor.shape)
    if tensor.offloaded:  # PEFT made it on the meta device: register a real parameter, which no hook moves
        tensor.stay()
        tensor.module.register_parameter(tensor.key, nn.Parameter(made, tensor.tensor.requires_grad))
    else:
        tensor.tensor.data = made


def _log(live: LivePlan, found: Findings | None, name: str, sink: LoggingSink) -> None:
    """Log the same lines as PEFT's function, one for each layer."""
    by_tensor = {} if found is None else found.by_tensor
    counts: dict[str, int] = {}
    layers = {path for path, _ in live.live.layers()}
    for target in live.plan.targets:
        path = layer_of(target, layers)
        finding = by_tensor.get(target.tensor)
        counts[path] = counts.get(path, 0) + (len(finding.detection.intruders) if finding else 0)
    for path, _ in live.live.layers():
        if path in counts:
            sink(f"{path}: Intruders: {counts[path]}" if counts[path] else f"{path}: No intruders")
    sink(f"Enabling new adapter {name}")
