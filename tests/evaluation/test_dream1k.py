"""The snippet of docs/EVALUATION.md that puts captions into the list of DREAM-1K, read the way its scorer reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "EVALUATION.md"


def test_captions_become_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    captions = [
        {"video": "DREAM-1K/video/1.mp4", "caption": "Eine Kätze springt.", "error": None},
        {"video": "DREAM-1K/video/2.mp4", "caption": None, "error": "damaged"},
    ]
    (tmp_path / "runs" / "dream1k").mkdir(parents=True)
    Path("runs/dream1k/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions), "utf-8")
    rows = [
        {"idx": i, "dataset": "DREAM/movie", "vid": i, "text": {"response": f"Cat {i}."}, "extra_info": {"n_shots": 1}}
        for i in (1, 2, 3)
    ]
    Path("DREAM-1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = GUIDE.read_text().partition("## DREAM-1K")[2]
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippet is not None
    exec(snippet[1], {})
    # as evaluation/evaluate.py (read_dataset) and the DREAM metric of tarsier take the rows
    found = [json.loads(line) for line in Path("predictions.jsonl").read_text("utf-8").splitlines()]
    assert [{**row["text"], **row["extra_info"]} for row in found] == [
        {"response": "Cat 1.", "prediction": "Eine Kätze springt.", "n_shots": 1},
        {"response": "Cat 2.", "prediction": "<error>", "n_shots": 1},
        {"response": "Cat 3.", "prediction": "<error>", "n_shots": 1},
    ]
