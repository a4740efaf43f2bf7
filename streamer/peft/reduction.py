"""Mitigate an adapter of a live model by adding a new adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from streamer.api.keywords import LiveKeywords, explained, watched
from streamer.api.options import Judged, MethodChoice, Settings, take
from streamer.detection.findings import Findings
from streamer.errors import UnsupportedError, UsageError
from streamer.methods import Project
from streamer.output.adapter_writer import MitigatedFactors, refuse_dense
from streamer.output.metrics import truncation_warnings
from streamer.output.records import MitigatedMatrix
from streamer.peft.detection import named_as_files
from streamer.peft.job import live_job
from streamer.peft.model import LiveModel, layer_of, quiet_peft, require_peft
from streamer.peft.plan import LivePlan, plan_live
from streamer.peft.tensors import LiveTensor

LoggingSink = Callable[[str], Any]


@explained(LiveKeywords, Settings, MethodChoice)
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
    method = take(MethodChoice, options, mitigation_lambda=mitigation_lambda).make()
    judged, settings = take(Judged, options, top_k=top_k, threshold_epsilon=threshold_epsilon), take(Settings, options)
    try:  # PEFT keeps an adapter's tensors in modules of its name
        nn.ModuleDict().add_module(new_adapter_name, None)
    except (KeyError, TypeError):
        raise UsageError(
            f"new_adapter_name: expected a name without dots that is not an attribute of a torch module, found {new_adapter_name!r}"
        ) from None
    with watched(options) as monitor:
        device = settings.make_run(monitor).device
        live = plan_live(peft_model, old_adapter_name, settings.ignore_keys)
        if new_adapter_name in live.live.configs:
            raise UsageError(
                f"adapter {new_adapter_name!r}: the model has one of this name; choose another, or call delete_adapter"
            )
        merge = "merge_and_unload_with_reduced_intruder_dimensions"
        files = "for files `streamer mitigate --to-lora RANK` writes it as a LoRA adapter"
        refuse_dense(live.plan, f"{merge} merges it into the base, and {files}")
        job, found = live_job(live, method, judged, options.get("findings"), device, monitor)
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
