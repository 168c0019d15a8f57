"""One finding of `headrace doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`remedy`: what to do where it is not `ok`; where it is and there is one, what would be better."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
