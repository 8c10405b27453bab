"""What a member's process imports, and the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from halfmoon.deploy.actors import lasting_imports

STORE = """
import gc
from halfmoon.deploy.actors import lasting_imports
rounds = []
gc.callbacks.append(lambda phase, info: rounds.append(phase))
with lasting_imports():
    import halfmoon.kvstore.server
during = len(rounds)
left = len(gc.get_objects())
print(during, left, gc.get_freeze_count(), gc.isenabled())
"""


def test_the_collector_has_no_round_while_a_store_is_imported_and_looks_at_none_of_it_later() -> None:
    done = subprocess.run([sys.executable, "-c", STORE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_rounds, num_left, num_frozen, is_enabled = done.stdout.split()
    assert (num_rounds, is_enabled) == ("0", "True") and int(num_frozen) > 100 * int(num_left)


def test_it_goes_on_where_an_import_fails() -> None:
    with pytest.raises(ImportError), lasting_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
