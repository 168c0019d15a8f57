"""Processes of tests: forked from one that has imported torch, which takes seconds, and they are started often."""

from __future__ import annotations

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.forked_with"])  # there is one list in a process: the last one said would count
