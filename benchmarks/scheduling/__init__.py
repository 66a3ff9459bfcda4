"""The scheduling benchmark: every policy at its own best, simulated on real traces. See docs/scheduling.md."""
