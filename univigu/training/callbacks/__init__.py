"""Lightning callbacks, each with one purpose."""

from univigu.training.callbacks.accuracy import CaptionAccuracy
from univigu.training.callbacks.checkpoint import LastCheckpoint
from univigu.training.callbacks.data import DataStatistics
from univigu.training.callbacks.ema import WeightEMA
from univigu.training.callbacks.media import MediaLogger
from univigu.training.callbacks.monitor import TrainingMonitor
from univigu.training.callbacks.predictions import PredictionWriter
from univigu.training.callbacks.report import FinalReport
from univigu.training.callbacks.stage import StageSwitch
from univigu.training.callbacks.throughput import ThroughputLogger

__all__ = [
    "CaptionAccuracy",
    "DataStatistics",
    "FinalReport",
    "LastCheckpoint",
    "MediaLogger",
    "PredictionWriter",
    "StageSwitch",
    "ThroughputLogger",
    "TrainingMonitor",
    "WeightEMA",
]
