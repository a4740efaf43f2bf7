"""Find and scale down intruder dimensions in a PEFT model in memory, one weight matrix at a time.

Names and parameters are those of PEFT's own function, so changing one import line is enough::

    from streamer.peft import reduce_intruder_dimension  # instead of from peft.tuners.lora.intruders

The engine that reads files also handles the live model. Its tensors, on any device, are presented as safetensors files: the base's by
their names without PEFT, and an adapter's. Each of the adapter's modules is matched with the matrix that it changes, or refused. Findings
on files can be used for the model in memory, and vice versa. Needs PEFT: ``pip install 'intruder-streamer[peft]'``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast

import torch
from torch import Tensor, nn

from streamer.adapters.adapter import DeltaSource, PeftAdapter, adapter_from_tensors, normalize
from streamer.adapters.adapter_config import AdapterConfig, Stated, refuse_kinds
from streamer.adapters.modules import MethodModule
from streamer.api.calls import explained, watched
from streamer.api.requests import detection_options
from streamer.detection.detect import choose_device, detect_in_memory
from streamer.detection.findings import Findings, load_findings, matched_findings
from streamer.detection.options import DetectionOptions
from streamer.errors import InputError, NumericError, UnsupportedError, UsageError
from streamer.events import Event, Monitor
from streamer.linalg.operators import all_finite
from streamer.linalg.torch_state import threads
from streamer.methods import Method, NullSpace, Project, RegMean
from streamer.options import LiveMitigation, LiveOptions
from streamer.output.factors import mitigated_factors, refuse_dense, targets_by_tensor
from streamer.output.form import Form
from streamer.output.merged import OutputTensor, plan_merged
from streamer.output.mitigation import Mitigation
from streamer.output.opening import check_counts, lacking_inputs, refuse_other_base
from streamer.output.recipes import AddBias, Cast, CopyBytes
from streamer.output.record import MitigatedMatrix
from streamer.output.write import truncation_warnings
from streamer.packages import require_package
from streamer.plan.architectures import architecture_for, spellings
from streamer.plan.base import OpenBase
from streamer.plan.name_matching import Match
from streamer.plan.names import NameIndex
from streamer.plan.plan import AdapterBatch, Plan, match_plan
from streamer.plan.targets import Orientation, Target
from streamer.run import Run
from streamer.storage.atomic_file import Piece, gather
from streamer.storage.checkpoint import (
    SAMPLE_BYTES,
    Checkpoint,
    TensorFile,
    checkpoint_identity,
    open_checkpoint,
)
from streamer.storage.files import AdapterIdentity, BaseIdentity
from streamer.storage.header import Header, TensorInfo, tensor_nbytes
from streamer.units import listed
from streamer.weights.base import SPELLINGS, TORCH_DTYPES, as_bytes, as_tensor
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import ModelConfig, read_model_config

if TYPE_CHECKING:
    from streamer.api.keywords import LiveDetectKeywords, LiveKeywords


__all__ = [
    "detect_intruder_dimensions",
    "merge_and_unload_with_reduced_intruder_dimensions",
    "reduce_intruder_dimension",
]

_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


class LiveTensor(NamedTuple):
    """Parameter or buffer of a module: the module, the tensor's name in it, and the tensor itself."""

    module: nn.Module
    key: str
    tensor: Tensor


