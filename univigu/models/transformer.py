"""Wan's video transformer with a second stream for text (Uni-ViGU, arXiv:2604.08121, section 3).

    video latents --patch--> [B, N, D] --+                        +--> norm_out, proj_out --> .sample
                                         |  N blocks              |
                                         +--> shared attention ---+
                                         |    FFN | FFN_t         |
    text tokens --embed----> [B, L, D] --+                        +--> text_head ----------> .text

Without text tokens its output is the parent's, bit for bit.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401 (a pipeline's loader looks ModelMixin up here)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, apply_lora_scale
from einops import rearrange
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.functional import pad

from univigu.flow.text import EMBEDDING_INPUT_SCALE, TextInputs
from univigu.models.attention import VideoOnly
from univigu.models.block import UniViGUTransformerBlock, modulate
from univigu.models.cache import AttentionCache
from univigu.models.encode import Conventions, NullCondition, PromptPadding
from univigu.models.options import ArchitectureOptions, TextAttention, TextFlowName, check_replaced
from univigu.models.text import (
    NO_TEXT,
    TextHead,
    TextStream,
    TextTimeEmbedding,
    check_inputs,
    copied_from,
    init_text_tables,
    text_rotary_table,
)
from univigu.models.weights import (
    WeightDtype,
    check_complete,
    check_files,
    compute_device,
    empty_model,
    known_options,
    load_strictly,
    read_weights,
    transformer_folder,
    wan_options,
)


@dataclass
class UniViGUTransformerOutput(BaseOutput):
    """The predictions of one forward pass."""

    sample: torch.Tensor | None = None
    """Video, in Wan's convention noise - data (= minus the velocity of flow time), [B, C, T, H, W]; None if only the
    text was computed."""
    text: torch.Tensor | None = None
    """Logits [B, L, V], or what the text's reader returns; None without text tokens."""


