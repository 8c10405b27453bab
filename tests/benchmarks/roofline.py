"""The roofline of measured rows: what a kernel reached beside what the GPU allows for its operations a byte (Williams et al., 2009).

TFLOP/s   copy rate · operations a byte ╱‾‾‾‾ matrix product's rate
                                      ╱   ●
                                    ╱ ●
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Point(NamedTuple):
    kernel: str
    case: str
    implementation: str
    intensity: float  # operations a byte
    tflops: float
    roof_tflops: float

    @property
    def share(self) -> float:
        """Of the roof; above 1 where the ceilings were measured on a slower moment of the card."""
        return self.tflops / self.roof_tflops


def roof(intensity: float, matmul_tflops: float, copy_gb_s: float) -> float:
    """TFLOP/s."""
    return min(matmul_tflops, intensity * copy_gb_s / 1e3)


def points(rows: list[dict[str, Any]], limits: dict[str, float]) -> list[Point]:
    """One for every implementation of every timed row that computes something, rows as measure.timed gives them."""
    found = []
    for row in rows:
        if "ms" not in row or row["flops"] <= 0:
            continue
        intensity = row["flops"] / row["bytes"]
        top = roof(intensity, limits["matmul_tflops"], limits["copy_gb_s"])
        found += [Point(row["kernel"], row["case"], name, intensity, row["flops"] / ms / 1e9, top) for name, ms in row["ms"].items()]
    return found


def draw(found: list[Point], limits: dict[str, float], title: str, path: Path) -> None:
    """A PNG: ours filled, a colour a kernel; the others' hollow. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), constrained_layout=True)
    lowest = min([point.intensity for point in found], default=1.0) / 2
    highest = max([point.intensity for point in found], default=1.0e3) * 2
    ridge = limits["matmul_tflops"] * 1e3 / limits["copy_gb_s"]
    line = sorted({lowest, ridge, max(highest, ridge * 2)})
    axes.plot(line, [roof(x, **limits) for x in line], color="black", linewidth=1)
    kernels = sorted({point.kernel for point in found})
    colours = dict(zip(kernels, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for point in found:
        ours = point.implementation.split()[0] in ("hopper", "portable")
        filled = {"facecolors": colours[point.kernel]} if ours else {"facecolors": "none"}
        axes.scatter(point.intensity, point.tflops, edgecolors=colours[point.kernel], s=30, **filled)
    for kernel in kernels:
        axes.scatter([], [], color=colours[kernel], label=kernel)
    axes.scatter([], [], facecolors="none", edgecolors="grey", label="peers, torch")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of memory traffic", ylabel="TFLOP/s", title=title)
    axes.legend()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
