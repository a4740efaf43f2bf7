"""Bases and adapters in a bucket, by s3fs against moto's server."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import helpers
import pytest
from forks import server
from remote_jobs import COMMANDS, argv, contents, run_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("s3fs") is None, reason="s3fs is not installed"),
    pytest.mark.skipif(
        None in map(importlib.util.find_spec, ("moto", "flask_cors")),
        reason="moto[server] is not installed",
    ),
]


@pytest.mark.parametrize("mode", ["stream", "cache"])
def test_outputs_are_those_of_the_files(tmp_path: Path, mode: str) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    base, adapter = helpers.three_shards(tmp_path / "w")
    run_all(base, adapter, tmp_path / "local")
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        keys = {
            "aws_access_key_id": "testing",
            "aws_secret_access_key": "testing",
            "region_name": "us-east-1",
        }
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
        client.create_bucket(Bucket="models")
        for path in (p for p in (tmp_path / "w").rglob("*") if p.is_file()):
            client.upload_file(str(path), "models", str(path.relative_to(tmp_path / "w")))
        before = (
            f"os.environ.update(XDG_CACHE_HOME={str(tmp_path / 'cache')!r}, AWS_ENDPOINT_URL='http://{host}:{port}', "
            "AWS_ACCESS_KEY_ID='testing', AWS_SECRET_ACCESS_KEY='testing', AWS_DEFAULT_REGION='us-east-1')"
        )
        home = tmp_path / "out"
        home.mkdir()
        for command in COMMANDS:
            done = server().run(
                *argv(command, "s3://models/base", "s3://models/adapter", home, "--remote", mode),
                before=before,
            )
            assert done.code == 0, done
        done = server().run(
            "detect",
            "s3://models/none",
            "s3://models/adapter",
            "-o",
            home / "f.safetensors",
            before=before,
        )
        assert (done.code, done.err.count("\n")) == (3, 1), done
    finally:
        moto.stop()
    assert contents(home) == contents(tmp_path / "local")
