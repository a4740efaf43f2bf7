"""Layers that run again for their gradients, and what they hand on to each other."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from seeds import vary
from torch import Tensor, nn

from streamer.errors import UnsupportedError
from streamer.streaming.layers import SpooledLayer
from streamer.streaming.spool import Spool


class Handed:
    """An object with attributes."""

    key: Tensor


class Layer(nn.Module):
    """Gives ``tanh(x Wᵀ) + k`` with a key k ``x Vᵀ`` of its own, which it hands on, or of the layer that did."""

    def __init__(self, stores: bool) -> None:
        super().__init__()
        self.stores = stores
        self.w, self.v = (nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in "wv")

    def forward(self, x: Tensor, shared: Any) -> Tensor:
        key = self.v(x)
        if isinstance(shared, UserDict | dict):
            if self.stores:
                shared["keys"] = key, 2 * key
            key = shared["keys"][1]
        elif isinstance(shared, list):
            shared.append(key)
        elif shared is not None:
            shared.key = key
        return torch.tanh(self.w(x)) + key


def layers(*stores: bool) -> nn.ModuleList:
    torch.manual_seed(vary(0))
    return nn.ModuleList(Layer(one) for one in stores)


def spooled(of: nn.ModuleList) -> nn.ModuleList:
    """Layers that run again; all of their weights require gradients."""
    spool, anchor = Spool(), torch.zeros((), requires_grad=True)
    for i, layer in enumerate(of):
        SpooledLayer(f"layers.{i}", layer, spool, lambda: anchor)
    return of


def gradients(of: nn.ModuleList, x: Tensor, shared: Any) -> list[Tensor | None]:
    for layer in of:
        x = layer(x, shared)
    (x**3).sum().backward()
    return [p.grad for p in of.parameters()]


@pytest.mark.parametrize("stores", [(True, False, False), (True, True, False), (True, False, True)])
def test_gradients_pass_through_what_layers_hand_on(stores: tuple[bool, ...]) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = gradients(layers(*stores), x, UserDict())
    found = gradients(spooled(layers(*stores)), x, UserDict())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(g is None for g in found) == stores.count(False)


def test_gradients_of_a_layer_of_which_only_what_it_hands_on_is_used() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for of in (layers(True, False), spooled(layers(True, False))):
        shared: UserDict[str, Any] = UserDict()
        of[0](x, shared)
        of[1](x, shared).sum().backward()
        results.append(of[0].v.weight.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shared", [{}, [], Handed()], ids=["dict", "list", "object"])
def test_what_is_handed_on_otherwise_is_refused(shared: Any) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"layer 'layers.0' hands tensors on to other layers in its arguments"):
        gradients(spooled(layers(True, False)), x, shared)


def test_an_object_that_holds_what_has_a_gradient_is_refused() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    layer = spooled(layers(True))[0]
    handed = Handed()
    handed.key = torch.ones((), requires_grad=True)
    with pytest.raises(UnsupportedError, match="where gradients do not follow them"):
        layer(x, handed)


def test_arguments_that_hold_constants_are_given_as_they_are() -> None:
    """Tuples, dictionaries and objects with masks or positions, which no layer changes."""
    seen: list[Any] = []

    class Plain(nn.Module):
        def forward(self, x: Tensor, positions: Any, held: Any) -> Tensor:
            seen.append((positions, held))
            return 2 * x * positions["full"][0] * held.key

    layer, x, handed = Plain(), torch.ones(2, requires_grad=True), Handed()
    handed.key = torch.full((2,), 3.0)
    SpooledLayer("layers.0", layer, Spool(), lambda: None)
    layer(x, {"full": (torch.full((2,), 5.0), None)}, handed).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [30.0, 30.0]
    assert len(seen) == 2
    assert seen[0][1] is seen[1][1] is handed
