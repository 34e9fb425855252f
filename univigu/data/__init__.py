"""Data: tar shards of videos and texts, their filters, and the loaders that feed training and prediction.

Only light modules are imported here; the data module itself is ``univigu.data.datamodule.VideoTextDataModule``.
"""

from __future__ import annotations

from univigu.data.filters import LengthFilter
from univigu.data.sample import DataError, SampleError, SampleRef

__all__ = ["DataError", "LengthFilter", "SampleError", "SampleRef"]
