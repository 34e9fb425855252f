"""For people who only want to use a model: a diffusers pipeline over the whole folder.

pipe = UniViGUPipeline.from_pretrained("my_model").to("cuda")
frames = pipe("a red circle moving left").frames
text = pipe.caption(frames).text[0]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import BaseOutput
from torch import Tensor

from univigu.data.buckets import Bucket, latents_shape
from univigu.flow.random import Generators
from univigu.flow.time import NUM_TRAIN_TIMESTEPS
from univigu.models.conventions import Conventions
from univigu.models.foundation import encode_prompt, set_conv_layout
from univigu.models.tokens import TextTooLongError, detokenize, tokenize
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import compute_device
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import Sampler, Samples, StepCallback, StepState

StepEndCallback = Callable[[Any, int, float, dict[str, Any]], Any]
"""``callback(pipeline, step, timestep, {"latents": ..., "text": ..., "state": StepState})``, as in diffusers; what it
returns is not used.  The timestep is that of what is being denoised, the video where both are."""


@dataclass
class UniViGUOutput(BaseOutput):
    """What a task made."""

    frames: Any = None
    """Video in the form asked for by ``output_type``; None for tasks that make text alone."""
    text: list[str] | None = None
    """One text a sample; None for tasks that make video alone."""
    tokens: Tensor | None = None
    """The texts' token ids, int64 [B, L]."""


def check_prompts(tokenizer: Any, prompts: list[str], max_sequence_length: int) -> None:
    """See that prompts fit their slot, which WanPipeline's encoding would cut them to without a word.

    Raises:
        TextTooLongError: one has more tokens, its end counted.
    """
    try:
        tokenize(tokenizer, prompts, max_sequence_length)
    except TextTooLongError as error:
        raise TextTooLongError(f"max_sequence_length={max_sequence_length}: {error}") from None


