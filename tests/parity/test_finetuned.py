"""A fully fine-tuned model in an adapter's place: its difference to the base, matrix by matrix and expert by expert."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import zoo
from architectures import MODELS, MOE, TEXT, text, weights
from pairs import assert_decided, merge, mitigate
from safetensors.torch import load_file, save_file
from seeds import vary
from test_architectures_table import plain
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import streamer
from streamer.errors import (
    InputError,
    MismatchError,
    StreamerError,
    StreamerWarning,
    UnsupportedError,
)
from streamer.plan.plan import make_plan


def llama(**options: object) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=80,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            **{"num_hidden_layers": 2, **options},
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=48,
            n_layer=1,
            n_head=4,
            vocab_size=64,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def pair(
    home: Path, make=llama, dtype: torch.dtype = torch.float32, **saving: object
) -> tuple[Path, Path]:
    """A model, and the same after some steps on noise."""
    torch.manual_seed(vary(0))
    model = make().to(dtype)
    model.save_pretrained(home / "base", **saving)
    model = model.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(4):
        logits = model(torch.randint(1, 64, (4, 12))).logits
        loss = (logits - torch.randn(logits.shape)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.to(dtype).save_pretrained(home / "tuned", **saving)
    return home / "base", home / "tuned"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_lambda_one_is_the_tuned_model_bit_for_bit(
    tmp_path: Path, make, dtype: torch.dtype
) -> None:
    base, tuned = pair(tmp_path, make, dtype)
    merge(base, tuned, tmp_path / "out", 1.0)
    ours = tensors(tmp_path / "out")
    theirs = tensors(tuned)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert (tmp_path / "out" / "config.json").read_bytes() == (tuned / "config.json").read_bytes()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_detection_and_methods_equal_the_dense_formulas(tmp_path: Path, make) -> None:
    base, tuned = pair(tmp_path, make)
    findings = streamer.detect_intruder_dimensions(base, tuned)
    W0s = tensors(base)
    W1s = tensors(tuned)
    assert {m.tensor for m in findings} == {n for n, t in W0s.items() if t.dim() == 2}
    assert findings.intruders > 0
    expected: dict[str, dict[str, torch.Tensor]] = {"paper": {}, "project": {}, "shrink": {}}
    turn: dict[str, float] = {}
    for m in findings:
        W0 = W0s[m.tensor].double()
        W1 = W1s[m.tensor].double()
        turned = "embed" in m.tensor or "wte" in m.tensor or "wpe" in m.tensor or ".c_" in m.tensor
        if turned:
            W0 = W0.T
            W1 = W1.T
        assert m.transposed == turned
        assert m.shape == tuple(W0.shape)
        U0 = torch.linalg.svd(W0, full_matrices=False).U
        U, S, Vh = torch.linalg.svd(W1, full_matrices=False)
        # LAPACK's SVD in float32 is that of W1 + E with ‖E‖ ≤ p u σ1, u half an ε and p about min(m, n): each σ moves by ‖E‖ at most.
        backward = len(S) * torch.finfo(torch.float32).eps / 2 * float(S[0])
        torch.testing.assert_close(
            torch.tensor(m.detection.singular_values, dtype=torch.float64),
            S[:10],
            rtol=0,
            atol=backward,
        )
        similarity = (U0.T @ U[:, :10]).abs().amax(0)
        clear = [j for j in range(10) if abs(float(similarity[j]) - 0.5) > 1e-3]
        assert [j for j in m.detection.intruders if j in clear] == [
            j for j in clear if similarity[j] < 0.5
        ], m.tensor
        chosen = list(m.detection.intruders)
        # What is taken away is a function of W1 that is σ (paper), or 1 in front of Δ (project), on the chosen directions and 0 on the
        # others. By E it moves by its divided differences between the two, at most σ / gap and ‖Δ‖ / gap, and `lambda` halves that.
        left = [j for j in range(len(S)) if j not in chosen]
        gap = min((abs(float(S[i] - S[j])) for i in chosen for j in left), default=1.0)
        turn[m.tensor] = (
            backward / gap * max(float(S[0]), float(torch.linalg.matrix_norm(W1 - W0, 2)))
        )
        U = U[:, chosen]
        S = S[chosen]
        Vh = Vh[chosen]
        for method, W in (
            ("paper", W1 - 0.5 * (U * S) @ Vh),
            ("project", W1 - 0.5 * U @ (U.T @ (W1 - W0))),
            ("shrink", (W0 + W1) / 2),
        ):
            expected[method][m.tensor] = W.T if turned else W
    for method, wanted in expected.items():
        for name, tensor in streamer.iter_merged(
            base, tuned, findings=findings, mitigation_lambda=0.5, method=method
        ):  # type: ignore[arg-type]
            if name in wanted:
                rounded = 4 * torch.finfo(torch.float32).eps * float(wanted[name].norm())
                room = rounded + (0 if method == "shrink" else turn[name])
                assert float((tensor.double() - wanted[name]).norm()) <= room, (method, name)
            else:  # norms and biases are the tuned model's
                assert torch.equal(tensor, W1s[name]), name


@pytest.mark.parametrize("make", [llama, gpt2])
def test_outputs_are_verified_on_the_side_that_was_judged(tmp_path: Path, make) -> None:
    base, tuned = pair(tmp_path, make)
    merge(base, tuned, tmp_path / "merged", 0.5)
    mitigate(base, tuned, tmp_path / "lora", 0.5, to_lora=8)
    for output in ("merged", "lora"):
        totals = streamer.verify_output(tmp_path / output, base, tuned, sample="all")["totals"]
        assert totals["recomputed"] == totals["matrices"] > 0
        assert totals["differences"] == 0


def test_a_grown_vocabulary_is_taken_over(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tuned)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "grown")
    merge(base, tmp_path / "grown", tmp_path / "out", 0.5)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 70


def shaken(home: Path, make, only: str = "") -> tuple[Path, Path]:
    """A model, and the same with noise on every parameter, or on those whose names hold `only`."""
    torch.manual_seed(vary(0))
    model = make()
    model.save_pretrained(home / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(home / "tuned")
    return home / "base", home / "tuned"


def test_what_was_not_trained_is_not_in_the_adapter(tmp_path: Path) -> None:
    base, tuned = shaken(tmp_path, gpt2, only="c_proj")
    streamer.reduce_intruder_dimension(base, tuned, tmp_path / "out", to_lora=4)
    carried = {
        n.removeprefix("base_model.model.") for n in tensors(tmp_path / "out") if "lora_" not in n
    }
    assert carried == {f"transformer.h.0.{m}.c_proj.base_layer.bias" for m in ("attn", "mlp")}
    assert "modules_to_save" not in json.loads(
        (tmp_path / "out" / "adapter_config.json").read_text()
    )


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        ("SiglipModel", "logit_scale"),
        ("SiglipModel", "logit_bias"),
        ("BartForConditionalGeneration", "final_logits_bias"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:matrices carried along"
)  # an attention whose projections are one parameter
def test_parameters_of_the_model_itself(cls: str, own: str, tmp_path: Path) -> None:
    base, tuned = shaken(tmp_path, lambda: zoo.build(cls))
    merge(base, tuned, tmp_path / "out", 1.0)
    ours = tensors(tmp_path / "out")
    theirs = tensors(tuned)
    assert own in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_a_buffer_that_loading_does_without(tmp_path: Path) -> None:
    """Saved by another version of transformers, a model may lack what its class can do without; the base's own stays."""
    base, tuned = shaken(tmp_path, lambda: zoo.build("BartForConditionalGeneration"))
    kept = {n: t for n, t in tensors(tuned).items() if n != "final_logits_bias"}
    save_file(kept, tuned / "model.safetensors", metadata={"format": "pt"})
    merged = dict(streamer.iter_merged(base, tuned, mitigation_lambda=1.0))
    assert torch.equal(merged.pop("final_logits_bias"), tensors(base)["final_logits_bias"])
    assert merged.keys() == kept.keys()


