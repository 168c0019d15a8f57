"""A disk that can be full: a tmpfs over a directory, where we may mount one (root), made smaller and larger again."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOM = 2 << 30  # bytes; of memory it takes what is in it


@dataclass
class Disk:
    """Over `path`, which is there and empty, of `room` bytes. Without the right to mount, `mounted` stays False and all
    else does nothing."""

    path: Path
    mounted: bool = False
    room: int = ROOM

    def mount(self) -> None:
        self.mounted = _mount("-t", "tmpfs", "-o", f"size={self.room}", "tmpfs", str(self.path))

    def fill(self) -> None:
        """No space left."""
        self.leave(0)

    def leave(self, space: int) -> None:
        """So many bytes of space left. Raises OSError."""
        for _ in range(5):  # it can be made no smaller than what is in it, which may grow meanwhile
            room = os.statvfs(self.path)
            if self._resize((room.f_blocks - room.f_bfree) * room.f_frsize + space):
                return
        raise OSError(f"{self.path} could not be made smaller")

    def free(self) -> None:
        """Space again."""
        self._resize(self.room)

    def release(self) -> None:
        """What is on it goes to the disk beneath, under the same path. Nobody may use it any more."""
        if not self.mounted:
            return
        self.free()
        kept = self.path.with_name(self.path.name + ".kept")
        shutil.copytree(self.path, kept)
        unmount(self.path)
        self.mounted = False
        self.path.rmdir()
        kept.rename(self.path)

    def _resize(self, size: int) -> bool:
        return self.mounted and _mount("-o", f"remount,size={size}", str(self.path))


def unmount(path: Path) -> None:
    """Also what a run that was killed has left."""
    if path.is_mount():
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
