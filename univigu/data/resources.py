"""Where encoding runs within ``lightning fit``, and in how many processes: each holds the encoders' weights itself."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from univigu.data.build import usable_cores

log = logging.getLogger(__name__)

CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows what containers and jobs may take, in files of these names (limit, usage; version 2 and 1)."""
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
LARGE = 4 * 2**30
"""Bytes of a text encoder from which on a CPU takes seconds a prompt."""


def weight_bytes(folder: Path) -> int:
    """Memory that a component's weights take as float32; of its safetensors files only the headers are read.

    Args:
        folder: of the component; weights in other files count as large as these are.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return sum(path.stat().st_size for path in folder.glob("*.bin"))
    return 4 * sum(map(_count_numbers, files))


def _count_numbers(path: Path) -> int:
    """Of a safetensors file's tensors."""
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError:
        return path.stat().st_size // 4  # it will be refused by who loads it, who says more


def available_memory() -> int | None:
    """Bytes that may be taken now: the system's count, or what a container or job has left; None if nobody says."""
    bounds: list[int] = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        bounds = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for group in _control_groups():
        for limit, usage in LIMITS:
            with suppress(OSError, ValueError):  # there is none, or it is "max"
                bounds.append(int((group / limit).read_text()) - int((group / usage).read_text()))
    return max(0, min(bounds)) if bounds else None


def _control_groups() -> list[Path]:
    """The folders of this process's control groups and all above them, each of which may set a limit."""
    groups = {CONTROL_GROUPS, CONTROL_GROUPS / "memory"}  # what a container sees of its own
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CONTROL_GROUPS / "memory" if controllers else CONTROL_GROUPS  # version 1 has a tree for each
            if controllers and "memory" not in controllers.split(","):
                continue
            group = root / path.lstrip("/")
            groups |= {folder for folder in (group, *group.parents) if folder.is_relative_to(root)}
    return sorted(groups)


def encoding_processes(foundation: str | Path, device: str, prompts: bool = True) -> int:
    """How many processes encode at once: one on a GPU; on a CPU one a core, as far as their weights fit into memory.

    Args:
        foundation: WanPipeline folder whose text encoder and VAE each process loads, as float32.
        device: where they run.
        prompts: whether the text encoder is needed.
    """
    if device != "cpu":
        return 1
    cores, available = usable_cores(), available_memory()
    if available is None:
        return cores
    size = sum(weight_bytes(Path(foundation) / name) for name in ("text_encoder", "vae")[not prompts :])
    return max(1, min(cores, available // max(1, size)))


def warn_if_slow(foundation: str | Path, device: str) -> None:
    """Say what is better, where a CPU is to run a large text encoder."""
    size = weight_bytes(Path(foundation) / "text_encoder")
    if device == "cpu" and size > LARGE:
        log.warning(
            "encoding on the CPU with a text encoder of %.1f GB (%s): with one process a GPU, "
            "`torchrun --nproc-per-node GPUS tools/encode.py ...` does it before training (docs/CLUSTER.md)",
            size / 1e9, foundation,
        )  # fmt: skip
