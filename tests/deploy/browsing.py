"""A real browser for the tests of the live page, and what is asked of every page there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = Path("/usr/bin/chromium")
with_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium")

# Text whose colour is too near to what is behind it: [text, ratio]. WCAG 2.2, 1.4.3: 4.5 for text of usual size.
FAINT = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length && (colour[3] ?? 1) > 0) return colour;
    }
    return [255, 255, 255];
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, .unseen, .plot")) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([walk.currentNode.data.trim(), ratio]);
  }
  return found;
}"""

# What a reader that does not see, or has no mouse, would miss.
UNSAID = """() => {
  const found = [], name = (node) => node.outerHTML.slice(0, 80);
  const all = (selector) => [...document.querySelectorAll(selector)].filter((node) => node.checkVisibility());
  if (document.querySelectorAll("h1").length !== 1) found.push("not one h1");
  if (!document.documentElement.lang) found.push("no language");
  let level = 1;
  for (const node of all("h1, h2, h3, h4")) {
    if (Number(node.tagName[1]) > level + 1) found.push("a level is left out before " + name(node));
    level = Number(node.tagName[1]);
    if (!node.textContent.trim()) found.push("empty " + name(node));
  }
  for (const node of all("input, select, textarea")) if (![...node.labels ?? []].some((l) => l.textContent.trim())) found.push("no label: " + name(node));
  for (const node of all("button, a, summary")) if (!(node.getAttribute("aria-label") ?? node.textContent).trim()) found.push("no name: " + name(node));
  for (const node of all("img")) if (!node.hasAttribute("alt")) found.push("no alt: " + name(node));
  for (const node of all("[role=img], [role=region]")) if (!node.getAttribute("aria-label")) found.push("not described: " + name(node));
  for (const node of all("[aria-labelledby]")) if (!document.getElementById(node.getAttribute("aria-labelledby"))) found.push("labelled by nothing: " + name(node));
  for (const node of all("[tabindex]")) if (node.tabIndex > 0) found.push("an order of its own: " + name(node));
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of new Set(ids.filter((id, at) => ids.indexOf(id) !== at))) found.push("twice the id " + id);
  for (const node of all("th")) if (!node.scope) found.push("a heading of nothing: " + name(node));
  return found;
}"""  # noqa: E501 - lines of another language


@dataclass
class Opened:
    """A tab of the browser; `problems`: what it has complained of, and what it asked of others than the page."""

    tab: Any
    problems: list[str] = field(default_factory=list)

    def unreadable(self) -> list[Any]:
        """All that is wrong for readers: contrast, names, labels, headings, and what does not fit into the width."""
        found = self.tab.evaluate(FAINT) + self.tab.evaluate(UNSAID)
        wide, window = self.tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        return found + ([f"{wide} px wide in {window}"] if wide > window else [])

    def keep(self, name: str) -> None:
        """A screenshot of the whole page, kept as an artefact of the tests."""
        folder = Path(os.environ.get("HEADRACE_ARTEFACTS", ".headrace/artefacts"))
        folder.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=folder / f"{name}.png", full_page=True)


@contextmanager
def opened(url: str, width: int = 1280, scheme: str = "light") -> Iterator[Opened]:
    """The page at `url`, in a browser of its own."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        tab = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 1000}).new_page()
        tab.set_default_timeout(60_000)  # of a machine that has others to serve
        it = Opened(tab)
        tab.on("console", lambda message: it.problems.append(message.text))
        tab.on("pageerror", lambda error: it.problems.append(str(error)))
        tab.on("request", lambda request: it.problems.extend([] if request.url.startswith(url) else [request.url]))
        tab.goto(url)
        yield it
        browser.close()


class Acted(NamedTuple):
    """What came of a click, as the page says it: ms from the click, and whether the list changed with either."""

    history_ms: float
    learned_ms: float
    changed: bool


def click_as(tab: Any, user: str, place: int) -> Acted:
    """Be that user, and click the item in that place (0: the first)."""
    tab.get_by_label("User, known or not").fill(user)
    tab.get_by_role("button", name="Recommend", exact=True).click()
    tab.locator("#visit-heading", has_text=f"For {user}").wait_for()
    before = shown(tab)
    tab.get_by_role("button", name="Click: ").nth(place).click()
    row = tab.locator("#visit-journeys tbody tr").first
    for column in (1, 2):
        row.locator("td").nth(column).and_(tab.locator("[data-ms]")).wait_for()
    took = [float(row.locator("td").nth(column).get_attribute("data-ms")) for column in (1, 2)]
    return Acted(*took, changed=shown(tab) != before)


def shown(tab: Any) -> list[str]:
    """The items of the list."""
    return tab.evaluate("[...document.querySelectorAll('#visit-list li')].map((line) => line.dataset.item)")
