"""`halfmoon explain` against a real proxy."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from halfmoon.client import Client
from halfmoon.deploy.cli import app

FACE_TOKEN = "the-token-of-a-cluster-of-scripted-workers"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "HALFMOON_CLUSTER_TOKEN": FACE_TOKEN})


def test_a_request_is_explained_as_tables(face: Any) -> None:
    with Client(face.grpc) as client:
        done = client.generate(prompt="Hello", max_tokens=4, request_id="shown")
    result = run("explain", "shown", "--control", face.control.address)
    assert result.exit_code == 0, result.output
    for words in (
        f"{done.request_id}: done",
        "policy least_loaded, admission none",
        "→ prefill-0",
        "→ decode-0",
        "least_loaded: prefill-0 has",
        "ended: length",
    ):
        assert words in " ".join(result.stdout.split()), result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("time to first token")]
    assert len(lines) == 1 and lines[0].rstrip().endswith("%"), "predicted, measured, error"


def test_json_holds_what_the_sdk_gives(face: Any) -> None:
    with Client(face.grpc, control=face.control) as client:
        client.generate(prompt="Hello", max_tokens=4, request_id="plain")
        (found,) = client.explain("plain")
    (shown,) = json.loads(run("explain", "plain", "--control", face.control.address, "--json").stdout)
    assert shown["attempts"] == json.loads(json.dumps(found.as_dict()))["attempts"] and shown["request_id"] == found.request_id


def test_a_request_that_nobody_remembers_is_one_line_and_exit_code_1(face: Any) -> None:
    result = run("explain", "nothing", "--control", face.control.address)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("halfmoon: no request 'nothing' is among the last ")


def test_a_flag_of_serve_that_is_wrong_is_told_before_anything_starts(tmp_path: Any) -> None:
    result = run("serve", "--cost-model", str(tmp_path / "none.json"))
    assert result.exit_code == 1 and result.stderr.startswith("halfmoon: no cost model at ")
    result = run("serve", "--admission", "some")
    assert result.exit_code == 1 and "proxy.admission is 'some'; it must be one of 'none', 'two_stage'" in result.stderr
