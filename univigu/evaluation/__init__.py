"""Held-out evaluation, caption and video metrics, and exports for other projects' benchmarks."""
