"""The cost model of a model on a GPU: measured where somebody measured it, derived elsewhere. Writes those that are in the package.

h100-8b, h200-8b                       measured: docs/engine_cuda.md
{a100,h100,h200}-{8b,32b,70b}[-tpN]    derived by a roofline (roofline.py)            python -m halfmoon.deploy.planner.cost_models
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError
from ...proxy.conductor.predictors.cost_model import CostModel
from ...simulator.scenario import COST_MODELS, find_cost_model
from .gpus import GPUS, find_gpu
from .model_shape import ALIASES, ModelShape, find_shape
from .points import fit_points, read_points
from .roofline import Efficiency, derive, mean

SIZES = {name: size for size, name in ALIASES.items()}
MEASURED = {("h100", "llama-3.1-8b", 1): "h100-8b", ("h200", "llama-3.1-8b", 1): "h200-8b"}
POINTS = Path(__file__).parent / "points"
TPS = (1, 2, 4, 8)


def cost_model_of(shape: ModelShape, gpu_name: str, tp: int) -> CostModel:
    """Raises ConfigError: an unknown GPU, a model that does not fit or can't be divided."""
    gpu_name = gpu_name.lower()
    measured = MEASURED.get((gpu_name, shape.name, tp))
    if measured is not None:
        return find_cost_model(measured)
    gpu, reached = find_gpu(gpu_name), efficiency(gpu_name)
    name = f"{gpu_name}-{SIZES.get(shape.name, shape.name)}{f'-tp{tp}' if tp > 1 else ''}"
    of = gpu_name.upper() if (gpu_name, "llama-3.1-8b", 1) in MEASURED else "H100 and H200, whose mean is taken"
    source = f"derived from peaks, as Llama-3.1-8B measured on {of} reaches them: {reached.text}"
    return derive(shape, gpu, tp, reached, name, source)


def efficiency(gpu_name: str) -> Efficiency:
    """What the 8B reaches on this GPU; of one that nobody measured, the mean of the others."""
    found = {name: Efficiency.reached(find_cost_model(model), find_shape("8b"), GPUS[name]) for (name, _, _), model in MEASURED.items()}
    return found.get(gpu_name) or mean(list(found.values()))


def measured_h200() -> CostModel:
    """Fitted to points/h200-8b.csv. What those do not tell is the H100's; links from docs/engine_cuda.md."""
    base = dataclasses.replace(
        find_cost_model("h100-8b"), name="h200-8b", kv_capacity_tokens=846_000, link_bytes_per_s=18.6e9, own_load_bytes_per_s=32.3e9
    )
    return fit_points(read_points(POINTS / "h200-8b.csv"), base, "measured: 14 steps in docs/engine_cuda.md").cost


def shipped() -> dict[str, CostModel]:
    """By name; h100-8b and a800-70b are written by hand."""
    found = {"h200-8b": measured_h200()}
    for gpu_name in GPUS:
        for size in ALIASES:
            for tp in TPS:
                try:
                    cost = cost_model_of(find_shape(size), gpu_name, tp)
                except ConfigError:
                    continue  # does not fit
                found.setdefault(cost.name, cost)
    return {name: cost for name, cost in found.items() if name != "h100-8b"}


def text_of(cost: CostModel) -> str:
    """As YAML, numbers to four digits, what is at its default left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(cost)}
    lines = [f"# {cost.source[0].upper()}{cost.source[1:]}."]
    lines += [f"{name}: {_plain(value)}" for name, value in dataclasses.asdict(cost).items() if value != defaults[name]]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, int):
        return str(value)
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa}e{exponent}"


if __name__ == "__main__":
    (COST_MODELS / "h200-8b.yaml").write_text(text_of(measured_h200()))  # others are derived from it
    for name, cost in shipped().items():
        (COST_MODELS / f"{name}.yaml").write_text(text_of(cost))
        sys.stdout.write(f"{name}: {cost.source}\n")
