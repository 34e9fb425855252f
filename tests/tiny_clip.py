"""A tiny random CLIP, a tiny random VideoMAE and a tiny video network in TorchScript, as people's model folders are."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    VideoMAEConfig,
    VideoMAEModel,
)

try:  # transformers 5 loads the other one only where torchvision is
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

SIZE, PATCH, FRAMES = 32, 16, 4
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def shake(model: torch.nn.Module) -> None:
    """As they start, the weights are so small that nothing depends on the input."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)


def write_clip(folder: Path) -> Path:
    """Save a CLIP that reads letters, 77 of them at most."""
    special = ["<pad>", "<start>", "<end>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *string.ascii_letters, *string.digits, *" .,:;'-"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [("<start>", vocab["<start>"]), ("<end>", vocab["<end>"])]
    backend.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>",
        model_max_length=77,
    )  # fmt: skip
    pixels = {"height": SIZE, "width": SIZE}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=pixels), tokenizer)
    torch.manual_seed(0)
    text = {"vocab_size": len(vocab), "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2, **SMALL}
    vision = {"image_size": SIZE, "patch_size": PATCH, **SMALL}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    shake(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_video_encoder(folder: Path) -> Path:
    """Save a VideoMAE of four frames."""
    torch.manual_seed(0)
    model = VideoMAEModel(VideoMAEConfig(image_size=SIZE, patch_size=PATCH, num_frames=FRAMES, tubelet_size=2, **SMALL))
    shake(model)
    model.save_pretrained(folder)
    return folder


class _Detector(torch.nn.Module):
    """Takes what StyleGAN-V's i3d_torchscript.pt takes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv3d(3, 6, (3, 4, 4), stride=(1, 4, 4))

    def forward(
        self, video: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        if rescale:
            video = video / 127.5 - 1
        if resize:
            size = [video.shape[2], 32, 32]
            video = torch.nn.functional.interpolate(video, size=size, mode="trilinear", align_corners=False)
        features = self.convolution(video).relu().mean(dim=[2, 3, 4])
        return features if return_features else features.sum(dim=1)


def write_detector(path: Path) -> Path:
    """Save the network as a TorchScript file."""
    torch.manual_seed(0)
    detector = _Detector().eval()
    shake(detector)
    torch.jit.script(detector).save(str(path))
    return path
