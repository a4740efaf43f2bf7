"""`streamer verify`: what the commands wrote is as they wrote it; every byte that is not is found, and so is what a digest cannot tell."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import jobs
import pytest
import torch
from command_line import ENV
from forks import server
from safetensors.torch import load_file, save_file
from test_schemas import check
from verified import KINDS, Job, agree, edit_tensor, lines, make_all_outputs, make_outputs

import streamer


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_all_outputs(*helpers.three_shards(home := tmp_path_factory.mktemp("verify")), home)


# Nothing differs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_commands_wrote_is_as_they_wrote_it(job: Job, kind: str) -> None:
    output = job.home / kind
    tree = check(server().run("verify", output, "--json"), "streamer.verification/1")
    assert (tree["verified"], tree["kind"]) == (True, kind)
    assert "inputs" not in tree
    assert tree["totals"]["recomputed"] == 0
    names = {p.name for p in output.rglob("*") if p.is_file()} - {"streamer.json"}
    files = json.loads((output / "streamer.json").read_text())["files"]
    assert (
        tree["totals"]["files"] == len(files) - 1 >= len(names) - 1
    )  # anyone may edit the model card
    tree = check(
        server().run("verify", output, job.base, job.adapter, "--sample", "all", "--json"),
        "streamer.verification/1",
    )
    assert tree["totals"]["recomputed"] == tree["totals"]["matrices"] == 9
    assert all(0 < r["error"] <= 1 for r in tree["recomputed"])


def test_a_sample_is_spread_over_kinds_and_the_same_each_time(job: Job) -> None:
    def sample(**options: Any) -> list[str]:
        found = streamer.verify_output(job.home / "model", job.base, job.adapter, **options)
        return [r["tensor"] for r in found["recomputed"]]

    assert sample() == sample()
    assert {name.split(".", 3)[3] for name in sample()} == {
        f"{module}.weight" for module in helpers.MODULES
    }
    assert sample(sample=5)[:3] == sample()
    assert len(set(sample(sample=5))) == 5
    assert len(sample(sample=100)) == 9


@pytest.mark.long
@pytest.mark.parametrize("method", ["paper", "project", "shrink"])
@pytest.mark.parametrize(
    ("lam", "dtype"),
    [
        *((0.3, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        *((lam, torch.bfloat16) for lam in (0.0, 1.0)),
    ],
)
def test_every_method_lambda_and_dtype(
    tmp_path: Path, method: Any, lam: float, dtype: torch.dtype
) -> None:
    base, adapter = helpers.three_shards(tmp_path, dtype)
    made = {
        "mitigation_lambda": lam,
        "method": method,
        **({"select": "first"} if lam and method != "shrink" else {}),
    }
    for write in (
        streamer.merge_with_reduced_intruder_dimensions,
        streamer.reduce_intruder_dimension,
    ):
        write(base, adapter, tmp_path / write.__name__, **made)  # type: ignore[operator]
        assert lines(tmp_path / write.__name__, base, adapter, sample="all") == []


@pytest.mark.parametrize("kind", ["fp8", "dora"])
def test_other_kinds_are_recomputed(tmp_path: Path, kind: str) -> None:
    base, adapter = getattr(jobs, kind)(tmp_path)
    made = make_outputs(base, adapter, tmp_path)
    found = streamer.verify_output(made.home / "model", base, adapter, sample="all")
    assert found["totals"]["recomputed"] == found["totals"]["matrices"] > 0
    options: dict[str, Any] = {"to_lora": 3} if kind == "dora" else {}
    streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", mitigation_lambda=0.5, **options
    )
    assert lines(tmp_path / "out", base, adapter, sample="all") == []
    if kind == "fp8":
        streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, tmp_path / "plain", dequantize=True
        )
        assert lines(tmp_path / "plain", base, adapter, sample="all") == []


@pytest.mark.parametrize(
    ("hidden", "block"),
    [(160, (100, 100)), (48, (4, 12))],
    ids=["as many blocks as of 128", "as many blocks as rows"],
)
def test_blocks_of_fp8_are_those_that_the_config_states(
    tmp_path: Path, hidden: int, block: tuple[int, int]
) -> None:
    base, adapter = jobs.fp8(tmp_path, hidden, block)
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "model")
    found = streamer.verify_output(tmp_path / "model", base, adapter, sample="all")
    assert (found["totals"]["recomputed"], found["totals"]["differences"]) == (9, 0)


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_stacked_experts_are_recomputed(tmp_path: Path, command: str) -> None:
    base, adapter = jobs.experts(tmp_path)
    out = tmp_path / "out"
    done = server().run(
        command, base, adapter, "-o", out, "--method", "shrink", "--lambda", "0.5", "-q"
    )
    assert done.code == 0
    assert lines(out, base, adapter, sample="all") == []
    (weights, *_) = sorted(out.glob("*.safetensors"))
    name = next(name for name in load_file(weights) if not name.endswith("lora_A.weight"))
    edit_tensor(weights, name, lambda t: t.view(len(t), -1)[:, -1].mul_(1.5))
    agree(out, weights.name)
    found = lines(out, base, adapter, sample="all")
    assert found
    assert all("[" in line and " within one rounding, found " in line for line in found), found


def test_what_cannot_be_recomputed_is_not_verified(tmp_path: Path) -> None:
    """The rotations of OFT have no formula here; the sample asks for what it cannot have."""
    base, _ = helpers.three_shards(tmp_path)
    (tmp_path / "oft").mkdir()
    tensors = {"base_model.model.model.layers.1.mlp.up_proj.oft_R.weight": torch.full((6, 28), 0.1)}
    save_file(tensors, tmp_path / "oft" / "adapter_model.safetensors")
    config = {"peft_type": "OFT", "oft_block_size": 8, "r": 6, "target_modules": ["up_proj"]}
    (tmp_path / "oft" / "adapter_config.json").write_text(json.dumps(config))
    inputs = base, tmp_path / "oft"
    streamer.merge_with_reduced_intruder_dimensions(
        *inputs, tmp_path / "model", method="shrink", mitigation_lambda=0.5
    )
    assert lines(tmp_path / "model") == []
    done = server().run("verify", tmp_path / "model", *inputs, "--json")
    tree = check(done, "streamer.verification/1", 7)
    why = "it is changed by a OFT adapter, for which verify has no formula"
    assert (
        done.err
        == f"streamer: {tmp_path / 'model'}: not verified: 1 matrix cannot be recomputed: {why}\n"
    )
    assert (tree["verified"], tree["differences"], tree["totals"]["recomputed"]) == (False, [], 0)
    assert tree["not_recomputed"] == [
        {"tensor": "model.layers.1.mlp.up_proj.weight", "reason": why}
    ]


def test_outputs_of_several_adapters(tmp_path: Path) -> None:
    base, adapters = jobs.several(tmp_path)
    out = tmp_path / "models"
    streamer.merge_with_reduced_intruder_dimensions(base, [adapters], out, mitigation_lambda=0.5)
    for name in ("lora", "dora", "saved"):
        found = streamer.verify_output(out / name, base, adapters / name, sample="all")
        assert found["totals"]["recomputed"] > 0
        assert (found["totals"]["not_compared"], found["not_recomputed"]) == (0, [])
    with pytest.raises(
        streamer.StreamerError, match=r"name one of the outputs in it: dora, lora, saved"
    ) as e:
        streamer.verify_output(out)
    assert e.value.exit_code == 3


# Refusals ----------------------------------------------------------------------------------------------------------------


def test_verify_refuses_what_it_cannot_check(job: Job, tmp_path: Path) -> None:
    other, _ = helpers.three_shards(tmp_path / "other", hidden=64)
    findings = job.home / "findings.safetensors"
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (
            (tmp_path / "no",),
            3,
            f"{tmp_path / 'no'}: expected the streamer.json of a finished output, found none; check the path",
        ),
        (
            (tmp_path / "empty",),
            3,
            f"{tmp_path / 'empty'}: expected the streamer.json of a finished output, found none",
        ),
        (
            (findings,),
            3,
            f"{findings}: expected the streamer.json of a finished output, found none; check the path",
        ),
        ((job.home / "model", job.base), 2, "verify: expected BASE and ADAPTER, found one of them"),
        *(
            (
                (job.home / "model", job.base, job.adapter, "--sample", count),
                2,
                f"--sample: expected a count from 1 or 'all', found {found}",
            )
            for count, found in (("0", "0"), ("-1", "-1"), ("1.5", "'1.5'"), ("some", "'some'"))
        ),
        (
            (job.home / "model", other, job.adapter),
            3,
            f"{other / 'model-00001-of-00003.safetensors'}: expected ",
        ),
        (
            (job.home / "model", job.base, job.home / "adapter"),
            3,
            f"{job.home / 'adapter' / 'adapter_model.safetensors'}: expected ",
        ),
        (
            (job.home / "model", tmp_path / "empty", job.adapter),
            3,
            f"{tmp_path / 'empty' / 'model-00001-of-00003.safetensors'}: no such file; give the base that ",
        ),
    ]
    for argv, code, message in cases:
        done = server().run("verify", *argv)
        assert done.code == code, done
        assert message in done.err
        assert "Traceback" not in done.err


def test_a_base_of_other_values_is_refused(job: Job, tmp_path: Path) -> None:
    """Its names, shapes and dtypes are those of the base: only a sample of the values tells."""
    other = Path(shutil.copytree(job.base, tmp_path / "other"))
    shard = other / "model-00002-of-00003.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(shard)
    tensors[name][len(tensors[name]) // 2] *= 2
    save_file(tensors, shard, metadata={"format": "pt"})
    assert shard.stat().st_size == (job.base / shard.name).stat().st_size
    for kind in KINDS:
        done = server().run("verify", job.home / kind, other, job.adapter)
        assert done.code == 3, done
        assert f"{shard}: expected sample_sha256 " in done.err
        assert f"; give the base that {job.home / kind} was made from" in done.err


@pytest.mark.long
def test_without_inputs_no_torch_is_loaded(job: Job) -> None:
    code = "import sys; from streamer.cli.main import run; code = run(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    line = [sys.executable, "-c", code, "verify", str(job.home / "model"), "-q"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=ENV)
    assert done.stdout == "0 False\n"


def test_the_text_for_people(job: Job) -> None:
    done = server().run("verify", job.home / "model", job.base, job.adapter)
    rest = "not compared: 6 matrices and 6 other tensors; --sample all compares everything"
    assert done.out.splitlines() == [
        f"{job.home / 'model'}: 7 files, 73.5 kB, as recorded",
        "3 of 9 matrices recomputed, each within its rounding",
        "0 of 6 other tensors compared with the inputs'",
        rest,
    ]
    done = server().run("verify", job.home / "model", job.base, job.adapter, "--sample", "all")
    assert done.out.splitlines()[1:] == [
        "9 of 9 matrices recomputed, each within its rounding",
        "6 of 6 other tensors compared with the inputs'",
        "not compared: nothing",
    ]
    done = server().run("verify", job.home / "model")
    assert done.out.splitlines()[1:] == [
        "compared only with its own record; give BASE ADAPTER to compare it with them"
    ]
