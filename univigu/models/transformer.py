"""Wan's video transformer with a second stream for text (Uni-ViGU, arXiv:2604.08121, section 3).

    video latents --patch--> [B, N, D] --+                        +--> norm_out, proj_out --> .sample
                                         |  N blocks              |
                                         +--> shared attention ---+
                                         |    FFN | FFN_t         |
    text tokens --embed----> [B, L, D] --+                        +--> text_head ----------> .text

Without text tokens the model *is* its parent, bit for bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from univigu.models.attention import Rotary, VideoOnly, joint_attention
from univigu.models.text import TextHead, TextTimeEmbedding, text_rotary

TextFlowName = Literal["embedding", "uniform", "mask"]
TEXT_FLOWS = ("embedding", "uniform", "mask")
# What a Wan checkpoint does not have; everything else must come from it.
TEXT_KEYS = (
    "time_embedding_t.",
    "vocab_embed.",
    "text_position_embed.",
    "text_head.",
    "scale_shift_table_t",
    ".ffn_t.",
)


def is_text_parameter(name: str) -> bool:
    """Whether a transformer's parameter belongs to the text stream (and not to Wan)."""
    return any(part in f".{name}" for part in TEXT_KEYS)


@dataclass
class UniViGUTransformerOutput(BaseOutput):
    """What one denoising step predicts for each modality."""

    sample: torch.Tensor
    """Video, in Wan's convention noise - data (= minus the velocity of flow time), [B, C, T, H, W]."""
    text: torch.Tensor | None = None
    """Logits [B, L, V], or for the ``embedding`` flow the velocity [B, L, D]; None without text tokens."""


class UniViGUTransformerBlock(WanTransformerBlock):
    """A Wan block whose attention is shared by both streams and whose FFN is not.

    Args:
        ffn_dim: inner width of both FFNs.
        separate_text_ffn: False sends text through the video's FFN, to measure what an own one is worth.
    """

    def __init__(self, dim: int, ffn_dim: int, *args: Any, separate_text_ffn: bool = True, **kwargs: Any) -> None:
        super().__init__(dim, ffn_dim, *args, **kwargs)
        self.ffn_t: FeedForward | None = None
        if separate_text_ffn:
            self.ffn_t = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,  # [B, N, D]
        encoder_hidden_states: torch.Tensor,  # [B, S, D]
        temb: torch.Tensor,  # [B, 6, D]
        rotary_emb: Rotary,
        text_states: torch.Tensor | None = None,  # [B, L, D]
        temb_t: torch.Tensor | None = None,  # [B, 6, D]
        rotary_t: Rotary | None = None,
        text_mask: torch.Tensor | None = None,  # [B, L], True where a text key may be attended to
        video_only: VideoOnly | None = None,  # samples whose video queries must not see text keys
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if text_states is None or temb_t is None or rotary_t is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)

        # One table serves both streams; each brings its own time.
        shift_v, scale_v, gate_v, shift_ffn_v, scale_ffn_v, gate_ffn_v = self._modulation(temb)
        shift_t, scale_t, gate_t, shift_ffn_t, scale_ffn_t, gate_ffn_t = self._modulation(temb_t)

        # 1. Self-attention over [video ; text]
        video_out, text_out = joint_attention(
            self.attn1,
            _modulate(self.norm1, hidden_states, shift_v, scale_v),
            _modulate(self.norm1, text_states, shift_t, scale_t),
            rotary_emb,
            rotary_t,
            text_mask,
            video_only,
        )
        hidden_states = _gated(hidden_states, video_out, gate_v)
        text_states = _gated(text_states, text_out, gate_t)

        # 2. Cross-attention onto the prompt, both streams as queries
        streams = torch.cat([hidden_states, text_states], dim=1)
        normed = self.norm2(streams.float()).type_as(streams)
        streams = streams + self.attn2(normed, encoder_hidden_states, None, None)
        hidden_states, text_states = streams.split([hidden_states.shape[1], text_states.shape[1]], dim=1)

        # 3. Feed-forward, one expert for each modality
        video_out = self.ffn(_modulate(self.norm3, hidden_states, shift_ffn_v, scale_ffn_v))
        expert = self.ffn if self.ffn_t is None else self.ffn_t
        text_out = expert(_modulate(self.norm3, text_states, shift_ffn_t, scale_ffn_t))
        return _gated(hidden_states, video_out, gate_ffn_v), _gated(text_states, text_out, gate_ffn_t)

    def _modulation(self, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.scale_shift_table + temb.float()).chunk(6, dim=1)


