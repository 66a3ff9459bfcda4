"""Parts of benchmarks/bench_overlap.py: KV transfers beside compute."""
