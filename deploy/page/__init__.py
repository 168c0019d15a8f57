"""The live page of the demo and of `headrace monitor`: static files and the small HTTP app that feeds them."""

from deploy.page.app import LivePage
from deploy.page.visits import Visited

__all__ = ["LivePage", "Visited"]