def _modulate(norm: nn.Module, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (norm(states.float()) * (1 + scale) + shift).type_as(states)


def _gated(states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (states.float() + update.float() * gate).type_as(states)


class UniViGUTransformer3DModel(WanTransformer3DModel):
    r"""Wan's transformer, extended by a text stream. Wan's weights keep their names.

    Args (besides :class:`~diffusers.WanTransformer3DModel`'s):
        vocab_size: number of tokens V of the text tokenizer, at least 1.
        text_flow: "embedding" (head predicts a velocity in embedding space), "uniform" or "mask" (head gives
            logits; "mask" has one more embedding row, id V, for the mask state).
        clean_video_reads_text: whether clean video (timestep 0) attends to text.  False makes the video's
            keys and values independent of the text, so that captioning can compute them once.
        text_length: slot of the text in tokens that the model was last trained on; what sampling fills.
        separate_text_ffn: whether text has FFNs of its own; False shares the video's.
        text_positions: learned absolute positions added to the text tokens, as many as the longest slot; 0 adds
            none, as in the paper.  Rotary embeddings alone tell tokens apart by what they attend to, and fully
            masked text is one token many times over, which leaves only the video to tell its positions by.
    """

    # diffusers looks these up by name on the class; Wan's own entries name Wan's block class.
    _no_split_modules = ["UniViGUTransformerBlock"]  # noqa: RUF012
    _repeated_blocks = ["UniViGUTransformerBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = [  # noqa: RUF012
        *WanTransformer3DModel._keep_in_fp32_modules,
        "scale_shift_table_t",
        "norm_final",
    ]
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *WanTransformer3DModel._skip_layerwise_casting_patterns,
        "time_embedding_t",
        "vocab_embed",
        "text_position_embed",
    ]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        vocab_size: int = 256384,
        text_flow: TextFlowName = "uniform",
        clean_video_reads_text: bool = True,
        text_length: int = 256,
        separate_text_ffn: bool = True,
        text_positions: int = 0,
    ) -> None:
        if text_flow not in TEXT_FLOWS:
            raise ValueError(f"text_flow={text_flow!r}: expected one of {TEXT_FLOWS}")
        for name, value, least in (("vocab_size", vocab_size, 1), ("text_positions", text_positions, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        # The parent builds everything but its blocks, which are ours: no block is allocated twice.
        super().__init__(
            patch_size, num_attention_heads, attention_head_dim, in_channels, out_channels, text_dim, freq_dim,
            ffn_dim, 0, cross_attn_norm, qk_norm, eps, image_dim, added_kv_proj_dim, rope_max_seq_len,
            pos_embed_seq_len,
        )  # fmt: skip
        self.register_to_config(num_layers=num_layers)
        dim = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            UniViGUTransformerBlock(
                dim,
                ffn_dim,
                num_attention_heads,
                qk_norm,
                cross_attn_norm,
                eps,
                added_kv_proj_dim,
                separate_text_ffn=separate_text_ffn,
            )
            for _ in range(num_layers)
        )
        self.vocab_embed = nn.Embedding(vocab_size + (text_flow == "mask"), dim)
        # Small beside what attention adds, so that what is read off the video is not drowned by the token itself.
        nn.init.normal_(self.vocab_embed.weight, std=0.1)
        self.text_position_embed = nn.Embedding(text_positions, dim) if text_positions else None
        if self.text_position_embed is not None:
            nn.init.normal_(self.text_position_embed.weight, std=0.1)
        self.time_embedding_t = TextTimeEmbedding(freq_dim, dim)
        self.scale_shift_table_t = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.text_head = TextHead(dim, dim if text_flow == "embedding" else vocab_size)

    # ------------------------------------------------------------------ forward

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_tokens: torch.Tensor | None = None,
        text_timestep: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> UniViGUTransformerOutput | tuple[torch.Tensor, ...]:
        """Predict both modalities' velocities (or posteriors) at their own times.

        Args:
            hidden_states: normalised video latents [B, C, T, H, W].
            timestep: the video's Wan timestep 1000 * (1 - t), [B]; 0 is clean, fractions are kept.
            encoder_hidden_states: prompt embeddings [B, S, text_dim], zero past the prompt's end.
            text_tokens: ids [B, L], or for the ``embedding`` flow float states [B, L, D]; None leaves the text
                stream out, and the video output is then bit-equal to Wan's.
            text_timestep: the text's timestep, [B], in the same unit; required with ``text_tokens``.
            text_mask: bool [B, L], False hides a text token from every query; None shows all.
            encoder_hidden_states_image: image embeddings of image-to-video Wan models.
            return_dict: False gives the tuple (sample, text).
            attention_kwargs: as in diffusers (``scale`` of LoRA layers).

        Raises:
            ValueError: shapes or dtypes that do not belong together, named.
        """
        if text_tokens is None:
            (sample,) = super().forward(
                hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, False, attention_kwargs
            )
            text = None
        else:
            self._check_text(hidden_states, timestep, text_tokens, text_timestep, text_mask)
            sample, text = self._forward_joint(
                hidden_states, timestep, encoder_hidden_states, text_tokens, text_timestep, text_mask,
                encoder_hidden_states_image, attention_kwargs=attention_kwargs,
            )  # fmt: skip
        if not return_dict:
            return (sample,) if text is None else (sample, text)
        return UniViGUTransformerOutput(sample=sample, text=text)

    @apply_lora_scale("attention_kwargs")
    def _forward_joint(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_tokens: torch.Tensor,
        text_timestep: torch.Tensor,
        text_mask: torch.Tensor | None,
        encoder_hidden_states_image: torch.Tensor | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grid = hidden_states.shape[2:]
        video_only = None if self.config.clean_video_reads_text else VideoOnly.where(timestep == 0)

        # 1. Both modalities as tokens of width D, with their positions
        rotary_v = self.rope(hidden_states)
        video = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]
        text = self.vocab_embed(text_tokens) if text_tokens.ndim == 2 else text_tokens  # [B, L, D]
        if self.text_position_embed is not None:
            text = text + self.text_position_embed.weight[: text.shape[1]]
        text = text.type_as(video)
        rotary_t = text_rotary(text.shape[1], self.config.attention_head_dim, text.device)

        # 2. The prompt, and a time for each modality
        embedder = self.condition_embedder
        temb_v, modulation_v, context, image_context = embedder(
            timestep, encoder_hidden_states, encoder_hidden_states_image
        )
        modulation_v = modulation_v.unflatten(1, (6, -1))
        temb_t, modulation_t = self.time_embedding_t(embedder.timesteps_proj(text_timestep), temb_v.dtype)
        if image_context is not None:
            context = torch.cat([image_context, context], dim=1)

        # 3. Blocks
        for block in self.blocks:
            inputs = (
                video, context, modulation_v, rotary_v, text, modulation_t, rotary_t, text_mask, video_only,
            )  # fmt: skip
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                video, text = self._gradient_checkpointing_func(block, *inputs)
            else:
                video, text = block(*inputs)

        # 4. Heads
        return self._video_head(video, temb_v, grid), self._text_head(text, temb_t)

    def _video_head(self, video: torch.Tensor, temb: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        """Tokens [B, N, D] -> latents [B, C, T, H, W]; the parent's output head."""
        shift, scale = (self.scale_shift_table.to(temb.device) + temb[:, None]).chunk(2, dim=1)
        video = self.proj_out(_modulate(self.norm_out, video, shift, scale))
        patch = self.config.patch_size
        counts = [size // step for size, step in zip(grid, patch, strict=True)]
        video = video.unflatten(1, counts).unflatten(-1, (*patch, -1))  # [B, t, h, w, pt, ph, pw, C]
        return video.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _text_head(self, text: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, D] -> [B, L, V], or [B, L, D] for the embedding flow."""
        shift, scale = (self.scale_shift_table_t.to(temb.device) + temb[:, None]).chunk(2, dim=1)
        return self.text_head(text, shift, scale)

    def token_table(self) -> torch.Tensor:
        """The token embeddings with rows of RMS 1, float32 [V, D]: the data points of the ``embedding`` flow."""
        table = self.vocab_embed.weight[: self.config.vocab_size].float()
        return table * torch.rsqrt(table.square().mean(-1, keepdim=True) + 1e-8)

    def _check_text(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        text_tokens: torch.Tensor,
        text_timestep: torch.Tensor | None,
        text_mask: torch.Tensor | None,
    ) -> None:
        batch = hidden_states.shape[0]
        if text_timestep is None:
            raise ValueError("text_timestep=None: text_tokens need a text_timestep [B]")
        for name, value in (("timestep", timestep), ("text_timestep", text_timestep)):
            if value.shape != (batch,):
                raise ValueError(f"{name} has shape {list(value.shape)}: expected [{batch}], one time a sample")
        embedding = self.config.text_flow == "embedding"
        if embedding != text_tokens.is_floating_point() or text_tokens.ndim != (3 if embedding else 2):
            expected = "float states [B, L, D]" if embedding else "integer ids [B, L]"
            raise ValueError(
                f"text_tokens is {text_tokens.dtype} {list(text_tokens.shape)}: "
                f"the {self.config.text_flow} flow expects {expected}"
            )
        if text_tokens.shape[0] != batch:
            raise ValueError(f"text_tokens has {text_tokens.shape[0]} rows: expected {batch}, as hidden_states")
        positions = self.config.text_positions
        if 0 < positions < text_tokens.shape[1]:
            raise ValueError(f"text_tokens has {text_tokens.shape[1]} positions: the model has {positions}")
        if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != text_tokens.shape[:2]):
            raise ValueError(
                f"text_mask is {text_mask.dtype} {list(text_mask.shape)}: expected bool {list(text_tokens.shape[:2])}"
            )

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_wan(
        cls,
        wan: str | Path | WanTransformer3DModel,
        vocab_size: int,
        text_flow: TextFlowName = "uniform",
        clean_video_reads_text: bool = True,
        separate_text_ffn: bool = True,
        text_positions: int = 0,
        torch_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Start from a pretrained Wan2.1 transformer; the text stream's FFNs and time embedding are copies of Wan's.

        Args:
            wan: a transformer folder, a pipeline folder with ``transformer/``, or a model in memory (copied).
            vocab_size, text_flow, clean_video_reads_text, separate_text_ffn, text_positions: see the class.
            torch_dtype: dtype a folder's weights are loaded in.

        Raises:
            FileNotFoundError: the folder holds no transformer.
            ValueError: keys of Wan's that are missing or not understood, by name.
        """
        if not isinstance(wan, WanTransformer3DModel):
            folder = _transformer_folder(wan)
            wan, info = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch_dtype, output_loading_info=True)
            _check_complete(folder, info)
        config = {name: value for name, value in wan.config.items() if not name.startswith("_")}
        options = {
            "vocab_size": vocab_size, "text_flow": text_flow, "clean_video_reads_text": clean_video_reads_text,
            "separate_text_ffn": separate_text_ffn, "text_positions": text_positions,
        }  # fmt: skip
        model = cls(**(config | options))
        _cast_like(model, wan)
        missing, unexpected = model.load_state_dict(wan.state_dict(), strict=False)
        missing = [key for key in missing if not is_text_parameter(key)]
        if missing or unexpected:
            raise ValueError(f"not a Wan transformer: missing keys {missing}, unexpected keys {unexpected}")
        model.copy_text_stream_from_video()
        return model

    @torch.no_grad()
    def copy_text_stream_from_video(self) -> None:
        """Initialise what the text stream copies: each FFN, the time embedding, the output modulation."""
        for block in self.blocks:
            if block.ffn_t is not None:
                block.ffn_t = copy.deepcopy(block.ffn)
        for name in ("time_embedder", "time_proj"):
            setattr(self.time_embedding_t, name, copy.deepcopy(getattr(self.condition_embedder, name)))
        self.scale_shift_table_t.copy_(self.scale_shift_table)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but strict: a missing or unexpected key is an error that names it.

        Raises:
            ValueError: the weights do not fit the model; Wan folders belong to :meth:`from_wan`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        _check_complete(pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model


def _check_complete(path: Any, info: dict[str, Any]) -> None:
    problems = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if problems:
        raise ValueError(f"{path}: weights do not fit: {problems}")


def _cast_like(model: UniViGUTransformer3DModel, wan: WanTransformer3DModel) -> None:
    """Give each weight the dtype it has in Wan: a bfloat16 model keeps some in float32, and which may vary."""
    dtypes = {name: parameter.dtype for name, parameter in wan.named_parameters()}
    dtypes |= dict.fromkeys(("scale_shift_table_t", "text_head.norm_final.weight"), dtypes["scale_shift_table"])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, wan.proj_out.weight.dtype))
    model.rope = copy.deepcopy(wan.rope)  # buffers that no state dict holds


def _transformer_folder(path: str | Path) -> Path:
    for folder in (Path(path), Path(path) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path}: neither a transformer folder nor a pipeline folder (no config.json found)")
