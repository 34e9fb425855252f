"""The pretrained generator around the transformer: tokenizer, text encoder, VAE, scheduler; a folder of WanPipeline."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from univigu.models.weights import WeightFiles, check_complete, load_model, reading

EMBEDDED_FOUNDATION = str(Path(__file__).resolve().parents[1] / "assets" / "foundation")
EMBEDDED_MODEL = str(Path(EMBEDDED_FOUNDATION).with_name("model"))
"""The unified transformer that ships, trained on the embedded world, in float16; its other components are the
foundation's."""
TWO_TRANSFORMERS = "two transformers (Wan2.2 A14B) are not supported; take a Wan2.1 model or Wan2.2 TI2V-5B"
VOCABULARY = "vocabulary.json"
"""In a pruned folder: the list of the tokenizer's ids that texts are made of, see tools/convert.py."""
COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")


def vocabulary_of(folder: Path) -> dict[str, Any]:
    """Options of a foundation's transformer: ``vocab_size``, the number of ids that the text encoder takes (which may
    be more than the tokenizer gives), or that of the ``token_ids`` which texts are made of in a pruned folder."""
    if (folder / VOCABULARY).is_file():
        ids = json.loads((folder / VOCABULARY).read_text())
        return {"vocab_size": len(ids), "token_ids": ids}
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    return {"vocab_size": int(config["vocab_size"]), "token_ids": None}


class Foundation:
    """Lazily loaded components of a WanPipeline folder, frozen and in evaluation mode.

    ``vae_tiling`` processes the videos of a batch one by one, in overlapping tiles. A FileNotFoundError names a missing
    folder or component; two transformers are a ValueError.
    """

    def __init__(
        self,
        path: str | Path = EMBEDDED_FOUNDATION,
        text_encoder_dtype: torch.dtype = torch.float32,
        vae_tiling: bool = False,
    ) -> None:
        self.path = Path(path)
        self._text_encoder_dtype = text_encoder_dtype
        self._vae_tiling = vae_tiling
        self._device = torch.device("cpu")
        missing = [name for name in COMPONENTS if not (self.path / name).is_dir()]
        if missing:
            message = f"foundation={str(path)!r}: not a WanPipeline folder, it lacks {', '.join(missing)}"
            if self.path.name.startswith("Wan") and not self.path.exists():
                message += f"; download it: hf download Wan-AI/{self.path.name} --local-dir {path}"
            raise FileNotFoundError(message)
        if (self.path / "transformer_2").is_dir():
            raise ValueError(f"foundation={str(path)!r}: {TWO_TRANSFORMERS}")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        with reading(self.path / "tokenizer"):
            return AutoTokenizer.from_pretrained(self.path / "tokenizer", trust_remote_code=False)

    @cached_property
    def text_encoder(self) -> UMT5EncoderModel:
        folder, dtype = self.path / "text_encoder", self._text_encoder_dtype
        if not any(folder.glob("*.safetensors")):
            model = load_model(UMT5EncoderModel, folder, allow_unexpected=True, dtype=dtype)
            return model.to(self._device).requires_grad_(False).eval()
        # One weight after the other, straight to its device: transformers maps all files at once, and with many
        # processes a node, as many copies would not fit into the host's memory.
        with reading(folder), torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config.from_pretrained(folder))
        state, own = WeightFiles(folder), model.state_dict()
        missing = own.keys() - state.keys() - {"encoder.embed_tokens.weight"}  # which is shared.weight
        wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
        check_complete(folder, {"missing_keys": missing, "mismatched_keys": wrong}, allow_unexpected=True)
        weights = {name: state[name].to(self._device, dtype, copy=True) for name in own if name in state}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        return model.requires_grad_(False).eval()

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        model = load_model(AutoencoderKLWan, self.path / "vae", torch_dtype=torch.float32)
        if self._vae_tiling:
            model.enable_slicing()
            model.enable_tiling()
        return set_conv_layout(model.requires_grad_(False).eval().to(self._device))

    def scheduler(self) -> Any:
        """A fresh scheduler of the class and configuration the folder names (schedulers carry state)."""
        file = self.path / "scheduler" / "scheduler_config.json"
        with reading(file):
            config = json.loads(file.read_text())
            return getattr(diffusers, config["_class_name"]).from_config(config)

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def to(self, device: torch.device | str) -> Foundation:
        """Move what has been loaded so far; the rest will be loaded there."""
        if torch.device(device) == self._device:  # asked in every step of a training
            return self
        self._device = torch.device(device)
        if "text_encoder" in self.__dict__:
            self.text_encoder.to(device)
        if "vae" in self.__dict__:
            set_conv_layout(self.vae.to(device))
        return self


def set_conv_layout(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Store a VAE's kernels in the memory format that convolutions are fastest in: channels last on a CPU.

    The format changes the rounding of latents, so that every VAE that encodes needs the same.
    """
    layout = torch.channels_last_3d if vae.device.type == "cpu" else torch.contiguous_format
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return vae
