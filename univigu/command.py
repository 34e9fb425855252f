"""The LightningCLI behind ``univigu.cli``: what is linked, what is checked before anything heavy starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from univigu.checkpoint import missing_checkpoint
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

    def before_instantiate_classes(self) -> None:
        """Evaluation is of what the configuration trained; a checkpoint makes ``init_from`` needless."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand in ("validate", "test") and not config.ckpt_path and config.trainer.default_root_dir:
            trained = Path(config.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            if not trained.exists():
                raise missing_checkpoint(trained)
            config.ckpt_path = str(trained)
        if config.get("ckpt_path"):
            config.model.init_from = None