def test_models_that_do_not_belong_together(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    with pytest.raises(InputError, match="is the base itself"):
        make_plan(base, base)
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(MismatchError, match=r"lacks 9 of the base's 21 tensors, 'model.layers.1"):
        make_plan(base, tmp_path / "short")
    with pytest.raises(StreamerError):
        make_plan(tmp_path / "short", tuned)
    findings = streamer.detect_intruder_dimensions(base, tuned)
    model = LlamaForCausalLM.from_pretrained(tuned)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-2)
    model.save_pretrained(tmp_path / "else")
    with pytest.raises(MismatchError, match="made with another adapter"):
        next(iter(streamer.iter_merged(base, tmp_path / "else", findings=findings)))


def with_a_copy(directory: Path, off: float = 0.0) -> None:
    """Store the tied head beside the embedding, as other writers do."""
    held = load_file(directory / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + off
    save_file(held, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("copied", [("base", "tuned"), ("base",), ("tuned",)])
def test_copies_of_a_tied_embedding_are_one_matrix(copied: tuple[str, ...], tmp_path: Path) -> None:
    """Judged, mitigated and written once: apart, the two would differ in a model that is said to be tied."""
    base, tuned = pair(tmp_path, functools.partial(llama, tie_word_embeddings=True))
    expected = dict(streamer.iter_merged(base, tuned, mitigation_lambda=0.0))
    for name in copied:
        with_a_copy(tmp_path / name)
    findings = streamer.detect_intruder_dimensions(base, tuned)
    assert "lm_head.weight" not in {m.tensor for m in findings}
    out = tmp_path / "out"
    merge(base, tuned, out, 0.0, findings=findings)
    ours = tensors(out)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n], t) for n, t in expected.items())
    loaded, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert streamer.verify_output(out, base, tuned, sample="all")["recomputed"]
    mitigate(base, tuned, tmp_path / "lora", 1.0, to_lora=64)
    tokens = torch.randint(1, 64, (3, 9))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(base), tmp_path / "lora"
        ).eval()
        theirs = LlamaForCausalLM.from_pretrained(tuned).eval()
        torch.testing.assert_close(
            model(tokens).logits, theirs(tokens).logits, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_copies_of_a_tied_embedding_that_differ(which: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, functools.partial(llama, tie_word_embeddings=True))
    for name in ("base", "tuned"):
        with_a_copy(tmp_path / name, 0.1 if name == which else 0.0)
    with pytest.raises(
        UnsupportedError,
        match=r"/(base|tuned): 'lm_head.weight' differs from .* ties it, and loaders",
    ):
        make_plan(base, tuned)


def test_copies_in_a_model_of_an_unknown_class(tmp_path: Path) -> None:
    """Nothing tells whether they are tied; the user can name the class."""
    base, tuned = pair(tmp_path, functools.partial(llama, tie_word_embeddings=True))
    for home in (base, tuned):
        with_a_copy(home)
        config = json.loads((home / "config.json").read_text())
        kept = {
            k: v
            for k, v in config.items()
            if k not in ("architectures", "model_type", "tie_word_embeddings")
        }
        (home / "config.json").write_text(json.dumps(kept))
    with pytest.raises(
        UnsupportedError, match=r"whose bytes are equal, are tied depends on .* with --architecture"
    ):
        make_plan(base, tuned)


# Model → (its class, its config, which tensors on disk are stacks, and whether they are (in, out))
STACKED: dict[str, tuple[str, Any, tuple[str, ...], bool]] = {
    "gpt-oss": (*MODELS["gpt-oss"][:2], ("gate_up_proj", "down_proj"), True),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        text("GraniteMoe", **MOE),
        ("input_linear.weight", "output_linear.weight"),
        False,
    ),
}


