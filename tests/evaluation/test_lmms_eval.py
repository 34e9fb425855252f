"""The adapter for lmms-eval, with stand-ins for the three names that it imports where lmms-eval is not installed."""

from __future__ import annotations

import importlib
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from univigu import UniViGUPipeline
from univigu.data.video import encode_mp4, read_video
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    if find_spec("lmms_eval") is None:
        names = {"api.instance": "Instance", "api.model": "lmms", "models.registry_v2": "ModelManifest"}
        for path, name in names.items():
            module = ModuleType(f"lmms_eval.{path}")
            setattr(module, name, type(name, (SimpleNamespace,), {"__init__": lambda self, *a, **k: None}))
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "univigu.evaluation.lmms_eval", raising=False)
    return importlib.import_module("univigu.evaluation.lmms_eval")


@pytest.mark.slow
def test_its_texts_are_the_pipelines(adapter: Any, tmp_path: Path) -> None:
    documents = []
    for seed in range(3):
        documents.append({"video": str(tmp_path / f"{seed}.mp4")})
        Path(documents[-1]["video"]).write_bytes(encode_mp4(render(sample_scene(seed))))
    requests = [
        SimpleNamespace(args=("how large is the object?", {}, lambda doc: [doc["video"]], number, "task", "test"))
        for number in range(3)
    ]
    pipe = UniViGUPipeline.from_pretrained()
    frames = torch.stack([read_video(document["video"], 9, 64, 64) for document in documents]).float() / 255
    seeds = [torch.Generator().manual_seed(number) for number in range(3)]
    for ask in (False, True):
        model = adapter.UniViGU(ask=ask, caption_steps=2, max_sequence_length=64, batch_size="2", device="cpu")
        model.task_dict = {"task": {"test": documents}}
        options = {"generator": seeds, "caption_steps": 2, "max_sequence_length": 64}
        made = pipe.answer(frames, "how large is the object?", **options) if ask else pipe.caption(frames, **options)
        assert model.generate_until(requests) == made.text
    requests[0].args = ("", {}, lambda doc: [], 0, "task", "test")
    with pytest.raises(ValueError, match="task, document 0: expected one video file"):
        model.generate_until(requests)


def test_lmms_eval_finds_it(adapter: Any) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"univigu": f"{adapter.__name__}:MODEL"}
