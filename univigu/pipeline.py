"""All tasks of a model: a diffusers pipeline over a model folder, and the task runner that training shares with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from univigu.data.buckets import Bucket, Grid
from univigu.flow.random import Generators
from univigu.flow.time import NUM_TRAIN_TIMESTEPS
from univigu.models.encode import Conventions, crop, encode_clips, to_pixels
from univigu.models.foundation import EMBEDDED_FOUNDATION, EMBEDDED_MODEL, TWO_TRANSFORMERS, Foundation, set_conv_layout
from univigu.models.tokens import (
    Vocabulary,
    clean_text,
    detokenize,
    list_prompts,
    replace_words,
    tokenize,
)
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import CheckpointError, check_files
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import SampleInputs, Sampler, Samples, StepCallback, StepState, Task
from univigu.shapes.text_checker import brief_of

StepEndCallback = Callable[[Any, int, float, dict[str, Any]], Any]
"""``callback(pipeline, step, timestep, {"latents": ..., "text": ..., "state": StepState})``, as in diffusers; what it
returns is not used.  The timestep is that of what is being denoised, the video where both are."""


@dataclass
class UniViGUOutput(BaseOutput):
    """Output of a task."""

    frames: Any = None
    """Video in the form of ``output_type``; None for tasks that make only text."""
    text: list[str] | None = None
    """One text for each sample; None for tasks that make only video. Of ``edit`` with ``replace`` the new prompts."""
    tokens: Tensor | None = None
    """The texts' token ids, int64 [B, L]."""


