"""Merge a mitigated adapter into a live model, or add it as a new adapter.

Merge a mitigated adapter into a live model, one matrix at a time and in place.

Mitigate an adapter of a live model by adding a new adapter.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from streamer.api.functions import explained
from streamer.api.requests import chosen_method, watched
from streamer.detection.findings import Findings
from streamer.errors import NumericError, UnsupportedError, UsageError
from streamer.events import Event
from streamer.linalg.operators import all_finite
from streamer.linalg.torch_state import threads
from streamer.methods import Project
from streamer.options import LiveMitigation
from streamer.output.adapter_writer import MitigatedFactors, refuse_dense
from streamer.output.job import Job, MitigatedMatrix, truncation_warnings
from streamer.output.merge_plan import AddBias, Cast, CopyBytes, OutputTensor, plan_merged
from streamer.peft.detection import LivePlan, live_job, named_as_files, plan_live
from streamer.peft.model import LiveModel, LiveTensor, layer_of, quiet_peft, require_peft
from streamer.storage.atomic_file import gather
from streamer.weights.base import TORCH_DTYPES, as_tensor

if TYPE_CHECKING:
    from streamer.api.keywords import LiveKeywords


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
        data = gather(output.recipe.pieces(lambda target: job.mitigated(target)[:2]), _nbytes(output))
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
        factors, new = MitigatedFactors(job), dict[str, Tensor]()
        metrics: list[MitigatedMatrix] = []
        for name, targets in factors.targets.items():
            if name not in new:
                new |= factors.tensors(targets, metrics)
        way = f'method="{Project.name}" or ' if not method.keeps_rank else ""
        remedy = f"{way}{merge} loses nothing"
        monitor.warn(truncation_warnings(metrics, lambda: remedy))
        _add(live.live, new_adapter_name, {name: values for name, values in new.items() if values.numel()})
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
