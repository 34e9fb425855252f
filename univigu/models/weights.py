"""Taking weights over from folders and from Wan, strictly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel


def check_complete(path: Any, info: dict[str, Any]) -> None:
    """Raise ValueError if diffusers' loading report names a missing, unexpected or mismatched key."""
    problems = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if problems:
        raise ValueError(f"{path}: weights do not fit: {problems}")


def cast_like(model: WanTransformer3DModel, wan: WanTransformer3DModel) -> None:
    """Give each weight the dtype it has in Wan: a bfloat16 model keeps some in float32, and which may vary."""
    dtypes = {name: parameter.dtype for name, parameter in wan.named_parameters()}
    dtypes |= dict.fromkeys(("scale_shift_table_t", "text_head.norm_final.weight"), dtypes["scale_shift_table"])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, wan.proj_out.weight.dtype))
    model.rope = copy.deepcopy(wan.rope)  # buffers that no state dict holds


def transformer_folder(path: str | Path) -> Path:
    """The transformer's folder, given itself or the pipeline's; FileNotFoundError if there is none."""
    for folder in (Path(path), Path(path) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path}: neither a transformer folder nor a pipeline folder (no config.json found)")
