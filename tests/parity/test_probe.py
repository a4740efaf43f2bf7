"""The probe of a model's pace and the count of a pass's work: floating-point operations, as torch counts them, stand in for seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from causal_models import CAUSAL, make_adapter, make_base
from evaluated import sequences, token_ids
from torch.utils.flop_counter import FlopCounterMode

from streamer.forecast import probe
from streamer.measuring.losses import measure
from streamer.measuring.progress import CALL, READING, pass_cost
from streamer.methods import UNCHANGED
from streamer.plan.plan import make_plan
from streamer.streaming.model import StreamingModel
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import ADAPTER, BASE, Variant

LONG = "deepseek-v3", "gemma3n", "qwen3-next", "gemma3-vision", "mamba"


@pytest.mark.parametrize("name", ["llama", *(pytest.param(one, marks=pytest.mark.long) for one in LONG)])
def test_a_probe_counts_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", CAUSAL[name][2])
    job = VariantSet(make_plan(tmp_path / "base", adapter), (Variant(BASE, None), Variant(ADAPTER, UNCHANGED)), None)
    text = sequences(token_ids(64)[:1])
    monkeypatch.setattr(probe, "ROWS", 1 << 20)  # so that the vocabulary has several blocks
    timed = probe.TimedModel(job)
    with FlopCounterMode(display=False) as whole:
        measure(StreamingModel(job), text, timed._block)
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(probe, "thread_time", counter.get_total_flops)
        timed.seconds(text)
        found = timed.seconds(text)
    counted = whole.get_total_flops()
    assert 0.9 < found / counted < 1.6, "layers of one class are taken to be alike"
    if name == "llama":
        size = timed.size
        cost = pass_cost(size, text, 2) - READING * sum(size.products.values()) - CALL * len(size.products)
        assert found == counted
        assert 1 <= counted / 2 / cost < 1.1, "attention and the deltas come on top"
