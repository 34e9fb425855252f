"""CLIPScore and the Frechet video distance against what the models themselves and numpy say."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor, VideoMAEModel

from tests.tiny_clip import FRAMES, SIZE, write_clip, write_detector, write_video_encoder
from univigu.evaluation.video_metrics import ClipEncoder, FrechetVideoDistance, VideoCLIPScore, VideoFeatures

TEXTS = ["a cat", "two dogs run", "x" * 300, "", "a red circle", "the sea"]


def videos(seed: int, number: int = 6, frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, frames, 3, 40, 48), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    write_video_encoder(folder / "videomae")
    write_detector(folder / "detector.pt")
    return folder


def clip_score(folder: Path, clips: torch.Tensor, texts: list[str]) -> float:
    metric = VideoCLIPScore(ClipEncoder(folder / "clip"), num_frames=3)
    for start in range(0, len(texts), 4):
        metric.update(clips[start : start + 4], texts[start : start + 4])
    return float(metric.compute())


def test_clip_score_is_the_models_own_similarity(folder: Path) -> None:
    model, processor = CLIPModel.from_pretrained(folder / "clip"), CLIPProcessor.from_pretrained(folder / "clip")
    scores = []
    for clip, text in zip(videos(0), TEXTS, strict=True):
        inputs = processor(
            text=[text], images=list(clip[[0, 4, 8]].numpy()), return_tensors="pt", truncation=True, max_length=77
        )
        with torch.no_grad():
            cosine = model(**inputs).logits_per_image / model.logit_scale.exp()
        scores.append(100 * cosine.clamp_min(0).mean())
    expected = float(torch.stack(scores).mean())
    assert expected > 1 and max(scores) > min(scores)
    assert clip_score(folder, videos(0), TEXTS) == pytest.approx(expected, abs=1e-3)
    assert clip_score(folder, videos(0), TEXTS[1:] + TEXTS[:1]) != pytest.approx(expected, abs=1e-3)


def features_of(path: Path, clips: torch.Tensor) -> np.ndarray:
    """The features by another way than ours."""
    with torch.no_grad():
        if path.suffix == ".pt":
            video = clips.permute(0, 2, 1, 3, 4).float()
            return torch.jit.load(path)(video, rescale=True, resize=True, return_features=True).numpy()
        frames = clips[:, [0, 3, 5, 8]].float() / 255
        frames = torch.stack([torch.nn.functional.interpolate(f, (SIZE, SIZE), mode="bilinear", antialias=True)
                              for f in frames])  # fmt: skip
        mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        output = VideoMAEModel.from_pretrained(path)(pixel_values=(frames - mean) / std)
        assert FRAMES == 4
        return output.last_hidden_state.mean(1).numpy()


@pytest.mark.parametrize("name", ["detector.pt", "videomae"])
def test_frechet_distance_by_numpy(folder: Path, name: str) -> None:
    real, made = videos(1, 24), (videos(2, 24).float() * 0.6).to(torch.uint8)
    first, second = (features_of(folder / name, clips).astype(np.float64) for clips in (real, made))
    covariances = [np.cov(values, rowvar=False) for values in (first, second)]
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1])
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + sum(np.trace(c) for c in covariances)
    expected -= 2 * np.sqrt(eigenvalues.astype(complex)).real.sum()
    path = f"trusted:{folder / name}" if name == "detector.pt" else folder / name
    metric = FrechetVideoDistance(VideoFeatures(path))
    for start in range(0, 24, 10):
        metric.update(real[start : start + 10], real=True)
        metric.update(made[start : start + 10], real=False)
    assert expected > 1e-3
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-3)
    same = FrechetVideoDistance(VideoFeatures(path))
    same.update(real, real=True)
    same.update(real, real=False)
    assert float(same.compute()) == pytest.approx(0, abs=1e-3 * expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ClipEncoder, VideoFeatures])
@pytest.mark.parametrize("damage", ["missing", "empty", "other", "cut"])
def test_wrong_model_folders_are_named(folder: Path, tmp_path: Path, kind: type, damage: str) -> None:
    path = tmp_path / damage
    if damage == "empty":
        path.mkdir()
    elif damage == "other" and kind is ClipEncoder:
        path = folder / "videomae"
    elif damage == "other":
        path.write_text("no network")
    elif damage == "cut":
        shutil.copytree(folder / ("clip" if kind is ClipEncoder else "videomae"), path)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^evaluation\.(clip|video_features)='.*': ") as error:
        kind(path)
    assert "\n" not in str(error.value)


def test_a_file_of_code_must_be_trusted(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"video_features='.*detector\.pt': a file of code; .* write 'trusted:"):
        VideoFeatures(folder / "detector.pt")
