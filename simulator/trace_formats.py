"""Requests as other tools write them down, as a Trace. The content says which format it is, and not the file's name.

Mooncake's JSON lines      timestamp (ms), input_length, output_length; hash_ids may be missing
Azure's CSV                TIMESTAMP, ContextTokens, GeneratedTokens
vLLM's benchmark result    one JSON object: input_lens, output_lens, start_times (vllm bench serve --save-result --save-detailed)
aiperf's JSON lines        profile_export.jsonl: metadata.request_start_ns, metrics.{input,output}_sequence_length
Halfmoon's own CSV         requests.csv of bench serve and of simulate

A line that is not of its format is an error with its number. A request that failed, or that has no tokens, is left out and counted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import lzma
import random
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..protocol.errors import ConfigError
from .trace import BLOCK_SIZE, Trace, TraceRequest

FORMATS = "Mooncake's JSON lines, Azure's CSV, a result of vLLM's benchmark, aiperf's profile_export.jsonl or a requests.csv of Halfmoon"
MOONCAKE, AZURE, VLLM, AIPERF, BENCH_CSV, SIMULATED_CSV = "Mooncake", "Azure", "vLLM", "aiperf", "bench serve", "simulate"
COLUMNS = {
    AZURE: ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    BENCH_CSV: ("due_s", "num_input_tokens", "num_output_tokens"),
    SIMULATED_CSV: ("arrival_s", "num_input_tokens", "num_output_tokens"),
}


class LeftOut(NamedTuple):
    """Requests that can't be replayed."""

    num: int
    first: str  # where the first one stands, and why


class Imported(NamedTuple):
    trace: Trace
    format: str
    left_out: LeftOut
    notes: tuple[str, ...]  # what the file does not say, and what stands in its place


class Raw(NamedTuple):
    """A request as the file has it."""

    place: str  # "line 7"
    arrival_s: float
    num_input_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] | None = None  # None: the file names none
    unusable: str = ""  # why it is no request


def import_trace(path: Path) -> Imported:
    """Raises ConfigError: no such file, no format that is known, a line that is not of its format (with its number), no request."""
    data = _read(path)
    text = data.decode("utf-8-sig", errors="replace")
    name, rows, notes = _rows(path, text)
    usable: list[TraceRequest] = []
    left_out, fresh, shares = LeftOut(0, ""), itertools.count(1 << 40), False
    for row in rows:
        why = row.unusable or _unusable(row)
        if why:
            left_out = LeftOut(left_out.num + 1, left_out.first or f"{row.place}: {why}")
            continue
        num_blocks = -(-row.num_input_tokens // BLOCK_SIZE)
        shares |= row.block_ids is not None
        block_ids = row.block_ids if row.block_ids is not None else tuple(itertools.islice(fresh, num_blocks))
        usable.append(TraceRequest(row.arrival_s, row.num_input_tokens, row.num_output_tokens, block_ids))
    if not usable:
        raise ConfigError(f"{path} holds no request that can be replayed{f'; {left_out.first}' if left_out.num else ''}")
    if not shares:
        notes = (*notes, "the file does not say which prompts share a prefix: none does here")
    first_s = min(request.arrival_s for request in usable) if name != MOONCAKE else 0.0
    requests = sorted((one._replace(arrival_s=one.arrival_s - first_s) for one in usable), key=lambda one: one.arrival_s)
    return Imported(Trace(path.name.split(".")[0], hashlib.sha256(data).hexdigest(), tuple(requests)), name, left_out, notes)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"no trace at {path} ({error.strerror}); check --trace") from error
    if path.suffix != ".xz":
        return data
    try:
        return lzma.decompress(data)
    except lzma.LZMAError as error:
        raise ConfigError(f"{path} is not an xz file: {error}") from error


def _rows(path: Path, text: str) -> tuple[str, Iterator[Raw], tuple[str, ...]]:
    """The format's name, its requests, and what has to be told."""
    number, first = next(((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()), (1, ""))
    if not first.lstrip().startswith("{"):
        return _csv(path, text, first)
    try:
        row = json.loads(first)
    except ValueError:
        row = None  # an object over several lines, or nothing of the sort
    if row is None or "input_lens" in row:
        return _vllm(path, text)
    reader = _aiperf if "metrics" in row else _mooncake if "input_length" in row else None
    if reader is None:
        raise ConfigError(f"{path}:{number} has {', '.join(sorted(row)) or 'nothing'}; a trace is {FORMATS}")
    return AIPERF if reader is _aiperf else MOONCAKE, _json_lines(path, text, reader), ()


def _json_lines(path: Path, text: str, reader: Callable[[Any, str], Raw]) -> Iterator[Raw]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield reader(json.loads(line), f"line {number}")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{path}:{number} is no request: {_told(error)}") from error


def _mooncake(row: Any, place: str) -> Raw:
    ids = row.get("hash_ids")
    block_ids = None if ids is None else tuple(int(block) for block in ids)
    return Raw(place, float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), block_ids)


