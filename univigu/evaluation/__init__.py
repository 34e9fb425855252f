"""Held-out evaluation, caption and video metrics, and what benchmarks that live elsewhere are given."""
