"""The serving benchmark's arms: what they are, and that nothing of one is left. Servers here are scripts; no GPU, no Ray."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

ENDPOINT = """
import asyncio, os, signal, subprocess, sys
sys.path.insert(0, {folder!r})
if {stubborn}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for environment in (None, {{}}):  # one that carries the arm's mark, one that does not
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, env=environment)
from fake_server import serve
asyncio.run(serve({port}, 0.01, 0.005))
"""


@pytest.fixture
def arms(load: Any) -> Any:
    return load("serving_arms")


def specs(arms: Any, *names: str, num_gpus: int = 2, device: str = "cpu") -> list[Any]:
    model = arms.Model("", 0, dummy=False)
    return arms.make_specs(names, num_gpus=num_gpus, device=device, model=model, settings=["store.arena_bytes=7"], slo=(5.0, 0.03))


def fake_spec(arms: Any, name: str, *, stubborn: bool = False) -> Any:
    (port,) = arms._free_ports(1)
    code = ENDPOINT.format(folder=str(Path(arms.__file__).parent), stubborn=stubborn, port=port)
    return arms.Spec(name, (arms.Process((sys.executable, "-c", code), f"http://127.0.0.1:{port}", "/v1/models", {}),))


def test_arms_are_keys_of_halfmoons_configuration(arms) -> None:
    from halfmoon.protocol.config import ClusterConfig

    found = {}
    for spec in specs(arms, "coupled:512", "coupled@20", "coupled", "1p1d:4096", "adaptive:1p1d"):
        (process,) = spec.processes
        keys = dict(part.split("=", 1) for part in process.arguments[2:])
        assert keys["store.arena_bytes"] == "7"
        read = {key: value if key == "model.path" else json.loads(value) if value[:1].isdigit() else value for key, value in keys.items()}
        config = ClusterConfig.load(None, read)
        assert process.url.endswith(f":{config.proxy.http_port}") and config.proxy.http_port != config.proxy.grpc_port
        found[spec.name] = config
    assert (found["coupled:512"].prefill.num_workers, found["coupled:512"].decode.num_workers) == (0, 2)
    assert found["coupled:512"].decode.max_prefill_tokens_per_step == 512
    assert found["coupled:512"].decode.tpot_target_s == 0.0 and found["coupled@20"].decode.tpot_target_s == 0.02
    assert found["coupled"].decode == dataclasses.replace(ClusterConfig().decode, num_workers=2)
    assert (found["1p1d:4096"].prefill.num_workers, found["1p1d:4096"].prefill.max_tokens_per_step) == (1, 4096)
    assert (found["adaptive:1p1d"].proxy.policy, found["adaptive:1p1d"].proxy.tpot_slo_s) == ("adaptive", 0.03)


def test_what_cannot_run_here_says_why_and_a_wrong_name_ends_it(arms) -> None:
    assert [spec.absent for spec in specs(arms, "2p1d", "vllm:512")] == ["it needs 3 GPUs, there are 2", "vLLM is run on GPUs only"]
    with pytest.raises(SystemExit, match="1p1d"):
        specs(arms, "sglang")
    with pytest.raises(SystemExit, match="vllm:CHUNK"):
        specs(arms, "vllm@20")


def test_every_default_arm_is_one(load, arms) -> None:
    serving = load("serving")
    assert serving.default_arms(2).split(",")[-2:] == ["1p1d", "adaptive:1p1d"]
    for num_gpus in (1, 2, 3, 8):
        assert not [
            spec.name for spec in specs(arms, *serving.default_arms(num_gpus).split(","), num_gpus=num_gpus) if "needs" in spec.absent
        ]


def test_an_arm_that_ends_before_it_is_ready_tells_the_end_of_its_log(arms, tmp_path: Path) -> None:
    spec = arms.Spec("broken", (arms.Process((sys.executable, "-c", "raise SystemExit('no weights')"), "http://127.0.0.1:9", "/", {}),))
    with pytest.raises(arms.ArmFailed, match=r"(?s)ended with 1 .*no weights"), arms.running(spec, tmp_path, 30.0, print):
        pass


def test_nothing_of_an_arm_is_left_though_it_ignores_the_interrupt_and_has_children_in_other_sessions(arms, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(arms, "STOP_S", ((arms.signal.SIGINT, 1.0), (arms.signal.SIGTERM, 10.0), (arms.signal.SIGKILL, 10.0)))
    mark = uuid.uuid4()
    monkeypatch.setattr(arms.uuid, "uuid4", lambda: mark)
    told: list[str] = []
    with arms.running(fake_spec(arms, "stubborn", stubborn=True), tmp_path, 60.0, told.append):
        assert len(arms.marked(mark.hex)) == 2
        (root, *_) = arms.marked(mark.hex)
        members = arms.family([root])
        assert len(members) == 3
    assert arms.marked(mark.hex) == [] and not set(members) & set(arms._processes()) and "SIGTERM" in told[0] and len(told) == 1


def test_arms_run_in_turn_and_what_no_longer_fits_is_left_out_and_told(load, arms, tmp_path: Path) -> None:
    serving = load("serving")
    values = {"device": "cpu", "out": tmp_path, "start_timeout_s": 60.0, "budget_s": 600.0}
    load_values = {"trace": None, "rates": "20,40", "requests": 6, "input_len": "20", "output_len": "3", "shared_share": 0.0}
    caps = {"max_input": 100, "max_output": 100, "warm_up": 1, "seed": 1, "tell": ""}
    arguments = argparse.Namespace(**values, **load_values, **caps)
    plan, factors = serving.make_plan(arguments)
    options = serving.ArmOptions(factors=factors, slos=(serving.Slo(5.0, 1.0),), seed=1)
    run = serving.Run(arguments, plan, options)
    run.run(fake_spec(arms, "first"))
    told = dict(run._loads(dataclasses.replace(fake_spec(arms, "ours"), takes_slo=True)))
    run.run(arms.Spec("absent", absent="it is not here"))
    run.run(arms.Spec("broken", (arms.Process((sys.executable, "-c", "raise SystemExit(3)"), "http://127.0.0.1:9", "/", {}),)))
    run._deadline = time.monotonic() + serving.STOP_S
    run.run(fake_spec(arms, "late"))
    assert {name: one.extra_body for name, one in told.items()} == {"ours, told 5s/1000ms": {"slo": {"ttft": 5.0, "tpot": 1.0}}}
    text = (tmp_path / "serving.md").read_text()
    (arm,) = json.loads((tmp_path / "serving.json").read_text())["arms"]
    assert arm["name"] == "first" and len(arm["windows"]) == 2 and arm["started_s"] > 0
    assert "| first | 20" in text and "| first | 40" in text and "absent: left out, it is not here" in text and run.num_failed == 1
    assert "broken: FAILED, ended with 3" in text and "late: left out, it needs about" in text


def test_a_shape_is_a_folder_that_halfmoons_tokenizer_reads(arms, tmp_path: Path) -> None:
    from halfmoon.proxy.text.tokenizer import Tokenizer

    folder = arms.make_model("small", tmp_path / "small")
    assert Tokenizer.from_folder(Path(folder)) is not None
    assert json.loads((tmp_path / "small" / "tokenizer_config.json").read_text())["eos_token"] == "t1"


def test_it_needs_none_of_the_command_lines_packages(load, arms) -> None:
    blocked = ("typer", "rich", "yaml", "matplotlib", "torch", "ray", "fastapi")
    folder = str(Path(arms.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); sys.modules.update(dict.fromkeys({blocked!r})); import serving"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
