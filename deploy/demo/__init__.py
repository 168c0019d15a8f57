"""The whole system on one machine, for a minute or for as long as one likes to watch."""

from deploy.demo.run import run_demo

__all__ = ["run_demo"]
