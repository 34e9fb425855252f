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
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401 (a pipeline's loader looks ModelMixin up here)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from univigu.flow.time import NUM_TRAIN_TIMESTEPS
from univigu.models.attention import Rotary, VideoOnly
from univigu.models.block import UniViGUTransformerBlock, modulate
from univigu.models.cache import AttentionCache
from univigu.models.conventions import Conventions, NullCondition, PromptPadding
from univigu.models.text import TextHead, TextReader, TextTimeEmbedding, check_text, text_rotary_table
from univigu.models.weights import cast_like, check_complete, embedding_rows, transformer_folder

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
    ".attn1_t.",
)


def is_text_parameter(name: str) -> bool:
    """Whether a transformer's parameter belongs to the text stream (and not to Wan)."""
    return any(part in f".{name}" for part in TEXT_KEYS)


@dataclass
class UniViGUTransformerOutput(BaseOutput):
    """What one denoising step predicts for each modality."""

    sample: torch.Tensor | None = None
    """Video, in Wan's convention noise - data (= minus the velocity of flow time), [B, C, T, H, W]; None if only the
    text was computed."""
    text: torch.Tensor | None = None
    """Logits [B, L, V], or for the ``embedding`` flow the velocity [B, L, D]; None without text tokens."""


class UniViGUTransformer3DModel(WanTransformer3DModel):
    r"""Wan's transformer, extended by a text stream. Wan's weights keep their names.

    Args (besides :class:`~diffusers.WanTransformer3DModel`'s):
        vocab_size: number of tokens V of the text tokenizer, at least 1.
        text_flow: "embedding" (head predicts a velocity in embedding space), "uniform" or "mask" (head gives
            logits; "mask" has one more embedding row, id V, for the mask state).
        clean_video_reads_text: whether clean video (timestep 0) attends to text.  False makes the video's
            keys and values independent of the text, so that captioning can compute them once.
        clean_video_timestep: the timestep, over or equal to 0 and under 1000, that the generator is told of clean
            video beside text.  At 0 it has nothing to look for; told that there is some noise to be found, it
            works out more of what the video shows, which is what the text reads.
        text_length: slot of the text in tokens that the model was last trained on; what sampling fills.
        separate_text_ffn: whether text has FFNs of its own; False shares the video's.
        separate_text_attention: whether text has its own query, key, value and output projections in the
            self-attention, which is joint all the same.  False shares the video's, as in the paper; beside a frozen
            generator text can then only ask what the video's own projections ask.
        text_projects_video: whether the keys and values under which the text finds the video are made of the video's
            states by the text's own projections, too (only with ``separate_text_attention``).  False leaves the text
            to what the generator shows itself.  The video's own queries find the same either way.
        text_positions: learned absolute positions added to the text tokens, as many as the longest slot; 0 adds
            none, as in the paper.  Rotary embeddings alone tell tokens apart by what they attend to, and fully
            masked text is one token many times over, which leaves only the video to tell its positions by.
        text_rotary: whether the text's queries and keys are rotated by their positions, as in the paper.  False
            (only with ``text_positions``) lets a token ask the video the same question wherever it stands:
            rotation makes the same query another one at each position, to be learned for each.
        latents_normalized, null_condition, prompt_padding: how its inputs are made, see :class:`Conventions`.
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
        clean_video_timestep: float = 0.0,
        text_length: int = 256,
        separate_text_ffn: bool = True,
        text_positions: int = 0,
        text_rotary: bool = True,
        separate_text_attention: bool = False,
        text_projects_video: bool = False,
        latents_normalized: bool = True,
        null_condition: NullCondition = "encoded",
        prompt_padding: PromptPadding = "zeros",
    ) -> None:
        Conventions(latents_normalized, null_condition, prompt_padding)  # checks them; they shape no weight
        if text_flow not in TEXT_FLOWS:
            raise ValueError(f"text_flow={text_flow!r}: expected one of {TEXT_FLOWS}")
        for name, value, least in (("vocab_size", vocab_size, 1), ("text_positions", text_positions, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        if not 0 <= clean_video_timestep < NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"clean_video_timestep={clean_video_timestep}: expected 0 <= it < {NUM_TRAIN_TIMESTEPS}")
        if not (text_rotary or text_positions):
            raise ValueError("text_rotary=False: text_positions=0 leaves the text no positions at all")
        if text_projects_video and not separate_text_attention:
            raise ValueError("text_projects_video=True: separate_text_attention=False leaves the text none of its own")
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
                separate_text_attention=separate_text_attention,
                text_projects_video=text_projects_video,
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
        hidden_states: torch.Tensor | None,
        timestep: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        text_tokens: torch.Tensor | None = None,
        text_timestep: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        encoder_hidden_states_image: torch.Tensor | None = None,
        cache: AttentionCache | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        text_reader: TextReader | None = None,
        text_places: torch.Tensor | None = None,
    ) -> UniViGUTransformerOutput | tuple[torch.Tensor | None, ...]:
        """Predict both modalities' velocities (or posteriors) at their own times.

        Args:
            hidden_states: normalised video latents [B, C, T, H, W]; None computes the text alone, beside the video
                of an earlier pass with the same ``cache`` (``timestep`` and ``encoder_hidden_states`` are then
                None, too).
            timestep: the video's Wan timestep 1000 * (1 - t), [B]; 0 is clean, fractions are kept.
            encoder_hidden_states: prompt embeddings [B, S, text_dim], zero past the prompt's end.
            text_tokens: ids [B, L], or for the ``embedding`` flow float states [B, L, D]; None leaves the text
                stream out, and the video output is then bit-equal to Wan's.
            text_timestep: the text's timestep, [B], in the same unit; required with ``text_tokens``.
            text_mask: bool [B, L], False hides a text token from every query; None shows all.
            encoder_hidden_states_image: image embeddings of image-to-video Wan models.
            cache: keys and values to keep and to reuse, see :class:`AttentionCache`; only without gradients.
            return_dict: False gives the tuple (sample, text).
            attention_kwargs: as in diffusers (``scale`` of LoRA layers).
            text_reader: makes ``text`` of the head's hidden states in place of logits, see :class:`TextHead`.
            text_places: the tokens' places in their slot, int64 [B, L] from 0; None: 0 to L-1, the whole slot.

        Raises:
            ValueError: shapes or dtypes that do not belong together, named; a cache that belongs to another call.
        """
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("cache: its keys and values carry no gradients; use it under torch.no_grad()")
        image, sample, text = encoder_hidden_states_image, None, None
        if text_tokens is not None:
            check_text(self.config, hidden_states, timestep, text_tokens, text_timestep, text_mask, text_places)
        if hidden_states is None:
            text = self._forward_text(
                text_tokens, text_timestep, text_mask, cache, text_reader, text_places,
                attention_kwargs=attention_kwargs,
            )  # fmt: skip
        elif text_tokens is None and cache is None:
            (sample,) = super().forward(
                hidden_states,
                timestep,
                encoder_hidden_states,
                image,
                False,
                attention_kwargs,  # type: ignore[arg-type]
            )
        else:
            sample, text = self._forward_streams(
                hidden_states, timestep, encoder_hidden_states, text_tokens, text_timestep, text_mask, image, cache,
                text_reader, text_places, attention_kwargs=attention_kwargs,
            )  # fmt: skip
        if not return_dict:
            return (sample,) if text is None else (sample, text)
        return UniViGUTransformerOutput(sample=sample, text=text)

    @apply_lora_scale("attention_kwargs")
    def _forward_streams(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_tokens: torch.Tensor | None,
        text_timestep: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        encoder_hidden_states_image: torch.Tensor | None,
        cache: AttentionCache | None,
        text_reader: TextReader | None = None,
        text_places: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Video, beside text if there is any."""
        grid = hidden_states.shape[2:]
        clean = timestep == 0
        video_only = None if self.config.clean_video_reads_text else VideoOnly.where(clean)
        if text_tokens is not None and self.config.clean_video_timestep:
            timestep = timestep.float().masked_fill(clean, self.config.clean_video_timestep)
        if cache is not None:
            cache.begin(encoder_hidden_states, len(self.blocks))

        # 1. The video as tokens of width D with their positions; the prompt, and the video's time
        rotary_v = self.rope(hidden_states)
        video = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]
        temb_v, modulation_v, context, image_context = self.condition_embedder(
            timestep, encoder_hidden_states, encoder_hidden_states_image
        )
        modulation_v = modulation_v.unflatten(1, (6, -1))
        if image_context is not None:
            context = torch.cat([image_context, context], dim=1)

        # 2. The text likewise
        text, rotary_t, temb_t, modulation_t = None, None, None, None
        if text_tokens is not None:
            text, rotary_t, temb_t, modulation_t = self._embed_text(
                text_tokens, text_timestep, video.dtype, temb_v.dtype, text_places
            )
            if cache is not None and cache.keep_video:
                cache.video_tokens, cache.text_tokens = video.shape[1], text.shape[1]

        # 3. Blocks
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layers[i]
            inputs = (
                video, context, modulation_v, rotary_v, text, modulation_t, rotary_t, text_mask, video_only, layer,
            )  # fmt: skip
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                states = self._gradient_checkpointing_func(block, *inputs)
            else:
                states = block(*inputs)
            video, text = (states, None) if text is None else states

        # 4. Heads
        text_out = None if text is None or temb_t is None else self._text_head(text, temb_t, text_reader)
        return self._video_head(video, temb_v, grid), text_out

    @apply_lora_scale("attention_kwargs")
    def _forward_text(
        self,
        text_tokens: torch.Tensor,
        text_timestep: torch.Tensor,
        text_mask: torch.Tensor | None,
        cache: AttentionCache | None,
        text_reader: TextReader | None = None,
        text_places: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Text alone, beside the cached video and prompt."""
        if text_tokens is None or cache is None or cache.prompt_embeds is None or not cache.video_tokens:
            raise ValueError("hidden_states=None: text alone needs text_tokens and a cache filled by a pass with both")
        cache.check_layers(len(self.blocks))
        if text_tokens.shape[:2] != (cache.prompt_embeds.shape[0], cache.text_tokens):
            raise ValueError(
                f"text_tokens has shape {list(text_tokens.shape[:2])}: the cache was filled with "
                f"{[cache.prompt_embeds.shape[0], cache.text_tokens]}"
            )
        text, rotary_t, temb_t, modulation_t = self._embed_text(
            text_tokens, text_timestep, cache.states_dtype, cache.prompt_embeds.dtype, text_places
        )
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            text = block(None, None, None, None, text, modulation_t, rotary_t, text_mask, cache=layer)
        return self._text_head(text, temb_t, text_reader)

    def _embed_text(
        self,
        text_tokens: torch.Tensor,
        text_timestep: torch.Tensor | None,
        dtype: torch.dtype,
        time_dtype: torch.dtype,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Rotary | None, torch.Tensor, torch.Tensor]:
        """Tokens of width D [B, L, D], their rotary table if any, the text's time [B, D] and modulation [B, 6, D]."""
        text = self.vocab_embed(text_tokens) if text_tokens.ndim == 2 else text_tokens
        if places is None:
            places = torch.arange(text.shape[1], device=text.device)
        if self.text_position_embed is not None:
            text = text + self.text_position_embed(places)
        rotary = None
        if self.config.text_rotary:
            rotary = text_rotary_table(places, self.config.attention_head_dim)
        sinusoid = self.condition_embedder.timesteps_proj(text_timestep)
        return text.to(dtype), rotary, *self.time_embedding_t(sinusoid, time_dtype)

    def _video_head(self, video: torch.Tensor, temb: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        """Tokens [B, N, D] -> latents [B, C, T, H, W]; the parent's output head."""
        shift, scale = (self.scale_shift_table.to(temb.device) + temb[:, None]).chunk(2, dim=1)
        video = self.proj_out(modulate(self.norm_out, video, shift, scale))
        patch = self.config.patch_size
        counts = [size // step for size, step in zip(grid, patch, strict=True)]
        video = video.unflatten(1, counts).unflatten(-1, (*patch, -1))  # [B, t, h, w, pt, ph, pw, C]
        return video.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _text_head(self, text: torch.Tensor, temb: torch.Tensor, reader: TextReader | None = None) -> torch.Tensor:
        """Tokens [B, L, D] -> [B, L, V], or [B, L, D] for the embedding flow."""
        shift, scale = (self.scale_shift_table_t.to(temb.device) + temb[:, None]).chunk(2, dim=1)
        return self.text_head(text, shift, scale, reader)

    def token_table(self) -> torch.Tensor:
        """The token embeddings with rows of RMS 1, float32 [V, D]: the data points of the ``embedding`` flow."""
        table = embedding_rows(self.vocab_embed, self.config.vocab_size).float()
        return table * torch.rsqrt(table.square().mean(-1, keepdim=True) + 1e-8)

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_wan(
        cls,
        wan: str | Path | WanTransformer3DModel,
        vocab_size: int,
        text_flow: TextFlowName = "uniform",
        torch_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """Start from a pretrained Wan2.1 transformer; the text stream's FFNs and time embedding are copies of Wan's.

        Args:
            wan: a transformer folder, a pipeline folder with ``transformer/``, or a model in memory (copied).
            vocab_size, text_flow, options: see the class; the sizes are the folder's.
            torch_dtype: dtype a folder's weights are loaded in.

        Raises:
            FileNotFoundError: the folder holds no transformer.
            ValueError: keys of Wan's that are missing or not understood, by name.
        """
        if not isinstance(wan, WanTransformer3DModel):
            folder = transformer_folder(wan)
            wan, info = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch_dtype, output_loading_info=True)
            check_complete(folder, info)
        config = {name: value for name, value in wan.config.items() if not name.startswith("_")}
        model = cls(**(config | options | {"vocab_size": vocab_size, "text_flow": text_flow}))
        cast_like(model, wan)
        missing, unexpected = model.load_state_dict(wan.state_dict(), strict=False)
        missing = [key for key in missing if not is_text_parameter(key)]
        if missing or unexpected:
            raise ValueError(f"not a Wan transformer: missing keys {missing}, unexpected keys {unexpected}")
        model.copy_text_stream_from_video()
        return model

    @torch.no_grad()
    def copy_text_stream_from_video(self) -> None:
        """Initialise what the text stream copies: FFNs, attention's projections, time embedding, modulation."""
        for block in self.blocks:
            for name in ("ffn", "attn1"):
                if getattr(block, f"{name}_t") is not None:
                    setattr(block, f"{name}_t", copy.deepcopy(getattr(block, name)))
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
        check_complete(pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model
