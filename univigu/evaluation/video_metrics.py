"""Video scores by pretrained networks in local folders: CLIPScore and the Frechet video distance.

torchmetrics' own CLIPScore accepts hub names only and does not support transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.image.fid import FrechetInceptionDistance  # exported by the package only if torch-fidelity is there
from transformers import AutoModel, CLIPModel, CLIPProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from univigu.data.video import even_indices


@contextmanager
def _loading(option: str, path: str | Path, expected: str) -> Iterator[None]:
    """Turn errors of the block into one line that names the option and the path."""
    if not Path(path).exists():
        raise ValueError(f"evaluation.{option}={str(path)!r}: no such file or folder")
    try:
        yield
    except Exception as error:  # of many types, as in univigu.models.weights.reading
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"evaluation.{option}={str(path)!r}: expected {expected} ({reason[:160]})") from error


class ClipEncoder(nn.Module):
    """A CLIP model with tokenizer and image processor, in transformers' layout."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        with _loading("clip", folder, "a CLIP model with its processor"):
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
            self.processor = CLIPProcessor.from_pretrained(folder)

    @torch.no_grad()
    def forward(self, frames: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Cosines [N, B] of uint8 frames [N, C, H, W] and texts; tokens past the model's last position are cut off."""
        longest = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": longest, "return_token_type_ids": False}
        inputs = self.processor(text=texts, images=list(frames.cpu().numpy()), return_tensors="pt", **options)
        made = self.model(**inputs.to(self.model.device))
        return made.image_embeds @ made.text_embeds.T  # of length 1


class VideoCLIPScore(MeanMetric):
    """How well videos match texts: 100 max(cos, 0), mean over frames and then over videos; in [0, 100].

    Hessel et al., 2021 (arXiv:2104.08718), with weight 100 as in torchmetrics, over frames as in CLIPSIM (Wu et al.,
    2021, arXiv:2104.14806).
    Several metrics may share an encoder; ``num_frames`` evenly spaced frames of a video are scored.
    """

    def __init__(self, clip: ClipEncoder, num_frames: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clip, self.num_frames = clip, num_frames

    def update(self, videos: torch.Tensor, texts: list[str]) -> None:  # type: ignore[override]
        """Add uint8 videos [B, F, C, H, W], each with a text."""
        chosen = videos[:, even_indices(videos.shape[1], min(self.num_frames, videos.shape[1]))]
        cosine = torch.einsum("bfb->bf", self.clip(chosen.flatten(0, 1), texts).unflatten(0, chosen.shape[:2]))
        super().update(100.0 * cosine.clamp_min(0).mean(1))


class VideoFeatures(nn.Module):
    """A network that maps videos to feature vectors.

    * "trusted:" and the path of a TorchScript file, called like StyleGAN-V's ``i3d_torchscript.pt``, which papers use
      for FVD: ``(video [B, C, F, H, W] in 0..255, rescale=True, resize=True, return_features=True)``. Such a file is
      code; the prefix says that it may run.
    * The folder of a transformers video encoder whose forward takes ``pixel_values`` [B, F, C, H, W], such as VideoMAE:
      the mean of its last hidden states.  ``num_frames`` evenly spaced frames are resized to ``image_size`` and
      normalised with ImageNet's mean and standard deviation.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path, self.scripted = str(path).removeprefix("trusted:"), str(path).startswith("trusted:")
        if Path(path).is_file() and not self.scripted:
            raise ValueError(f"evaluation.video_features={path!r}: a file of code; to trust it, write 'trusted:{path}'")
        with _loading("video_features", path, "a TorchScript file or a transformers folder"):
            if self.scripted:
                network = torch.jit.load(path, map_location="cpu")
            else:
                network = AutoModel.from_pretrained(path, trust_remote_code=False)
        self.network = network.eval()
        self.num_features = self(torch.zeros(1, 17, 3, 64, 64, dtype=torch.uint8)).shape[-1]  # I3D needs ten frames

    @torch.no_grad()
    def forward(self, videos: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F, C, H, W] -> float32 [B, D]."""
        videos = videos.to(next(self.network.parameters()).device)
        if self.scripted:
            frames = videos.transpose(1, 2).float()
            features: torch.Tensor = self.network(frames, rescale=True, resize=True, return_features=True)
            return features.flatten(1).float()
        config = self.network.config
        videos = videos[:, even_indices(videos.shape[1], config.num_frames)]
        size = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
        frames = F.interpolate(videos.flatten(0, 1).float() / 255, tuple(size), mode="bilinear", antialias=True)
        mean, std = (frames.new_tensor(c)[:, None, None] for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        pixels = ((frames - mean) / std).unflatten(0, videos.shape[:2])
        return self.network(pixel_values=pixels).last_hidden_state.mean(1).float()  # type: ignore[no-any-return]


class FrechetVideoDistance(FrechetInceptionDistance):
    """FVD, Unterthiner et al., 2018 (arXiv:1812.01717): torchmetrics' Frechet distance of video features.

    It is meaningless for fewer than some hundred videos and depends on their number: compare equal numbers only.
    """

    def __init__(self, features: VideoFeatures, **kwargs: Any) -> None:
        super().__init__(feature=features, **kwargs)
        self.orig_dtype = torch.float32  # torchmetrics sets it in update, which a rank without videos never calls
