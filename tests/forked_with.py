"""What processes of the tests are forked with."""

import hypothesis.stateful  # noqa: F401
import pytest  # noqa: F401

import streams.join_worker
import streams.serve_worker
import streams.train_worker  # noqa: F401