def with_intruders(name: str, home: Path, only: str = "") -> tuple[Path, Path]:
    """A model, and the same with one large direction added to each matrix whose name holds `only`, and noise."""
    cls, config, *_ = STACKED[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(config())
    model.save_pretrained(home / "base")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if only in key:
                p.add_(0.01 * torch.randn(p.shape))
                if p.dim() > 1:
                    p.add_(
                        0.3
                        * torch.randn(*p.shape[:-1], 1)
                        @ torch.randn(*p.shape[:-2], 1, p.shape[-1])
                    )
    model.save_pretrained(home / "tuned")
    return home / "base", home / "tuned"


@pytest.mark.parametrize("name", STACKED)
def test_each_expert_is_a_matrix(name: str, tmp_path: Path) -> None:
    _, _, stacks, transposed = STACKED[name]
    base, tuned = with_intruders(name, tmp_path)
    W0s = weights(base)
    W1s = weights(tuned)
    findings = streamer.detect_intruder_dimensions(base, tuned)
    found = {m.tensor: m for m in findings}
    stacked = [key for key in W0s if key.endswith(stacks)]
    experts = {f"{key}[{e}]": (key, e) for key in stacked for e in range(len(W0s[key]))}
    assert len(experts) == 2 * 2 * 4
    assert experts.keys() <= found.keys()
    expected = {key: torch.empty_like(W0s[key], dtype=torch.float64) for key in stacked}
    total = 0
    for tensor, (key, e) in experts.items():
        W0, W1 = (W[key][e].double().T if transposed else W[key][e].double() for W in (W0s, W1s))
        total += assert_decided(found[tensor], W0, W1, rtol=2e-6, atol=1e-9)
        U, S, Vh = torch.linalg.svd(W1, full_matrices=False)
        i = list(found[tensor].detection.intruders)
        W = W1 - 0.5 * (U[:, i] * S[i]) @ Vh[i]
        expected[key][e] = W.T if transposed else W
    assert total > 0
    merged = dict(streamer.iter_merged(base, tuned, findings=findings, mitigation_lambda=0.5))
    for key, wanted in expected.items():
        torch.testing.assert_close(
            merged[key].double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
        )
    merge(base, tuned, tmp_path / "out", 1.0)
    ours = weights(tmp_path / "out")
    assert ours.keys() == W1s.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in W1s.items())


