"""vLLM over the engine benchmark's shapes. Imports nothing of ours: engine.py runs it as a process of its own.

python tests/benchmarks/vllm_peer.py MODEL_FOLDER CASES ROWS      CASES: JSON, as engine.py writes them; ROWS: JSON file to write
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # else it asks for FlashInfer, which greedy tokens have no use for

FIRST_STEPS, MORE_STEPS = 33, 128


def main(folder: str, cases: dict[str, Any], path: str) -> None:
    import vllm

    llm = vllm.LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=cases["max_model_len"],
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        max_num_batched_tokens=cases["max_step_tokens"],
        max_num_seqs=256,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
    )

    def run(num_seqs: int, num_tokens: int, num_output: int) -> float:
        params = vllm.SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [random.randrange(10, 128000) for _ in range(num_tokens)]} for _ in range(num_seqs)]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    run(2, 512, 8)
    rows: list[dict[str, Any]] = []
    for num_seqs, num_tokens in cases["prefill"]:
        taken = statistics.median(run(num_seqs, num_tokens, 1) for _ in range(3))
        rows.append({"case": f"prefill {num_seqs} x {num_tokens}", "s": taken, "tokens_s": num_seqs * num_tokens / taken})
    for num_seqs, kv_len in cases["decode"]:
        more, first = (run(num_seqs, kv_len, FIRST_STEPS + steps) for steps in (MORE_STEPS, 0))
        rows.append({"case": f"decode {num_seqs} x {kv_len}", "ms": (more - first) / MORE_STEPS * 1e3})
    Path(path).write_text(json.dumps({"version": vllm.__version__, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
