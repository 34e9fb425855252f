"""The LightningModule: wires foundation, transformer, uni-flow objective and sampler together."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from univigu.checkpoint import averaging_of, check_resumed, load_weights, plain, take_for_use, take_sharded
from univigu.data.buckets import Bucket, latents_shape
from univigu.data.sample import questions_of
from univigu.data.video import to_frames, to_model_range
from univigu.evaluation.held_out import EvaluatedModule, EvaluationOptions
from univigu.flow.objective import (
    ConditionDropout,
    FlowOptions,
    UniFlowBatch,
    UniFlowLosses,
    UniFlowObjective,
    by_noise_level,
)
from univigu.flow.random import make_generator
from univigu.flow.text import make_text_flow
from univigu.models.conventions import CONVENTIONS, Conventions
from univigu.models.encode import encode_prompts
from univigu.models.foundation import EMBEDDED_FOUNDATION, Foundation, encode_prompt
from univigu.models.lora import LoraOptions, add_lora
from univigu.models.options import ArchitectureOptions, check_replaced
from univigu.models.tokens import detokenize, fit_slot, tokenize
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import known_options
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import Sampler
from univigu.training.compute import ComputeOptions
from univigu.training.optim import OptimizerOptions, make_optimizer
from univigu.training.parallel import ParallelOptions, build_sharded, is_sharded, trained_weights_changed
from univigu.training.prediction import Prediction, PredictTask, predict_batch
from univigu.training.stages import Stage
from univigu.training.trained import Trains, check_stage, parameter_groups, train_only


class UniViGU(EvaluatedModule):
    """A unified video generator and captioner in training.

    Args:
        foundation: folder of the pretrained generator in WanPipeline layout.
        init_from: weights to start from instead of the foundation's transformer: a checkpoint of an earlier
            stage (.ckpt file or sharded folder) or a saved transformer folder.
        random_init: ignore the foundation's transformer weights (for ablations).
        architecture: what the text stream adds to the generator.
        flow: distributions of the times.
        optimizer: which optimizer, and its constants.
        sampling: how samples are drawn in validation and prediction.
        predict_task: what ``lightning predict`` makes: "caption", "generate", "joint", "edit" or "qa".
        text_encoder_dtype: type of the (frozen) text encoder's weights.
        gradient_checkpointing: recompute activations in the backward pass.
        parallel: how the transformer computes if the trainer's strategy shards it.
        compute: compiling, and the VAE's memory.
        trains: "all" weights, where a stage's rate is over 0; the "text" stream's own alone; or the text stream's and,
            in place of the pretrained weights, low-rank adapters on the shared attention ("lora").
        lora: size of the adapters.
        evaluation: what ``lightning test`` and ``lightning validate`` measure.
        seed: seeds noise, times, dropout and samples.
    """

    def __init__(
        self,
        foundation: str = EMBEDDED_FOUNDATION,
        init_from: str | None = None,
        random_init: bool = False,
        architecture: ArchitectureOptions = ArchitectureOptions(),  # noqa: B008
        flow: FlowOptions = FlowOptions(),  # noqa: B008
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
        predict_task: PredictTask = "caption",
        text_encoder_dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        parallel: ParallelOptions = ParallelOptions(),  # noqa: B008
        compute: ComputeOptions = ComputeOptions(),  # noqa: B008
        trains: Trains = "all",
        lora: LoraOptions = LoraOptions(),  # noqa: B008
        evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Frozen components stay outside the module tree: they belong to the foundation, not to our checkpoints.
        dtype, memory = getattr(torch, text_encoder_dtype), (compute.vae_slicing, compute.vae_tiling)
        self._foundation = (Foundation(foundation, dtype, *memory),)
        self.init_from = init_from
        self.random_init = random_init
        self.architecture = architecture
        self.flow_options = flow
        self.optimizer_options = optimizer
        self.sampling = sampling
        self.predict_task = predict_task
        self.gradient_checkpointing = gradient_checkpointing
        self.parallel = parallel
        self.compute = compute
        self.trains = trains
        self.lora = lora
        self.evaluation_options = evaluation
        self.seed = seed
        self.stage, self.stage_step = Stage(), 0
        self.transformer: UniViGUTransformer3DModel | None = None

    @property
    def foundation(self) -> Foundation:
        """The frozen components around the transformer."""
        return self._foundation[0]

    @property
    def text_share(self) -> float:
        """The share of its text's slot that a sample is shown in the present step of training."""
        return self.stage.text_share_at(self.stage_step)

    @property
    def conventions(self) -> Conventions:
        """How the transformer's inputs are made."""
        return Conventions.of(self._model.config)

    # ---------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        if stage in ("test", "predict") and self.device_mesh is not None and self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"lightning {stage}: samples end at different steps on different processes, and a sharded model waits "
                "for all of them; run it on one, --trainer.strategy auto --trainer.devices 1 (see docs/CLUSTER.md)"
            )
        if stage == "fit" and isinstance(self.trainer.strategy, DDPStrategy):
            # What is frozen changes with the stages, and a small batch may lack a task: DDP must not wait for those.
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def configure_model(self) -> None:
        """Build the transformer once, from the foundation or from an earlier stage's weights."""
        if self.transformer is not None:
            return
        mesh = self.device_mesh
        if mesh is None:  # the strategy does not shard
            self._set_transformer(self._adapted(self._build_transformer()))
        else:
            device = self.trainer.strategy.root_device
            mesh = mesh["data_parallel"]
            self._set_transformer(build_sharded(self._build_transformer, self._adapted, mesh, device, self.parallel))

    def _adapted(self, model: UniViGUTransformer3DModel) -> UniViGUTransformer3DModel:
        """With adapters, if they are what is trained."""
        if self.trains == "lora":
            add_lora(model, self.lora)
        return model

    def _build_transformer(self) -> UniViGUTransformer3DModel:
        if self.init_from is not None and self._trainer is not None and self.trainer.state.fn != "fit":
            return load_weights(self.init_from)  # brings its own architecture, as a checkpoint does
        torch.manual_seed(self.seed)  # the text stream's new weights
        model = UniViGUTransformer3DModel.from_wan(self.foundation.path, self.foundation.vocab_size, self.architecture)
        if self.random_init:
            # Not from_config, which takes the values that it believes to be defaults for Wan 14B's.
            model = UniViGUTransformer3DModel(**known_options(UniViGUTransformer3DModel, model.config))
        if self.init_from is not None:
            model = load_weights(self.init_from, like=model)
        return model

    def _set_transformer(self, model: UniViGUTransformer3DModel) -> None:
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.compute.compile(model)
        self.transformer = model
        text_flow = make_text_flow(model.config.text_flow, model.config.vocab_size)
        self.objective = UniFlowObjective(text_flow, self.flow_options)

    def enter_stage(self, stage: Stage) -> None:
        """Put a stage in force: what is frozen changes here, learning rates in ``StageSwitch``."""
        check_stage(self.trains, stage)
        self.stage = stage
        if self.transformer is not None:
            self._apply_stage()

    def on_fit_start(self) -> None:
        self._apply_stage()

    def _apply_stage(self) -> None:
        self._model.register_to_config(text_length=self.stage.text_length)
        train_only(self._model, self.trains, self.stage)
        trained_weights_changed(self._model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(parameter_groups(self._model, self.trains), self.optimizer_options)

    # ---------------------------------------------------------------- training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        stage, size = self.stage, len(batch["key"])
        step = self.trainer.fit_loop.total_batch_idx
        inputs = self.prepare(batch)
        losses = self.objective(
            self._model,
            inputs,
            counts=stage.tasks.counts(size, step),
            dropout=stage.condition_dropout,
            text_loss=stage.text_loss,
            generator=self._generator(step),
            text_share=self.text_share,
        )
        loss = losses.total(stage.video_weight, stage.text_weight, size)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self._log_losses("train", losses)
        return loss

    def prepare(self, batch: dict[str, Any]) -> UniFlowBatch:
        """Encode what the loader brought; precomputed latents are taken as they are."""
        latents = self.latents_of(batch)
        prompt_ids = batch["prompt_ids"]
        embeds, null = self._prompts_of(batch)
        target = prompt_ids if self.stage.target == "prompt" else batch["caption_ids"]
        text_ids = None
        if self.stage.writes_text:
            text_ids = fit_slot(target, self.stage.text_length, self.foundation.pad_token_id, self.stage.target)
        return UniFlowBatch(latents.float(), embeds, null, text_ids)

    def _prompts_of(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, S, text_dim] of a batch's prompts, [1, S, text_dim] of none, encoded if need be."""
        zero_padding = self.conventions.prompt_padding == "zeros"  # what shards hold
        if "prompt_embeds" in batch and zero_padding:
            return batch["prompt_embeds"].to(self.device), self.conventions.null(batch["null_embeds"].to(self.device))
        self.foundation.to(self.device)
        ids = torch.cat([batch["prompt_ids"], self._null_ids(batch["prompt_ids"].shape[1])])
        if zero_padding:
            with torch.no_grad():
                embeds = encode_prompts(self.foundation.text_encoder, ids, self.foundation.pad_token_id)
        else:
            embeds = self._encode_prompt(ids)
        return embeds[:-1], self.conventions.null(embeds[-1:])

    def latents_of(self, batch: dict[str, Any]) -> torch.Tensor:
        """Latents of a batch on the module's device, as the transformer wants them, encoded if need be."""
        self.foundation.to(self.device)
        if "latents" in batch:
            latents = batch["latents"].to(self.device)
            normalized = self.conventions.latents_normalized  # what shards hold; the VAE need not be loaded
            return latents if normalized else self.conventions.from_normalized(latents, self.foundation.vae)
        return self.encode_frames(batch["video"].to(self.device))

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames uint8 [B, F, C, H, W] -> latents [B, C, T, H, W] as the transformer wants them."""
        with torch.no_grad():
            return self.conventions.encode(self.foundation.vae, to_model_range(frames))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The transformer's latents [B, C, T, H, W] -> frames uint8 [B, F, C, H, W]."""
        return to_frames(self.conventions.decode(self.foundation.vae, latents))

    def _encode_prompt(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            zero_padding = self.conventions.prompt_padding == "zeros"
            encoder = self.foundation.text_encoder
            return encode_prompt(encoder, ids, self.foundation.pad_token_id, zero_padding).float()

    def encode_prompts(self, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, S, text_dim] of the prompts and [1, S, text_dim] of none."""
        self.foundation.to(self.device)
        ids = tokenize(self.foundation.tokenizer, [*prompts, ""], length).to(self.device)
        embeds = self._encode_prompt(ids)
        return embeds[:-1], self.conventions.null(embeds[-1:])

    def _null_ids(self, length: int) -> torch.Tensor:
        return tokenize(self.foundation.tokenizer, [""], length).to(self.device)

    def _generator(self, *numbers: int) -> torch.Generator:
        """A generator that is a function of the seed, the rank and the given numbers: nothing to save or restore."""
        return make_generator(self.device, self.seed, self.global_rank, *numbers)

    def _log_losses(self, prefix: str, losses: UniFlowLosses) -> None:
        for modality, values, times in (
            ("video", losses.video, losses.video_times),
            ("text", losses.text, losses.text_times),
        ):
            if values.numel():
                values = values.detach()
                self.log(f"{prefix}/{modality}_loss", values.mean(), prog_bar=True, batch_size=values.numel())
                if self.trainer.global_step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
                    continue  # what is not logged need not be split up
                for level, value in by_noise_level(values, times).items():
                    self.log(f"{prefix}/{modality}_loss_{level}", value, batch_size=values.numel())

    # -------------------------------------------------------------- evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out losses with noise and times that are the same at every validation.

        The text is read off the clean video without its prompt (an answer with its question); the video is denoised
        under the prompt.  In ``lightning validate`` the held-out evaluation follows, as in ``lightning test``.
        """
        size, inputs = len(batch["key"]), self.prepare(batch)
        for counts in ((0, size, 0), (0, 0, size)):
            if counts[1] and inputs.text_ids is None:
                continue
            losses = self.objective(
                self._model,
                inputs,
                counts,
                ConditionDropout(0.0, 0.0 if questions_of(batch) else 1.0, 0.0),
                self.stage.text_loss,
                make_generator(self.device, self.seed, 1, batch_idx),
            )
            for modality, values in (("video", losses.video), ("text", losses.text)):
                if values.numel():
                    self.log(f"val/{modality}_loss", values.mean(), prog_bar=True, batch_size=size, sync_dist=True)

    # -------------------------------------------------------------- prediction

    @property
    def sampler(self) -> Sampler:
        """A sampler over the current weights."""
        tokenizer = self.foundation.tokenizer
        return Sampler(
            self._model, self.foundation.scheduler(), self.sampling,
            tokenizer.eos_token_id, tokenizer.pad_token_id,
        )  # fmt: skip

    def caption(
        self, latents: torch.Tensor, prompt_length: int, seeds: list[int], prompts: list[str] | None = None
    ) -> list[str]:
        """Captions of clean latents [B, C, T, H, W]; see :meth:`caption_tokens`."""
        return self.caption_tokens(latents, prompt_length, seeds, prompts)[1]

    @torch.no_grad()
    def caption_tokens(
        self, latents: torch.Tensor, prompt_length: int, seeds: list[int], prompts: list[str] | None = None
    ) -> tuple[torch.Tensor, list[str]]:
        """Token ids [B, L] and texts of captions of clean latents [B, C, T, H, W].

        Args:
            prompts: a condition for each clip, such as its brief prompt; None captions from the video alone.
        """
        embeds, null = self.encode_prompts(prompts or [], prompt_length)
        condition = embeds if prompts else null
        generators = self._sample_generators(seeds)
        samples = self.sampler.caption(latents, condition, self._model.config.text_length, generators, null_embeds=null)
        assert samples.tokens is not None
        return samples.tokens, detokenize(self.foundation.tokenizer, samples.tokens)

    @torch.no_grad()
    def generate(
        self, prompts: list[str], prompt_length: int, shape: tuple[int, ...], seeds: list[int], joint: bool = False
    ) -> tuple[torch.Tensor, list[str] | None]:
        """Frames uint8 [B, F, C, H, W] for prompts, and for ``joint`` the captions made along with them.

        Args:
            shape: latents' (C, T, H, W).
        """
        embeds, null = self.encode_prompts(prompts, prompt_length)
        generators = self._sample_generators(seeds)
        if joint:
            samples = self.sampler.joint(embeds, null, shape, self._model.config.text_length, generators)
        else:
            samples = self.sampler.generate(embeds, null, shape, generators)
        assert samples.latents is not None
        texts = None if samples.tokens is None else detokenize(self.foundation.tokenizer, samples.tokens)
        return self.decode(samples.latents), texts

    @torch.no_grad()
    def edit(
        self, latents: torch.Tensor, strength: float, prompts: list[str], prompt_length: int, seeds: list[int]
    ) -> torch.Tensor:
        """Frames uint8 [B, F, C, H, W] of clean latents [B, C, T, H, W] made anew under other prompts."""
        embeds, null = self.encode_prompts(prompts, prompt_length)
        samples = self.sampler.edit(latents, strength, embeds, null, self._sample_generators(seeds))
        assert samples.latents is not None
        return self.decode(samples.latents)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Prediction]:
        """Predict a batch of the prediction loader; see :func:`univigu.training.prediction.predict_batch`."""
        return predict_batch(self, batch, self.trainer.datamodule)  # type: ignore[attr-defined]

    def latents_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latents' (C, T, H, W) of a video of that size; frames are 4k+1."""
        config = self.foundation.vae.config
        size = Bucket(height, width, num_frames)
        return config.z_dim, *latents_shape(size, config.scale_factor_temporal, config.scale_factor_spatial)

    def _sample_generators(self, seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    # ------------------------------------------------------------- checkpoints

    @property
    def _model(self) -> UniViGUTransformer3DModel:
        if self.transformer is None:
            self.configure_model()
        assert self.transformer is not None
        return self.transformer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what is needed to rebuild the model without its configuration file."""
        config = {name: value for name, value in self._model.config.items() if not name.startswith("_")}
        checkpoint["univigu"] = {"transformer_config": config, "stage": self.stage.name, "trains": self.trains}
        if self.trains == "lora":
            checkpoint["univigu"]["lora"] = asdict(self.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint brings its own architecture to prediction and evaluation; a resumed fit must match it."""
        saved = checkpoint.get("univigu", {}).get("transformer_config")
        if saved is None:
            raise ValueError("ckpt_path: not a checkpoint of this project (it holds no 'univigu' entry)")
        check_replaced(saved, "ckpt_path")
        ours = {name: self._model.config[name] for name in saved}
        differing = {name: (saved[name], ours[name]) for name in saved if plain(saved[name]) != plain(ours[name])}
        for name in {"text_length", *CONVENTIONS} & differing.keys():  # what no weight depends on comes with them
            self._model.register_to_config(**{name: differing.pop(name)[0]})
        if differing and (self.trainer.state.fn == "fit" or is_sharded(self._model)):
            raise MisconfigurationException(f"the checkpoint's model differs from the configuration: {differing}")
        path = self.trainer.strategy.broadcast(self.trainer.ckpt_path or "ckpt_path")
        if self.trainer.state.fn == "fit":
            check_resumed(checkpoint, path, self.trains, self.lora, averaging_of(self))
            return
        if hasattr(self, "ema"):  # of a fit before; no callback keeps it now
            del self.ema
        if is_sharded(self._model):
            take_sharded(self._model, checkpoint, path, self.lora)
        elif (model := take_for_use(self._model, checkpoint, self.lora, bool(differing))) is not self._model:
            self._set_transformer(model.to(self.device))
