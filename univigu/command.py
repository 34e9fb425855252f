"""The LightningCLI behind ``univigu.cli``: what is linked, what is checked before anything heavy starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from univigu.checkpoint import check_checkpoint_file, missing_checkpoint
from univigu.data.datamodule import VideoTextDataModule
from univigu.module import UniViGU


class UniViGUCLI(LightningCLI):
    """LightningCLI for one model and one data module; values both need are linked, not written twice."""

    def __init__(self, args: Any = None) -> None:
        super().__init__(
            UniViGU,
            VideoTextDataModule,
            args=args,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.foundation", "data.foundation")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then settle which checkpoint is meant, before anything reads it."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        if subcommand in ("validate", "test") and not config.ckpt_path and config.trainer.default_root_dir:
            # Evaluation is of what the configuration trained.
            trained = Path(config.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            if not trained.exists():
                raise missing_checkpoint(trained)
            config.ckpt_path = str(trained)
        if config.get("ckpt_path"):
            if config.ckpt_path not in ("best", "last", "hpc") and "://" not in str(config.ckpt_path):
                check_checkpoint_file(Path(config.ckpt_path))
            config.model.init_from = None  # the checkpoint brings all weights
