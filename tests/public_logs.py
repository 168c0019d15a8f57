"""Where the public logs are that tests and figures read."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(os.environ.get("HEADRACE_DATA", Path(__file__).parents[2] / "shared" / "data")).resolve()
TAOBAO_BY_TIME = "taobao-userbehavior/time_ordered_96k.csv.gz"
TAOBAO_BY_USER = "taobao-userbehavior/by_user_100k.csv.gz"
KUAIRAND = "kuairand/kuairand27k_explicit_feedback_kcore15.tsv.gz"
