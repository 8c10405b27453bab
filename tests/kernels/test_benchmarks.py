"""How the kernel benchmarks put their rows together. The rows here are made up, which is what these functions are for: nothing is timed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

LIMITS = {"matmul_tflops": 700.0, "copy_gb_s": 4200.0}


def rows(measure: ModuleType) -> list[dict]:
    prefill = measure.timed("flash_prefill", "one chunk", 7.0e12, 1.0e9, {"hopper": 20.0, "cudnn": 25.0}, compute=True)
    norm = measure.timed("rms_norm", "32 x 4096", 1.0e6, 4.2e6, {"portable": 0.002, "torch": 0.004}, compute=False, error=1e-3)
    pack = measure.timed("kv_pack", "8 pages", 0.0, 1.0e6, {"portable pack": 0.001}, compute=False)
    return [{"check": "something", "ok": True}, prefill, norm, pack]


def test_a_rows_rates_are_its_operations_and_bytes_by_its_time(load, capsys) -> None:
    _, prefill, norm, _ = rows(load("measure"))
    assert prefill["tflops"] == pytest.approx({"hopper": 350.0, "cudnn": 280.0})
    assert norm["gb_s"] == pytest.approx({"portable": 2100.0, "torch": 1050.0})
    shown = capsys.readouterr().out
    assert "hopper 350.0 TFLOP/s" in shown and "portable 2100 GB/s (2.0 us)" in shown and "error 1.0e-03" in shown


def test_the_roof_is_the_memorys_up_to_the_ridge_and_the_matrix_units_beyond(load) -> None:
    roofline = load("roofline")
    assert roofline.roof(1.0, **LIMITS) == pytest.approx(4.2)
    assert roofline.roof(700e3 / 4200, **LIMITS) == pytest.approx(700.0)
    assert roofline.roof(1e6, **LIMITS) == 700.0
    found = roofline.points(rows(load("measure")), LIMITS)
    assert [(p.kernel, p.implementation) for p in found] == [
        ("flash_prefill", "hopper"), ("flash_prefill", "cudnn"), ("rms_norm", "portable"), ("rms_norm", "torch"),
    ]  # fmt: skip
    assert [p.share for p in found] == pytest.approx([0.5, 0.4, 0.5, 0.25])


def test_the_summary_sets_ours_beside_the_best_of_the_others(load) -> None:
    lines = load("kernels").summary(load("roofline").points(rows(load("measure")), LIMITS))
    assert len(lines) == 2
    assert "hopper 0.50" in lines[0] and lines[0].endswith("1.250 x cudnn")
    assert lines[1].endswith("2.000 x torch")


def test_a_written_json_can_be_drawn_without_a_gpu(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    kernels, measure = load("kernels"), load("measure")
    document, picture = tmp_path / "kernels.json", tmp_path / "roofline.png"
    kernels.write(str(document), rows(measure), LIMITS)
    written = json.loads(document.read_text())
    assert written["ceilings"] == LIMITS and len(written["rows"]) == 4
    assert {"gpu", "torch", "triton", "python", "commit", "command", "absent"} <= written["environment"].keys()
    monkeypatch.setattr(sys, "argv", ["halfmoon bench kernels", "--draw", str(document), "--png", str(picture)])
    kernels.main()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000


def test_without_matplotlib_a_line_says_where_to_draw(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    kernels, measure = load("kernels"), load("measure")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    kernels.draw({"environment": measure.environment(), "ceilings": LIMITS, "rows": rows(measure)}, str(tmp_path / "x.png"))
    assert "no picture" in capsys.readouterr().out and not (tmp_path / "x.png").exists()


def test_cases_are_left_out_when_the_time_is_over_and_named(load, capsys) -> None:
    measure = load("measure")
    found, saved = [], []
    cases = [measure.Case("k", name, lambda name=name: {"case": name}) for name in ("first", "second")]
    assert measure.run_cases(cases, found, save=lambda: saved.append(len(found))) == []
    assert [row["case"] for row in found] == ["first", "second"] and saved == [1, 2]
    assert measure.run_cases(cases, found, limit_s=-1.0) == ["k: first", "k: second"] and len(found) == 2
    assert "k: first; k: second" in capsys.readouterr().out


def test_a_peer_that_does_not_run_is_named_with_its_reason(load, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    measure = load("measure")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.delenv("FA3_SO", raising=False)

    def broken() -> None:
        raise RuntimeError("no kernel image\nmore")

    assert list(measure.present({"works": lambda: None, "broken": broken})) == ["works"]
    assert measure.load_fa3() is None
    assert measure.absent == {"broken": "RuntimeError: no kernel image", "fa3": "FA3_SO names no library"}
    assert "peer broken is absent: RuntimeError: no kernel image" in capsys.readouterr().out


def test_an_error_above_its_limit_or_no_number_is_wrong(load) -> None:
    measure = load("measure")
    assert measure.checked("x", {"a": 1e-3, "b": 2e-3}, 2e-3)["ok"]
    assert not measure.checked("x", {"a": 1e-3, "b": 3e-3}, 2e-3)["ok"]
    assert not measure.checked("x", {"a": math.nan}, 2e-3)["ok"]
    assert measure.relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert measure.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["flash_prefill", "paged_decode", "kv_write", "rms_norm", "silu_mul", "kv_pack", "quantized"])
def test_a_quick_run_has_fewer_cases_and_names_each_once(name: str, load) -> None:
    module = load(name)
    quick, all_of_them = module.cases(True), module.cases(False)
    assert 0 < len(quick) <= len(all_of_them)
    assert len({(case.kernel, case.name) for case in all_of_them}) == len(all_of_them)
    assert {case.kernel for case in all_of_them} == {name}


@pytest.mark.parametrize("kind", ["fp8", "fp8 blocks", "int8", "int4"])
def test_the_quantised_products_reference_is_right_about_the_engines_own(kind: str, load) -> None:
    """It rounds in its own way, and is what all ways are checked against on a GPU."""
    quantized, measure = load("quantized"), load("measure")
    x, linear = torch.randn(5, 256), quantized.MADE[kind](torch.randn(128, 256))
    wanted = quantized.exact(linear, x)
    assert measure.relative_error(linear(x), wanted) < 1e-5
    assert 1e-3 < measure.relative_error(wanted, x @ linear.dequantized().T) < 0.1 or kind == "int4"


def test_without_a_gpu_one_line_says_so(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["halfmoon bench kernels", "--quick"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^halfmoon bench kernels needs a CUDA GPU[^\n]*$"):
        load("kernels").main()