class UniViGUPipeline(WanPipeline):
    """Generate, caption, joint, edit, answer: one unified transformer inside a WanPipeline folder.

    Calling it makes video from prompts and is WanPipeline's own ``__call__``, with all its arguments.  The other
    tasks are methods.  Moving, offloading and saving work as in diffusers.

    Args:
        tokenizer, text_encoder, vae, scheduler: as in WanPipeline.
        transformer: a :class:`UniViGUTransformer3DModel`.
        transformer_2, boundary_ratio, expand_timesteps: WanPipeline's, for Wan2.2; not used by the tasks.

    Raises:
        ValueError: another transformer; a plain Wan one has no text stream.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: UniViGUTransformer3DModel,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        if not isinstance(transformer, UniViGUTransformer3DModel):
            raise ValueError(
                f"transformer: expected a UniViGUTransformer3DModel, got {type(transformer).__name__}; train its text "
                "stream with `lightning fit --config configs/recall.yaml --model.foundation FOLDER`"
            )
        super().__init__(
            tokenizer, text_encoder, vae, scheduler, transformer, transformer_2, boundary_ratio, expand_timesteps
        )
        set_conv_layout(self.vae)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in diffusers; the VAE's kernels get the memory format of the device."""
        super().to(*args, **kwargs)
        set_conv_layout(self.vae)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As in diffusers; the transformer is read strictly.

        Raises:
            ValueError: the transformer's weights do not fit, or it is a plain Wan one; keys are named.
        """
        if "transformer" not in kwargs:
            options = {
                name: kwargs[name] for name in ("torch_dtype", "cache_dir", "revision", "token") if name in kwargs
            }
            kwargs["transformer"] = UniViGUTransformer3DModel.from_pretrained(
                pretrained_model_name_or_path, subfolder="transformer", **options
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[no-any-return]

    # ---------------------------------------------------------------------- tasks

    @torch.no_grad()
    def __call__(self, *args: Any, output_type: str | None = "np", return_dict: bool = True, **kwargs: Any) -> Any:
        """WanPipeline's, on latents as the transformer knows them."""
        if self._conventions.latents_normalized or output_type == "latent":
            return super().__call__(*args, output_type=output_type, return_dict=return_dict, **kwargs)
        (latents,) = super().__call__(*args, output_type="latent", return_dict=False, **kwargs)
        decoded = self._conventions.decode(self.vae, latents)
        frames = self.video_processor.postprocess_video(decoded, output_type=output_type)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    @torch.no_grad()
    def caption(
        self,
        video: Any,
        prompt: str | list[str] | None = None,
        generator: Generators = None,
        options: SamplingOptions | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 512,
        callback_on_step_end: StepEndCallback | None = None,
        **overrides: Any,
    ) -> UniViGUOutput:
        """Describe videos.

        Args:
            video: what diffusers' ``VideoProcessor.preprocess_video`` takes: a list of PIL images, an array
                [F, H, W, C] or a tensor [F, C, H, W] in [0, 1], or a batch of them.  Frames behind the last 4k+1 are
                left out.
            prompt: what the text is conditioned on, one for all or one a video; None is the empty prompt.
            generator: one, or one a video, which makes each text independent of the batch.
            options: see :class:`SamplingOptions`; single ones can be given by keyword, ``caption_steps=10``, if they
                mean something to the task (:data:`univigu.sampling.options.TASK_OPTIONS`) and the text flow.
            height, width: size to scale frames to, in pixels; default is the video's, brought to whole patches.
            max_sequence_length: slot of the prompt in tokens, its end counted.
            callback_on_step_end: see :data:`StepEndCallback`.

        Raises:
            TextTooLongError: a prompt needs more tokens; only ``pipe(prompt)`` cuts it, as WanPipeline does.
            ValueError: as many prompts as videos are needed, or one; an option out of range or of another task.
        """
        sampler, on_step = self._sampler("caption", options, overrides), self._on_step(callback_on_step_end)
        latents = self._latents_of(video, height, width)
        embeds, null = self._prompt_embeds(prompt or "", len(latents), max_sequence_length)
        length = self.transformer.config.text_length
        return self._output(sampler.caption(latents, embeds, length, generator, on_step, null), "latent", video=False)

    def answer(self, video: Any, question: str | list[str], **kwargs: Any) -> UniViGUOutput:
        """Answer questions about videos: a caption whose condition is the question; arguments as in :meth:`caption`."""
        return self.caption(video, question, **kwargs)

    @torch.no_grad()
    def joint(
        self,
        prompt: str | list[str],
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        generator: Generators = None,
        options: SamplingOptions | None = None,
        output_type: str = "np",
        max_sequence_length: int = 512,
        callback_on_step_end: StepEndCallback | None = None,
        **overrides: Any,
    ) -> UniViGUOutput:
        """Make video and its text together, each reading the other.

        Args:
            prompt: one or several.
            height, width, num_frames: of the video; multiples of whole patches, and 4k+1.
            output_type: "np", "pt", "pil" or "latent", as in diffusers.
            generator, options, max_sequence_length, callback_on_step_end: as in :meth:`caption`.

        Raises:
            TextTooLongError: as in :meth:`caption`.
            ValueError: a size that does not fit, an option out of range or of another task.
        """
        shape = self.latents_shape(height, width, num_frames)
        sampler, on_step = self._sampler("joint", options, overrides), self._on_step(callback_on_step_end)
        embeds, null = self._prompt_embeds(prompt, None, max_sequence_length)
        length = self.transformer.config.text_length
        return self._output(sampler.joint(embeds, null, shape, length, generator, on_step), output_type)

    @torch.no_grad()
    def edit(
        self,
        video: Any,
        prompt: str | list[str],
        strength: float = 0.8,
        generator: Generators = None,
        options: SamplingOptions | None = None,
        output_type: str = "np",
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 512,
        callback_on_step_end: StepEndCallback | None = None,
        **overrides: Any,
    ) -> UniViGUOutput:
        """Make a video anew under another prompt, starting part of the way back to noise.

        Args:
            video, height, width: as in :meth:`caption`.
            prompt: what it shall show instead, in full.
            strength: how far back, in (0, 1]; 1 keeps nothing of the video.
            generator, options, max_sequence_length, callback_on_step_end: as in :meth:`caption`.
            output_type: as in :meth:`joint`.

        Raises:
            TextTooLongError: as in :meth:`caption`.
            ValueError: strength or an option out of range, an option of another task, another number of prompts than
                videos.
        """
        sampler, on_step = self._sampler("edit", options, overrides), self._on_step(callback_on_step_end)
        latents = self._latents_of(video, height, width)
        embeds, null = self._prompt_embeds(prompt, len(latents), max_sequence_length)
        return self._output(sampler.edit(latents, strength, embeds, null, generator, on_step), output_type)

    # ---------------------------------------------------------------------- parts

    def encode_prompt(self, prompt: Any, negative_prompt: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """WanPipeline's, where no negative prompt is the null condition that the model was trained with."""
        given = kwargs.get("negative_prompt_embeds") is not None or negative_prompt
        embeds, negative = super().encode_prompt(prompt, negative_prompt, *args, **kwargs)
        return embeds, negative if given or negative is None else self._conventions.null(negative)

    def _get_t5_prompt_embeds(
        self,
        prompt: Any = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """WanPipeline's, with what the encoder gives for padding where the model was trained with that."""
        if self._conventions.prompt_padding == "zeros":
            return super()._get_t5_prompt_embeds(prompt, num_videos_per_prompt, max_sequence_length, device, dtype)
        texts = [prompt] if isinstance(prompt, str) else prompt
        ids = tokenize(self.tokenizer, texts, max_sequence_length).to(compute_device(self.text_encoder))
        embeds = encode_prompt(self.text_encoder, ids, self.tokenizer.pad_token_id, zero_padding=False)
        embeds = embeds.to(device or self._execution_device, dtype or self.text_encoder.dtype)
        return embeds.repeat_interleave(num_videos_per_prompt, dim=0)

    def _sampler(self, task: str, options: SamplingOptions | None, overrides: dict[str, Any]) -> Sampler:
        options, config = replace(options or SamplingOptions(), **overrides), self.transformer.config
        options.check_keywords(overrides, task, config.text_flow)
        ends = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return Sampler(self.transformer, self.scheduler, options, *ends)

    def _prompt_embeds(self, prompt: str | list[str], count: int | None, length: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, text_dim] of prompts, repeated to ``count``, and [1, S, text_dim] of none."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if count is not None and len(prompts) == 1:
            prompts = prompts * count
        if count is not None and len(prompts) != count:
            raise ValueError(f"prompt: {len(prompts)} of them for {count} videos; give one for all or one for each")
        check_prompts(self.tokenizer, prompts, length)
        embeds, _ = self.encode_prompt([*prompts, ""], None, False, max_sequence_length=length)
        return embeds[:-1], self._conventions.null(embeds[-1:])

    @property
    def _conventions(self) -> Conventions:
        return Conventions.of(self.transformer.config)

    def _latents_of(self, video: Any, height: int | None, width: int | None) -> Tensor:
        """Normalised latents [B, C, T, H, W] of whatever form of video."""
        pixels = self.video_processor.preprocess_video(video, height, width)  # [B, C, F, H, W] in [-1, 1]
        step = self.vae_scale_factor_temporal
        frames = (pixels.shape[2] - 1) // step * step + 1
        down, right = self._patch_pixels()
        rows, columns = pixels.shape[3] // down * down, pixels.shape[4] // right * right
        if not rows or not columns:
            raise ValueError(f"video: {pixels.shape[3]} x {pixels.shape[4]} pixels, expected at least {down} x {right}")
        pixels = pixels[:, :, :frames, :rows, :columns].to(self._execution_device)
        return self._conventions.encode(self.vae, pixels)

    def latents_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """Latents' (C, T, H, W) of a video of that size; raises ValueError where none has it."""
        down, right = self._patch_pixels()
        for name, value, step, rest in (
            ("height", height, down, 0),
            ("width", width, right, 0),
            ("num_frames", num_frames, self.vae_scale_factor_temporal, 1),
        ):
            if value < 1 or value % step != rest % step:
                raise ValueError(f"{name}={value}: expected a multiple of {step}" + (" plus 1" if rest else ""))
        scales = self.vae_scale_factor_temporal, self.vae_scale_factor_spatial
        return self.transformer.config.in_channels, *latents_shape(Bucket(height, width, num_frames), *scales)

    def _patch_pixels(self) -> tuple[int, int]:
        """Height and width in pixels of one token."""
        _, down, right = self.transformer.config.patch_size
        return self.vae_scale_factor_spatial * down, self.vae_scale_factor_spatial * right

    def _on_step(self, callback: StepEndCallback | None) -> StepCallback:
        bar = None

        def on_step(state: StepState) -> None:
            nonlocal bar
            bar = bar or self.progress_bar(total=state.num_steps)
            bar.update()
            if callback is not None:
                time = state.text_time if state.video_time == 1.0 and state.text_time is not None else state.video_time
                tensors = {"latents": state.latents, "text": state.text, "state": state}
                callback(self, state.step, NUM_TRAIN_TIMESTEPS * (1.0 - time), tensors)
            if state.last:  # a caption's may come before its time
                bar.close()

        return on_step

    def _output(self, samples: Samples, output_type: str, video: bool = True) -> UniViGUOutput:
        text, frames = None, None
        if samples.tokens is not None:
            text = detokenize(self.tokenizer, samples.tokens)
        if video and samples.latents is not None:
            frames = samples.latents
            if output_type != "latent":
                decoded = self._conventions.decode(self.vae, samples.latents)
                frames = self.video_processor.postprocess_video(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return UniViGUOutput(frames=frames, text=text, tokens=samples.tokens)
