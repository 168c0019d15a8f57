"""A marketplace with users, items and tastes that turn: for demonstrations, load and tests that need the truth."""

from replay.simulator.marketplace import Marketplace, Request, Step
from replay.simulator.run import POLICIES, Policy, Simulated, Simulation, oracle_policy, random_policy, simulate_to
from replay.simulator.settings import SimulatorSettings
from replay.simulator.truth import Truth, TruthFile, read_truth

__all__ = [
    "POLICIES", "Marketplace", "Policy", "Request", "Simulated", "Simulation", "SimulatorSettings", "Step", "Truth",
    "TruthFile", "oracle_policy", "random_policy", "read_truth", "simulate_to",
]  # fmt: skip
