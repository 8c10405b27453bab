"""Compiles every kernel for GPUs that are not here, through its public function, and prints what the assembler made of it as JSON.

python compile_ahead.py [90 ...] [--more | --pairs] [TEXT]     cases whose name holds TEXT
--more: variants that no test compiles, too     --pairs: each case for sm_90 and one of the others, as the tests compile them
one line a kernel: {"case", "kernel", "capability", "shared", "registers", "stack"}, and "matrix" of those in BY_MATRIX_UNITS

The public functions run as they do on a GPU, up to the launch: a driver that names the target but owns no device stands in for CUDA's,
and the launch becomes a compilation. So the specialisations are the ones that serving meets.
"""

from __future__ import annotations

import importlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from halfmoon.kernels.portable import experts, flash_prefill, fp8, int4_linear, narrow_linear, paged_decode, wide_prefill

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448}  # bytes a program may take
E4M3 = torch.float8_e4m3fn
MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool)
BY_MATRIX_UNITS = ("_flash_prefill_kernel", "_scores_kernel", "_values_kernel")
MATRIX = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCMMA)\b")


class Target:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # by which Triton keeps what it has compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)


@contextmanager
def compiling(capability: int) -> Iterator[list]:
    """Inside, launches compile for the capability; the compiled kernels gather in the list."""
    compiled: list = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    # what the kernels' functions ask of the device that the tensors are on
    answers = [
        *((module, "shared_bytes", lambda _: SHARED[capability]) for module in (experts, flash_prefill, paged_decode, wide_prefill)),
        (flash_prefill, "num_sms", lambda _: 132),
        *((module, "_way", lambda _: fp8.BY_INSTRUCTION if capability >= 89 else fp8.BY_BITS) for module in (fp8, narrow_linear)),
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in answers]
    JITFunction.run = compile_only
    for module, name, answer in answers:
        setattr(module, name, answer)
    driver.set_active(Target(capability))
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        for module, name, answer in kept:
            setattr(module, name, answer)
        driver._active = None


