"""The live page of the demo: static files and the small HTTP app that feeds them."""

from deploy.page.app import LivePage

__all__ = ["LivePage"]
