"""Cards: what the hub reads at their heads, the facts in front, and what stays of the card that was there."""

from pathlib import Path

import pytest
import yaml
from helpers import planted, three_shards, write_adapter
from safetensors.torch import save_file

import streamer
from streamer.output.record import Card, _merged_head, _with_tag
from streamer.plan.side_files import NameSource

BASE = """---
language:
- en
- de
license: other
license_name: llama3  # with a comment
datasets: [a/b, c/d]
model-index:
- name: base
  results: [{task: {type: x}}]
tags:
- base-only
pipeline_tag: text-generation
extra_gated_prompt: >-
  Say *yes*, R &D.	Twice.

  And again: - "so
---

# The base

It scores 99 %.
"""


def parts(path: Path) -> tuple[dict, str]:
    """The head of a card as the hub reads it, and the rest."""
    _, head, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def merge(base: Path, adapter: Path, out: Path, **options) -> dict:
    return streamer.merge_with_reduced_intruder_dimensions(base, adapter, out, **options)


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter = three_shards(tmp_path)
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(
        config.replace("{", '{"base_model_name_or_path": "some/base", ', 1)
    )
    return base, adapter


def test_a_merged_model_is_not_passed_off_as_its_base(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = job
    (base / "README.md").write_text(BASE)
    record = merge(base, adapter, tmp_path / "out", mitigation_lambda=0.5)
    head, body = parts(tmp_path / "out" / "README.md")
    assert head == {
        "base_model": ["some/base"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["intruder-dimensions", "merged", "peft", "lora"],
        "license": "other",
        "license_name": "llama3",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
    }
    facts, _, rest = body.partition("# Card of the base model")
    assert "[some/base](https://huggingface.co/some/base), digest" in facts
    scaled = f"{record['totals']['intruders']} intruders scaled"
    assert f"- method paper, select all, lambda 0.5: 9 of 9 matrices mitigated, {scaled}\n" in facts
    assert "| intruders | scaled in 9 of 9 matrices |" in facts
    assert "the decisions on 9 of 9 matrices" in facts
    assert "streamer merge base adapter -o OUTPUT --lambda 0.5 --method paper" in facts
    assert "It scores 99 %." in rest
    assert "99 %" not in facts
    assert str(tmp_path) not in body


def test_a_mitigated_adapter_keeps_its_head(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    (adapter / "README.md").write_text(
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- base_model:adapter:{base}\n- lora\nmine: 1\n---\n\n# Mine\n"
    )
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out")
    head, body = parts(tmp_path / "out" / "README.md")
    assert head == {
        "base_model": "some/base",
        "library_name": "peft",
        "tags": ["lora", "intruder-dimensions"],
        "mine": 1,
    }
    assert body.index("- lost in projection: at most") < body.index("# Mine")
    assert "`--method project`" in body  # what was recommended


def test_matrices_with_intruders_are_counted(tmp_path: Path) -> None:
    """Not all that were judged have some; where a card has room for all, it says how many do."""
    tensors = {}
    factors = {}
    for i in range(12):
        tensors[f"layers.{i}.weight"], (a, b) = planted(24, 20, 3, seed=i)
        factors[f"layers.{i}"] = (a, b if i < 2 else 0 * b)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    record = merge(
        tmp_path / "base", write_adapter(tmp_path / "adapter", factors, r=3), tmp_path / "out"
    )
    scaled = [m for m in record["matrices"] if m["intruders"]]
    assert len(scaled) == 2
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| intruders | scaled in {len(scaled)} of 12 matrices |" in text


def test_the_library_is_that_of_the_class(tmp_path: Path) -> None:
    """A classifier made of a sentence encoder is none."""
    source: NameSource = {"name": "x", "digest": "0"}
    blocks = {
        "library_name": "library_name: sentence-transformers\n",
        "pipeline_tag": "pipeline_tag: sentence-similarity\n",
    }
    for pipeline, library in (
        ("text-classification", "transformers"),
        ("", "sentence-transformers"),
    ):
        head = yaml.safe_load(_merged_head(Card(b"", pipeline), (source, source), dict(blocks)))
        assert head["library_name"] == library
        assert head["pipeline_tag"] == (pipeline or "sentence-similarity")


def test_a_merged_pipeline_has_no_tag_of_peft() -> None:
    source: NameSource = {"name": "x", "digest": "0"}
    head = yaml.safe_load(_merged_head(Card(b"", diffusers=True), (source, source), {}))
    assert head == {"tags": ["intruder-dimensions", "merged", "lora"], "library_name": "diffusers"}


def test_no_card_leaves_it_as_it_is(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    merge(base, adapter, tmp_path / "none", model_card=False)
    assert not (tmp_path / "none" / "README.md").exists()
    (base / "README.md").write_text(BASE)
    merge(base, adapter, tmp_path / "out", model_card=False)
    assert (tmp_path / "out" / "README.md").read_text() == BASE
    with pytest.raises(streamer.StreamerError, match="holds another output"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "head",
    [
        "license: &x mit\nlanguage: *x\n",
        "a: 1\na: 2\n",
        "- a\n",
        "tags: [a,\nb]\n",
        "? a\n: b\n",
        "\ta: 1\n",
        "a: 1\n...\n",
    ],
)
def test_a_head_that_is_not_plain_stays_as_it_is(
    job: tuple[Path, Path], tmp_path: Path, head: str
) -> None:
    base, adapter = job
    (base / "README.md").write_bytes(f"---\n{head}---\n".encode() + b"\xff not text\n")
    merge(base, adapter, tmp_path / "out")
    data = (tmp_path / "out" / "README.md").read_bytes()
    assert data.startswith(f"---\n{head}---\n".encode())
    assert b"- method paper" in data
    assert b"\xff not text\n" in data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tags:\n- a\n- b\n", ["a", "b", "intruder-dimensions"]),
        ("tags:\n  - a\n  - b\n", ["a", "b", "intruder-dimensions"]),
        ("tags: [a, b]\n", ["a", "b", "intruder-dimensions"]),
        ("tags:\n", ["intruder-dimensions"]),
        ("tags: []\n", ["intruder-dimensions"]),
        ("tags:\n- intruder-dimensions\n- a\n", ["intruder-dimensions", "a"]),
        ("tags: some\n", "some"),
    ],
)
def test_the_tag_is_added_to_any_form_of_tags(text: str, expected: object) -> None:
    assert yaml.safe_load(_with_tag(text)) == {"tags": expected}


def test_a_card_of_a_fine_tuned_model_is_called_so(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    merge(base, adapter, tmp_path / "tuned", mitigation_lambda=1, model_card=False)
    (tmp_path / "tuned" / "README.md").write_text("# Tuned\n")
    merge(base, tmp_path / "tuned", tmp_path / "out")
    head, body = parts(tmp_path / "out" / "README.md")
    assert "base_model" not in head  # nothing says what it is called
    assert head["tags"] == ["intruder-dimensions", "merged"]
    assert (
        "# Card of the fine-tuned model\n\nThe rest is the unchanged card of tuned.\n\n# Tuned"
        in body
    )
    assert (tmp_path / "out" / "README.md").read_text().count("# Tuned") == 1


def test_an_edited_card_stands_and_is_never_replaced(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = job
    merge = streamer.merge_with_reduced_intruder_dimensions
    out = tmp_path / "out"
    merge(base, adapter, out)
    with (out / "README.md").open("a") as f:
        f.write("mine\n")
    assert merge(base, adapter, out)["state"] == "present"
    words = r"README\.md: was edited since it was written; choose another output, or move it away$"
    with pytest.raises(streamer.StreamerError, match=words):
        merge(base, adapter, out, mitigation_lambda=0.5, overwrite=True)
    merge(base, adapter, out, mitigation_lambda=0.5, overwrite=True, model_card=False)
    assert (out / "README.md").read_text().endswith("mine\n")


@pytest.mark.parametrize("options", [{}, {"model_card": False}])
def test_another_card_of_the_base_is_another_output(
    job: tuple[Path, Path], tmp_path: Path, options: dict[str, bool]
) -> None:
    """At its size, too."""
    base, adapter = job
    merge = streamer.merge_with_reduced_intruder_dimensions
    out = tmp_path / "out"
    (base / "README.md").write_text("# One\n")
    merge(base, adapter, out, **options)
    (base / "README.md").write_text("# Two\n")
    with pytest.raises(streamer.StreamerError, match="holds another output"):
        merge(base, adapter, out, **options)
    merge(base, adapter, out, overwrite=True, **options)
    assert "# Two" in (out / "README.md").read_text()


def test_names_do_not_steer_a_terminal(tmp_path: Path) -> None:
    """Directories and tensors come from downloads; the command is one line of its block, whatever they are called."""
    base, adapter = three_shards(tmp_path)
    base = base.rename(tmp_path / "ba\x1b[31m\u202e\u2028\n```se")
    merge(base, adapter, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8", errors="surrogateescape")
    assert all(line.isprintable() for line in text.split("\n"))
    _, block, _ = text.split("\n```", 2)
    assert block.startswith(
        "sh\nstreamer merge 'ba\\x1b[31m\\u202e\\u2028\\n```se' adapter -o OUTPUT"
    )
