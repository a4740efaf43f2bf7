"""Every object printed with --json, and every line of --json-events, is as its JSON Schema says, which is made from the types."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import helpers
import make_schemas
import pytest
from forks import Outcome, server
from jsonschema import Draft202012Validator
from paths import ROOT
from referencing import Registry, Resource

SCHEMAS: dict[str, dict[str, Any]] = {
    tree["properties"]["schema"]["const"]: tree
    for tree in (json.loads(path.read_text()) for path in (files("streamer") / "schemas").iterdir())
}
FORMATS = (ROOT / "docs" / "formats.md").read_text()


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an object with properties in a schema, itself among them."""
    if isinstance(schema, dict):
        if "object" in (schema.get("type") or ()) and "properties" in schema:
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, which permits keys to come, as one that refuses any that it does not describe."""
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    for inner in objects(copy):
        inner["additionalProperties"] = False
    return copy


REGISTRY: Any = Registry().with_resources(
    [(s["$id"], Resource.from_contents(strict(s))) for s in SCHEMAS.values()]
)


def faults(tree: dict[str, Any]) -> list[str]:
    """Where an object breaks the schema that it names, or has what the schema does not describe."""
    validator = Draft202012Validator(strict(SCHEMAS[tree["schema"]]), registry=REGISTRY)
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(tree)]


def check(done: Outcome, schema: str, code: int = 0) -> dict[str, Any]:
    assert done.code == code, done
    tree: dict[str, Any] = json.loads(done.out)
    assert tree["schema"] == schema
    assert faults(tree) == []
    return tree


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return helpers.three_shards(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_describes_every_key(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    kind, version = name.removeprefix("streamer.").split("/")
    assert (files("streamer") / "schemas" / f"{kind}-{version}.json").is_file()
    for inner in objects(SCHEMAS[name]):
        assert inner.get("description", ".").endswith("."), (
            inner
        )  # a part may be described by its key alone
        for key, value in inner["properties"].items():
            assert value["description"].strip(), key
            if key.endswith("bytes"):
                assert "ytes" in value["description"] or "same" in value["description"], key
    ranks = [
        v
        for inner in objects(SCHEMAS[name])
        for k, v in inner["properties"].items()
        if k in ("intruders", "degenerate")
    ]
    assert all("0-based" in v["description"] for v in ranks if v.get("type") == "array")


def test_the_check_can_fail() -> None:
    assert faults({"schema": "streamer.error/1", "errors": []}) == [
        "$.errors: [] should be non-empty"
    ]
    assert faults({"schema": "streamer.error/1", "errors": [{}], "more": 1})


@pytest.mark.long
def test_what_every_command_prints(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = server().run
    f = tmp_path / "f.safetensors"
    check(run("inspect", *inputs, "--json"), "streamer.plan/2")
    check(run("detect", *inputs, "-o", f, "--dry-run", "--json"), "streamer.dry-run/1")
    for state in ("written", "present"):
        assert (
            check(run("detect", *inputs, "-o", f, "--json"), "streamer.findings/1")["state"]
            == state
        )
    check(run("report", f, "--json"), "streamer.findings/1")
    for command in ("mitigate", "merge"):
        for name, options in {
            "found": ["--findings", f],
            "alone": [],
            "shrunk": ["--method", "shrink"],
            **({"lora": ["--to-lora", "3"]} if command == "mitigate" else {}),
        }.items():
            line = (command, *inputs, "-o", tmp_path / f"{command}-{name}", *options, "--json")
            check(run(*line, "--dry-run"), "streamer.dry-run/1")
            assert check(run(*line), "streamer.output/2")["state"] == "written"
            assert check(run(*line, "--dry-run"), "streamer.dry-run/1")["state"] == "done"
            record = json.loads((tmp_path / f"{command}-{name}" / "streamer.json").read_text())
            assert faults(record) == []
            assert {**check(run(*line), "streamer.output/2"), "state": "present"} == {
                **record,
                "output": str(tmp_path / f"{command}-{name}"),
                "state": "present",
            }


# docs/formats.md --------------------------------------------------------------------------------------------------------


MADE = make_schemas.made()


@pytest.mark.parametrize("path", MADE)
def test_schemas_are_those_of_the_types(path: Path) -> None:
    assert path.read_text() == MADE[path], "run `python tools/make_schemas.py`"


def test_the_docs_have_the_exit_codes() -> None:
    from streamer import errors

    def classes(of: type) -> Iterator[type]:
        yield of
        for sub in of.__subclasses__():
            yield from classes(sub)

    for error in classes(errors.StreamerError):
        if error is not errors.Interrupted and "exit_code" in vars(error):
            assert re.search(
                rf"^\| {vars(error)['exit_code']} \|.*`{error.__name__}`", FORMATS, re.MULTILINE
            ), error


def test_the_page_names_every_schema() -> None:
    names = {path.name for path in (files("streamer") / "schemas").iterdir()}
    assert set(re.findall(r"schemas/([\w-]+\.json)\)", FORMATS)) == names


def test_the_example_reads_findings(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server().run("detect", *inputs, "-o", tmp_path / "findings.safetensors").code == 0
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", FORMATS, re.DOTALL)
    exec(compile(code, "formats.md", "exec"), {})


def test_the_schemas_are_in_the_package() -> None:
    assert {path.name for path in (files("streamer") / "schemas").iterdir()} == {
        path.name for path in MADE
    }
