"""`mitigate --to-lora`: ranks by a share of the energy as PEFT's conversion takes them, and adapters of tuned models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import zoo
from architectures import weights
from forks import server
from kinds import KINDS, Kind, llama
from kinds_cases import Made, make, stored
from pairs import merge, mitigate
from peft import PeftModel
from safetensors.torch import load_file
from seeds import vary

import streamer
from streamer.errors import UnsupportedError, UsageError
from streamer.linalg.operators import Dense, LowRank
from streamer.linalg.svd import energies, least_rank
from streamer.plan.architectures import architecture_for
from streamer.weights.model_config import ModelConfig

LOHA = Kind(
    llama(),
    lambda: peft.LoHaConfig(
        r=4, alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 1}
    ),
    mitigate=False,
)
"""Deltas of rank 1 and 16, so that no share is kept by one rank in all modules."""
LOKR = Kind(llama(), lambda: peft.LoKrConfig(r=40, alpha=8, target_modules=["q_proj", "up_proj"]))


Maker = Callable[[str | Kind], Made]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    def made(kind: str | Kind) -> Made:
        monkeypatch.setitem(KINDS, "made here", KINDS[kind] if isinstance(kind, str) else kind)
        return make("made here", torch.float32, tmp_path)

    return made


def deltas(base: Path, merged: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Module → W' − W0, of those that changed, in float64."""
    before = load_file(base / "model.safetensors")
    found = {
        name.removesuffix(".weight"): (merged[name].double() - before[name].double()).numpy()
        for name in before
    }
    return {name: delta for name, delta in found.items() if delta.any()}


def ranks_by_svd(deltas: dict[str, np.ndarray], share: float) -> dict[str, int]:
    """The least rank of each that keeps the share, by numpy's SVD; a share that a rank meets exactly would be decided by rounding."""
    out = {}
    for name, delta in deltas.items():
        energy = np.linalg.svd(delta, compute_uv=False) ** 2
        kept = np.cumsum(energy) / energy.sum()
        assert np.abs(kept - share).min() > 1e-6, name
        out[name] = int((kept < share).sum()) + 1
    return out


def stored_ranks(adapter: Path) -> dict[str, int]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("kind", ["linear", LOHA, LOKR], ids=["LoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_ranks_are_those_of_pefts_conversion(
    kind: Kind | str, share: float, tmp_path: Path, made: Maker
) -> None:
    """Of one adapter by streamer, by numpy in float64, and by PEFT: equal ranks, the same delta, and PEFT loads it."""
    job = made(kind)
    record = mitigate(job.base, job.adapter, tmp_path / "lora", 1.0, to_lora=share)
    exact = deltas(job.base, job.merged())
    expected = ranks_by_svd(exact, share)
    assert stored_ranks(tmp_path / "lora") == expected
    assert len(set(expected.values())) > 1 or kind == "linear"
    with warnings.catch_warnings(action="ignore"):
        config, state = peft.convert_to_lora(job.peft(job.adapter, torch.float32), share)
    theirs = {
        k.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(t)
        for k, t in state.items()
        if "lora_A" in k
    }
    assert theirs == expected
    assert all(config.rank_pattern.get(name, config.r) == rank for name, rank in expected.items())
    merged = job.merged(
        tmp_path / "lora"
    )  # by PEFT, which opens it with the ranks of its own config
    for name, delta in exact.items():
        stem = f"base_model.model.{name}"
        ours = (
            merged[f"{name}.weight"].double()
            - load_file(job.base / "model.safetensors")[f"{name}.weight"].double()
        ).numpy()
        of_peft = (
            state[f"{stem}.lora_B.weight"].double() @ state[f"{stem}.lora_A.weight"].double()
        ).numpy()
        size = np.linalg.norm(delta)
        assert np.linalg.norm(ours - of_peft) < 1e-4 * size, name
        assert np.linalg.norm(ours - delta) ** 2 <= (1 - share) * size**2 * (1 + 1e-6), name
    assert record["to_lora"] == share
    assert record["totals"]["dropped_max"] ** 2 <= (1 - share) * (1 + 1e-6)


def test_the_share_is_of_the_mitigated_delta(tmp_path: Path, made: Maker) -> None:
    job = made("linear")
    options: dict[str, Any] = {
        "mitigation_lambda": 0.0,
        "method": "paper",
        "threshold_epsilon": 0.9,
    }
    with pytest.raises(
        UsageError,
        match=r"^to_lora: a share .* run `streamer detect`, and pass them with --findings, or pass a rank$",
    ):
        streamer.reduce_intruder_dimension(
            job.base, job.adapter, tmp_path / "lora", to_lora=0.9, **options
        )
    assert not (tmp_path / "lora").exists()
    options["findings"] = streamer.detect_intruder_dimensions(
        job.base, job.adapter, threshold_epsilon=0.9
    )
    streamer.reduce_intruder_dimension(
        job.base, job.adapter, tmp_path / "lora", to_lora=0.9, **options
    )
    mitigated = deltas(job.base, dict(streamer.iter_merged(job.base, job.adapter, **options)))
    assert stored_ranks(tmp_path / "lora") == ranks_by_svd(mitigated, 0.9)


@pytest.mark.parametrize("share", [1.5, 0.0, -0.5, float("nan")])
def test_what_is_no_share_of_energy_is_refused(share: float, tmp_path: Path, made: Maker) -> None:
    job = made("linear")
    with pytest.raises(
        UsageError,
        match=r"to_lora: expected a rank from 1, or a share in \(0, 1\] with a decimal point",
    ):
        mitigate(job.base, job.adapter, tmp_path / "lora", 1.0, to_lora=share)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (1500, 30)])