def test_stacks_that_were_trained_have_no_place_in_a_lora_adapter(tmp_path: Path) -> None:
    base, tuned = with_intruders("gpt-oss", tmp_path)
    with pytest.raises(UnsupportedError, match="is on experts' parameters"):
        streamer.reduce_intruder_dimension(base, tuned, tmp_path / "out", to_lora=4)
    base, tuned = with_intruders("gpt-oss", tmp_path / "attention", only="q_proj.weight")
    streamer.reduce_intruder_dimension(base, tuned, tmp_path / "out", to_lora=4)
    assert not any("experts" in key for key in tensors(tmp_path / "out"))


def test_a_stack_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    for name, shift in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps({"model_type": "elsewhere", "hidden_size": TEXT["hidden_size"]})
        )
        tensors = {
            "layers.0.experts.up": torch.ones(4, 6, 8) + shift,
            "cls_token": torch.ones(1, 1, 8) + shift,
        }
        save_file(
            {**tensors, "layers.0.q.weight": torch.eye(8) + shift},
            tmp_path / name / "model.safetensors",
        )
    with pytest.raises(
        UnsupportedError, match=r"'layers.0.experts.up' \[4, 6, 8\] may be a stack of experts"
    ):
        make_plan(tmp_path / "base", tmp_path / "tuned")


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_of_an_unknown_class_that_may_be_a_convolution(bias: bool, tmp_path: Path) -> None:
    """Its bias tells: experts have one each."""
    for name, shift in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        tensors = {
            "layers.0.proj.weight": torch.ones(6, 4, 8) + shift,
            "layers.0.depthwise.weight": torch.ones(6, 1, 3),
        }
        tensors |= {"layers.0.proj.bias": torch.ones(6)} if bias else {}
        save_file(tensors, tmp_path / name / "model.safetensors")
    if not bias:
        with pytest.raises(
            UnsupportedError, match=r"'layers.0.proj.weight' \[6, 4, 8\] may be a stack of experts"
        ):
            make_plan(tmp_path / "base", tmp_path / "tuned")
        return
    assert [t.stored for t in make_plan(tmp_path / "base", tmp_path / "tuned").targets] == [
        (6, 1, 3),
        (6, 4, 8),
    ]


def test_matrices_that_are_no_weights_of_layers_are_named(tmp_path: Path) -> None:
    torch.manual_seed(vary(0))
    model = transformers.MambaForCausalLM(plain("Mamba")())
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    said = make_plan(tmp_path / "base", tmp_path / "tuned").warnings
    assert said == (
        "matrices carried along without findings: 'backbone.layers.0.mixer.A_log', 'backbone.layers.1.mixer.A_log'",
    )


def test_a_table_of_positions_that_is_a_weight_by_its_name_on_disk(tmp_path: Path) -> None:
    """Kimi-K2.5's (64, 64, n) is ``pos_emb.weight`` on disk and a parameter of another name in the model."""
    base = zoo.build("Kimi_K25ForConditionalGeneration")
    base.save_pretrained(tmp_path / "base")
    for p in base.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    base.save_pretrained(tmp_path / "tuned")
    with pytest.warns(
        StreamerWarning,
        match=r"carried along without findings: 'vision_tower.patch_embed.pos_emb.weight'",
    ):
        findings = streamer.detect_intruder_dimensions(
            tmp_path / "base", tmp_path / "tuned", top_k=1
        )
    modules = {m.module for m in findings}
    assert "vision_tower.encoder.patch_embed.proj" in modules
    assert "vision_tower.patch_embed.pos_emb" not in modules
