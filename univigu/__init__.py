"""Uni-ViGU: one diffusion transformer that makes video and understands it (arXiv:2604.08121)."""

__version__ = "0.1.0"