def _aiperf(row: Any, place: str) -> Raw:
    about: dict[str, Any] = row["metadata"]
    metrics: dict[str, dict[str, Any]] = row.get("metrics") or {}
    num_input, num_output = (int(metrics.get(f"{side}_sequence_length", {}).get("value", 0)) for side in ("input", "output"))
    unusable = "it is of the warm-up" if about.get("benchmark_phase") == "warmup" else "it failed" if row.get("error") else ""
    return Raw(place, float(about["request_start_ns"]) / 1e9, num_input, num_output, unusable=unusable)


def _vllm(path: Path, text: str) -> tuple[str, Iterator[Raw], tuple[str, ...]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno} is not JSON: {error.msg}; a trace is {FORMATS}") from error
    if not isinstance(found, dict) or "input_lens" not in found or "output_lens" not in found:
        raise ConfigError(f"{path} has no input_lens and output_lens; let vLLM's benchmark write them with --save-detailed")
    result = cast(dict[str, Any], found)
    num = len(result["input_lens"])
    errors = result.get("errors") or [""] * num
    starts, notes = result.get("start_times"), ()
    if not starts:
        rate = float(result.get("request_throughput") or 0.0)
        if rate <= 0:
            raise ConfigError(f"{path} has neither start_times nor request_throughput, so nobody knows when its requests came")
        draw = random.Random(0)
        starts = list(itertools.accumulate(draw.expovariate(rate) for _ in range(num)))
        notes = (f"the file does not say when requests came: Poisson arrivals at its {rate:.3g} requests a second stand in their place",)
    if not len(errors) == len(starts) == len(result["output_lens"]) == num:
        raise ConfigError(f"{path} has lists of different lengths; input_lens, output_lens, errors and start_times go together")
    rows = zip(starts, result["input_lens"], result["output_lens"], errors, strict=True)
    return VLLM, (_vllm_row(path, number, *row) for number, row in enumerate(rows)), notes


def _vllm_row(path: Path, number: int, start: Any, num_input: Any, num_output: Any, error: Any) -> Raw:
    try:
        return Raw(f"request {number}", float(start), int(num_input), int(num_output), unusable="it failed" if error else "")
    except (TypeError, ValueError, OverflowError) as wrong:
        raise ConfigError(f"{path}, request {number}, has what is no number: {wrong}") from wrong


def _csv(path: Path, text: str, first: str) -> tuple[str, Iterator[Raw], tuple[str, ...]]:
    header = [name.strip() for name in next(csv.reader([first]), list[str]())]
    name = next((name for name, columns in COLUMNS.items() if set(columns) <= set(header)), None)
    if name is None:
        raise ConfigError(f"{path} begins with {first[:80]!r}; a trace is {FORMATS}")
    return name, _csv_rows(path, text, name), ()


def _csv_rows(path: Path, text: str, name: str) -> Iterator[Raw]:
    """Of several windows or arms the first one's requests; the others are left out."""
    reader = csv.DictReader(io.StringIO(text))
    reader.fieldnames = [one.strip() for one in reader.fieldnames or []]
    moment = _stamp if name == AZURE else float
    arrival, *lengths = COLUMNS[name]
    wanted: tuple[str, ...] | None = None
    for row in reader:
        place = f"line {reader.line_num}"
        window = tuple(row.get(key) or "" for key in ("arm", "rate", "speed")) if name == BENCH_CSV else ()
        wanted = window if wanted is None else wanted
        unusable = "it is of another arm or window than the first" if window != wanted else _failed(row)
        try:
            num_input, num_output = (int(float(_counted(row, key))) for key in lengths)
            yield Raw(place, moment(row[arrival]), num_input, num_output, unusable=unusable)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{path}:{reader.line_num} is no request: {_told(error)}") from error


def _counted(row: dict[str, str], key: str) -> str:
    """The server's own count of tokens where the file has it."""
    return row.get({"num_input_tokens": "prompt_tokens", "num_output_tokens": "completion_tokens"}.get(key, ""), "") or row[key]


def _failed(row: dict[str, str]) -> str:
    outcome = row.get("outcome")
    return f"its outcome is {outcome}" if outcome in ("error", "timed_out") else ""


def _stamp(text: str) -> float:
    """Seconds of "2023-11-16 18:15:46.6805900"; fractions have any number of digits."""
    whole, _, rest = text.strip().partition(".")
    digits = "".join(itertools.takewhile(str.isdigit, rest))
    found = datetime.fromisoformat(whole + rest[len(digits) :])
    return found.timestamp() + (float(f"0.{digits}") if digits else 0.0)


def _unusable(row: Raw) -> str:
    if row.num_input_tokens < 1 or row.num_output_tokens < 1:
        return f"it has {row.num_input_tokens} prompt and {row.num_output_tokens} answer tokens"
    if row.arrival_s != row.arrival_s or row.arrival_s in (float("inf"), float("-inf")):
        return f"it came at {row.arrival_s}"
    if row.block_ids is not None and len(row.block_ids) * BLOCK_SIZE < row.num_input_tokens:
        return f"it has {len(row.block_ids)} hash ids for {row.num_input_tokens} tokens; every {BLOCK_SIZE} need one"
    return ""


def _told(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
