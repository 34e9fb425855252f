"""The LightningCLI behind ``univigu.cli``: what is linked, what is checked before anything heavy starts."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from univigu.checkpoint import check_checkpoint_file, missing_checkpoint
from univigu.data.datamodule import VideoTextDataModule
from univigu.flow.objective import FlowOptions
from univigu.models.lora import LoraOptions
from univigu.training.compute import ComputeOptions
from univigu.training.module import UniViGU
from univigu.training.optim import OptimizerOptions
from univigu.training.overrides import Overrides, apply_overrides
from univigu.training.parallel import ParallelOptions
from univigu.training.report import EARLIER
from univigu.training.stages import Stage

log = logging.getLogger(__name__)


class TrainingConfig(SaveConfigCallback):
    """Keeps what a training was configured to be; an evaluation, which may log into the same folder, changes it not."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class UniViGUCLI(LightningCLI):
    """LightningCLI for one model and one data module; values both need are linked, not written twice."""

    def __init__(self, args: Any = None) -> None:
        super().__init__(
            UniViGU,
            VideoTextDataModule,
            args=args,
            seed_everything_default=0,
            save_config_callback=TrainingConfig,
            save_config_kwargs={"overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Overrides, "overrides")
        parser.link_arguments("model.foundation", "data.foundation")
        parser.link_arguments("model.predict_task", "data.predict_task")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then settle which checkpoint is meant, before anything reads it."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        changes = config.get("overrides")
        apply_overrides(Overrides(changes.stages, changes.callbacks), _callbacks(config))
        limit = config.trainer.get("limit_val_batches")
        if subcommand == "validate" and limit is not None and not _given(args, "--trainer.limit_val_batches"):
            log.warning("validate takes all clips; --trainer.limit_val_batches=%s would limit it as it does fit", limit)
            config.trainer.limit_val_batches = 1.0  # what the configurations say of it is meant for fit's own looks
        evaluates = subcommand in ("validate", "test")
        named = config.ckpt_path or (_given(args, "--model.init_from") and config.model.init_from)
        if evaluates and not named and config.trainer.default_root_dir:
            # Evaluation is of what the configuration trained.
            trained = Path(config.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            if not trained.exists():
                raise missing_checkpoint(trained)
            config.ckpt_path = str(trained)
        if config.get("ckpt_path"):
            if config.ckpt_path not in ("best", "last", "hpc") and "://" not in str(config.ckpt_path):
                check_checkpoint_file(Path(config.ckpt_path))
            config.model.init_from = None  # the checkpoint brings all weights
            if evaluates and Path(config.ckpt_path).is_dir() and not _shards(config):
                config.model.init_from, config.ckpt_path = config.ckpt_path, None  # only who shards can restore it

    def before_fit(self) -> None:
        """A training from its beginning does not write its curves over those of an earlier one."""
        saved = list(Path(self.trainer.default_root_dir).glob("hpc_ckpt_*"))
        requeued = saved and SLURMEnvironment.detect()  # it goes on with the newest of these
        if self.config["fit"].ckpt_path or requeued:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                set_aside(Path(logger.log_dir))


@rank_zero_only
def set_aside(folder: Path) -> None:
    """Move a folder that holds TensorBoard's events to ``earlier/``, beside it; any other is left alone."""
    if not any(folder.glob("events.out.tfevents.*")):
        return
    earlier = folder.parent / EARLIER
    earlier.mkdir(exist_ok=True)
    numbers = [path.name.removeprefix(f"{folder.name}-") for path in earlier.glob(f"{folder.name}-*")]
    target = earlier / f"{folder.name}-{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"
    folder.rename(target)
    log.warning("%s holds the curves of an earlier training: moved to %s", folder, target)


def _shards(config: Namespace) -> bool:
    """Whether the trainer's strategy splits the transformer."""
    return str(getattr(config.trainer.strategy, "class_path", config.trainer.strategy)).endswith("ShardedStrategy")


def _given(args: Any, option: str) -> bool:
    """Whether an option stands on the command line itself."""
    return any(str(arg).partition("=")[0] == option for arg in (sys.argv[1:] if args is None else args))


@dataclass
class ParsedFit:
    """What a fit was configured to do, nothing of it made yet."""

    model: Any
    """Arguments of :class:`UniViGU`, options as their classes."""
    data: Any
    """Arguments of :class:`VideoTextDataModule`."""
    strategy: Any
    """The trainer's."""
    callbacks: list[str]
    """Names of the callbacks' classes."""
    stages: list[Stage]


def parse_fit(args: list[str]) -> ParsedFit:
    """Parse the arguments of ``lightning fit``, with overrides applied, without making trainer, model or data."""

    class OnlyParse(UniViGUCLI):
        def instantiate_classes(self) -> None:
            raise _Parsed(self)

    try:
        OnlyParse(["fit", *args])
    except _Parsed as parsed:
        cli = parsed.cli
    config = cli.config["fit"]
    callbacks = _callbacks(config)
    switches = [callback for callback in callbacks if callback.class_path.endswith("StageSwitch")]
    if not switches:
        raise ValueError("trainer.callbacks: no StageSwitch, so there are no stages")
    model = Namespace(**vars(config.model))
    for name, kind in (("flow", FlowOptions), ("optimizer", OptimizerOptions), ("lora", LoraOptions),
                       ("parallel", ParallelOptions), ("compute", ComputeOptions)):  # fmt: skip
        model[name] = _make(kind, config.model[name])
    stages = [_make(Stage, stage) for stage in switches[0].init_args.stages]
    names = [callback.class_path.rpartition(".")[2] for callback in callbacks]
    return ParsedFit(model, config.data, config.trainer.strategy, names, stages)


def _callbacks(config: Namespace) -> list[Namespace]:
    """The trainer's callbacks as parsed; one alone needs no list."""
    callbacks = config.trainer.get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


class _Parsed(Exception):
    def __init__(self, cli: UniViGUCLI) -> None:
        self.cli = cli


def _make(kind: Any, values: Any) -> Any:
    """A dataclass of parsed values, those within it as well."""
    if values is None or isinstance(values, kind):
        return values
    hints = get_type_hints(kind)
    made = {name: value for name, value in vars(values).items()}
    for name, value in made.items():
        if is_dataclass(hints.get(name)) and not is_dataclass(value):
            made[name] = _make(hints[name], value)
    return kind(**made)
