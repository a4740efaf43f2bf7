"""Merge a mitigated adapter into a live model, one matrix at a time and in place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from streamer.api.keywords import LiveKeywords, explained, watched
from streamer.api.options import Judged, MethodChoice, Settings, take
from streamer.errors import NumericError, UnsupportedError
from streamer.events import Event
from streamer.linalg.operators import all_finite
from streamer.linalg.torch_state import threads
from streamer.output.job import Job
from streamer.output.merge_plan import OutputTensor, plan_merged
from streamer.output.merged_tensors import AddBias, Cast, CopyBytes
from streamer.peft.job import live_job
from streamer.peft.model import LiveModel, quiet_peft
from streamer.peft.plan import LivePlan, plan_live
from streamer.peft.tensors import LiveTensor
from streamer.storage.buffers import gather
from streamer.weights.dtypes import TORCH_DTYPES, as_tensor


@explained(LiveKeywords, Settings, MethodChoice)
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
    method = take(MethodChoice, options, mitigation_lambda=mitigation_lambda).make()
    judged, settings = take(Judged, options, top_k=top_k, threshold_epsilon=threshold_epsilon), take(Settings, options)
    with watched(options) as monitor:
        device = settings.make_run(monitor).device
        live = plan_live(peft_model, adapter_name, settings.ignore_keys)
        outputs = _checked(live, list(_changed(live)))
        job, _ = live_job(live, method, judged, options.get("findings"), device, monitor)
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
