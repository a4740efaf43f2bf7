"""Files beside an output's weights that someone added, took away or exchanged, with every digest made right: `verify` finds each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import Attack, Output, add, drop, found, record, together
from helpers import three_shards
from safetensors.torch import save_file
from verified import Job, agree, lines

import streamer
from streamer.plan import side_files as written
from streamer.plan.tokenizer import PROCESSOR, TOKENIZER, VOCABULARIES
from streamer.verification import directory, side_files

TEMPLATE = "additional_chat_templates/tools.jinja"


def write_tokenizer(path: Path, whose: str, tokens: int = 2) -> None:
    tree = {"model": {"vocab": {f"t{i}": i for i in range(tokens)}}, "of": whose}
    for name, text in {
        "tokenizer.json": json.dumps(tree),
        "tokenizer_config.json": "{}",
        "chat_template.jinja": whose,
    }.items():
        (path / name).write_text(text)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Models of three adapters, with the adapter's tokenizer, and with the base's where it has none or too large a one; and an adapter."""
    home = tmp_path_factory.mktemp("side")
    base, made = three_shards(home)
    bare = made.rename(home / "bare")
    (base / "config.json").write_text(
        json.dumps({"model_type": "test", "vocab_size": 64, "tie_word_embeddings": False})
    )
    write_tokenizer(base, "base")
    (base / TEMPLATE).parent.mkdir()
    (base / "2_Dense").mkdir()
    for name in (
        TEMPLATE,
        "generation_config.json",
        "preprocessor_config.json",
        "modules.json",
        "modeling_test.py",
        "notes.txt",
    ):
        (base / name).write_text("{}")
    save_file({"linear.weight": torch.eye(3)}, base / "2_Dense" / "model.safetensors")
    own, large = (Path(shutil.copytree(bare, home / name)) for name in ("own", "large"))
    write_tokenizer(own, "adapter")
    (own / "preprocessor_config.json").write_text('{"of": "adapter"}')
    (own / "config.json").write_text("{}")
    write_tokenizer(large, "adapter", 65)
    shrink: Any = {"method": "shrink", "mitigation_lambda": 0.5, "on_event": [].append}
    for name, adapter in {"model": own, "plain": bare, "small": large}.items():
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, home / name, **shrink)
    streamer.reduce_intruder_dimension(base, own, home / "adapter", **shrink)
    return {
        "model": Job(base, own, home),
        "plain": Job(base, bare, home),
        "small": Job(base, large, home),
        "adapter": Job(base, own, home),
    }