class LiveFile(TensorFile):
    """Tensors of a live model by name, as a read-only file; its bytes are the model's own if they can be viewed.

    Parameters
    ----------
    title
        Used in messages in place of a path.
    tensors
        Tensors in file order.

    Raises
    ------
    UnsupportedError
        If a tensor has a class or dtype that no file can store.
    """

    def __init__(self, title: str, tensors: Mapping[str, LiveTensor]) -> None:
        self.path = Path(title)
        self.io = "mmap"
        self.stamp = (0, 0, 0, 0)
        self.tensors = dict(tensors)
        self._last: tuple[str, Tensor] | None = None
        infos = []
        at = 0
        for name, live in self.tensors.items():
            tensor = live.tensor
            dtype = SPELLINGS.get(tensor.dtype)
            # Its dtype and shape describe it fully; bitsandbytes' layers describe the rest.
            plain = type(tensor) in _PLAIN_TENSORS or type(tensor).__module__.startswith(
                "bitsandbytes"
            )
            if dtype is None or not plain:
                raise UnsupportedError(
                    f"{title}: {name!r} is a {type(tensor).__name__} of {tensor.dtype}, which is not supported; load the model in a "
                    "plain dtype"
                )
            end = at + tensor.numel() * tensor.element_size()
            infos.append(TensorInfo(name, dtype, tuple(tensor.shape), at, end))
            at = end
        listed = json.dumps([(info.name, info.dtype, info.shape) for info in infos])
        self.header = Header(tuple(infos), {}, 0, hashlib.sha256(listed.encode()).hexdigest())

    def check_unchanged(self) -> None:
        """Do nothing: the owner of the model may change it."""

    def view(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """View the bytes ``[start, stop)`` of a tensor or of a slice of one, read-only."""
        stop = info.nbytes if stop is None else stop
        offset = info.start - self.header.by_name[info.name].start
        return as_bytes(self._contiguous(info.name))[offset + start : offset + stop]

    def chunks(self, info: TensorInfo, size: int = 4 << 20) -> Iterator[Piece]:
        """Yield a tensor's bytes in pieces."""
        data = self.view(info)
        return (Piece(data[i : i + size]) for i in range(0, info.nbytes, size))

    def sample(self) -> str:
        """Compute the SHA-256 (hex) of names, dtypes, shapes, and the middle `SAMPLE_BYTES` of every tensor."""
        digest = hashlib.sha256(self.header.digest.encode())
        for info in self.header.tensors:
            if info.nbytes == 0:
                continue
            flat = self.tensors[info.name].tensor.detach().reshape(-1)
            count = max(1, min(SAMPLE_BYTES // flat.element_size(), len(flat)))
            middle = (len(flat) - count) // 2
            digest.update(as_bytes(flat[middle : middle + count].cpu()))
        return digest.hexdigest()

    def _contiguous(self, name: str) -> Tensor:
        """Return a tensor's values in CPU memory; if they must be copied, the last copy is kept."""
        values = self.tensors[name].tensor.detach()
        if values.device.type == "cpu" and values.is_contiguous():
            return values
        last = self._last
        if last is None or last[0] != name:
            last = self._last = None  # free the last copy before making the next
            # The local stays: another thread may read the next tensor meanwhile.
            last = self._last = name, values.cpu().contiguous()
        return last[1]


def require_peft() -> Any:
    """Import PEFT; see `require_package`."""
    return require_package("peft", (0, 21), "streamer.peft needs PEFT 0.21", "peft")


@dataclass(frozen=True, eq=False)
class LiveModel:
    """Model into which PEFT put adapters.

    Attributes
    ----------
    model
        A `PeftModel`, or a plain model with injected adapters, without the wrapper of `torch.compile`.
    base
        The model with the layers; `model` itself if adapters were injected.
    adapter_name
        The adapter to use.
    """

    model: nn.Module
    base: nn.Module
    adapter_name: str

    @property
    def adapter_title(self) -> str:
        """Return the adapter's name for messages."""
        return f"adapter {self.adapter_name!r} in memory"

    @property
    def configs(self) -> dict[str, Any]:
        """Return PEFT's configs by adapter name."""
        return cast(dict[str, Any], self.model.peft_config)

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, LiveTensor]:
        """Return an adapter's tensors by the names under which PEFT saves them.

        A tensor that PEFT creates for saving belongs to no module.
        """
        tensors = dict(state_entries(self.model, "", base_only=False))
        by_id = {id(live.tensor): live for live in tensors.values()}
        adapter_name = adapter_name or self.adapter_name
        try:
            with quiet_peft():
                state = {name: live.tensor for name, live in tensors.items()}
                saved = require_peft().get_peft_model_state_dict(
                    self.model, state, adapter_name, save_embedding_layers=False
                )
        except KeyError as e:
            raise UnsupportedError(
                f"adapter {adapter_name!r}: PEFT cannot save it, because it looks for {e}, which belongs to another adapter; load it in a "
                "model of its own"
            ) from e
        return {
            name: by_id.get(id(t)) or LiveTensor(self.model, name, t) for name, t in saved.items()
        }

    def adapter_config(self) -> AdapterConfig:
        """Return the adapter's config as PEFT would save it, with the version of the running PEFT."""
        tree = self.configs[self.adapter_name].to_dict()
        tree["peft_version"] = require_peft().__version__
        return AdapterConfig(
            json.loads(json.dumps(tree, default=_as_json)), Path(self.adapter_title)
        )

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield PEFT's layers that have this adapter, with their paths in `model`."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                kinds = (getattr(module, attribute, ()) for attribute in module.adapter_layer_names)
                if any(self.adapter_name in kind for kind in kinds if not isinstance(kind, Tensor)):
                    yield name, module

    def activate(self, adapter_name: str) -> None:
        """Make an adapter active and trainable."""
        from peft import PeftModel, functional

        if isinstance(self.model, PeftModel):
            self.model.set_adapter(adapter_name)
        else:
            functional.set_adapter(self.model, adapter_name)


def _as_json(value: Any) -> Any:
    """Convert a value of PEFT's config: a set, or a member of an enumeration."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))


def open_model(peft_model: nn.Module, adapter_name: str) -> LiveModel:
    """Find the model and the adapter.

    Raises
    ------
    UsageError
        If the model has no adapter of that name.
    UnsupportedError
        If it mixes kinds of adapters, or deltas are merged into its weights.
    """
    peft = require_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = _uncompiled(peft_model)
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict) or not configs:
        raise UsageError(
            f"peft_model: expected a model with PEFT adapters, found {type(model).__name__}; load one with PeftModel.from_pretrained, or "
            "pass the PEFT model inside it"
        )
    if isinstance(model, peft.PeftModel) and isinstance(
        _uncompiled(model.get_base_model()), peft.PeftModel
    ):
        raise UnsupportedError(
            "peft_model: a PeftModel around a PeftModel is not supported; merge the inner one, or pass it"
        )
    if isinstance(model, peft.PeftMixedModel):
        raise UnsupportedError(
            "peft_model: a PeftMixedModel, whose adapters are of several kinds, is not supported"
        )
    if adapter_name not in configs:
        raise UsageError(
            f"adapter {adapter_name!r}: the model has none of this name; it has {listed(map(repr, configs))}"
        )
    base = _uncompiled(model.get_base_model() if isinstance(model, peft.PeftModel) else model)
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise UnsupportedError(
                f"{name}: an adapter is merged into its weight, so the base's values are not available; call unmerge_adapter() first"
            )
    for name, parameter in base.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(
                f"{name}: has no values (it is on the meta device, or accelerate offloads it), which is not supported; "
                "load the whole model, or use the commands on its files"
            )
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedError(
                f"{name}: bitsandbytes repacked it for this CPU when the model ran, which is not supported; load the model again, and "
                "call streamer before you run the model"
            )
    return LiveModel(model, base, adapter_name)


def _uncompiled(model: Any) -> Any:
    """Return the model without the wrapper of `torch.compile`."""
    # PeftModel passes attributes on to its base.
    while isinstance(model, nn.Module) and "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]
    return model


def state_entries(
    module: nn.Module, prefix: str, base_only: bool
) -> Iterator[tuple[str, LiveTensor]]:
    """Yield the tensors in each module's state dict, which for quantized layers include what decodes them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if base_only and isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
        wrapped = (
            "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else "base_layer"
        )
        yield from state_entries(module.get_submodule(wrapped), prefix, base_only)
        return
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, "", keep_vars=True)
    for key, tensor in state.items():
        if isinstance(tensor, Tensor):
            yield prefix + key, LiveTensor(module, key, tensor)
    for name, child in module.named_children():
        below = prefix if base_only and name == "_orig_mod" else f"{prefix}{name}."
        yield from state_entries(child, below, base_only)


def layer_of(target: Target, layers: Container[str]) -> str:
    """Return the path of PEFT's layer with the tensors of a target's module; "" if there is none."""
    path = target.module.tensor_names[0]
    while path and path not in layers:
        path = path.rpartition(".")[0]
    return path


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence PEFT's advice, and preserve torch's CPU generator: new factors are overwritten anyway."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


class LiveBase(Checkpoint):
    """Base in memory, with the interface of its files."""

    @cached_property
    def identity(self) -> BaseIdentity:
        """Return names, dtypes, shapes and samples of its tensors, and the fact that it is in memory."""
        return {"in_memory": True, **checkpoint_identity(self.files)}


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

    def seen(
        self, adapter: DeltaSource, weights: WeightView, names: Mapping[str, Match]
    ) -> Orientation:
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
        on_disk = NameIndex.of(self.files.weight_map, read_model_config(self.files.path)).on_disk
        prefix = getattr(self.live.base, "base_model_prefix", "")
        found = {
            name: next((on_disk[s] for s in spellings(name, prefix) if s in on_disk), None)
            for name in self.tensors
        }
        names = {name: stored for name, stored in found.items() if stored is not None}
        return names if len({*names.values()}) == len(names) else {}

    def name_in_files(self, tensor: str) -> str:
        """Return a matrix's name in the files (for an expert, by its stack), or its own name if they are not available."""
        stem, bracket, index = tensor.partition("[")
        return self.names_in_files.get(stem, stem) + bracket + index


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
    loaded = adapter_from_tensors(Path(live.adapter_title), config, adapter_file)
    adapter = LiveAdapter(
        loaded.path, loaded.config, loaded.files, loaded.modules, loaded.carried, loaded.wrapped
    )
    tensors = dict(state_entries(live.base, "", base_only=True))
    first = {id(live_tensor.tensor): name for name, live_tensor in reversed(tensors.items())}
    # Tied ones once, as in files.
    distinct = {name: tensors[name] for name in tensors if first[id(tensors[name].tensor)] == name}
    title = f"{type(live.base).__name__} in memory"
    base = LiveBase(
        Path(title), {title: LiveFile(title, distinct)}, dict.fromkeys(distinct, title), None
    )
    model = _config(live.base, tied=len(distinct) < len(tensors))
    classes = {name: type(t.module).__mro__ for name, t in distinct.items() if t.key == "weight"}
    conv1d = frozenset(
        name for name, kinds in classes.items() if any(kind.__name__ == "Conv1D" for kind in kinds)
    )
    orientation = LiveOrientation(Orientation.of(base, model).architectures, conv1d=conv1d)
    names = NameIndex(tuple(base.weight_map))
    plan = match_plan(OpenBase(base, open_weights(base, model), model, orientation, names), adapter)
    # Layers may have been scaled after loading, so that the config's scaling is wrong.
    layers = {
        name: layer
        for name, layer in live.layers()
        if isinstance(getattr(layer, "scaling", None), dict)
    }
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
    return LivePlan(live, plan, tensors)


def _config(base_model: nn.Module, tied: bool) -> ModelConfig:
    """Return the model's config, with the model's class or a known class from which it is derived.

    For an unknown class, state that nothing is tied unless a parameter has two names.
    """
    config: Any = getattr(base_model, "config", None)
    values: dict[str, Any] = {}
    if hasattr(config, "to_json_string"):
        values = json.loads(config.to_json_string(use_diff=False))
    for cls in type(base_model).__mro__:
        known = ModelConfig({**values, "architectures": [cls.__name__]})
        if architecture_for(known) is not None:
            return known
    values["architectures"] = [type(base_model).__name__]
    if not tied:
        values["tie_word_embeddings"] = False
    return ModelConfig(values)


def _directory(stated: object) -> Path | None:
    """Find the directory from which a model was loaded, by its path or by its id in the hub's cache."""
    path = Path(stated) if isinstance(stated, str) and stated else None
    if path is None or path.is_dir():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(str(stated), "config.json")
    except (ImportError, ValueError):  # not a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


@explained(LiveOptions)
def detect_intruder_dimensions(
    peft_model: nn.Module,
    adapter_name: str = "default",
    top_k: int | float | None = None,
    threshold_epsilon: float | None = None,
    **options: Unpack[LiveDetectKeywords],
) -> Findings:
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
        As from files. `Findings.save` writes them. Mitigate and merge on files accept them if base and adapter are the same.

    Raises
    ------
    MissingPackageError
        If PEFT is not installed.
    StreamerError
        Of the class for the kind of error (see `streamer.errors`).
    """
    settings = LiveOptions(top_k=top_k, threshold_epsilon=threshold_epsilon, **options)
    detection = detection_options(settings)
    with watched(settings) as monitor:
        live_plan = plan_live(peft_model, adapter_name, settings.ignore_keys)
        monitor.warn(live_plan.plan.warnings)
        device = choose_device(settings.device)
        return named_as_files(live_plan, detect_live(live_plan, detection, device, monitor))


def detect_live(
    live_plan: LivePlan, options: DetectionOptions, device: torch.device, monitor: Monitor
) -> Findings:
    """Detect in one matrix after another; the findings use the names in memory."""
    batch = AdapterBatch(live_plan.plan.base, (live_plan.plan,))
    return detect_in_memory(batch, options, Run(device, monitor=monitor))[0]


def named_as_files(live_plan: LivePlan, findings: Findings) -> Findings:
    """Rename findings on a live model to the names in the base's files."""
    renamed = (replace(m, tensor=live_plan.name_in_files(m.tensor)) for m in findings)
    return replace(findings, matrices=tuple(renamed))


def live_mitigation(
    live_plan: LivePlan, method: Method, settings: LiveMitigation, monitor: Monitor
) -> Mitigation:
    """Make a mitigation, with given or new findings if the method needs them; findings, factors and maps get names in memory.

    Raises
    ------
    UnsupportedError
        If a map is given, but it is unknown from which files the base was loaded.
    MismatchError
        If findings, factors or a map belong to another base or adapter, or findings were made with different options.
    """
    plan = live_plan.plan
    findings = settings.findings
    detection = detection_options(settings)
    device = choose_device(settings.device)
    monitor.warn(plan.warnings)
    usable = None
    names = {}
    if method.file is not None:
        names = {live_plan.name_in_files(target.tensor): target.tensor for target in plan.targets}
    if isinstance(method, RegMean):
        matrices = {names.get(name, name): R for name, R in method.coefficients.matrices.items()}
        method = replace(method, coefficients=replace(method.coefficients, matrices=matrices))
        check_counts(plan, method.coefficients)
    if isinstance(method, NullSpace):
        inputs = method.map
        if live_plan.files is None:
            raise UnsupportedError(
                f"{inputs.name}: is a map of a base's files, but the model's files are unknown; load the model from their directory"
            )
        mapped_base = {k: v for k, v in inputs.facts["base"].items() if k != "architecture"}
        refuse_other_base(inputs, mapped_base, {**live_plan.files.identity})
        renamed = (
            replace(entry, names=tuple(names[n] for n in entry.names if n in names))
            for entry in inputs.inputs
        )
        inputs = replace(inputs, inputs=tuple(entry for entry in renamed if entry.names))
        monitor.warn(lacking_inputs(plan, inputs))
        method = replace(method, map=inputs)
    if method.needs_detection and findings is None:
        usable = detect_live(live_plan, detection, device, monitor)
    elif method.needs_detection and findings is not None:
        loaded = findings if isinstance(findings, Findings) else load_findings(findings)
        usable = matched_findings(plan, loaded, loaded.name)
        usable.check_matches(
            plan.base_identity, plan.adapter_identity, detection_options(settings, None, loaded)
        )
    return Mitigation(plan, method, detection, device, usable)


@explained(LiveMitigation)
def merge_and_unload_with_reduced_intruder_dimensions(
    peft_model: nn.Module,
    adapter_name: str = "default",
    top_k: int | float | None = None,
    threshold_epsilon: float | None = None,
    mitigation_lambda: float | None = None,
    **options: Unpack[LiveKeywords],
) -> nn.Module:
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
        If weights are quantized or offloaded.
    StreamerError
        Of the class for the kind of error (see `streamer.errors`).
    """
    settings = LiveMitigation(
        top_k=top_k,
        threshold_epsilon=threshold_epsilon,
        mitigation_lambda=mitigation_lambda,
        **options,
    )
    method = settings.chosen
    with watched(settings) as monitor:
        live_plan = plan_live(peft_model, adapter_name, settings.ignore_keys)
        outputs = _changed(live_plan)
        mitigation = live_mitigation(live_plan, method, settings, monitor)
        # Compute everything once before the first change, so that wrong coefficients or an overflow are refused here.
        for output in outputs:
            monitor.checkpoint()
            _values(mitigation, output)
        # Activate before any weight changes, because it may fail: a model loaded in inference mode allows no gradients.
        with quiet_peft():
            live_plan.live.activate(adapter_name)
        total = sum(tensor_nbytes(output.dtype, output.shape) for output in outputs)
        done = 0
        for items, output in enumerate(outputs):
            monitor.emit(Event("write", output.name, done, total, items, len(outputs)))
            values = _values(mitigation, output)
            module, key, tensor = live_plan.tensors[output.name]
            if output.name in live_plan.plan.base.weight_map:
                tensor.detach().copy_(values)
            else:  # the parameter still belongs to another module
                parameter = nn.Parameter(values.to(tensor), tensor.requires_grad)
                module.register_parameter(key, parameter)
            done += values.nbytes
        monitor.emit(Event("write", "", total, total, len(outputs), len(outputs)))
        for *path, key in live_plan.plan.edits.untied:  # head and embedding are separate now
            setattr(functools.reduce(getattr, path, live_plan.live.base.config), key, False)
        with quiet_peft():
            return unloaded(live_plan.live)


def _changed(live_plan: LivePlan) -> list[OutputTensor]:
    """List the tensors of the base that the merge changes, starting with those that get a parameter of their own.

    Modules that the adapter saves are already in the model; they replace the base's when PEFT is removed. Refuse, before anything changes,
    tensors that cannot be written and adapters with values that are not finite.
    """
    plan = live_plan.plan
    outputs: list[OutputTensor] = []
    for output in chain.from_iterable(plan_merged(plan, Form()).files.values()):
        source = plan.edits.sources.get(output.name)
        stays = output.name in plan.base.weight_map
        saved = source is not None and source.file is plan.adapter.file
        if isinstance(output.recipe, CopyBytes) and (stays or saved):
            continue
        if saved and isinstance(output.recipe, Cast):
            continue
        if saved and not isinstance(output.recipe, AddBias):
            raise UnsupportedError(
                f"{plan.adapter.path}: saves {output.name!r} and also changes it, which is not supported in memory; merge its files "
                "with `streamer merge`"
            )
        if output.name not in live_plan.tensors:
            raise UnsupportedError(
                f"{plan.base.path}: {output.name!r} is not a parameter of the model; merge its files with `streamer merge`"
            )
        outputs.append(output)
    ties = {output.name for output in outputs}
    if plan.architecture:
        ties |= plan.architecture.tied_names
    shared = {
        _place(tensor): name for name, tensor in live_plan.tensors.items() if name not in ties
    }
    for output in outputs:
        other = shared.get(_place(live_plan.tensors[output.name]))
        if other and output.name in plan.base.weight_map:
            raise UnsupportedError(
                f"{plan.base.path}: {output.name!r} and {other!r} are one parameter, but the adapter changes only the former; give "
                "each module a parameter of its own"
            )
    for name, stored in plan.adapter.tensors.items():
        values = stored.whole()
        if values.is_floating_point() and not all_finite(values):
            raise NumericError(f"{plan.adapter.path}: {name!r} holds NaN or Inf; check the adapter")
    return sorted(outputs, key=lambda output: output.name in plan.base.weight_map)


def _place(live: LiveTensor) -> tuple[str, int]:
    """Return a key for a tensor's values, which parameters with the same memory share."""
    tensor = live.tensor
    return (str(tensor.device), tensor.data_ptr()) if tensor.numel() else ("parameter", id(tensor))


def _values(mitigation: Mitigation, output: OutputTensor) -> Tensor:
    """Compute a tensor's values in its own dtype."""
    with threads():
        nbytes = tensor_nbytes(output.dtype, output.shape)
        data = gather(output.recipe.make(mitigation, measures=False), nbytes)
    return as_tensor(data, TORCH_DTYPES[output.dtype], output.shape)


def unloaded(live: LiveModel) -> nn.Module:
    """Remove PEFT's layers from the base in place, keep what the active adapter saves, and return the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base: Any = live.base
    names = [
        n
        for n, module in base.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    for name in names:
        if any(name.startswith(f"{above}.") for above in names):
            continue
        wrapper: Any = base.get_submodule(name)
        if hasattr(wrapper, "unload_and_optionally_merge_module"):
            inner = wrapper.unload_and_optionally_merge_module(
                merge=False, safe_merge=False, adapter_names=None
            )
        else:
            inner = wrapper.get_base_layer()
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, inner)
    if hasattr(base, "peft_config"):
        del base.peft_config
    if getattr(base, "_hf_peft_config_loaded", False):
        base._hf_peft_config_loaded = False
    return live.base


@explained(LiveMitigation)
def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int | float | None = None,
    threshold_epsilon: float | None = None,
    mitigation_lambda: float | None = None,
    logging_sink: Callable[[str], Any] | None = None,
    **options: Unpack[LiveKeywords],
) -> Findings | None:
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
    settings = LiveMitigation(
        top_k=top_k,
        threshold_epsilon=threshold_epsilon,
        mitigation_lambda=mitigation_lambda,
        **options,
    )
    method = settings.chosen
    try:  # PEFT keeps an adapter's tensors in modules of its name
        nn.ModuleDict().add_module(new_adapter_name, None)
    except (KeyError, TypeError):
        what = "a name without dots that is not an attribute of a torch module"
        raise UsageError(f"new_adapter_name: expected {what}, found {new_adapter_name!r}") from None
    with watched(settings) as monitor:
        live_plan = plan_live(peft_model, old_adapter_name, settings.ignore_keys)
        if new_adapter_name in live_plan.live.configs:
            raise UsageError(
                f"adapter {new_adapter_name!r}: the model has one of this name; choose another, or delete it"
            )
        merge = "merge_and_unload_with_reduced_intruder_dimensions"
        files = "for files `streamer mitigate --to-lora RANK` writes it as a LoRA adapter"
        refuse_dense(live_plan.plan, f"{merge} merges it into the base, and {files}")
        mitigation = live_mitigation(live_plan, method, settings, monitor)
        new: dict[str, Tensor | None] = {}
        metrics: list[MitigatedMatrix] = []
        for name, targets in targets_by_tensor(live_plan.plan).items():
            if name not in new:
                tensors, rows = mitigated_factors(targets, mitigation)
                new |= tensors
                metrics += rows
        way = f'method="{Project.name}" or ' if not method.keeps_rank else ""
        remedy = f"{way}{merge} loses nothing"
        monitor.warn(truncation_warnings(metrics, lambda: remedy))
        given = {name: values for name, values in new.items() if values is not None}
        _add(live_plan.live, new_adapter_name, given)
        if logging_sink is not None:
            _log(live_plan, mitigation.findings, logging_sink)
            logging_sink(f"Enabling new adapter {new_adapter_name}")
        findings = mitigation.findings
        return None if findings is None else named_as_files(live_plan, findings)


def _log(live_plan: LivePlan, findings: Findings | None, sink: Callable[[str], Any]) -> None:
    """Write the lines of PEFT's function, one for each layer that the adapter changes."""
    by_tensor = {} if findings is None else findings.by_tensor
    layers = dict(live_plan.live.layers())
    counts = Counter[str]()
    for target in live_plan.plan.targets:
        finding = by_tensor.get(target.tensor)
        counts[layer_of(target, layers)] += len(finding.detection.intruders) if finding else 0
    for path in layers:
        if path not in counts:
            continue
        sink(f"{path}: {f'Intruders: {counts[path]}' if counts[path] else 'No intruders'}")


def _add(live: LiveModel, name: str, new: Mapping[str, Tensor]) -> None:
    """Add an adapter like the old one, with new values for some of its tensors, and make it active; if that fails, remove it.

    Parameters
    ----------
    new
        New values by the names under which PEFT saves tensors.

    Raises
    ------
    UnsupportedError
        If PEFT refuses a second adapter of this kind.
    """
    from peft import functional, mapping

    model: Any = live.model
    peft = require_peft()
    wrapped = isinstance(model, peft.PeftModel)
    old = live.adapter_tensors()
    stated = live.configs[live.adapter_name]
    config = copy.deepcopy(stated)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other initialisations read the base, and some change it
    try:
        with quiet_peft():
            if wrapped:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
            else:
                peft.inject_adapter_in_model(config, model, name)
    except ValueError as e:
        live.configs.pop(name, None)  # only a PeftModel removes it itself
        raise UnsupportedError(
            f"adapter {live.adapter_name!r}: PEFT adds no second one beside it ({next(iter(str(e).splitlines()), '')}); "
            "merge_and_unload_with_reduced_intruder_dimensions needs none"
        ) from e
    try:
        for key in ("init_lora_weights", "modules_to_save"):
            if hasattr(stated, key):
                setattr(live.configs[name], key, copy.deepcopy(getattr(stated, key)))
        made = live.adapter_tensors(name)
        if other := sorted(made.keys() ^ old.keys()):
            raise UnsupportedError(
                f"adapter {live.adapter_name!r}: PEFT gives a second adapter with its config other tensors, {other[0]!r} first (as with "
                "ensure_weight_tying); merge_and_unload_with_reduced_intruder_dimensions and files do not need a second adapter"
            )
        for saved, live_tensor in made.items():
            source = old[saved].tensor.detach()
            values = new.get(saved, source)
            live_tensor.tensor.data = values.to(source, copy=True).reshape(source.shape)
        for module in model.modules():
            if isinstance(module, nn.ModuleDict) and name in module and live.adapter_name in module:
                module[name].train(module[live.adapter_name].training)
        live.activate(name)
    except BaseException:  # also on Ctrl-C, the model keeps no half-made adapter
        if wrapped:
            model.delete_adapter(name)
        else:
            kind = live.configs.pop(name).peft_type
            functional.delete_adapter(model, name, mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind])
        raise
