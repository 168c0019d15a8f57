"""Off-policy evaluation: what a policy would have earned that was never served, from a log that says its propensities.

Reading order: `estimators` (arrays in, estimates out), `intervals`, `verdicts`, `rewards` (the model of DM and DR),
`decisions` (a log as arrays), `policies` and `ours` (whom the estimate is of), `estimate` (the command's work),
`report`.
"""
