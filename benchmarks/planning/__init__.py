"""The planner's benchmark, part by part: benchmarks/bench_planning.py. See docs/planning.md."""
