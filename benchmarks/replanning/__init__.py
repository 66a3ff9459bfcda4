"""Parts of benchmarks/bench_replanning.py: traffic that shifts, simulated and live."""
