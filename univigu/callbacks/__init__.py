"""Lightning callbacks, each with one purpose."""

from univigu.callbacks.accuracy import CaptionAccuracy
from univigu.callbacks.checkpoint import LastCheckpoint
from univigu.callbacks.data import DataStatistics
from univigu.callbacks.ema import WeightEMA
from univigu.callbacks.media import MediaLogger
from univigu.callbacks.monitor import TrainingMonitor
from univigu.callbacks.predictions import PredictionWriter
from univigu.callbacks.report import FinalReport
from univigu.callbacks.stage import StageSwitch
from univigu.callbacks.throughput import ThroughputLogger

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
