"""What a reader sees of a plot: its words and where they are, and the lines, bars and marks of a colour."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np

SVG = "{http://www.w3.org/2000/svg}"


class Plot:
    """An SVG; it must be sound. Places are (x, y) from the upper left corner."""

    def __init__(self, drawn: str) -> None:
        self._root = ElementTree.fromstring(drawn)  # noqa: S314 - our own
        self.title = self._root.findtext(f"{SVG}title")
        self.words = {element.text: self._place(element) for element in self._root.iter(f"{SVG}text")}

    def paths(self, color: str) -> list[np.ndarray]:
        """Corners [n, 2] of each path that is drawn in this colour, in the order in which they are drawn."""
        paths = [element for element in self._root.iter(f"{SVG}path") if color in element.get("style", "")]
        numbers = [re.findall(r"-?[\d.]+", element.get("d", "")) for element in paths]
        return [np.array(found, float).reshape(-1, 2) for found in numbers]

    def marks(self, color: str) -> list[tuple[float, float]]:
        """Places of the marks of this colour."""
        return [self._place(use) for use in self._root.iter(f"{SVG}use") if color in use.get("style", "")]

    @staticmethod
    def _place(element: ElementTree.Element) -> tuple[float, float]:
        return float(element.get("x", "nan")), float(element.get("y", "nan"))
