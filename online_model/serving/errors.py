"""What a replica refuses, and why."""

from embedding_store.errors import HeadraceError, PositionError


class NotReady(HeadraceError):
    """There is no model, or no item, to answer with yet."""


class VersionGap(PositionError):
    """A version goes on from one that this replica does not hold: the newest snapshot has to be loaded."""


class UnknownItem(HeadraceError):
    """No version served so far holds this item."""