class UniViGUTransformer3DModel(WanTransformer3DModel):
    """Wan's transformer, extended by a text stream. Wan's weights keep their names.

    Arguments from ``text_flow`` to ``clean_video_timestep`` are ``univigu.models.options.ArchitectureOptions``, those
    of ``univigu.models.encode.Conventions`` have its names. The first ones are diffusers'.

    Args:
        token_ids: the ids of the tokenizer that texts consist of, ascending; None is all of them.
        vocab_size: number of tokens V that texts consist of, at least 1. The ``mask`` flow has one more embedding,
            id V, for the mask state.
        text_length: number of text tokens of the last training stage; sampling uses it.
        answer_length: the same of answers to questions; None: as many as other texts.
    """

    # diffusers looks these up by name on the class; Wan's own entries name Wan's block class.
    _no_split_modules: ClassVar = ["UniViGUTransformerBlock"]
    _repeated_blocks: ClassVar = ["UniViGUTransformerBlock"]
    _keep_in_fp32_modules: ClassVar = [
        *WanTransformer3DModel._keep_in_fp32_modules,
        "scale_shift_table_t",
        "norm_final",
    ]
    _skip_layerwise_casting_patterns: ClassVar = [
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
        text_positions: int = 0,
        text_attention: TextAttention = "shared",
        separate_text_ffn: bool = True,
        clean_video_reads_text: bool = True,
        clean_video_reads_prompt: bool = True,
        clean_video_timestep: float = 0.0,
        text_length: int = 256,
        answer_length: int | None = None,
        latents_normalized: bool = True,
        null_condition: NullCondition = "encoded",
        prompt_padding: PromptPadding = "zeros",
        token_ids: list[int] | None = None,
    ) -> None:
        wan = known_options(WanTransformer3DModel, locals())
        ArchitectureOptions.of(self.config)  # checks them
        Conventions.of(self.config)
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError(f"{image_dim=}, {added_kv_proj_dim=}: image-to-video models are not supported")
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}: expected at least 1")
        if token_ids is not None and (len(token_ids) != vocab_size or sorted(set(token_ids)) != list(token_ids)):
            raise ValueError(f"token_ids: {len(token_ids)} ids, expected vocab_size={vocab_size} of them, ascending")
        # The parent builds everything but its blocks, which are ours: no block is allocated twice.
        super().__init__(**(wan | {"num_layers": 0}))
        self.register_to_config(num_layers=num_layers)
        dim = num_attention_heads * attention_head_dim
        sizes = dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps
        of_text: Any = {"separate_text_ffn": separate_text_ffn, "text_attention": text_attention}
        self.blocks = nn.ModuleList(UniViGUTransformerBlock(*sizes, **of_text) for _ in range(num_layers))
        self.vocab_embed = nn.Embedding(vocab_size + (text_flow == "mask"), dim)
        self.text_position_embed = nn.Embedding(text_positions, dim) if text_positions else None
        self.time_embedding_t = TextTimeEmbedding(freq_dim, dim)
        self.scale_shift_table_t = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.text_head = TextHead(dim, vocab_size)
        self.text_endpoint_proj = nn.Linear(dim, dim, bias=False) if text_flow == "embedding" else None
        init_text_tables(self)

    # ------------------------------------------------------------------ forward

    @apply_lora_scale("attention_kwargs")
    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        text: TextInputs | None = None,
        cache: AttentionCache | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        predict_video: bool = True,
    ) -> UniViGUTransformerOutput | tuple[torch.Tensor | None, ...]:
        """Predict the video's velocity and the text's posterior at their own times.

        Args:
            hidden_states: normalised video latents [B, C, T, H, W]. None computes only the text, with the video's
                keys and values from ``cache``; ``timestep`` and ``encoder_hidden_states`` are then None, too.
            timestep: the video's Wan timestep 1000 * (1 - t), [B], or one for each token [B, N] as Wan2.2 5B has it; 0
                is clean, fractions are kept.
            encoder_hidden_states: prompt embeddings [B, S, text_dim], zero past the prompt's end.
            text: the text's inputs; None leaves the text stream out, and the video output is bit-equal to Wan's.
            cache: keys and values to keep and to reuse, see ``AttentionCache``; only without gradients.
            predict_video: False leaves out what only ``sample`` needs: most of the last block, and the head.

        A ValueError names shapes or dtypes that do not fit together, and a cache that belongs to another call.
        """
        if hidden_states is not None and text is None and cache is None and predict_video:  # Wan's own model
            (sample,) = super().forward(hidden_states, timestep, encoder_hidden_states, return_dict=False)
            return UniViGUTransformerOutput(sample=sample) if return_dict else (sample,)
        check_inputs(self, text, hidden_states, timestep, cache, predict_video)

        # 1. The video: tokens, prompt, time and positions
        video_only: VideoOnly = False
        of_video: tuple[Any, ...] = (None,) * 5
        if hidden_states is not None:
            if text is not None or not predict_video:
                timestep, video_only = self._clean_video(timestep)
            if cache is not None:
                cache.begin(encoder_hidden_states, len(self.blocks), 0 if text is None else text.tokens.shape[1])
            of_video = self._embed_video(hidden_states, timestep, encoder_hidden_states)
        states, *others, temb = of_video

        # 2. The text: tokens, time, positions, and a prompt if it has its own
        stream, temb_t = self._embed_text(text, states, encoder_hidden_states, cache)

        # 3. Blocks
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layers[i]
            for_text = not predict_video and i + 1 == len(self.blocks)
            inputs = (states, *others, stream, video_only, layer, for_text)
            recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
            outputs = self._gradient_checkpointing_func(block, *inputs) if recomputed else block(*inputs)
            states, stream = outputs[0], stream._replace(states=outputs[1])

        # 4. Heads
        sample = None if states is None else self._video_head(states, temb, hidden_states.shape[2:])
        logits = None
        if text is not None:
            shift, scale = (self.scale_shift_table_t.to(temb_t.device) + temb_t[:, None]).chunk(2, dim=1)
            logits = self.text_head(stream.states, shift, scale, text.reader)
        if return_dict:
            return UniViGUTransformerOutput(sample=sample, text=logits)
        return (sample,) if text is None else (sample, logits)

    def _clean_video(self, timestep: torch.Tensor) -> tuple[torch.Tensor, VideoOnly]:
        """The timestep that conditions the video, and the samples whose clean video does not read text."""
        video_only: Any = False
        if not self.config.clean_video_reads_text:
            video_only = timestep.view(len(timestep), -1).eq(0).all(1)
            # One bool if the samples agree. Not under torch.compile: a graph cannot depend on values.
            if not torch.compiler.is_compiling() and video_only.all() == video_only.any():
                video_only = bool(video_only.all())
        if self.config.clean_video_timestep:
            timestep = timestep.float().where(timestep > 0, self.config.clean_video_timestep)
        return timestep, video_only

    def _embed_video(self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> tuple[Any, ...]:
        """A block's tokens [B, N, D], prompt, modulation [B, 1 or N, 6, D] and positions; the time's embedding."""
        rotary = self.rope(latents)
        tokens = rearrange(self.patch_embedding(latents), "b d t h w -> b (t h w) d").contiguous()
        temb, modulation, context, _ = self.condition_embedder(timestep.flatten(), prompt, None, timestep[0].numel())
        return tokens, context, modulation.unflatten(-1, (6, -1)), rotary, temb

    def _embed_text(
        self, text: TextInputs | None, video: Any, prompt: Any, cache: AttentionCache | None
    ) -> tuple[TextStream, Any]:
        """The text stream before the first block, beside the video's tokens or the cached video; its time."""
        if text is None:
            return NO_TEXT, None
        if cache is not None and video is None:
            video, prompt = cache.of_video, cache.prompt_embeds
        context, rotary, key_mask, positions = None, None, None, text.positions
        if text.tokens.ndim == 2:
            states = self.vocab_embed(text.tokens)
        else:
            states = EMBEDDING_INPUT_SCALE * text.tokens
            if text.endpoint is not None and self.text_endpoint_proj is not None:
                states = states + self.text_endpoint_proj(text.endpoint.to(video.dtype))
        if positions is None:
            positions = torch.arange(states.shape[1], device=states.device)
        if self.text_position_embed is None:
            rotary = text_rotary_table(positions, self.config.attention_head_dim)
        else:
            states = states + self.text_position_embed(positions)
        if text.mask is not None:  # every video key may be attended to
            key_mask = pad(text.mask, (video.shape[1], 0), value=True)[:, None, None]
        sinusoid = self.condition_embedder.timesteps_proj(text.timestep)
        temb, modulation = self.time_embedding_t(sinusoid, prompt.dtype)
        if text.prompt_embeds is not None and (cache is None or cache.take_prompt(text.prompt_embeds)):
            context = self.condition_embedder.text_embedder(text.prompt_embeds.to(prompt.dtype))
        return TextStream(states.to(video.dtype), modulation[:, None], rotary, key_mask, context), temb

    def _video_head(self, video: torch.Tensor, temb: Any, grid: torch.Size) -> torch.Tensor:
        """Tokens [B, N, D] -> latents [B, C, T, H, W]; the parent's output head."""
        shift, scale = (self.scale_shift_table.to(temb.device) + temb[:, :, None]).unbind(2)
        video = self.proj_out(modulate(self.norm_out, video, shift, scale))
        pt, ph, pw = self.config.patch_size
        t, h, w = grid[0] // pt, grid[1] // ph, grid[2] // pw
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return rearrange(video, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    def token_table(self) -> torch.Tensor:
        """The token embeddings with rows of RMS 1, float32 [V, D]: the data points of the ``embedding`` flow."""
        weight, count, device = self.vocab_embed.weight, self.config.vocab_size, compute_device(self.vocab_embed)
        if weight.device != device:  # offloaded: its weights are there while it is called
            weight = self.vocab_embed(torch.arange(count, device=device))
        elif isinstance(weight, DTensor):  # sharded: gradients are averaged over processes
            weight = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
        table = weight[:count].to(compute_device(self)).float()
        return table * torch.rsqrt(table.square().mean(-1, keepdim=True) + 1e-8)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, which would miss sharded blocks; for all tasks, which call a block in over 8 forms."""
        torch.compiler.config.recompile_limit = 64  # more of them would run uncompiled, with no more than a warning
        for block in self.blocks:
            block.compile(*args, **kwargs)

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_wan(
        cls,
        wan: str | Path | WanTransformer3DModel,
        vocab_size: int,
        architecture: ArchitectureOptions | None = None,
        torch_dtype: WeightDtype = torch.float32,
        token_ids: list[int] | None = None,
    ) -> Self:
        """Start from a pretrained Wan2.1 transformer; the text stream's FFNs and time embedding are copies of Wan's.

        ``wan`` is a transformer folder, a pipeline folder with ``transformer/``, or a model in memory (copied, in its
        dtypes). A FileNotFoundError without a transformer; a ValueError naming missing or unexpected keys.
        """
        model = empty_model(cls, cls.wan_config(wan, vocab_size, architecture, token_ids))
        copies = {name: theirs for name in model.state_dict() if (theirs := copied_from(name))}
        if isinstance(wan, WanTransformer3DModel):
            load_strictly(model, wan.state_dict(), "wan", copies)
            model.rope, torch_dtype = copy.deepcopy(wan.rope), wan.proj_out.weight.dtype  # in no state dict
        else:
            load_strictly(model, read_weights(transformer_folder(wan)), wan, copies, torch_dtype)
        init_text_tables(model, torch_dtype)
        return model

    @staticmethod
    def wan_config(
        wan: str | Path | WanTransformer3DModel,
        vocab_size: int,
        architecture: ArchitectureOptions | None = None,
        token_ids: list[int] | None = None,
    ) -> dict[str, Any]:
        """The configuration of a model that extends a Wan transformer, as of ``from_wan``."""
        options = asdict(architecture or ArchitectureOptions()) | {"vocab_size": vocab_size, "token_ids": token_ids}
        return wan_options(wan) | options

    @classmethod
    def from_config(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; a ValueError for a configuration with a former key."""
        check_replaced(config, "config.json")
        return super().from_config(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but a missing or unexpected key is a ValueError; Wan folders belong to ``from_wan``."""
        wants_info = kwargs.pop("output_loading_info", False)
        check_files(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        check_complete(pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model
