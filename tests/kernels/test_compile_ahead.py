"""Every CUDA kernel is compiled, without a GPU, for the ones it is meant for: it builds, spills no tile and fits shared memory.

Takes a minute: as many processes as this pytest worker has cores. Hopper gets every case, Ampere and Blackwell half of the attention
kernels' variants each; `python tests/kernels/compile_ahead.py` compiles all cases for all three.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
Compiled = Callable[[int], list[dict[str, Any]]]
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # what one program may take
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the widest matrix instruction of each


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    """compiled(capability) -> a line a kernel. In processes of their own: here the interpreter may be on, and a kernel is one or the other
    from its import on."""
    script = Path(__file__).with_name("compile_ahead.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def compile_all(capabilities: list[str]) -> list[dict[str, Any]]:
        command = [sys.executable, str(script), *capabilities, "--pairs"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        return [json.loads(line) for line in run.stdout.splitlines()]

    names = [str(capability) for capability in SHARED_BYTES]
    num_cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    shares = [names[start::num_cores] for start in range(min(num_cores, len(names)))]  # the import of Triton and torch takes 3 s
    with ThreadPoolExecutor(max_workers=num_cores) as threads:
        runs = [threads.submit(compile_all, share) for share in shares]
        yield lambda capability: [line for run in runs for line in run.result() if line["capability"] == capability]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_fits_its_gpu_and_spills_no_tile(capability: int, compiled: Compiled) -> None:
    lines = compiled(capability)
    kernels = {line["kernel"] for line in lines}
    assert kernels == {
        "_flash_prefill_kernel", "_merge_kernel", "_scores_kernel", "_values_kernel", "_widen_kernel", "_paged_decode_kernel",
        "_kv_write_kernel", "_kv_copy_kernel", "_rms_norm_kernel", "_silu_mul_kernel", "_token_mask_kernel", "_narrow_kernel",
        "_narrow_token_kernel", "_narrow_tile_kernel", "_int4_token_kernel", "_int4_tile_kernel", "_dequantize_kernel",
        "_expert_count_kernel", "_expert_place_kernel", "_experts_gate_up_kernel", "_experts_down_kernel",
    }  # fmt: skip
    # up to 16 bytes are a scalar or two that wait out a loop; a spilled tile is hundreds
    assert [line for line in lines if line["stack"] > 16 or line["shared"] > SHARED_BYTES[capability] or line["registers"] > 255] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_full_tiles_of_queries_reach_the_widest_matrix_instruction(capability: int, compiled: Compiled) -> None:
    prefill = ("_flash_prefill_kernel", "_scores_kernel", "_values_kernel")
    wide = [line for line in compiled(capability) if line["kernel"] in prefill and "16 queries" not in line["case"]]
    assert wide and all(MATRIX[capability] in line["matrix"].split(",") for line in wide)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_decode_programs_share_a_hopper_sm(compiled: Compiled) -> None:
    decode = [line for line in compiled(90) if line["kernel"] == "_paged_decode_kernel" and "hd256" not in line["case"]]
    assert decode and all(2 * (line["shared"] + 1024) <= 233472 and 2 * 128 * line["registers"] <= 65536 for line in decode)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_decode_programs_over_fp8_share_a_hopper_sm(compiled: Compiled) -> None:
    three = {"paged_decode fp8 hd64", "paged_decode fp8 hd96", "paged_decode fp8 hd128"}
    decode = [line for line in compiled(90) if line["case"] in three]
    assert len(decode) == 3
    assert all(3 * (line["shared"] + 1024) <= 233472 and 3 * 128 * -(-line["registers"] // 8) * 8 <= 65536 for line in decode)
