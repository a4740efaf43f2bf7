"""The findings file: a round trip, what it refuses, and what it says of its inputs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import streamer
from streamer.detection.findings import Findings, load_findings
from streamer.detection.options import DetectionOptions
from streamer.errors import FormatError, InputError, MismatchError, NumericError, OutputError
from streamer.storage.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Findings]:
    """Base, adapter, the findings file, and the findings in memory."""
    home = tmp_path_factory.mktemp("findings")
    base, adapter = helpers.three_shards(home)
    path = home / "findings.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, path, top_k=6, threshold_epsilon=0.6)
    return base, adapter, path, streamer.detect_intruder_dimensions(base, adapter, top_k=6, threshold_epsilon=0.6)


def test_round_trip(made: tuple[Path, Path, Path, Findings]) -> None:
    _, _, path, memory = made
    read = load_findings(path)
    assert (read.base, read.adapter, read.options) == (memory.base, memory.adapter, memory.options)
    assert len(read) == len(memory) == 9
    assert read.intruders == memory.intruders >= 9
    for a, b in zip(read, memory, strict=True):
        assert a.figures() == b.figures()
        assert a.seconds is None
        arrays = a.arrays()
        for key, value in b.arrays().items():
            assert arrays[key].dtype == value.dtype
            assert torch.equal(arrays[key], value)
        assert (a.detection.intruders, a.detection.degenerate) == (b.detection.intruders, b.detection.degenerate)


def test_the_safetensors_library_reads_it(made: tuple[Path, Path, Path, Findings]) -> None:
    _, _, path, memory = made
    with safe_open(path, "pt") as f:
        assert f.metadata()["schema"] == "streamer.findings/1"
        assert len(f.keys()) == 9 * len(memory)
        for m in memory:
            assert torch.equal(f.get_tensor(f"{m.tensor}/U"), m.detection.U)


def test_no_paths_and_no_times(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    """The same inputs give the same bytes, wherever they lie."""
    base, adapter = helpers.three_shards(tmp_path / "some" / "where")
    again = tmp_path / "again.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, again, top_k=6, threshold_epsilon=0.6)
    assert again.read_bytes() == made[2].read_bytes()
    assert str(tmp_path).encode() not in again.read_bytes()


def test_no_intruders_at_all(tmp_path: Path) -> None:
    """An adapter without intruders has findings with empty factors, and applying them changes nothing."""
    W = helpers.power_law(16, 12).float()
    base = helpers.write_sharded(
        tmp_path / "base", [{"a.q.weight": W}], {"model_type": "test", "tie_word_embeddings": False}
    )
    A, B = helpers.intruding_factors(16, 12, 2, sigma=1e-6)
    adapter = helpers.write_adapter(tmp_path / "adapter", {"a.q": (A, B * 1e-6)}, r=2)
    path = tmp_path / "f.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, path, top_k=3)
    read = load_findings(path)
    assert read.intruders == 0
    assert tuple(read.by_tensor["a.q.weight"].detection.U.shape) == (16, 0)
    record = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", findings=path, top_k=3, mitigation_lambda=0.0
    )
    assert record["totals"]["changed"] == 0
    name = "adapter_model.safetensors"
    before, after = ((path / name).read_bytes() for path in (adapter, tmp_path / "out"))
    data = sum(4 * t.numel() for t in (A, B))
    assert after[-data:] == before[-data:]


def test_findings_made_with_less_memory_than_this_build_of_torch_takes_are_read(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path
) -> None:
    small = replace(made[3], options=replace(made[3].options, max_memory=1 << 20))
    small.save(tmp_path / "f.safetensors")
    assert load_findings(tmp_path / "f.safetensors").options.max_memory == 1 << 20


# What is refused ------------------------------------------------------------------------------------------------------


def test_mismatch_says_what_differs(made: tuple[Path, Path, Path, Findings]) -> None:
    _, _, path, _ = made
    f = load_findings(path)
    f.check_matches(f.base, f.adapter, f.options)
    f.check_matches(f.base, f.adapter, None)
    files = [dict(x) for x in f.base["files"]]
    files[1]["sample_sha256"] = "0" * 64
    renamed = [x | {"file": x["file"].replace("model", "part")} for x in files]
    cases: list[tuple[dict, dict, DetectionOptions, str]] = [
        (
            {"files": files},
            {**f.adapter},
            f.options,
            "another base (the content of model-00002-of-00003.safetensors differs)",
        ),
        ({"files": renamed}, {**f.adapter}, f.options, "another base (files ['model-00001-of-00003.safetensors'"),
        ({"files": files[:2]}, {**f.adapter}, f.options, "another base (files ["),
        ({**f.base}, {**f.adapter, "weights_sha256": "0"}, f.options, "another adapter (weights_sha256 differ)"),
        ({**f.base}, {**f.adapter, "config_sha256": "0"}, f.options, "another adapter (config_sha256 differ)"),
        ({**f.base}, {**f.adapter}, DetectionOptions(5, 0.6), "made with top_k=6, asked for 5; pass the same"),
        ({**f.base}, {**f.adapter}, DetectionOptions(6, 0.5), "made with threshold_epsilon=0.6, asked for 0.5"),
        ({**f.base}, {**f.adapter}, DetectionOptions(6, 0.6, "dense"), "made with solver='auto', asked for 'dense'"),
    ]
    for base, adapter, options, words in cases:
        with pytest.raises(MismatchError) as e:
            f.check_matches(base, adapter, options)
        assert str(e.value).startswith(f"{path}: made with ")
        assert words in str(e.value)
        assert "run detect again" in str(e.value)


def test_two_bases_with_equal_headers_differ(tmp_path: Path) -> None:
    """Same names, shapes, dtypes and sizes, other weights: the identity tells them apart, and findings are refused."""
    bases = []
    for i in range(2):
        tensors = {f"a.{j}.weight": helpers.power_law(64, 48, seed=2 * i + j).float() for j in range(2)}
        bases.append(helpers.write_sharded(tmp_path / f"base{i}", [tensors]))
    one, other = (open_checkpoint(b).identity() for b in bases)
    assert one["files"][0]["header_sha256"] == other["files"][0]["header_sha256"]
    assert one != other
    adapter = helpers.write_adapter(tmp_path / "adapter", {"a.0": helpers.intruding_factors(64, 48, 2)}, r=2)
    findings = streamer.detect_intruder_dimensions(bases[0], adapter)
    with pytest.raises(
        MismatchError, match=r"^findings: made with another base \(the content of .* differs\); run detect again"
    ):
        streamer.reduce_intruder_dimension(bases[1], adapter, tmp_path / "out", findings=findings)
    assert not (tmp_path / "out").exists()


def test_identity_sees_one_tensor_of_many(tmp_path: Path) -> None:
    base, _ = helpers.three_shards(tmp_path)
    before = open_checkpoint(base).identity()
    shard = base / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    for name, tensor in tensors.items():
        flipped = tensor.clone().flatten()
        flipped[len(flipped) // 2] += 1
        save_file(tensors | {name: flipped.view(tensor.shape)}, shard, metadata={"format": "pt"})
        assert open_checkpoint(base).identity() != before, name


def tamper(path: Path, home: Path, change: Callable[[dict, dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the findings with its JSON and tensors changed, as a valid safetensors file."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    tree = json.loads(metadata["findings"])
    change(tree, tensors)
    out = home / "tampered.safetensors"
    save_file(tensors, out, metadata={**metadata, "findings": json.dumps(tree)})
    out.write_bytes(helpers.sealed(out.read_bytes()))
    return out


Q = "model.layers.0.self_attn.q_proj.weight"


TAMPERED: dict[str, tuple[Callable[[dict, dict[str, torch.Tensor]], object], str]] = {
    "no options": (lambda t, _: t.pop("options"), "KeyError"),
    "no matrices": (lambda t, _: t.pop("matrices"), "KeyError"),
    "an unknown option": (lambda t, _: t["options"].update(magic=1), "magic"),
    "a bad option": (lambda t, _: t["options"].update(top_k=0), "top_k"),
    "matrices that are no list": (lambda t, _: t.update(matrices=7), "TypeError"),
    "a matrix without tensors": (lambda t, _: t["matrices"][0].update(tensor="other"), "other/U"),
    "a figure less": (lambda t, _: t["matrices"][0].pop("certified"), "certified"),
    "a figure that is null": (lambda t, _: t["matrices"][0].update(precision=None), "precision is NoneType"),
    "no fingerprint": (lambda t, _: t["matrices"][0].pop("fingerprint"), "fingerprint"),
    "a tensor less": (lambda _, a: a.pop(f"{Q}/S"), f"{Q}/S"),
    "no values of the base": (lambda _, a: a.pop(f"{Q}/base_singular_values"), f"{Q}/base_singular_values"),
    "U of another shape": (lambda _, a: a.update({f"{Q}/U": torch.ones(3, 3)}), f"{Q}/U: expected shape"),
    "Vh of another shape": (lambda _, a: a.update({f"{Q}/Vh": torch.ones(3, 3)}), f"{Q}/Vh: expected shape"),
    "S not finite": (lambda _, a: a[f"{Q}/S"].fill_(float("nan")), f"{Q}/S holds NaN or Inf"),
    "more intruders than factors": (lambda _, a: a.update({f"{Q}/intruders": torch.arange(5)}), "expected shape"),
    "values of the base of another shape": (
        lambda _, a: a.update({f"{Q}/base_singular_values": torch.ones(3).double()}),
        f"{Q}/base_singular_values: expected shape",
    ),
    "another dtype": (lambda _, a: a.update({f"{Q}/U": a[f"{Q}/U"].half()}), "F16"),
    "ranks that repeat": (
        lambda _, a: a.update(
            {
                f"{Q}/{key}": torch.cat([a[f"{Q}/{key}"]] * 2, -1 if key == "U" else 0)
                for key in ("U", "S", "Vh", "intruders")
            }
        ),
        "intruders must be ascending ranks below 6",
    ),
    "ranks that fall": (
        lambda t, _: t["matrices"][0].update(degenerate=[2, 1]),
        "degenerate must be ascending ranks below 6",
    ),
    "another matrix shape": (lambda t, _: t["matrices"][0].update(shape=[3, 3]), "expected shape"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampering_is_refused(made: tuple[Path, Path, Path, Findings], tmp_path: Path, how: str) -> None:
    change, words = TAMPERED[how]
    path = tamper(made[2], tmp_path, change)
    with pytest.raises(FormatError) as e:
        load_findings(path)
    assert str(e.value).startswith(f"{path}: findings are not as streamer.findings/1 has them (")
    assert words in str(e.value)
    assert str(e.value).endswith("; run detect again")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "where", ["U", "S", "Vh", "similarity", "base_singular_values", "intruders", "the JSON", "its digest"]
)
def test_a_flipped_bit_is_refused(made: tuple[Path, Path, Path, Findings], tmp_path: Path, where: str) -> None:
    raw = bytearray(made[2].read_bytes())
    n = 8 + int.from_bytes(raw[:8], "little")
    places = {"the JSON": raw.index(b"delta_norm") + 15, "its digest": raw.index(b'"sha256":') + 12}
    entry = json.loads(raw[8:n]).get(f"{Q}/{where}")
    raw[places[where] if entry is None else n + entry["data_offsets"][0]] ^= 1
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=rf"^{path}: .*; (copy it again, or )?run detect again$") as e:
        load_findings(path)
    assert len(str(e.value)) < 300


def test_findings_without_a_digest_are_refused(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    with safe_open(made[2], "pt") as f:
        metadata = {key: value for key, value in f.metadata().items() if key != "sha256"}
    save_file(load_file(made[2]), path, metadata)
    with pytest.raises(FormatError, match=r"expected a SHA-256 .*, as in files of versions before 0.2; run detect"):
        load_findings(path)


def test_untampered_copies_are_read(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    path = tamper(made[2], tmp_path, lambda t, a: None)
    assert load_findings(path).intruders == made[3].intruders


def test_findings_that_lack_a_matrix_are_refused(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    base, adapter, path, _ = made
    short = tamper(path, tmp_path, lambda t, _: t["matrices"].pop(3))
    with pytest.raises(MismatchError, match=r"has no findings on .*; pass those on all matrices, or run detect again"):
        streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / "out", findings=short, top_k=6, threshold_epsilon=0.6
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["U", "Vh"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_are_checked_when_they_are_used(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path, key: str, value: float
) -> None:
    """They are read matrix by matrix, so that a bad one is known only then; it goes into no output."""
    base, adapter, path, _ = made
    bad = tamper(path, tmp_path, lambda _, a: a[f"{Q}/{key}"].view(-1)[-1:].fill_(value))
    for write in (streamer.reduce_intruder_dimension, streamer.merge_with_reduced_intruder_dimensions):
        with pytest.raises(NumericError, match=rf"findings: those on '{Q}' hold NaN or Inf; run detect again"):
            write(base, adapter, tmp_path / "out", findings=bad, top_k=6, threshold_epsilon=0.6, overwrite=True)
        assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_truncated_file(made: tuple[Path, Path, Path, Findings], tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut"
    path.write_bytes(made[2].read_bytes()[:cut])
    with pytest.raises(FormatError, match="get it again"):
        load_findings(path)


def test_not_a_findings_file(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"expected findings \(streamer.findings/1\), found another safetensors file"):
        load_findings(made[0] / "model-00001-of-00003.safetensors")
    with pytest.raises(InputError, match="no such file"):
        load_findings(tmp_path / "no")


def test_findings_over_something_else(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    base, adapter, _, _ = made
    path = tmp_path / "f.safetensors"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"exists and is not findings, which is all that is replaced; choose"):
        streamer.detect_intruder_dimensions(base, adapter, path)
    with pytest.raises(OutputError, match=r"exists and is not findings, which is all that is replaced; choose"):
        streamer.detect_intruder_dimensions(base, adapter, path, overwrite=True)
    assert path.read_text() == "mine"
    path.unlink()
    streamer.detect_intruder_dimensions(base, adapter, path, overwrite=True)
    assert len(load_findings(path)) == 9
    with pytest.raises(OutputError, match=r"holds findings of other inputs or options"):
        streamer.detect_intruder_dimensions(base, adapter, path, top_k=3)


def test_other_decisions_have_another_digest(made: tuple[Path, Path, Path, Findings]) -> None:
    """What an output was made from must tell findings apart even where their inputs and options agree."""
    findings = load_findings(made[2])
    first = findings.matrices[0]
    d = first.detection
    none = dataclasses.replace(d, intruders=(), U=d.U[:, :0], S=d.S[:0], Vh=d.Vh[:0])
    edited = dataclasses.replace(
        findings, matrices=(dataclasses.replace(first, detection=none), *findings.matrices[1:])
    )
    assert edited.digest() != findings.digest()
    assert findings.digest() == load_findings(made[2]).digest()
