"""Lightning callbacks, each with one purpose."""

from univigu.training.callbacks.checkpoint import LastCheckpoint
from univigu.training.callbacks.ema import WeightEMA
from univigu.training.callbacks.held_out import CaptionAccuracy, FinalReport, MediaLogger
from univigu.training.callbacks.monitor import DataStatistics, ProgressLines, TrainingMonitor
from univigu.training.prediction import PredictionWriter
from univigu.training.stages import StageSwitch

__all__ = [
    "CaptionAccuracy",
    "DataStatistics",
    "FinalReport",
    "LastCheckpoint",
    "MediaLogger",
    "PredictionWriter",
    "ProgressLines",
    "StageSwitch",
    "TrainingMonitor",
    "WeightEMA",
]
