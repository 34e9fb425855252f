"""The LightningCLI behind ``univigu.cli``: defaults of the trainer, linked options, checks before loading."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import Namespace, set_parsing_settings
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from univigu.checkpoint import SafeCheckpointIO, check_checkpoint_file
from univigu.models.foundation import EMBEDDED_FOUNDATION, EMBEDDED_MODEL, Foundation
from univigu.training.callbacks.checkpoint import FOLDER, LastCheckpoint, find_last
from univigu.training.callbacks.held_out import FinalReport, MediaLogger
from univigu.training.callbacks.monitor import DataStatistics, ProgressLines, TrainingMonitor
from univigu.training.module import UniViGU
from univigu.training.parser import DATA, Parser
from univigu.training.prediction import PredictionWriter
from univigu.training.stages import Stage, StageSwitch, select_stages

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "max_epochs": -1,  # the stages' steps end the training
    "check_val_every_n_epoch": None,  # validation counts steps, not epochs
    "val_check_interval": 400,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # each stage says what it trains
}
LAST_RUN = "runs/refine/checkpoints/last.ckpt"  # of the configurations of prediction


class UniViGUCLI(LightningCLI):
    """LightningCLI of UniViGU with any data module; values that both need are linked."""

    stages: dict[str, Stage]  # of the run, in order

    def __init__(self, args: Any = None, run: bool = True, **options: Any) -> None:
        """``options`` are LightningCLI's, in place of ours."""
        ours: dict[str, Any] = {
            "model_class": UniViGU,
            "datamodule_class": LightningDataModule,
            "subclass_mode_data": True,
            "auto_configure_optimizers": False,
            "parser_class": Parser,
            "trainer_defaults": TRAINER_DEFAULTS,
            "seed_everything_default": 0,
            "save_config_kwargs": {"overwrite": True},
        }
        with_help = any(str(arg).endswith(("help", "-h")) for arg in (sys.argv[1:] if args is None else args))
        set_parsing_settings(docstring_parse_attribute_docstrings=with_help)  # of dataclasses' fields; takes a second
        super().__init__(args=args, run=run, **ours | options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"data": {"class_path": DATA}})
        parser.add_argument("--run", type=list[str], default=[], help="Names of the stages to run, in order.")
        parser.add_argument("--stages", type=dict[str, Stage], default={}, help="Training stages by name.")
        parser.add_class_arguments(LastCheckpoint, "checkpoint")
        parser.add_class_arguments(MediaLogger, "media")
        parser.add_class_arguments(TrainingMonitor, "monitor")
        parser.add_class_arguments(FinalReport, "report")
        parser.link_arguments("model.foundation", "data.init_args.foundation")
        parser.link_arguments("model.predict_task", "data.init_args.predict_task")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then choose the checkpoint, before anything is loaded from it."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        if subcommand is None:
            return
        config = self.config[subcommand]
        root = config.trainer.default_root_dir
        for logger in _listed(config.trainer.logger):
            if isinstance(logger, Namespace) and logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = root or "."
        last = find_last(Path(config.checkpoint.dirpath or Path(root or ".") / FOLDER))
        given = [str(arg).partition("=")[0] for arg in (sys.argv[1:] if args is None else args)]
        named = config.ckpt_path or "--model.init_from" in given
        if subcommand in ("validate", "test") and not named and root:
            # What the configuration trained; its model.init_from is what that has started from.
            rank_zero_only(print)(f"evaluating {last}; --ckpt_path or --model.init_from names other weights")
            config.ckpt_path = "last"
        if config.ckpt_path == "best":
            raise ValueError("ckpt_path='best': no checkpoint is chosen by a metric; use 'last' or a path")
        if config.ckpt_path == "last":  # Lightning would look before it knows the folder
            config.ckpt_path = None if subcommand == "fit" and not last.exists() else str(last)
        uses_last_run = config.model.init_from == LAST_RUN and config.model.foundation == EMBEDDED_FOUNDATION
        if subcommand == "predict" and not named and uses_last_run and not Path(LAST_RUN).exists():
            print(f"{LAST_RUN} does not exist: using the model that ships, which knows the embedded world")
            config.model.init_from = EMBEDDED_MODEL
        if config.ckpt_path:
            config.model.init_from = None  # the checkpoint has all weights
            if config.ckpt_path != "hpc" and "://" not in str(config.ckpt_path):
                check_checkpoint_file(Path(config.ckpt_path))
                if subcommand != "fit":  # read it as weights, of which there is then no second copy
                    config.model.init_from, config.ckpt_path = str(config.ckpt_path), None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the callbacks and the logger that every run of the subcommand has."""
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        trainer, callbacks = config.trainer, _listed(config.trainer.callbacks)
        plugins = _listed(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, SafeCheckpointIO()]
        if self.subcommand not in (None, "fit"):  # a folder keeps the configuration of its training
            self.save_config_callback = None
        if self.subcommand == "predict":
            if not any(isinstance(callback, PredictionWriter) for callback in callbacks):
                callbacks.append(PredictionWriter())
            kwargs |= {"logger": False, "enable_checkpointing": False}
        else:
            self.stages = select_stages(config.stages, config.run) if config.run or self.subcommand else {}
            common: list[Callback] = [StageSwitch(self.stages)] if self.stages else []
            common += [config.monitor, DataStatistics(), config.media]
            if trainer.enable_checkpointing is not False:
                common.append(config.checkpoint)
            callbacks = [*common, *callbacks, config.report]  # which sees the weights that others leave
            if trainer.logger in (None, True):
                root = Path(trainer.default_root_dir or ".")
                resumed = config.get("ckpt_path") or (SLURMEnvironment.detect() and any(root.glob("hpc_ckpt_*")))
                kwargs["logger"] = curves(root, new=self.subcommand in (None, "fit") and not resumed)
            if self.subcommand == "fit" and trainer.limit_val_batches is None:
                kwargs["limit_val_batches"] = 4
        given = trainer.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in callbacks)
        if not given and not Console().is_terminal:
            kwargs["enable_progress_bar"] = False
            callbacks.append(ProgressLines())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def after_instantiate_classes(self) -> None:
        if self.subcommand is not None:
            Foundation(self.model.foundation_path)  # raises if the folder is not a foundation

    def fit(self, **options: Any) -> None:
        """Train, as the only training in ``trainer.default_root_dir``."""
        with lock_folder(Path(self.trainer.default_root_dir)) or nullcontext():
            self.trainer.fit(**options)

    def after_predict(self) -> None:
        if any(isinstance(callback, PredictionWriter) and callback.failed for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise SystemExit("error: no input could be used; each row has its error")


def curves(root: Path, new: bool) -> TensorBoardLogger:
    """The logger of a new training, in a folder with a number of its own, or that of the newest one in ``root``."""
    logger = TensorBoardLogger(root, name="tensorboard")
    return logger if new else TensorBoardLogger(root, name="tensorboard", version=max(0, int(logger.version) - 1))


def _listed(option: Any) -> list[Any]:
    """The values of an option that takes one, several or none."""
    return list(option) if isinstance(option, list) else [option] if option else []


@rank_zero_only
def lock_folder(folder: Path) -> AbstractContextManager[Any]:
    """Lock the folder of a training; the lock of a killed process is released. ValueError if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / "training.lock").acquire(blocking=False)
    except Timeout as error:
        message = "another training writes to this folder; wait for its end or choose another"
        raise ValueError(f"trainer.default_root_dir={str(folder)!r}: {message}") from error