def resources(name: str, cubin: bytes) -> dict[str, int | str]:
    """The disassembler takes as long as a small kernel's assembler: it is run where its answer matters."""
    registers, stack, local = usage(cubin)
    matrix, sass = name in BY_MATRIX_UNITS, ""
    if stack or matrix:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            sass = subprocess.run([str(CUOBJDUMP), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    if not re.search(r"\b(?:LDL|STL)\b", sass):
        stack = 0  # it is there, and nothing is ever put on it
    found = {"registers": registers, "stack": max(stack, local)}
    return found | ({"matrix": ",".join(sorted(set(MATRIX.findall(sass))))} if matrix else {})


REGCOUNT, FRAME_SIZE = 0x2F, 0x11  # attributes of .nv.info; each entry: format, attribute, size of what follows; here (symbol, value)
SIZED = 4  # the format of an entry that something follows


def usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack bytes, local bytes, as `cuobjdump -res-usage` tells them, which takes 0.2 s to start."""
    table, (entry_size, count, names) = struct.unpack_from("<Q", cubin, 0x28)[0], struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + entry_size * index) for index in range(count)]
    found, local = {REGCOUNT: 0, FRAME_SIZE: 0}, 0
    for name_at, _, _, _, start, size in headers:
        name = cubin[headers[names][4] + name_at :].split(b"\0", 1)[0]
        local += size if name.startswith(b".nv.local") else 0
        at, end = (start, start + size) if name == b".nv.info" else (0, 0)
        while at < end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, at)
            if attribute in found:
                found[attribute] = max(found[attribute], struct.unpack_from("<II", cubin, at + 4)[1])
            at += 4 + (length if form == SIZED else 0)
    return found[REGCOUNT], found[FRAME_SIZE], local


def pages(head_dim: int, page_size: int, dtype: torch.dtype, num_kv_heads: int = 8) -> torch.Tensor:
    return torch.zeros(2, 4, num_kv_heads, page_size, head_dim, dtype=dtype)


def scales(stored: torch.dtype | None) -> torch.Tensor | None:
    return torch.ones(2, 8) if stored == E4M3 else None


def prefill_case(
    module: str,
    head_dim: int,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    num_queries: int = 512,
    kv_len: int = 512,
    stored: torch.dtype | None = None,
    **options,
) -> None:
    prefill = importlib.import_module(f"halfmoon.kernels.{module}.flash_prefill").flash_prefill
    q = torch.zeros(num_queries, 32, head_dim, dtype=dtype)
    cu_seqlens_q, kv_lens = torch.tensor([0, num_queries], dtype=torch.int32), torch.tensor([kv_len], dtype=torch.int32)
    table = torch.zeros(1, 64, dtype=torch.int32)
    prefill(
        q, pages(head_dim, page_size, stored or dtype), table, cu_seqlens_q, kv_lens, max_seqlen_q=num_queries, max_kv_len=kv_len,
        scale=head_dim**-0.5, kv_scales=scales(stored), **options,
    )  # fmt: skip


def decode_case(
    head_dim: int,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    num_seqs: int = 32,
    num_q: int = 1,
    stored: torch.dtype | None = None,
    **options,
) -> None:
    q, lens = torch.zeros(num_seqs, num_q, 32, head_dim, dtype=dtype), torch.full((num_seqs,), 200, dtype=torch.int32)
    table, cache = torch.zeros(num_seqs, 64, dtype=torch.int32), pages(head_dim, page_size, stored or dtype)
    paged_decode.paged_decode(q, cache, table, lens, max_kv_len=4096, scale=head_dim**-0.5, kv_scales=scales(stored), **options)


def experts_case(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Qwen3-30B-A3B's layer."""
    x, weights = torch.zeros(num_tokens, 2048, dtype=dtype), torch.zeros(num_tokens, 8)
    gate_up, down = torch.empty(128, 1536, 2048, dtype=dtype, device="meta"), torch.empty(128, 2048, 768, dtype=dtype, device="meta")
    experts.experts(x, gate_up, down, weights, torch.zeros(num_tokens, 8, dtype=torch.int64))


def small_case(name: str) -> None:
    bf16 = torch.bfloat16
    if name == "rms_norm":
        from halfmoon.kernels.portable.rms_norm import rms_norm

        rms_norm(torch.zeros(8, 4096, dtype=bf16), torch.zeros(4096, dtype=bf16), 1e-5, torch.zeros(8, 4096, dtype=bf16))
    elif name == "silu_mul":
        from halfmoon.kernels.portable.silu_mul import silu_mul

        silu_mul(torch.zeros(8, 28672, dtype=bf16))
    elif name == "token_mask":
        from halfmoon.kernels.portable.token_mask import token_mask

        words = torch.zeros(4, 4008, dtype=torch.int32)
        token_mask(torch.zeros(8, 128256), torch.arange(4), words)
    elif name == "kv_pack":
        from halfmoon.kernels.portable.kv_pack import kv_pack, kv_unpack

        cache, index = pages(128, 64, bf16), torch.arange(2)
        kv_unpack(kv_pack(cache, index), cache, index)
    elif name == "widen":
        from halfmoon.kernels.portable.widen import widened_pages

        lens = torch.full((2,), 100, dtype=torch.int32)
        widened_pages(pages(128, 64, E4M3), torch.zeros(2, 4, dtype=torch.int32), lens, scales(E4M3), 100, bf16)
    elif name.startswith(("fp8", "int8", "int4")):
        quantized_case(name)
    else:
        from halfmoon.kernels.portable.kv_write import kv_write

        q, k = torch.zeros(8, 32, 128, dtype=bf16), torch.zeros(8, 8, 128, dtype=bf16)
        positions, norm = torch.arange(8), torch.zeros(128, dtype=bf16)
        stored = E4M3 if "fp8" in name else bf16
        cache = pages(128, 64, stored)
        kv_write(q, k, k, positions, torch.zeros(64, 128), positions, cache, q_norm=norm, k_norm=norm, kv_scales=scales(stored))


def quantized_case(name: str) -> None:
    """name: kind, "blocks" or not, way, tokens."""
    kind, *blocks, way, num_tokens = name.split()
    x, bf16 = torch.zeros(int(num_tokens), 4096, dtype=torch.bfloat16), torch.bfloat16
    if kind == "int4":
        words, scales, zeros = torch.zeros(6144, 512, dtype=torch.int32), torch.zeros(6144, 32, dtype=bf16), torch.zeros(6144, 32).byte()
        int4_linear.int4_linear(x, words, scales, zeros, group_len=128, way=way)
        return
    weight = torch.zeros(6144, 4096, dtype=E4M3 if kind == "fp8" else torch.int8)
    scales, row_block = (torch.zeros(48, 32), 128) if blocks else (torch.zeros(6144, 1), 1)
    narrow_linear.narrow_linear(x, weight, scales, row_block=row_block, group_len=128 if blocks else 4096, way=way)


QUANTIZED = (
    "fp8 token 1", "fp8 tiles 16", "fp8 tiles 512", "fp8 blocks token 1", "fp8 blocks tiles 512", "int8 token 1", "int8 tiles 512",
    "int4 token 1", "int4 tiles 16", "int4 tiles 64", "int4 dequantized 16",
)  # fmt: skip
PORTABLE: dict[str, Callable[[], None]] = {
    **{f"flash_prefill hd{d}": lambda d=d: prefill_case("portable", d) for d in (64, 80, 96, 128, 256)},
    "flash_prefill hd128 fp16 page16": lambda: prefill_case("portable", 128, 16, torch.float16),
    "flash_prefill hd128 window": lambda: prefill_case("portable", 128, sliding_window=256),
    "flash_prefill hd128 soft cap, 16 queries": lambda: prefill_case("portable", 128, num_queries=16, logit_soft_cap=30.0),
    **{f"paged_decode hd{d}": lambda d=d: decode_case(d) for d in (64, 80, 96, 128, 256)},
    "paged_decode hd128 batch 256": lambda: decode_case(128, num_seqs=256),
    "paged_decode hd128 fp16 page16": lambda: decode_case(128, 16, torch.float16, num_seqs=1),
    "paged_decode hd128 window": lambda: decode_case(128, sliding_window=256),
    "flash_prefill fp8 hd128": lambda: prefill_case("portable", 128, stored=E4M3),
    "flash_prefill hd128 lse, keys split": lambda: prefill_case("portable", 128, kv_len=4096, num_queries=128, return_lse=True),
    "flash_prefill hd128 block mask": lambda: prefill_case("portable", 128, block_mask=MASK),
    "flash_prefill wide hd1024": lambda: prefill_case("portable", 1024, causal=False),
    **{f"paged_decode fp8 hd{d}": lambda d=d: decode_case(d, stored=E4M3) for d in (64, 96, 128)},
    "paged_decode fp8 hd128 1 sequence": lambda: decode_case(128, num_seqs=1, stored=E4M3),
    "paged_decode fp8 hd256 8 queries": lambda: decode_case(256, num_q=8, stored=E4M3),
    "paged_decode fp8 hd128 8 queries, window": lambda: decode_case(128, num_q=8, stored=E4M3, sliding_window=256),
    **{f"experts {n} tokens": lambda n=n: experts_case(n) for n in (8, 512, 8192)},
    **{
        name: lambda name=name: small_case(name)
        for name in ("rms_norm", "silu_mul", "token_mask", "kv_write", "kv_write fp8", "kv_pack", "widen", *QUANTIZED)
    },
}
HOPPER: dict[str, Callable[[], None]] = {
    **{f"hopper flash_prefill hd{d}": lambda d=d: prefill_case("hopper", d) for d in (64, 128, 256)},
    "hopper flash_prefill hd128 full": lambda: prefill_case("hopper", 128, causal=False),
    "hopper flash_prefill wide hd512 fp16 page16": lambda: prefill_case("hopper", 512, 16, torch.float16),
    "hopper flash_prefill wide hd1024 full": lambda: prefill_case("hopper", 1024, causal=False),
}


MORE: dict[str, Callable[[], None]] = {
    **{f"flash_prefill fp8 hd{d}": lambda d=d: prefill_case("portable", d, stored=E4M3) for d in (64, 256)},
    "paged_decode fp8 hd256": lambda: decode_case(256, stored=E4M3),
    "flash_prefill fp8 hd128, 16 queries": lambda: prefill_case("portable", 128, num_queries=16, stored=E4M3),
    **{f"flash_prefill hd{d} block mask": lambda d=d: prefill_case("portable", d, block_mask=MASK) for d in (64, 256)},
    "flash_prefill wide hd512": lambda: prefill_case("portable", 512),
    "flash_prefill wide fp8 hd512 page16, 16 queries": lambda: prefill_case("portable", 512, 16, num_queries=16, stored=E4M3),
    "paged_decode fp8 hd128 page16": lambda: decode_case(128, 16, stored=E4M3),
    "paged_decode fp8 hd128 soft cap": lambda: decode_case(128, stored=E4M3, logit_soft_cap=30.0),
    **{f"paged_decode hd128 {n} queries": lambda n=n: decode_case(128, num_q=n) for n in (4, 8)},
    "experts 1024 tokens": lambda: experts_case(1024),
    "experts 512 tokens fp32": lambda: experts_case(512, torch.float32),
}


FOR_ALL = (
    "flash_prefill hd128", "flash_prefill hd128 lse, keys split", "flash_prefill wide hd1024", "paged_decode hd128",
    "fp8 token 1", "fp8 tiles 16", "int4 token 1", "int4 tiles 16", "int4 dequantized 16",
)  # fmt: skip
"""With the small kernels: each kernel for each GPU."""


def cases_of(capability: int, more: bool, pairs: bool) -> dict[str, Callable[[], None]]:
    cases = {**PORTABLE, **(HOPPER if capability == 90 else {}), **(MORE if more else {})}
    if not pairs or capability == 90:
        return cases
    shared_out = [name for name in cases if ("hd" in name or name in QUANTIZED) and name not in FOR_ALL]
    others = set(shared_out[capability == 80 :: 2])
    return {name: launch for name, launch in cases.items() if name not in others}


def main(capabilities: list[int], chosen: str = "", more: bool = False, pairs: bool = False) -> None:
    for capability in capabilities:
        for case, launch in cases_of(capability, more, pairs).items():
            if chosen not in case:
                continue
            with compiling(capability) as compiled:
                launch()
            for kernel in compiled:
                line = {"case": case, "kernel": kernel.name, "capability": capability, "shared": kernel.metadata.shared}
                sys.stdout.write(json.dumps({**line, **resources(kernel.name, kernel.asm["cubin"])}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.isdigit()]
    chosen = next((word for word in words if not word.startswith("--")), "")
    capabilities = [int(word) for word in sys.argv[1:] if word.isdigit()] or [80, 90, 100]
    main(capabilities, chosen, more="--more" in words, pairs="--pairs" in words)
