"""The benchmarks of `headrace bench`: one module each, every figure beside a reference of the same run."""
