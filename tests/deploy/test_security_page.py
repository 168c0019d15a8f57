"""docs/security.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_threat_model_names_is_there() -> None:
    for row in (ROOT / "docs" / "security.md").read_text().splitlines():
        files = [ROOT / "tests" / name for name in re.findall(r"`([a-z_/]+\.py)`", row)]
        assert all(file.is_file() for file in files), row
        text = "".join(file.read_text() for file in files)
        for name in re.findall(r"`(test_[a-z_]+)`", row):
            assert f"def {name}" in text, name
