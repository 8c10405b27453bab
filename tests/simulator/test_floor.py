from __future__ import annotations

import subprocess
import sys


def test_the_simulator_imports_neither_torch_nor_ray_nor_matplotlib() -> None:
    code = "import sys, halfmoon.simulator.sweep, halfmoon.simulator.goodput, halfmoon.simulator.report, halfmoon.simulator.plots; "
    code += "found = {'torch', 'ray', 'matplotlib'} & set(sys.modules); sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
