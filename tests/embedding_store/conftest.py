"""What the tests of the tables share: one thread, and a disk that is small and real."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@dataclass
class SmallDisk:
    path: Path

    def grow(self) -> None:
        """From 4 to 64 megabytes."""
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.path)], check=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: the last bits of the results depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A tmpfs of a few megabytes, where root can mount one; else the test is skipped."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs a right to mount a tmpfs (root)")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)
