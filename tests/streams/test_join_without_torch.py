"""The join worker is small and soon there: it does without torch."""

from __future__ import annotations

import subprocess
import sys


def test_the_join_worker_loads_no_torch() -> None:
    program = "import sys; from streams.join_worker import run_join; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
