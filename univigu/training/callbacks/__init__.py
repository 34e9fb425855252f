"""Lightning callbacks, each with one purpose; here those that a configuration may name."""

from univigu.training.callbacks.ema import WeightEMA
from univigu.training.callbacks.held_out import CaptionAccuracy
from univigu.training.prediction import PredictionWriter

__all__ = ["CaptionAccuracy", "PredictionWriter", "WeightEMA"]