class TaskRunner:
    """Encodes, samples and decodes: the one implementation of the tasks for pipeline, training and evaluation.

    ``scheduler`` returns a diffusers scheduler for the video; ``device`` is by default the transformer's. The tasks
    take prompts with the length of their slot in tokens, and one generator or one for each sample.
    """

    def __init__(
        self,
        components: Foundation | UniViGUPipeline,
        transformer: UniViGUTransformer3DModel,
        scheduler: Callable[[], Any],
        sampling: SamplingOptions | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.components, self.transformer, self.scheduler = components, transformer, scheduler
        self.sampling = sampling or SamplingOptions()
        self.device = device or transformer.device
        self.conventions = Conventions.of(transformer.config)
        self.vocabulary = Vocabulary(transformer.config.token_ids)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Video [B, C, F, H, W] in [-1, 1] -> latents [B, C, T, H, W] of the transformer."""
        latents = encode_clips(self.components.vae, video.to(self.device))
        return self.conventions.from_normalized(latents, self.components.vae)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, H, W] of the transformer -> video [B, C, F, H, W], roughly in [-1, 1]."""
        return self.conventions.decode(self.components.vae, latents)

    def encode_null(self, length: int) -> Tensor:
        """Embeddings of the null condition [1, S, text_dim]; S = ``length``."""
        return self.conventions.null(self.encode_ids(tokenize(self.components.tokenizer, [""], length)))

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """Token ids [B, S] -> prompt embeddings [B, S, text_dim]."""
        tokenizer, encoder = self.components.tokenizer, self.components.text_encoder
        return self.conventions.encode_prompts(encoder, ids, tokenizer.pad_token_id).to(self.device).float()

    def texts(self, samples: Samples) -> list[str]:
        """The texts of samples of a task that makes texts."""
        assert samples.tokens is not None
        return detokenize(self.components.tokenizer, samples.tokens)

    def describe(self, latents: Tensor, prompt_length: int, generator: Generators = None) -> list[str]:
        """The model's caption of each clean video, as a prompt: a brief one in the embedded world."""
        samples = self.sample("caption", None, prompt_length, latents=latents, generator=generator)
        return list(map(brief_of, self.texts(samples)))

    def generators(self, seeds: Iterable[int]) -> list[torch.Generator]:
        """One generator for each sample, so that a sample does not depend on its batch."""
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def latents_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """Latents' (C, T, H, W) of a video of that size; a ValueError if it is not a whole number of patches."""
        config, patch_size = self.components.vae.config, self.transformer.config.patch_size
        grid = Grid(config.scale_factor_temporal, config.scale_factor_spatial, patch_size)
        return config.z_dim, *grid.latents_shape(Bucket(height, width, num_frames))

    @torch.no_grad()
    def sample(self, task: Task, prompts: list[str] | None, prompt_length: int, **start: Any) -> Samples:
        """Samples of a task for each prompt, or question; without prompts, captions under the null condition.

        ``start`` has the other fields of ``univigu.sampling.sampler.SampleInputs`` that the task needs.
        """
        config, tokenizer = self.transformer.config, self.components.tokenizer
        embeds = null = self.encode_null(prompt_length)
        if prompts:
            name = f"max_sequence_length={prompt_length}: prompt"
            embeds = self.encode_ids(tokenize(tokenizer, prompts, prompt_length, name))
        length = (task == "answer" and config.answer_length) or config.text_length
        inputs = SampleInputs(embeds, null, text_length=length, **start)
        ends = self.encode_tokens(torch.tensor([[tokenizer.eos_token_id, tokenizer.pad_token_id]]), "end")[0].tolist()
        samples = Sampler(self.transformer, self.scheduler(), self.sampling, *ends).sample(task, inputs)
        return replace(samples, tokens=None if samples.tokens is None else self.vocabulary.decode(samples.tokens))

    def encode_tokens(self, tokens: Tensor, name: str) -> Tensor:
        """The transformer's ids of texts; a ValueError for a token that is not in its vocabulary."""
        return self.vocabulary.encode(tokens, self.components.tokenizer, name)


class UniViGUPipeline(WanPipeline):
    """Generate, caption, joint, edit, answer: one unified transformer inside a WanPipeline folder.

    Calling it generates video and is WanPipeline's own ``__call__`` with all its arguments. The other tasks are
    methods. Moving, offloading and saving work as in diffusers. Arguments that several tasks have:

    * ``video``: a list of PIL images, or an array or tensor, uint8 or in [0, 1], or a batch of them, see
      ``univigu.models.encode.to_pixels``. It is cut to 4k+1 frames of whole patches.
    * ``prompt``: one prompt for all samples, or one for each. A prompt over ``max_sequence_length`` tokens (its end
      included) is a TextTooLongError; only ``pipe(prompt)`` truncates it, as WanPipeline does.
    * ``height``, ``width``: size in pixels; for a given video the size to scale it to, by default its own.
    * ``generator``: one, or one for each sample, which makes a sample independent of its batch.
    * ``options``: see ``SamplingOptions``; single options can be given by keyword, such as ``caption_steps=10``. A
      keyword that the task or the text flow does not use is a ValueError.
    * ``output_type``: "np", "pt", "pil" or "latent", as in diffusers.
    * ``callback_on_step_end``: see ``StepEndCallback``.
    """

    _transformer_config: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: Any,
        transformer: UniViGUTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        if transformer_2 is not None:
            raise ValueError(f"transformer_2: {TWO_TRANSFORMERS}")
        if transformer is not None and not isinstance(transformer, UniViGUTransformer3DModel):
            raise ValueError(
                f"transformer: expected a UniViGUTransformer3DModel, got {type(transformer).__name__}; train its text "
                "stream with `lightning fit --config configs/recall.yaml --model.foundation FOLDER`"
            )
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer, None, boundary_ratio, expand_timesteps)
        if self.vae is not None:
            set_conv_layout(self.vae)

    @property
    def conventions(self) -> Conventions:
        """Those of the transformer, or of the folder if it was loaded without one."""
        return Conventions.of(self._transformer_config if self.transformer is None else self.transformer.config)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in diffusers; the VAE's kernels get the memory format of the device."""
        super().to(*args, **kwargs)
        if self.vae is not None:
            set_conv_layout(self.vae)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None = None, **kwargs: Any) -> Self:
        """As in diffusers; without a folder the model that ships, which knows the embedded world.

        Prompts encoded with ``transformer=None`` follow the folder's conventions, too.
        """
        folder = str(pretrained_model_name_or_path or EMBEDDED_FOUNDATION)
        if pretrained_model_name_or_path is None and "transformer" not in kwargs:
            if kwargs.get("quantization_config") is not None:
                raise ValueError("quantization_config: the model that ships is not quantized; give a folder")
            # diffusers gives them to the components that it loads itself
            own = {name: kwargs[name] for name in ("dtype", "torch_dtype", "device_map") if name in kwargs}
            for name, value in own.items():
                if isinstance(value, dict):
                    own[name] = value.get("transformer", value.get("default"))
            kwargs["transformer"] = UniViGUTransformer3DModel.from_pretrained(EMBEDDED_MODEL, **own)
        if not Path(folder).exists() and folder.count("/") != 1:  # else it may be a repository of the Hub
            make = "python tools/convert.py pipeline --checkpoint runs/refine/checkpoints/last.ckpt --output"
            raise CheckpointError(f"{folder}: no such model; make it with: {make} {folder}")
        check_files(Path(folder), subfolders=True)
        pipe = super().from_pretrained(folder, **kwargs)
        if "transformer" in kwargs and pipe.transformer is None:
            options = {name: kwargs[name] for name in ("cache_dir", "revision", "token") if name in kwargs}
            pipe._transformer_config = WanTransformer3DModel.load_config(folder, subfolder="transformer", **options)
        return pipe

    @torch.no_grad()
    def __call__(self, *args: Any, output_type: str = "np", return_dict: bool = True, **kwargs: Any) -> Any:
        """WanPipeline's, on latents as the transformer knows them."""
        made_as = output_type if self.conventions.latents_normalized else "latent"
        (frames,) = super().__call__(*args, output_type=made_as, return_dict=False, **kwargs)
        if made_as != output_type:
            decoded = self.conventions.decode(self.vae, frames)
            frames = self.video_processor.postprocess_video(decoded, output_type=output_type)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    __call__.__signature__ = signature(WanPipeline.__call__)  # type: ignore[attr-defined]

    def caption(
        self,
        video: Any,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> UniViGUOutput:
        """Describe videos; the text is conditioned on the prompt, by default on none.

        Several prompts about one video share its pass where the model lets them, see docs/ARCHITECTURE.md.
        """
        prompt = None if prompt == "" else prompt
        return self._run("caption", prompt, video, (height, width), output_type=None, **options)

    def answer(self, video: Any, question: str | list[str], **options: Any) -> UniViGUOutput:
        """Answer questions about videos, or several about one, with the arguments of ``caption``."""
        if not all(text.strip() for text in ([question] if isinstance(question, str) else question)):
            raise ValueError(f"question={question!r}: expected a question, got an empty one")
        size = options.pop("height", None), options.pop("width", None)
        return self._run("answer", question, video, size, output_type=None, **options)

    def joint(
        self, prompt: str | list[str], height: int = 480, width: int = 832, num_frames: int = 81, **options: Any
    ) -> UniViGUOutput:
        """Make videos and their texts together; height and width are multiples of patches, num_frames is 4k+1."""
        return self._run("joint", prompt, None, (height, width, num_frames), **options)

    def edit(
        self,
        video: Any,
        prompt: str | list[str] | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        replace: Mapping[str, str] | None = None,
        **options: Any,
    ) -> UniViGUOutput:
        """Regenerate videos under a new prompt, from noise level ``strength`` in (0, 1]; 1 keeps nothing.

        The prompt is a full new one. With ``replace`` its words are changed, such as ``{"red": "blue"}``, which must
        occur in it; then the default is the model's own prompt of the video.
        """
        if prompt is None and not replace:
            raise ValueError("prompt=None: edit needs a prompt, or the words to replace in the model's own")
        return self._run("edit", prompt, video, (height, width), strength, replace, **options)

    @torch.no_grad()
    def _run(
        self,
        task: Task,
        prompt: str | list[str] | None,
        video: Any,
        size: tuple[Any, ...],
        strength: float = 1.0,
        words: Mapping[str, str] | None = None,
        /,
        *,
        generator: Generators = None,
        options: SamplingOptions | None = None,
        output_type: str | None = "np",
        max_sequence_length: int = 512,
        callback_on_step_end: StepEndCallback | None = None,
        **overrides: Any,
    ) -> UniViGUOutput:
        """A task, from a video or on noise of that size."""
        for name in ("transformer", "text_encoder", "tokenizer", "vae"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None: {task} needs one")
        self._interrupt, count = False, None
        options = options or SamplingOptions()
        options.check_keywords(overrides, task, self.transformer.config.text_flow)
        runner = self._runner(replace(options, **overrides))
        inputs = dict[str, Any](strength=strength, generator=generator, on_step=self._on_step(callback_on_step_end))
        if video is None:
            inputs["shape"] = runner.latents_shape(*size)
        else:
            inputs["latents"] = latents = runner.encode_video(self._pixels(video, *size))
            count = len(latents)
        if words:
            texts = runner.describe(latents, max_sequence_length, generator) if prompt is None else prompt
            prompt = [replace_words(text, words) for text in ([texts] if isinstance(texts, str) else texts)]
        prompts = None if prompt is None else list_prompts(prompt, count, several=task in ("caption", "answer"))
        samples = runner.sample(task, prompts, max_sequence_length, **inputs)
        frames = None if output_type is None else samples.latents
        if frames is not None and output_type != "latent":
            frames = self.video_processor.postprocess_video(runner.decode(frames), output_type=output_type)
        text = (prompts if words else None) if samples.tokens is None else runner.texts(samples)
        self.maybe_free_model_hooks()
        return UniViGUOutput(frames=frames, text=text, tokens=samples.tokens)

    # ---------------------------------------------------------------------- encoding, as in WanPipeline

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """WanPipeline's, where no negative prompt is the null condition that the model was trained with."""
        given = signature(WanPipeline.encode_prompt).bind(self, *args, **kwargs).arguments
        prompt_embeds, negative_prompt_embeds = super().encode_prompt(*args, **kwargs)
        if negative_prompt_embeds is not given.get("negative_prompt_embeds") and not given.get("negative_prompt"):
            negative_prompt_embeds = self.conventions.null(negative_prompt_embeds)
        return prompt_embeds, negative_prompt_embeds

    encode_prompt.__signature__ = signature(WanPipeline.encode_prompt)  # type: ignore[attr-defined]

    def _get_t5_prompt_embeds(
        self,
        prompt: Any = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As in WanPipeline, but each prompt by itself, as in training, and with the model's padding."""
        texts = [clean_text(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        slot = {"padding": "max_length", "max_length": max_sequence_length, "truncation": True}
        ids = self.tokenizer(texts, return_tensors="pt", **slot).input_ids
        embeds = self.conventions.encode_prompts(self.text_encoder, ids, self.tokenizer.pad_token_id)
        embeds = embeds.to(device or self._execution_device, dtype or self.text_encoder.dtype)
        return embeds.repeat_interleave(num_videos_per_prompt, dim=0)

    def _runner(self, options: SamplingOptions | None = None) -> TaskRunner:
        return TaskRunner(self, self.transformer, lambda: self.scheduler, options, self._execution_device)

    def _pixels(self, video: Any, height: int | None, width: int | None) -> Tensor:
        """A video in any form as [B, C, F, H, W] in [-1, 1], cropped to 4k+1 frames of whole patches."""
        pixels = to_pixels(video, height, width)
        _, down, right = (self.vae_scale_factor_spatial * size for size in self.transformer.config.patch_size)
        return crop(pixels, self.vae_scale_factor_temporal, down, right)

    def _on_step(self, callback: StepEndCallback | None) -> StepCallback:
        bar = None

        def on_step(state: StepState) -> bool:
            nonlocal bar
            bar = bar or self.progress_bar(total=state.num_steps)
            bar.update()
            if callback is not None:
                time = state.text_time if state.video_time == 1.0 and state.text_time is not None else state.video_time
                tensors = {"latents": state.latents, "text": state.text, "state": state}
                callback(self, state.step, NUM_TRAIN_TIMESTEPS * (1.0 - time), tensors)
            if state.last or self._interrupt:  # a caption may end early
                bar = bar.close()  # None: several texts in turn have a bar each
            return self._interrupt

        return on_step


diffusers.UniViGUPipeline = UniViGUPipeline  # type: ignore[attr-defined]  # where DiffusionPipeline.from_pretrained looks
