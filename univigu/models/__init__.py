"""Models: pure torch, diffusers conventions.

The transformer is imported when it is asked for: processes that only load data need no diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from univigu.models.transformer import UniViGUTransformer3DModel, UniViGUTransformerOutput

__all__ = ["UniViGUTransformer3DModel", "UniViGUTransformerOutput"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from univigu.models import transformer

        return getattr(transformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
