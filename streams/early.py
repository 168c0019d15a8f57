"""Versions that came before what they go on from: kept, in bounded memory, until that is there or a snapshot is."""

from __future__ import annotations

from itertools import chain

from embedding_store.delta import Version

Place = tuple[int, int]  # (epoch, sequence)
_OWN_BYTES = 4_096  # of a version without its arrays and blobs, about


class Early:
    """Whole versions by what they go on from, `limit` bytes of them: past it those that came first go.

    Those are the ones that the next snapshot is likeliest to hold. Where two go on from the same version, the trainer
    went back to that between them: the later one (in place) is the true one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._versions: dict[Place | None, tuple[Version, int, int]] = {}  # base → (version, bytes, when it came)
        self.lost: Place = (0, 0)  # the largest that had to go

    def __len__(self) -> int:
        return len(self._versions)

    @property
    def nbytes(self) -> int:
        """What is kept, about."""
        return self._bytes

    def add(self, version: Version, when: int) -> None:
        """Keep it. when: a number that grows from version to version."""
        there = self._versions.get(version.base)
        if there is not None and place(there[0]) >= place(version):
            return
        self._drop(version.base)
        self._versions[version.base] = version, _bytes_of(version), when
        self._bytes += self._versions[version.base][1]
        while self._bytes > self._limit and len(self._versions) > 1:
            first = next(iter(self._versions))
            self.lost = max(self.lost, place(self._versions[first][0]))
            self._drop(first)

    def first(self) -> Version | None:
        """The one that has waited longest."""
        return next((version for version, _, _ in self._versions.values()), None)

    def after(self, held: Place | None) -> Version | None:
        """The one that goes on from the version held."""
        found = self._versions.get(held)
        return found[0] if found else None

    def leads_from(self, snapshot: Place) -> bool:
        """Whether a snapshot closes the gap before what is kept: one of these goes on from it, or is in it.

        One from before what is held does not, though a version may go on from it, as after a rollback: answers would
        go back, and the versions after it in the topic lead to the same gap.
        """
        kept = (place(version) for version, _, _ in self._versions.values())
        return snapshot in self._versions or any(at <= snapshot for at in kept)

    def forget(self, held: Place, before: int = -1) -> None:
        """Those up to the version held go, and whatever came before `before`."""
        for base, (version, _, when) in list(self._versions.items()):
            if place(version) <= held or when < before:
                self._drop(base)

    def _drop(self, base: Place | None) -> None:
        _, size, _ = self._versions.pop(base, (None, 0, 0))
        self._bytes -= size


def place(version: Version) -> Place:
    """Where a version is in their order."""
    return version.epoch, version.sequence


def _bytes_of(version: Version) -> int:
    rows = chain.from_iterable((rows.ids, *rows.columns.values()) for rows in version.tables.values())
    arrays = sum(array.nbytes for array in chain(version.dense.values(), version.gone.values(), rows))
    return _OWN_BYTES + arrays + sum(len(blob) + 100 for family in version.blobs.values() for blob in family.values())
