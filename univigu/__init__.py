"""Uni-ViGU: one diffusion transformer that makes video and understands it (arXiv:2604.08121)."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "UniViGUPipeline":  # imported when asked for: `lightning --help` needs no diffusers
        from univigu.pipeline import UniViGUPipeline

        return UniViGUPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
