"""The findings file: a round trip, what it refuses, what it says of its inputs, and how it is saved and matched."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from helpers import three_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import streamer
from streamer import errors
from streamer.detection.findings import Findings, fingerprint, load_findings, matched_findings
from streamer.plan.plan import Plan, make_plan
from streamer.storage.checkpoint import open_checkpoint
from streamer.storage.files import locked
from streamer.storage.transaction import journal_of, lock_of


def test_findings_are_read_as_they_were_saved(made: tuple[Path, Path, Path, Findings]) -> None:
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
        assert (a.detection.intruders, a.detection.degenerate) == (
            b.detection.intruders,
            b.detection.degenerate,
        )


def test_findings_hold_no_paths_and_no_times(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path
) -> None:
    """The same inputs give the same bytes, wherever they lie."""
    base, adapter = helpers.three_shards(tmp_path / "some" / "where")
    again = tmp_path / "again.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, again, top_k=6)
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


def test_identity_sees_one_tensor_of_many(tmp_path: Path) -> None:
    base, _ = helpers.three_shards(tmp_path)
    before = open_checkpoint(base).identity
    shard = base / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    for name, tensor in tensors.items():
        flipped = tensor.clone().flatten()
        flipped[len(flipped) // 2] += 1
        save_file(tensors | {name: flipped.view(tensor.shape)}, shard, metadata={"format": "pt"})
        assert open_checkpoint(base).identity != before, name


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
    "ranks that fall": (lambda t, _: t["matrices"][0].update(degenerate=[2, 1]), "degenerate must be ascending ranks below 6"),
    "another matrix shape": (lambda t, _: t["matrices"][0].update(shape=[3, 3]), "expected shape"),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_tampering_is_refused(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path, how: str
) -> None:
    change, words = TAMPERED[how]
    path = helpers.tampered(made[2], tmp_path / "tampered.safetensors", "findings", change)
    with pytest.raises(errors.FormatError) as e:
        load_findings(path)
    assert str(e.value).startswith(f"{path}: findings are not as streamer.findings/1 has them (")
    assert words in str(e.value)
    assert str(e.value).endswith("; run detect again")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "where",
    ["U", "S", "Vh", "similarity", "base_singular_values", "intruders", "the JSON", "its digest"],
)
def test_a_flipped_bit_is_refused(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path, where: str
) -> None:
    raw = bytearray(made[2].read_bytes())
    n = 8 + int.from_bytes(raw[:8], "little")
    places = {"the JSON": raw.index(b"delta_norm") + 15, "its digest": raw.index(b'"sha256":') + 12}
    entry = json.loads(raw[8:n]).get(f"{Q}/{where}")
    raw[places[where] if entry is None else n + entry["data_offsets"][0]] ^= 1
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    with pytest.raises(
        errors.FormatError, match=rf"^{path}: .*; (copy it again, or )?run detect again$"
    ) as e:
        load_findings(path)
    assert len(str(e.value)) < 300


def test_findings_without_a_digest_are_refused(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path
) -> None:
    path = tmp_path / "old.safetensors"
    with safe_open(made[2], "pt") as f:
        metadata = {key: value for key, value in f.metadata().items() if key != "sha256"}
    save_file(load_file(made[2]), path, metadata)
    with pytest.raises(
        errors.FormatError,
        match=r"expected a SHA-256 .*, as in files of versions before 0.2; run detect",
    ):
        load_findings(path)


def test_untampered_copies_are_read(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path
) -> None:
    path = helpers.tampered(
        made[2], tmp_path / "tampered.safetensors", "findings", lambda t, a: None
    )
    assert load_findings(path).intruders == made[3].intruders


@pytest.mark.parametrize("key", ["U", "Vh"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_are_checked_when_they_are_used(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path, key: str, value: float
) -> None:
    """They are read matrix by matrix, so that a bad one is known only then; it goes into no output."""
    base, adapter, path, _ = made
    bad = helpers.tampered(
        path,
        tmp_path / "tampered.safetensors",
        "findings",
        lambda _, a: a[f"{Q}/{key}"].view(-1)[-1:].fill_(value),
    )
    for write in (
        streamer.reduce_intruder_dimension,
        streamer.merge_with_reduced_intruder_dimensions,
    ):
        with pytest.raises(
            errors.NumericError,
            match=rf"findings: those on '{Q}' hold NaN or Inf; run detect again",
        ):
            write(base, adapter, tmp_path / "out", findings=bad, top_k=6, overwrite=True)
        assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_saved_findings_are_detects_own_bytes(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path, where: str
) -> None:
    base, adapter, path, memory = made
    given = memory if where == "memory" else load_findings(path)
    out = tmp_path / "some" / "where" / "f.safetensors"
    given.save(out)
    assert out.read_bytes() == path.read_bytes()
    with pytest.raises(errors.OutputError, match="holds findings of other inputs or options"):
        streamer.detect_intruder_dimensions(base, adapter, out, top_k=3)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    before = out.stat().st_ino
    again = streamer.detect_intruder_dimensions(
        base, adapter, out, top_k=6
    )  # it is detect's own output: nothing to do
    assert out.stat().st_ino == before
    assert again.digest() == memory.digest()


def test_a_part_is_saved_as_a_part(findings: Findings, tmp_path: Path) -> None:
    findings["*.q_proj"].save(tmp_path / "f")
    read = load_findings(tmp_path / "f")
    assert [m.tensor for m in read] == [m.tensor for m in findings["*.q_proj"]]
    assert torch.equal(read[1].detection.U, findings["*.q_proj"][1].detection.U)


def test_saving_replaces_nothing_unasked(findings: Findings, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("mine")
    with pytest.raises(
        errors.OutputExistsError, match=r"f: exists; choose another output, or pass overwrite=True$"
    ):
        findings.save(path)
    with pytest.raises(
        errors.OutputExistsError,
        match=r"f: exists and is not findings, and no other file is replaced; choose another output, or move it away$",
    ):
        findings.save(path, overwrite=True)
    assert path.read_text() == "mine"
    path.write_text("")
    findings.save(path)
    with pytest.raises(
        errors.OutputExistsError, match=r"f: exists; choose another output, or pass overwrite=True$"
    ):
        findings[:2].save(path)
    again = load_findings(path)
    again[:3].save(path, overwrite=True)  # onto the file that is mapped
    assert len(load_findings(path)) == 3
    assert torch.equal(again[8].detection.U, findings[8].detection.U)


def test_findings_that_are_equal(made: tuple[Path, Path, Path, Findings]) -> None:
    _, _, path, memory = made
    assert load_findings(path) == memory  # seconds do not count
    assert memory[:3] != memory[3:6]
    assert memory[0].detection != memory[1].detection
    assert memory[0].detection != 3


def test_saving_beside_an_interrupted_run(findings: Findings, tmp_path: Path) -> None:
    path = tmp_path / "f"
    journal_of(path).write_bytes(b"x")
    with pytest.raises(
        errors.OutputExistsError, match="f: an interrupted run has its journal there"
    ):
        findings.save(path)
    findings.save(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("what", ["directory", "symlink", "file above", "locked"])
def test_where_nothing_can_be_saved(findings: Findings, tmp_path: Path, what: str) -> None:
    path = tmp_path / "f"
    if what == "directory":
        path.mkdir()
    elif what == "symlink":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "file above":
        path.write_text("mine")
        path = path / "g"
    before = helpers.tree_digest(tmp_path)
    if what == "locked":
        with (
            locked(lock_of(path), path),
            pytest.raises(errors.LockedError, match=f"^{path}: another run is writing here"),
        ):
            findings.save(path)
    else:
        with pytest.raises(errors.OutputError) as e:
            findings.save(path, overwrite=True)
        assert str(e.value).startswith(f"{path}: ")
    assert helpers.tree_digest(tmp_path) == before


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return three_shards(tmp_path_factory.mktemp("inputs"))


def prints(plan: Plan) -> list[str | None]:
    return [fingerprint(plan, target) for target in plan.targets]


def detected(base: Path, adapter: Path) -> Findings:
    return streamer.detect_intruder_dimensions(base, adapter)


def test_a_wider_dtype_and_other_shards_keep_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    tensors = {
        name: t.double()
        for shard in sorted(base.glob("*.safetensors"))
        for name, t in load_file(shard).items()
    }
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    if (base / "config.json").exists():
        shutil.copy(base / "config.json", tmp_path / "one")
    before = make_plan(base, adapter)
    after = make_plan(tmp_path / "one", adapter)
    assert {t.tensor: p for t, p in zip(before.targets, prints(before), strict=True)} == {
        t.tensor: p for t, p in zip(after.targets, prints(after), strict=True)
    }


def test_another_value_of_the_adapter_changes_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, other / "adapter_model.safetensors", metadata={"format": "pt"})
    mine = prints(make_plan(base, adapter))
    others = prints(make_plan(base, other))
    assert sum(a != b for a, b in zip(mine, others, strict=True)) == 1


def test_findings_are_matched_by_module_and_values(inputs: tuple[Path, Path]) -> None:
    base, adapter = inputs
    found = detected(base, adapter)
    plan = make_plan(base, adapter)
    assert [m.fingerprint for m in found] == prints(plan)
    elsewhere = replace(
        found, matrices=tuple(replace(m, tensor=f"elsewhere.{m.tensor}") for m in found)
    )
    assert matched_findings(plan, elsewhere, "findings") == found
    with pytest.raises(errors.MismatchError, match="has no findings on 1 of"):
        matched_findings(plan, found[1:], "findings")
    first = replace(found[0], fingerprint="0" * 64)
    with pytest.raises(errors.MismatchError, match="was judged with other values"):
        matched_findings(plan, replace(found, matrices=(first, *found.matrices[1:])), "findings")
    with pytest.raises(errors.MismatchError, match="does not say by which values"):
        matched_findings(
            plan,
            replace(found, matrices=(replace(first, fingerprint=None), *found.matrices[1:])),
            "f",
        )
