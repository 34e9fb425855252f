"""The parser of ``lightning``: finds the shipped configurations by name and explains mistakes in one line."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import yaml
from lightning.pytorch import callbacks, loggers, strategies
from lightning.pytorch.cli import LightningArgumentParser

import univigu
from univigu.cli import SUBCOMMANDS, closest, fail, one_line, options_of
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.options import LengthFilter
from univigu.flow.objective import ConditionDropout, TaskMixture
from univigu.models.lora import LoraOptions
from univigu.models.options import REPLACED as TRANSFORMER_REPLACED
from univigu.models.options import ArchitectureOptions
from univigu.training.stages import Stage

DATA = "univigu.data.datamodule.VideoTextDataModule"
PACKAGE = Path(univigu.__file__).parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""The shipped configurations: a part of the installed package, or the folder of a clone."""
CONFIG_OPTIONS = ("--config", "-c")
NESTED = (VideoTextDataModule, Stage, TaskMixture, ConditionDropout, LengthFilter, LoraOptions)
"""Their fields are keys of a configuration, but no options of the parser."""
CLASSES = {name for module in (callbacks, loggers, strategies) for name in module.__all__}
"""Lightning's classes that can be given by their names alone."""
REMOVED = (
    *("clip_frames", "prompt_slots", "muon_rate", "fused", "video_weight", "text_weight", "text_loss", "video_times"),
    *("whole_text_from", "full_text_from", "data_parallel_size", "caption_guidance"),
)
REPLACED = {
    "overrides": "stages (fields of a stage by its name), checkpoint, media and report (callback options)",
    "StageSwitch": "the top-level 'stages' and 'run'; the command line adds this callback itself",
    "trains": "stages.NAME.learning_rate: 0 (text only) or model.lora (adapters)",
    "joint_dropout": "stages.NAME.condition_dropout.joint",
    "guidance_dropout": "stages.NAME.condition_dropout.generate",
    "condition_dropout": "a mapping by task: condition_dropout: {joint: , understand: , generate: }",
    "random_init": "model.init_from: random",
    "vae_slicing": "model.vae_tiling",
    "output_dir": "trainer.default_root_dir",
    "text_times": "stages.NAME.text_time_power",
    "flow": "stages.NAME.text_time_power; the video's shift is the one of the foundation's scheduler",
    "parallel": "trainer.strategy.init_args.compute_dtype of ShardedStrategy",
    "compute": "model.compile_blocks and model.vae_tiling",
    **{name: f"model.architecture.{successor}" for name, successor in TRANSFORMER_REPLACED.items()},
    **{name: f"model.architecture.{name}" for name in vars(ArchitectureOptions()) if name != "embedding"},
    **dict.fromkeys(REMOVED, "nothing: it was removed"),
}
"""Keys of former configurations and their successors."""

UNKNOWN = re.compile(r"unrecognized arguments: ([^\s=]+)|(?:Option|not accept option) '([\w.]+)'")
TEXT = re.compile(r"(?!\s*[\[{\"'-]).*:\s.*", re.DOTALL)
"""A prompt or a name with a colon, which YAML would take for a mapping."""


