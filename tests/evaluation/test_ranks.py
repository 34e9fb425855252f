"""Scores of captions and videos are the same from two processes as from one, even if one of them has no samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import run_ranks
from tests.evaluation.test_caption_metrics import CAPTIONS, REFERENCES, results
from tests.evaluation.test_video_metrics import TEXTS, clip_score, videos
from tests.tiny_clip import write_clip, write_detector
from univigu.evaluation.video_metrics import FrechetVideoDistance, VideoFeatures


def distance(folder: Path, part: slice) -> float:
    metric = FrechetVideoDistance(VideoFeatures(f"trusted:{folder / 'detector.pt'}"))
    real, made = videos(1, 24)[part], videos(2, 24)[part] // 2
    if len(real):
        metric.update(real, real=True)
        metric.update(made, real=False)
    return float(metric.compute())


def scores(folder: Path, captions: slice, clips: slice, distances: slice) -> dict[str, float]:
    found = results(CAPTIONS[captions], REFERENCES[captions])
    return found | {"clip": clip_score(folder, videos(0)[clips], TEXTS[clips]), "fvd": distance(folder, distances)}


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    write_detector(tmp_path / "detector.pt")
    expected = scores(tmp_path, slice(None), slice(None), slice(None))
    assert expected["fvd"] > 1e-3 and expected["bleu4"] > 0.1
    run_ranks(score_share, tmp_path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [pytest.approx(expected, rel=1e-5)] * 2


def score_share(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    all_or_nothing = slice(None) if rank == 0 else slice(0)
    clips = slice(4, None) if rank == 0 else slice(4)
    found = []
    for captions in (slice(33) if rank == 0 else slice(33, None), all_or_nothing):
        found.append(scores(folder, captions, clips, all_or_nothing))
    (folder / f"{rank}.json").write_text(json.dumps(found))
