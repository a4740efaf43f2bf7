"""A planned model is what its class loads: each rule on headers, and broken plans of real merges, which write no byte."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from seeds import vary

from streamer.adapters.one_or_several import One
from streamer.cli.main import run
from streamer.detection.options import DetectionOptions, Run, RunOptions
from streamer.errors import UnloadableError
from streamer.methods import UNCHANGED
from streamer.output import lora_writer, model_writer
from streamer.output.adapter_loadability import check_lora
from streamer.output.job import Job
from streamer.output.loadability import check_loadable, check_merged
from streamer.output.merge_plan import MergedModel, OutputTensor, plan_merged
from streamer.output.model_headers import Headers
from streamer.output.prepare import OutputOptions, open_jobs
from streamer.storage.checkpoint import open_checkpoint
from streamer.storage.shard_writer import ShardPlan, plan_shard
from streamer.weights.logical import open_weights
from streamer.weights.model_config import ModelConfig, read_model_config

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "tie_word_embeddings": False}
WHISPER = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "vocab_size": 64}
BART = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 64}
LLAVA = {
    "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "tie_word_embeddings": False,
    "text_config": {"model_type": "llama", "vocab_size": 64}, "vision_config": {"model_type": "clip_vision_model"},
}  # fmt: skip
T5GEMMA2 = {
    "model_type": "t5gemma2", "architectures": ["T5Gemma2ForConditionalGeneration"], "tie_word_embeddings": True,
    "encoder": {"model_type": "t5gemma2_encoder", "text_config": {"model_type": "t5gemma2_text"}},
    "decoder": {"model_type": "t5gemma2_decoder"},
}  # fmt: skip
TWO = {f"model.{side}.embed_tokens.{name}": shape for side in ("encoder", "decoder")
       for name, shape in (("weight", (64, 32)), ("eoi_embedding", (32,)))}  # fmt: skip
UNKNOWN = {"model_type": "own", "architectures": ["OwnForCausalLM"]}
EMBED, QUERY, HEAD = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
SHAPES = {EMBED: (64, 32), QUERY: (32, 32), HEAD: (64, 32)}
TIED = {EMBED: (64, 32), QUERY: (32, 32)}
SPEECH = {"model.decoder.embed_tokens.weight": (64, 32), "model.decoder.layers.0.fc1.weight": (48, 32)}
IMAGES = {"language_model.model.embed_tokens.weight": (64, 32), "language_model.lm_head.weight": (64, 32)}

# What is written → (the base's shapes and config, the shapes and config that are written, tensors with contents of their own)
Case = tuple[dict[str, tuple[int, ...]], dict[str, Any], dict[str, tuple[int, ...]], dict[str, Any], tuple[str, ...]]


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**config, **values}


SEQ_CLS = changed(LLAMA, architectures=["LlamaForSequenceClassification"], num_labels=3)
TIED_LLAMA = changed(LLAMA, tie_word_embeddings=True)

RIGHT: dict[str, Case] = {
    "the base": (SHAPES, LLAMA, SHAPES, LLAMA, ()),
    "a changed head": (SHAPES, LLAMA, SHAPES, LLAMA, (HEAD,)),
    "a head untied": (TIED, TIED_LLAMA, SHAPES, LLAMA, (HEAD,)),
    "a head that the base lacks": (TIED, LLAMA, TIED, LLAMA, (QUERY,)),
    "both names unchanged": (SHAPES, TIED_LLAMA, SHAPES, TIED_LLAMA, (QUERY,)),
    "a copy less": (SHAPES, TIED_LLAMA, TIED, TIED_LLAMA, (EMBED,)),
    "more tokens": (SHAPES, LLAMA, SHAPES | {EMBED: (66, 32), HEAD: (66, 32)}, changed(LLAMA, vocab_size=66), (EMBED, HEAD)),
    "more rows than tokens, as in the base": (SHAPES, changed(LLAMA, vocab_size=60), SHAPES, changed(LLAMA, vocab_size=60), ()),
    "a classifier": (TIED, TIED_LLAMA, TIED | {"score.weight": (3, 32)}, SEQ_CLS, ("score.weight",)),
    "names without the prefix": ({"wte.weight": (64, 32)}, GPT2, {"wte.weight": (64, 32)}, GPT2, ()),
    "a head beside names without the prefix": (
        {"wte.weight": (64, 32)}, GPT2, {"wte.weight": (64, 32), HEAD: (64, 32)}, changed(GPT2, tie_word_embeddings=False), (HEAD,)
    ),
    "old names": (IMAGES, LLAVA, IMAGES, LLAVA, tuple(IMAGES)),
    "a stale buffer less": (TIED | {"final_logits_bias": (1, 64)}, BART, TIED, BART, ()),
    "names that the table alone has": (
        {n: shape for n, shape in TWO.items() if "encoder" in n}, T5GEMMA2, TWO | {"lm_head.out_proj.weight": (64, 32)},
        changed(T5GEMMA2, tie_word_embeddings=False), ("lm_head.out_proj.weight",)
    ),
    "a class that is not known": (SHAPES, UNKNOWN, SHAPES, UNKNOWN, (QUERY,)),
}  # fmt: skip

WRONG: dict[str, tuple[Case, str]] = {
    "no head": ((SHAPES, LLAMA, TIED, LLAMA, ()), "'lm_head.weight' of the base is missing"),
    "a layer's weight less": ((SHAPES, LLAMA, {EMBED: (64, 32), HEAD: (64, 32)}, LLAMA, ()), f"'{QUERY}' of the base is missing"),
    "an untied head that is not written": (
        (TIED, TIED_LLAMA, TIED, LLAMA, ()), "and the config says that it is not 'model.embed_tokens.weight'"
    ),
    "a head written, the tie kept": ((TIED, TIED_LLAMA, SHAPES, TIED_LLAMA, (HEAD,)), "differ, and the config says that they are one"),
    "one copy of two changed": ((SHAPES, TIED_LLAMA, SHAPES, TIED_LLAMA, (EMBED,)), "differ, and the config says that they are one"),
    "a head of another class": ((SPEECH, WHISPER, SPEECH | {HEAD: (64, 32)}, changed(WHISPER, tie_word_embeddings=False), (HEAD,)),
                                "'lm_head.weight' is no tensor of the class"),
    "a layer too many": ((SHAPES, LLAMA, SHAPES | {QUERY.replace("0", "7"): (32, 32)}, LLAMA, ()), "in a layer that the base"),
    "one tensor twice": ((IMAGES, LLAVA, IMAGES | {HEAD: (64, 32)}, LLAVA, (HEAD,)), "are both loaded as 'lm_head.weight'"),
    "other rows than the vocabulary": ((SHAPES, LLAMA, SHAPES | {EMBED: (66, 32)}, LLAMA, ()), "has shape [66, 32], wanted"),
    "one of two embeddings grown": ((SHAPES, LLAMA, SHAPES | {EMBED: (66, 32)}, changed(LLAMA, vocab_size=66), ()),
                                    "'lm_head.weight' has shape [64, 32], and the config says 66"),
    "a nested vocabulary that is not grown": (
        (IMAGES, LLAVA, IMAGES, changed(LLAVA, text_config={"model_type": "llama", "vocab_size": 66}), ()), "and the config says 66"),
    "another shape": ((SHAPES, LLAMA, SHAPES | {QUERY: (32, 16)}, LLAMA, ()), "has shape [32, 16], wanted the base's [32, 32]"),
    "a class without its head": ((TIED, TIED_LLAMA, TIED, SEQ_CLS, ()), "'score.weight' is missing, the head of the class"),
    "a classifier with other labels": ((TIED, TIED_LLAMA, TIED | {"score.weight": (5, 32)}, SEQ_CLS, ()), "and the config says 3"),
    "a new tensor of a class that is not known": ((SHAPES, UNKNOWN, SHAPES | {"x.weight": (2, 2)}, UNKNOWN, ()), "no change adds it"),
    "a tensor less of a class that is not known": ((SHAPES, UNKNOWN, TIED, UNKNOWN, ()), "'lm_head.weight' of the base is missing"),
}  # fmt: skip


def check(home: Path, case: Case) -> None:
    shapes, config, written, written_config, contents = case
    base = helpers.write_sharded(home / "base", [{name: torch.zeros(shape) for name, shape in shapes.items()}], config)
    check_loadable(
        "out", Headers.of(written, ModelConfig(written_config), {name: name for name in contents}),
        Headers.of(shapes, ModelConfig(config), {}), open_weights(open_checkpoint(base), read_model_config(base)), lambda _: False, {},
    )  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(tmp_path: Path, name: str) -> None:
    check(tmp_path, RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    case, says = WRONG[name]
    with pytest.raises(UnloadableError) as caught:
        check(tmp_path, case)
    assert says in str(caught.value)
    assert "this is an error of streamer: nothing was written" in str(caught.value)


def merge_of_a_head(
    home: Path, config: dict[str, Any] = TIED_LLAMA, embed: str = EMBED, head: str = "lm_head"
) -> tuple[Path, Path]:
    """A base whose head is tied, and an adapter on it: the merge unties them."""
    torch.manual_seed(vary(0))
    tensors = {embed: torch.randn(64, 32), QUERY: torch.randn(32, 32)}
    base = helpers.write_sharded(home / "base", [tensors], config)
    return base, helpers.write_adapter(home / "adapter", {head: helpers.intruding_factors(64, 32, 4)}, r=4)


def job_of(base: Path, adapter: Path, **form: Any) -> Job:
    detection = DetectionOptions()
    (job,) = open_jobs(
        base,
        One(adapter),
        [None],
        UNCHANGED,
        detection,
        OutputOptions(**{"merges": True, **form}),
        Run(RunOptions(torch.device("cpu"))),
    )
    return job


def without(model: MergedModel, name: str) -> MergedModel:
    return replace(
        model, files={file: tuple(o for o in outputs if o.name != name) for file, outputs in model.files.items()}
    )


def renamed(model: MergedModel, name: str, other: str) -> MergedModel:
    def new(o: OutputTensor) -> OutputTensor:
        return replace(o, name=other) if o.name == name else o

    return replace(model, files={file: tuple(map(new, outputs)) for file, outputs in model.files.items()})


def reshaped(model: MergedModel, name: str) -> MergedModel:
    def new(o: OutputTensor) -> OutputTensor:
        return replace(o, shape=(o.shape[0] + 1, *o.shape[1:])) if o.name == name else o

    return replace(model, files={file: tuple(map(new, outputs)) for file, outputs in model.files.items()})


def stating(model: MergedModel, **values: Any) -> MergedModel:
    config = {**json.loads(model.texts["config.json"]), **values}
    return replace(model, texts={"config.json": json.dumps(config).encode()})


BREAKS: dict[str, tuple[Callable[[MergedModel], MergedModel], str]] = {
    "the head dropped": (lambda m: without(m, HEAD), "'lm_head.weight' is missing"),
    "the tie's flag kept": (lambda m: stating(m, tie_word_embeddings=True), "differ, and the config says that they are one"),
    "the config's changes lost": (lambda m: replace(m, texts={}), "differ, and the config says that they are one"),
    "the head misnamed": (lambda m: renamed(m, HEAD, "proj_out.weight"), "'proj_out.weight' is no tensor of the class"),
    "another size of vocabulary": (lambda m: stating(m, vocab_size=65), "and the config says 65"),
    "another shape of the head": (lambda m: reshaped(m, HEAD), "has shape [65, 32], and the config says 64"),
    "another shape of a layer": (lambda m: reshaped(m, QUERY), "has shape [33, 32], wanted the base's [32, 32]"),
    "a layer dropped": (lambda m: without(m, QUERY), "of the base is missing"),
    "a layer renamed": (lambda m: renamed(m, QUERY, "model.layers.0.self_attn.x_proj.weight"), "is no tensor of the class"),
    "another class": (lambda m: stating(m, architectures=["LlamaForSequenceClassification"]), "'lm_head.weight' is no tensor of the class"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_plan_is_exit_code_7_and_no_byte(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = merge_of_a_head(tmp_path)
    broken, says = BREAKS[name]
    monkeypatch.setattr(model_writer, "plan_merged", lambda *args: broken(plan_merged(*args)))
    for more in ([], ["--dry-run"]):
        assert run(["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--lambda", "1", *more]) == 7
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_name(tmp_path: Path) -> None:
    base, adapter = merge_of_a_head(tmp_path, WHISPER, "model.decoder.embed_tokens.weight", "proj_out")
    job = job_of(base, adapter)
    model = plan_merged(job.plan)
    check_merged(base, job, model)
    with pytest.raises(UnloadableError, match=r"'lm_head\.weight' is no tensor of the class"):
        check_merged(base, job, renamed(model, "proj_out.weight", HEAD))


def assert_says(check: Callable[[], None], says: str) -> None:
    """A check fails with these words; of no words, it passes."""
    with pytest.raises(UnloadableError, match=re.escape(says)) if says else contextlib.nullcontext():
        check()


def shard_of(entries: dict[str, tuple[int, ...]]) -> ShardPlan:
    return plan_shard("adapter_model.safetensors", [(name, "F32", shape) for name, shape in entries.items()], {})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"r": 4, "target_modules": ["q_proj", "embed_tokens", "proj_out"], "modules_to_save": ["norm"]}
FACTORS = {f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (32, 4)}
EMBEDDING = {
    f"base_model.model.model.embed_tokens.lora_embedding_{x}": shape for x, shape in (("A", (4, 64)), ("B", (32, 4)))
}

ADAPTERS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "right": (FACTORS | EMBEDDING | {"base_model.model.model.norm.weight": (32,)}, {}, ""),
    "one factor": ({f"{Q}.lora_A.weight": (4, 32)}, {}, "does not have two factors"),
    "another rank": (FACTORS, {"r": 8}, "and the config says rank 8"),
    "no target": (FACTORS, {"target_modules": ["k_proj"]}, "is named by no target_modules"),
    "no module": ({name.replace("q_proj", "proj_out"): shape for name, shape in FACTORS.items()}, {}, "is no module of the class"),
    "another shape": ({f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (48, 4)}, {}, "which do not fit [32, 32]"),
    "factors of a linear layer": ({name.replace("layers.0.self_attn.q_proj", "embed_tokens"): shape for name, shape in FACTORS.items()}, {},
                                  "has the factors of no embedding"),
    "not saved": ({"base_model.model.lm_head.weight": (64, 32)}, {}, "is in a module that no modules_to_save names"),
    "no tensor": ({"base_model.model.model.norm.bias": (32,)}, {}, "is no tensor of the class"),
    "saved and adapted": (FACTORS, {"modules_to_save": ["norm", "attn.q_proj"]}, "and modules_to_save names it by 'attn.q_proj'"),
    "half saved": ({f"{Q}.bias": (32,)}, {"modules_to_save": ["q_proj"]}, "without its weight"),
    "no prefix": ({"model.norm.weight": (32,)}, {}, "does not begin with"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_what_peft_looks_for(tmp_path: Path, name: str) -> None:
    tensors = {n: torch.randn(s) for n, s in SHAPES.items()} | {"model.norm.weight": torch.ones(32)}
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    base = helpers.write_sharded(tmp_path / "base", [tensors], LLAMA)
    tuned = helpers.write_sharded(tmp_path / "tuned", [{n: t + 0.1 for n, t in tensors.items()}], LLAMA)
    entries, values, says = ADAPTERS[name]
    job = job_of(base, tuned, merges=False, to_lora=4)

    def planned() -> None:
        check_lora(tmp_path / "out", job, shard_of(entries), json.dumps({**CONFIG, **values}).encode())

    assert_says(planned, says)


def test_a_broken_adapter_is_exit_code_7_and_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = helpers.write_sharded(tmp_path / "base", [{QUERY: torch.randn(32, 32)}], LLAMA)
    adapter = helpers.write_adapter(
        tmp_path / "adapter", {QUERY.removesuffix(".weight"): helpers.intruding_factors(32, 32, 4)}, r=4
    )
    plan = lora_writer.plan_shard

    def broken(*args: Any) -> ShardPlan:
        return shard_of({t.name.replace("q_proj", "x_proj"): t.shape for t in plan(*args).header.tensors})

    monkeypatch.setattr(lora_writer, "plan_shard", broken)
    to_lora = ["--to-lora", "2", "--lambda", "1"]
    assert run(["mitigate", str(base), str(adapter), "-o", str(tmp_path / "out"), *to_lora]) == 7
    assert "PEFT would not load the adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SCALE = f"{QUERY}_scale_inv"
CODED = changed(
    LLAMA, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
)
CODES = SHAPES | {SCALE: (1, 1)}

QUANTIZED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "as it is": (CODES, CODED, ""),
    "plain": (SHAPES, LLAMA, ""),
    "no scale": (SHAPES, CODED, f"'{SCALE}' is missing, which belongs to the weight '{QUERY}'"),
    "plain with a scale": (CODES, LLAMA, f"'{SCALE}' is of a quantized weight, and the config says that the model is plain"),
    "plain, a weight less": ({EMBED: (64, 32), HEAD: (64, 32)}, LLAMA, f"'{QUERY}' is missing, which is the weight"),
    "plain, another shape": (SHAPES | {QUERY: (32, 16)}, LLAMA, "has shape [32, 16], wanted the base's [32, 32]"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_companions_are_of_their_weight(tmp_path: Path, name: str) -> None:
    tensors = {n: torch.zeros(s, dtype=torch.float8_e4m3fn if n == QUERY else torch.float32) for n, s in CODES.items()}
    base = helpers.write_sharded(tmp_path / "base", [tensors], CODED)
    weights, (written, config, says) = open_weights(open_checkpoint(base), read_model_config(base)), QUANTIZED[name]
    assert weights.quantized_names == {QUERY}

    def planned() -> None:
        headers = Headers.of(written, ModelConfig(config), {}), Headers.of(CODES, ModelConfig(CODED), {})
        check_loadable("out", *headers, weights, lambda _: False, {})

    assert_says(planned, says)
