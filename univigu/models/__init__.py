"""Models: pure torch, diffusers conventions."""

from univigu.models.transformer import UniViGUTransformer3DModel, UniViGUTransformerOutput

__all__ = ["UniViGUTransformer3DModel", "UniViGUTransformerOutput"]