class Parser(LightningArgumentParser):
    """Takes prompts and names with a colon for texts, as lists of one, and names of shipped configurations for them.

    Options cannot be abbreviated: a misspelt one would be taken for another.
    """

    given: ClassVar[list[str]] = []  # arguments of the command, for messages

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        given, option = list[str](), ""
        for arg in sys.argv[1:] if args is None else args:
            name, equals, value = arg.partition("=") if arg.startswith("--") else (option, "", arg)
            prefix = name + equals if equals else ""
            if name in ("--data.prompts", "--data.videos") and TEXT.fullmatch(value):
                arg = prefix + json.dumps([value])
            elif name in CONFIG_OPTIONS and value.endswith((".yaml", ".yml")):
                arg = prefix + find_config(value)
            given.append(arg)
            if name == "--trainer.logger" and value == "CSVLogger":
                given.append("--trainer.logger.save_dir=.")  # it has no default
            option = arg
        Parser.given = given
        return super().parse_args(given, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """End with one line on standard error and exit code 2."""
        if not self.exit_on_error:  # the parser of a part, whose error becomes a part of another message
            return super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = next((word for word in (*parser.prog.split(), *self.given) if word in SUBCOMMANDS), "fit")
        fail(_explain(message, self.given, options_of(self)), f"lightning {command}")


def find_config(name: str) -> str:
    """The path of a configuration: as it is, or the shipped one of this name, with or without "configs/" before it."""
    path, shipped = Path(name), sorted(path.name for path in CONFIGS.glob("*.yaml"))
    if not path.exists() and str(path.parent) in (".", "configs") and path.name in shipped:
        path = CONFIGS / path.name
    if not path.exists():
        fail(f"{name}: no such file{closest(path.name, shipped)} shipped: {', '.join(shipped)}", "lightning fit")
    try:
        yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        fail(f"{name}: {one_line(error)}", "lightning fit")
    return str(path)


def _explain(message: str, given: list[str], options: set[str]) -> str:
    """A message of jsonargparse in one line: where, what is wrong, and what may have been meant."""
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if "StageSwitch" in message:
        return f"'StageSwitch' was replaced; use {REPLACED['StageSwitch']}"
    if unknown := UNKNOWN.search(message):
        return _unknown_option(next(filter(None, unknown.groups())), given, options)
    if not key:
        return one_line(message)
    reason = _value_error(message) or one_line(message)
    if key.endswith("condition_dropout"):
        reason = f"expected {REPLACED['condition_dropout']}"
    return f"{_where(key, given)}: {reason}"


def _unknown_option(name: str, given: list[str], options: set[str]) -> str:
    where, parts = _where(name, given), name.strip("-").split(".")
    if former := next((part for part in parts if part in REPLACED), None):
        return f"unknown option {where}: {former!r} was replaced; use {REPLACED[former]}"
    known = {part for option in options for part in option.strip("-").split(".")}
    known |= {field for kind in NESTED for field in inspect.signature(kind).parameters}
    whole = closest("--" + ".".join(parts), options) if name.startswith("-") or len(parts) > 1 else ""
    return f"unknown option {where}{whole or closest(parts[-1], known)}"


def _value_error(message: str) -> str | None:
    """What is wrong with a value."""
    found = re.search(r"(?:Got|Given) value: (.*)", message)
    value = found[1] if found else "another value"
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return f"{missing[1]} has no class {missing[2]}{closest(missing[2], dir(importlib.import_module(missing[1])))}"
    if missing := re.search(r"No module named '[\w.]+'", message):
        return f"{missing[0]}, got {value!r}"
    if missing := re.search(r"Expected a dot import path string: (\w+)", message):
        return f"no class {missing[1]}{closest(missing[1], CLASSES)}"
    if choices := re.search(r"Expected a typing.Literal\[(.*)\]", message):
        return f"expected one of {choices[1]}, got {value!r}{closest(repr(value), choices[1].split(', '))}"
    kinds = dict.fromkeys(re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", message))
    return f"expected {' or '.join(kind for kind in kinds if kind != 'NoneType')}, got {value!r}" if kinds else None


def _where(name: str, given: list[str]) -> str:
    """The option or the file that sets a key, and the key; by the key's last part, because messages lack the others."""
    leaf = name.strip("-").split(".")[-1]
    key = re.compile(rf"(?<!\w){re.escape(leaf)}['\"]?\s*:")
    for arg, following in reversed(list(zip(given, [*given[1:], ""], strict=True))):
        if not arg.startswith("-"):
            continue
        option, equals, value = arg.partition("=")
        if option.strip("-").split(".")[-1] == leaf:
            return option
        source, text = option, value if equals else following
        if option in CONFIG_OPTIONS and Path(text).is_file():
            source, text = text, Path(text).read_text()
        if key.search(text):
            return f"{source}: {name}"
    return name