@pytest.mark.parametrize("factored", [True, False])
def test_energies(shape: tuple[int, int], factored: bool) -> None:
    generator = torch.Generator().manual_seed(vary(0))
    L, R = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in shape)
    L *= torch.logspace(0, -5, 12, dtype=torch.float64)
    delta = LowRank(L, R) if factored else Dense(L @ R.T)
    expected = torch.from_numpy(np.linalg.svd((L @ R.T).numpy(), compute_uv=False) ** 2)[:12]
    found = energies(delta)
    torch.testing.assert_close(found[:12], expected, rtol=1e-9, atol=1e-14 * float(expected[0]))
    assert least_rank(found, 1.0) <= 12
    assert least_rank(torch.zeros(5), 0.9) == 1


class Depthwise(torch.nn.Module):
    """A convolution of one channel a group, and a layer."""

    example = (2, 16, 8)

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = torch.nn.Conv1d(16, 16, 3, groups=16)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.depthwise(x))


def test_a_depthwise_convolution_is_refused(tmp_path: Path, made: Maker) -> None:
    """PEFT divides the ranks of a LoRA among a convolution's groups, and refuses one that was made without them."""
    loha = Kind(
        Depthwise,
        lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["depthwise"]),
        mitigate=False,
    )
    job = made(loha)
    done = server().run(
        "mitigate", job.base, job.adapter, "-o", tmp_path / "out", "--lambda", 1, "--to-lora", 4
    )
    assert done.code == 3
    assert (
        "changes 'depthwise', a convolution with one channel per group; PEFT's LoRA needs their number"
        in done.err
    )
    merged = merge(job.base, job.adapter, tmp_path / "merged", 1)
    assert merged["totals"]["changed"] == 0
    theirs = job.merged(dtype=torch.float32)
    for name, values in stored(tmp_path / "merged").items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-6)


# Class, or what → the class and values of its config
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in (
            "GPT2LMHeadModel",
            "T5ForConditionalGeneration",
            "BartForConditionalGeneration",
            "BertForSequenceClassification",
            "ElectraForCausalLM",
            "XLMWithLMHeadModel",
            "CTRLLMHeadModel",
            "GemmaForCausalLM",
            "BloomForCausalLM",
            "ChameleonForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
        )
    },
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with biases": (
        "LlamaForCausalLM",
        {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "deepseek without experts": ("DeepseekV2ForCausalLM", {"first_k_dense_replace": 2}),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        {
            "relative_attention": True,
            "position_buckets": 16,
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": 2,
            "norm_rel_ebd": "layer_norm",
        },
    ),
}