UNLISTED = (
    "chat_template.json", "tokenizer.model", "merges.txt", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "quant_config.json", "processor_config.json", "modeling_other.py", "additional_chat_templates/other.jinja", "2_Dense/config.json",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("name", UNLISTED)
def test_a_file_that_loaders_read_and_no_record_lists(
    jobs: dict[str, Job], tmp_path: Path, kind: str, name: str
) -> None:
    output = jobs[kind].copy(kind, tmp_path)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("{}")
    read = kind == "model" or not name.startswith(("2_Dense", "modeling"))
    assert lines(output) == [f"{output / name}: expected no such file by streamer.json, found one"] * read


def exchange(*names: str, of: str, tokenizer: str) -> Attack:
    """Put another input's files into the output, and say so in the record."""

    def attack(output: Output, job: Job) -> None:
        for name in names:
            shutil.copy((job.base if of == "base" else job.adapter) / name, output / name)
            agree(output, name)
        record(lambda tree: tree.update(tokenizer=tokenizer))(output, job)

    return attack


def left_out(name: str) -> Attack:
    return together(drop(name), record(lambda tree: tree["left_out"].append(name)))


NONE = "expected no such file, as the inputs have none for it, found one"
ATTACKS = {
    "a template with an entry": ("plain", add("chat_template.json"), f"chat_template.json: {NONE}"),
    "an adapter's config beside a model": ("plain", add("adapter_config.json"), f"adapter_config.json: {NONE}"),
    "code": ("model", add("modeling_other.py"), f"modeling_other.py: {NONE}"),
    "the base's template beside the adapter's": ("model", add(TEMPLATE), f"{TEMPLATE}: {NONE}"),
    "a tokenizer's file in an adapter": ("adapter", add("special_tokens_map.json"), f"special_tokens_map.json: {NONE}"),
    "weights in another format": ("adapter", add("pytorch_model.bin"), f"pytorch_model.bin: {NONE}"),
    "generation_config.json": ("model", drop("generation_config.json"), "generation_config.json: expected a copy of "),
    "generation_config.json left out": ("plain", left_out("generation_config.json"), "generation_config.json: expected a copy of "),
    "code taken away": ("plain", drop("modeling_test.py"), "modeling_test.py: expected a copy of "),
    "templates taken away": ("plain", drop(TEMPLATE), "tools.jinja: expected a copy of "),
    "a tokenizer's config": ("model", drop("tokenizer_config.json"), "tokenizer_config.json: expected a copy of "),
    "an adapter's template": ("adapter", drop("chat_template.jinja"), "chat_template.jinja: expected a copy of "),
    "an adapter's config.json": ("adapter", exchange("config.json", of="base", tokenizer="adapter"), "config.json: expected the bytes of "),
    "a quantized model's config": (
        "plain",
        together(add("quant_config.json"), record(lambda tree: tree.update(dequantize=True))),
        f"quant_config.json: {NONE}",
    ),
    "the base's tokenizer": ("model", exchange("tokenizer.json", of="base", tokenizer="adapter"), "tokenizer.json: expected the bytes of "),
    "the base's tokenizer, and so recorded": (
        "model",
        exchange("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", of="base", tokenizer="base"),
        "streamer.json: expected the tokenizer of adapter, found that of base",
    ),
    "the adapter's tokenizer of too many tokens": (
        "small",
        exchange("tokenizer.json", of="adapter", tokenizer="adapter"),
        "tokenizer.json: expected the bytes of ",
    ),
    "the base's processor": ("model", exchange("preprocessor_config.json", of="base", tokenizer="adapter"), "expected the bytes of "),
    "an adapter's tokenizer": ("adapter", exchange("tokenizer.json", of="base", tokenizer="adapter"), "tokenizer.json: expected "),
    "the weights of another module": (
        "model",
        together(drop("2_Dense/model.safetensors"), add("2_Dense/model.safetensors", "other")),
        "2_Dense/model.safetensors: expected the bytes of ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_changed_side_file_with_every_digest_right(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    kind, attack, said = ATTACKS[name]
    told = found(jobs[kind].copy(kind, tmp_path), jobs[kind], attack)
    assert any(said in line for line in told), told


# No false difference -----------------------------------------------------------------------------------------------------


def test_files_that_no_loader_reads_may_stand_beside_an_output(jobs: dict[str, Job], tmp_path: Path) -> None:
    """And an input may have lost or gained such a file since."""
    job, output = jobs["plain"], jobs["plain"].copy("plain", tmp_path)
    base = Path(shutil.copytree(job.base, tmp_path / "base"))
    (base / "notes.txt").unlink()
    (base / "later.txt").write_text("")
    for name in ("results.json", "notes.md", "eval/config.json", ".config.json"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("{}")
    assert lines(output, base, job.adapter, sample="all") == []
    skipped = streamer.verify_output(output, base, job.adapter)["not_compared"]
    assert skipped == [{"tensor": "notes.txt", "reason": "a file that neither input has"}]


@pytest.mark.parametrize("kind", ["merge", "mitigate"])
def test_an_output_over_files_that_a_loader_would_read_is_refused(
    jobs: dict[str, Job], tmp_path: Path, kind: str
) -> None:
    """So that what was written is never found to differ."""
    job = jobs["plain"]
    shrink: Any = {"method": "shrink", "mitigation_lambda": 0.5, "overwrite": True}
    write = streamer.merge_with_reduced_intruder_dimensions if kind == "merge" else streamer.reduce_intruder_dimension
    read = {"added_tokens.json": "{}", "merges.txt": "", **({"train.py": "pass"} if kind == "merge" else {})}
    for name, text in read.items():
        out = tmp_path / Path(name).stem
        out.mkdir()
        (out / name).write_text(text)
        with pytest.raises(
            streamer.StreamerError, match=f"{name}: exists, and a loader would read it as a part of the output"
        ):
            write(job.base, job.adapter, out, **shrink)
        assert (out / name).read_text() == text
        (out / name).rename(out / "other.txt")
        write(job.base, job.adapter, out, **shrink)
        assert lines(out, job.base, job.adapter, sample="all") == []


def test_files_that_no_loader_reads_stay_empty_or_not(jobs: dict[str, Job], tmp_path: Path) -> None:
    job, out = jobs["plain"], tmp_path / "out"
    out.mkdir()
    names = ("train.py", "__init__.py", "training_config.json", "notes.txt")
    for name in names:
        (out / name).touch()
    streamer.reduce_intruder_dimension(
        job.base, job.adapter, out, method="shrink", mitigation_lambda=0.5, overwrite=True
    )
    assert all((out / name).read_bytes() == b"" for name in names)
    assert lines(out, job.base, job.adapter, sample="all") == []


def test_the_tables_are_those_of_the_writer() -> None:
    """They are two since verification shares no code with what it checks."""
    assert directory.READ == written.READ
    assert (side_files.VOCABULARIES, side_files.TOKENIZER, side_files.PROCESSOR) == (VOCABULARIES, TOKENIZER, PROCESSOR)
