"""Requests from other tools' files: each format by an example of two requests, lines that are wrong, lines that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfmoon.protocol.errors import ConfigError
from halfmoon.simulator.trace_formats import import_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 900, "output_length": 26, "hash_ids": [46, 50]}
"""
VLLM = {"request_throughput": 2.0, "input_lens": [10, 20], "output_lens": [3, 4], "errors": ["", ""], "start_times": [105.5, 107.0]}
BENCH = """arm,rate,index,due_s,num_input_tokens,num_output_tokens,outcome,prompt_tokens,completion_tokens
ours,2.0,0,0.25,100,50,ok,101,49
ours,2.0,1,0.75,200,60,ok,,
"""
SIMULATED = """request,arrival_s,num_input_tokens,num_output_tokens,outcome
0,0.5,100,50,done
1,1.5,200,60,rejected_at_arrival
"""


def aiperf(start_ns: int, num_input: int, num_output: int, **more: object) -> str:
    metrics = {f"{side}_sequence_length": {"value": num, "unit": "tokens"} for side, num in (("input", num_input), ("output", num_output))}
    return json.dumps({"metadata": {"request_start_ns": start_ns, "benchmark_phase": "profiling"}, "metrics": metrics, **more}) + "\n"


FORMS = [
    pytest.param("Azure", AZURE, [0.0, 4.314579], [(374, 44), (396, 109)], id="azure"),
    pytest.param("Mooncake", MOONCAKE, [27.482, 30.535], [(600, 52), (900, 26)], id="mooncake"),
    pytest.param("vLLM", json.dumps(VLLM), [0.0, 1.5], [(10, 3), (20, 4)], id="vllm"),
    pytest.param("vLLM", json.dumps(VLLM, indent=2), [0.0, 1.5], [(10, 3), (20, 4)], id="vllm over several lines"),
    pytest.param("aiperf", aiperf(7_000_000_000, 10, 3) + aiperf(8_500_000_000, 20, 4), [0.0, 1.5], [(10, 3), (20, 4)], id="aiperf"),
    pytest.param("bench serve", BENCH, [0.0, 0.5], [(101, 49), (200, 60)], id="bench serve"),
    pytest.param("simulate", SIMULATED, [0.0, 1.0], [(100, 50), (200, 60)], id="simulate"),
]


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.file"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "text", "arrivals", "lengths"), FORMS)
def test_a_file_is_known_by_its_content(
    tmp_path: Path, name: str, text: str, arrivals: list[float], lengths: list[tuple[int, int]]
) -> None:
    found = import_trace(written(tmp_path, text))
    assert (found.format, found.left_out.num) == (name, 0)
    assert [one.arrival_s for one in found.trace.requests] == pytest.approx(arrivals)
    assert [(one.num_input_tokens, one.num_output_tokens) for one in found.trace.requests] == lengths
    shares = any("prefix" in note for note in found.notes)
    assert shares == (name != "Mooncake"), "what shares a prefix is known from hash ids alone"


def test_hash_ids_are_kept_and_prompts_without_any_share_nothing(tmp_path: Path) -> None:
    with_ids = import_trace(written(tmp_path, MOONCAKE)).trace
    assert [one.block_ids for one in with_ids.requests] == [(46, 47), (46, 50)]
    without = import_trace(written(tmp_path, MOONCAKE.replace(', "hash_ids": [46, 47]', "").replace(', "hash_ids": [46, 50]', ""))).trace
    first, second = (set(one.block_ids) for one in without.requests)
    assert len(first) == len(second) == 2 and not first & second


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("when,what\n1,2\n", "begins with 'when,what'"),
        ("{}\n", "trace.file:1 has nothing"),
        ('{"prompt": "x"}\n', "trace.file:1 has prompt"),
        (MOONCAKE + '{"timestamp": 1}\n', "trace.file:3 is no request: input_length is missing"),
        (MOONCAKE + "oops\n", "trace.file:3 is no request"),
        (AZURE + "yesterday,1,2\n", "trace.file:4 is no request: Invalid isoformat"),
        (AZURE + "2023-11-16 18:15:50.99,many,2\n", "trace.file:4 is no request: could not convert"),
        (AZURE + "2023-11-16 18:15:50.99\n", "trace.file:4 is no request"),
        ('{\n"input_lens": [1],\n"output_lens": [1\n}', "trace.file:4 is not JSON"),
        (json.dumps({"input_lens": [1], "output_lens": [1]}), "neither start_times nor request_throughput"),
        (json.dumps(VLLM | {"output_lens": [3]}), "lists of different lengths"),
        (json.dumps({"total_input_tokens": 9}, indent=1), "--save-detailed"),
        (AZURE.splitlines()[0] + "\n2023-11-16 18:15:46.68,0,44\n", "no request that can be replayed; line 2: it has 0 prompt"),
    ],
)
def test_what_can_not_be_used_is_told_in_one_line_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_trace(written(tmp_path, text))
    assert told in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "num", "first"),
    [
        (AZURE + "2023-11-16 18:16:00.0,5,0\n2023-11-16 18:16:01.0,0,5\n", 2, "line 4: it has 5 prompt and 0 answer tokens"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 600, "output_length": 5, "hash_ids": [1]}', 1, "line 3: it has 1 hash ids for 600"),
        (aiperf(1, 10, 3) + aiperf(2, 10, 3, error={"code": 500}), 1, "line 2: it failed"),
        (json.dumps(VLLM | {"errors": ["", "gone"]}), 1, "request 1: it failed"),
        (BENCH + "ours,2.0,2,1.0,9,9,error,,\nours,4.0,0,0.1,9,9,ok,,\n", 2, "line 4: its outcome is error"),
        (BENCH + "theirs,2.0,0,0.25,100,50,ok,,\n", 1, "line 4: it is of another arm or window"),
    ],
)
def test_requests_that_can_not_be_replayed_are_left_out_and_counted(tmp_path: Path, text: str, num: int, first: str) -> None:
    found = import_trace(written(tmp_path, text)).left_out
    assert found.num == num and found.first.startswith(first)


def test_a_result_without_start_times_has_arrivals_at_its_rate_and_says_so(tmp_path: Path) -> None:
    result = {"request_throughput": 4.0, "input_lens": [10] * 2000, "output_lens": [5] * 2000}
    found = import_trace(written(tmp_path, json.dumps(result)))
    assert found.trace.duration_s == pytest.approx(500.0, rel=0.1)
    assert any("Poisson arrivals at its 4 requests a second" in note for note in found.notes)