QUICK = (
    "llama, tied",
    "llama with biases",
    "GPT2LMHeadModel",
    "BertForSequenceClassification",
    "Qwen2_5_VLForConditionalGeneration",
)

NO_LAYER = (
    "has changed, which is no weight or bias of a layer, and so has no place in a LoRA adapter"
)
REFUSED = {
    "MixtralForCausalLM": r"which loading turns into 'model\.layers\.0\.mlp\.experts\.gate_up_proj'",
    "Qwen3MoeForCausalLM": r"which loading turns into 'model\.layers\.\d\.mlp\.experts\.\w+'",
    "BertGenerationDecoder": r"'lm_head\.bias' has changed",
    "GraniteSpeech5ForCTC": "ties weights and has no input embedding: PEFT opens no adapter for it",
    "SiglipModel": f"'logit_bias' {NO_LAYER}",
    "CLIPVisionModel": f"'embeddings.class_embedding' {NO_LAYER}",
}


def pair(name: str, home: Path) -> None:
    """A random model and the same with every parameter changed."""
    kind, options = CLASSES.get(name, (name, {}))
    cls = getattr(transformers, kind)
    torch.manual_seed(vary(0))
    model = cls(zoo.tiny_config(cls.config_class, **options))
    for directory in ("base", "tuned"):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape))
        model.save_pretrained(home / directory)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in CLASSES]
)
def test_peft_s_model_answers_as_the_fine_tuned_one(name: str, tmp_path: Path) -> None:
    """Biases, norms, embeddings, a head tied to one, names on disk: nothing that was trained is lost on the way into an adapter."""
    pair(name, tmp_path)
    cls = getattr(transformers, CLASSES[name][0])
    base = tmp_path / "base"
    mitigate(base, tmp_path / "tuned", tmp_path / "lora", 1.0, to_lora=300)
    tuned = cls.from_pretrained(tmp_path / "tuned").eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / "lora").eval()
    assert not [str(w.message) for w in said if "missing" in str(w.message)]
    inputs = zoo.example(tuned)
    torch.testing.assert_close(
        zoo.answer(model, inputs), zoo.answer(tuned, inputs), rtol=1e-3, atol=2e-4
    )

    record = json.loads((tmp_path / "lora" / "streamer.json").read_text())
    assert all(matrix["dropped"] < 1e-5 for matrix in record["matrices"])
    architecture = architecture_for(ModelConfig(json.loads((base / "config.json").read_text())))
    assert architecture is not None
    tied = any(t.tied and t.name.endswith(".weight") for t in architecture.ties)
    assert tied == any("merge_and_unload adds the delta" in line for line in record["notes"])
    merged = model.merge_and_unload().state_dict()
    wanted = tuned.state_dict()
    shared = {
        n
        for n, p in wanted.items()
        if sum(p.data_ptr() == q.data_ptr() for q in wanted.values()) > 1
    }
    for key, tensor in wanted.items():
        if key not in shared:
            torch.testing.assert_close(merged[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    if (
        name not in QUICK
    ):  # a T5's adapter on all names of its embedding is refused, a Bart's head is apart in a merge
        return
    read_back = dict(streamer.iter_merged(base, tmp_path / "lora", mitigation_lambda=1.0))
    stored = weights(tmp_path / "tuned")
    assert read_back.keys() == stored.keys()
    for key, tensor in stored.items():
        torch.testing.assert_close(read_back[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_in_an_adapter_is_refused(name: str, tmp_path: Path) -> None:
    pair(name, tmp_path)
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        mitigate(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", 1.0, to_lora=4)
    assert not (tmp_path / "lora").exists()
