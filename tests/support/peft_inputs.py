"""Second moments of what PEFT's layers are given, in float64: the oracle of the inputs that a fit collects."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from evaluated import loaded
from peft.tuners.lora import LoraLayer

Moments = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""On general and on task text, by a module's name in the adapter; of an embedding the diagonal."""


def adapted(cls: Any, base: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    """The model with its adapter, and its adapted layers by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tied embedding that an adapter changes
        model = peft.PeftModel.from_pretrained(loaded(cls, base, dtype), adapter).eval().to(dtype)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return model, layers


def of_peft(
    cls: Any,
    base: Path,
    adapter: Path,
    general: list[torch.Tensor],
    task: list[torch.Tensor],
    dtype: torch.dtype = torch.float64,
) -> Moments:
    """Means over the tokens of each text: of the general one as the base, of the task's as base and adapter."""
    model, layers = adapted(cls, base, adapter, dtype)
    sums: dict[str, list[torch.Tensor]] = {name: [torch.zeros(()), torch.zeros(())] for name in layers}
    at = 0

    def hook(name: str) -> Any:
        def take(module: Any, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else kwargs["x"]).detach()
            if x.is_floating_point():
                x = x.reshape(-1, x.shape[-1]).double()
                sums[name][at] = sums[name][at] + x.T @ x
            else:
                count = module.get_base_layer().num_embeddings
                sums[name][at] = sums[name][at] + torch.bincount(x.flatten(), minlength=count).double()

        return take

    for name, layer in layers.items():
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with model.disable_adapter():
                for ids in general:
                    model(input_ids=ids[None])
        at = 1
        for ids in task:
            model(input_ids=ids[None])
    tokens = [sum(map(len, texts)) for texts in (general, task)]
    return {name: (a / tokens[0], b / tokens[1]) for name, (a, b) in sums.items()}
