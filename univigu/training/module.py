"""The LightningModule: connects the foundation, the transformer, the uni-flow objective and the task runner."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from univigu.checkpoint import PREFIX, check_resumed, config_differences, load_weights, start_weights
from univigu.data.inputs import PredictTask
from univigu.data.sample import questions_of
from univigu.data.video import to_model_range
from univigu.evaluation.held_out import EvaluationOptions, HeldOutEvaluation, own_samples
from univigu.flow.objective import (
    ConditionDropout,
    UniFlowBatch,
    UniFlowLosses,
    UniFlowObjective,
    by_noise_level,
    num_positions,
)
from univigu.flow.random import make_generator
from univigu.flow.text import make_text_flow
from univigu.models.encode import CONVENTIONS
from univigu.models.foundation import EMBEDDED_FOUNDATION, Foundation
from univigu.models.lora import LoraOptions, add_lora
from univigu.models.options import ArchitectureOptions, check_replaced
from univigu.models.tokens import fit_slot
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import known_options
from univigu.pipeline import TaskRunner
from univigu.sampling.options import SamplingOptions
from univigu.training.conditions import ANSWER_LENGTH, ANSWER_WEIGHT, ask_questions, vary_conditions
from univigu.training.optim import OptimizerOptions, freeze_by_rate, group_of, make_optimizer
from univigu.training.parallel import ShardedStrategy, build_sharded, trained_weights_changed
from univigu.training.precision import BFloat16Weights, compute_in_bfloat16, load_generator
from univigu.training.prediction import Row, predict_batch
from univigu.training.stages import Stage


class UniViGU(LightningModule):
    """A unified video generator and captioner in training.

    A batch is a dict of ``key`` (names), ``latents`` or ``video`` (uint8 [B, F, C, H, W]), ``prompt``, ``caption`` and
    ``prompt_ids``, ``caption_ids`` (their tokens), and optionally ``prompt_embeds`` with ``null_embeds``. Training on
    questions reads ``qa`` (questions and answers), ``test`` and ``validate`` read ``scene`` (each may be None).

    Args:
        foundation: folder of the pretrained generator in WanPipeline layout.
        init_from: weights to start from instead of the foundation's transformer: a checkpoint (.ckpt file or sharded
            folder), a saved transformer folder, or "random" for random weights (an ablation).
        architecture: what the text stream adds to the generator.
        optimizer: the optimizer and its learning rates.
        sampling: how validation and prediction sample.
        predict_task: what ``lightning predict`` makes.
        text_encoder_dtype: dtype of the (frozen) text encoder's weights; None is bfloat16 with the trainer's precision
            bf16-true, else float32.
        gradient_checkpointing: recompute activations in the backward pass.
        compile_blocks: compile the transformer's blocks with ``torch.compile``.
        vae_tiling: save the VAE's memory: process one video at a time, in overlapping tiles, which differ a little at
            their seams.
        lora: train adapters on the shared attention instead of the pretrained weights; None trains the weights.
        evaluation: what ``lightning test`` and ``lightning validate`` measure.
        seed: seeds noise, times, dropout and samples.
    """

    compile_backend = "inductor"  # of torch.compile
    _evaluation: tuple[HeldOutEvaluation] | tuple[()] = ()  # in a tuple, so that it is no part of the module tree

    def __init__(
        self,
        foundation: str = EMBEDDED_FOUNDATION,
        init_from: str | None = None,
        architecture: ArchitectureOptions = ArchitectureOptions(),  # noqa: B008
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
        predict_task: PredictTask = "caption",
        text_encoder_dtype: Literal["float32", "bfloat16"] | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        vae_tiling: bool = False,
        lora: LoraOptions | None = None,
        evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.foundation_path, self.init_from, self.seed = foundation, init_from, seed
        self.architecture, self.lora, self.sampling, self.predict_task = architecture, lora, sampling, predict_task
        self.optimizer_options, self.evaluation_options = optimizer, evaluation
        self.text_encoder_dtype, self.vae_tiling = text_encoder_dtype, vae_tiling
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.stage, self.stage_name, self.stage_step = Stage(), "", 0
        self.stages: Sequence[Stage] = [self.stage]  # of the run; StageSwitch sets them
        self.transformer: UniViGUTransformer3DModel | None = None

    @property
    def foundation(self) -> Foundation:
        """The frozen components, on the module's device; each is loaded on its first use."""
        return self._foundation.to(self.device)

    @cached_property
    def _foundation(self) -> Foundation:
        dtype = getattr(torch, self.text_encoder_dtype or ("bfloat16" if self._half else "float32"))
        return Foundation(self.foundation_path, dtype, self.vae_tiling)

    @property
    def tasks(self) -> TaskRunner:
        """The task runner over the current weights."""
        return TaskRunner(self.foundation, self._model, self._foundation.scheduler, self.sampling, self.device)

    @cached_property
    def shift(self) -> float:
        """The timestep shift of the foundation's scheduler, for training as for sampling."""
        config = self.foundation.scheduler().config
        return float(config.get("flow_shift", config.get("shift", 1.0)))

    # ---------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        if stage in ("test", "predict") and self.device_mesh is not None and self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"lightning {stage}: samples end at different steps on different processes, but a sharded model needs "
                "all of them; use one process, --trainer.strategy auto --trainer.devices 1 (see docs/CLUSTER.md)"
            )
        precision = self.trainer.precision
        if precision in ("16-true", "64-true") or (self.device_mesh is not None and precision == "bf16-true"):
            choices = "32-true, bf16-mixed, or bf16-true for a model that is not sharded"
            raise MisconfigurationException(f"trainer.precision={precision!r}: expected {choices}")
        if precision == "bf16-true":
            self.trainer.strategy.precision_plugin = BFloat16Weights()
        if stage == "fit" and isinstance(self.trainer.strategy, DDPStrategy):
            # Frozen weights change with the stages, and a small batch may lack a task.
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def configure_model(self) -> None:
        """Build the transformer once, from the foundation or from an earlier stage's weights."""
        if self.transformer is not None:
            return
        strategy = self.trainer.strategy if self._trainer is not None else None
        if isinstance(strategy, ShardedStrategy):
            mesh, device, dtype = strategy.device_mesh["data_parallel"], strategy.root_device, strategy.compute_dtype
            self._set_transformer(build_sharded(self._build_transformer, self.lora, mesh, device, dtype))
        else:
            self._set_transformer(self._build_transformer())

    def _weight_dtype(self, name: str) -> torch.dtype:
        """The dtype to load a weight in: with bf16-true float32 only if a stage of the fit trains it."""
        rates = [self.optimizer_options.rates(stage) for stage in self.stages] if self._fits else []
        trained = any(rate.get(group_of(name, self.lora), 0.0) > 0 for rate in rates)
        return torch.bfloat16 if self._half and not trained else torch.float32

    @property
    def _half(self) -> bool:
        return self._trainer is not None and self.trainer.precision == "bf16-true"

    @property
    def _fits(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == "fit"

    def _build_transformer(self) -> UniViGUTransformer3DModel:
        if self.init_from not in (None, "random") and self._trainer is not None and not self._fits:
            model = load_weights(self.init_from, dtype=self._weight_dtype)  # with its own architecture
        else:
            torch.manual_seed(self.seed)  # for the text stream's new weights
            model = start_weights(self.init_from, self.foundation, self.architecture, self._weight_dtype)
        if self.lora is not None:
            add_lora(model, self.lora)
        return model

    def _set_transformer(self, model: UniViGUTransformer3DModel) -> None:
        if self._half and self.trainer.state.fn != "predict":
            compute_in_bfloat16(model, self.trainer.strategy.root_device.type)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if self.compile_blocks:
            # Checkpointing recomputes with the code of the newest size, which must be the forward's, too.
            dynamic = False if self.gradient_checkpointing else None
            model.compile_repeated_blocks(backend=self.compile_backend, dynamic=dynamic)
        self.transformer = model

    def enter_stage(self, stage: Stage, name: str = "") -> None:
        """Start a stage: freeze weights; ``StageSwitch`` sets the learning rates."""
        self.stage, self.stage_name = stage, name
        if self.transformer is not None:
            self.on_fit_start()

    def on_fit_start(self) -> None:
        length, asks = self.stage.text_length, self.stage.question_share > 0
        self._model.register_to_config(text_length=length, answer_length=min(length, ANSWER_LENGTH) if asks else None)
        freeze_by_rate(self._model, self.lora, self.optimizer_options.rates(self.stage))
        trained_weights_changed(self._model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self._model, self.lora, self.optimizer_options)

    # ---------------------------------------------------------------- training

    @property
    def objective(self) -> UniFlowObjective:
        """The losses of the present stage."""
        config = self._model.config
        flow = make_text_flow(config.text_flow, config.vocab_size)
        return UniFlowObjective(flow, self.shift, self.stage.text_time_power, config.clean_video_reads_prompt)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        stage, size, step = self.stage, len(batch["key"]), self.trainer.fit_loop.total_batch_idx
        counts, dropout = stage.tasks.counts(size, step), stage.condition_dropout
        inputs, draw = self.prepare(batch), random.Random(f"{self.seed}, {self.global_rank}, {step}")
        if not stage.writes_text and self.tasks.conventions.prompt_padding == "zeros":
            inputs = vary_conditions(inputs, batch, self.tasks, self.foundation.path, draw)
        text_share, weight = stage.text_share_at(self.stage_step), 1.0
        if stage.writes_text and random.Random(step).random() < stage.question_share:  # the same on all ranks
            counts = 0, counts[0] + counts[1], counts[2]
            if (asked := ask_questions(inputs, batch, counts[1], self.tasks, draw, stage.question_weights)) is not None:
                inputs, text_share, weight, dropout = asked, 1.0, ANSWER_WEIGHT, replace(dropout, understand=0.0)
                counts = 0, len(inputs.latents) - counts[2], counts[2]
        patches = zip(inputs.latents.shape[2:], self._model.config.patch_size, strict=True)
        length = 0 if inputs.text_ids is None else num_positions(inputs.text_ids.shape[1], text_share)
        self.sample_tokens = prod(n // p for n, p in patches) + length
        losses = self.objective(
            self._model,
            inputs,
            counts,
            dropout=dropout,
            generator=make_generator(self.device, self.seed, self.global_rank, step),  # no state to restore
            text_share=text_share,
            step=step,
            teacher=self._teacher if stage.teacher_weight and stage.tasks.generate else None,
        )
        loss = losses.total(size, stage.teacher_weight, weight)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self._log_losses(losses)
        return loss

    @cached_property
    def _teacher(self) -> WanTransformer3DModel:
        """The frozen foundation; as a cached property it is no part of the module tree and of checkpoints."""
        if isinstance(self._model, FSDPModule) or not self.tasks.conventions.latents_normalized:
            raise MisconfigurationException(
                f"stages: teacher_weight={self.stage.teacher_weight}: the foundation cannot teach a sharded model, nor "
                "one whose latents are not normalised; set it to 0"
            )
        return load_generator(self.foundation.path / "transformer", self._half, self.device)

    def prepare(self, batch: dict[str, Any]) -> UniFlowBatch:
        """Encode a batch; precomputed latents and embeddings are used as they are."""
        target, text_ids = self.stage.target, None
        if "prompt_embeds" in batch and self.tasks.conventions.prompt_padding == "zeros":  # as shards store it
            embeds = batch["prompt_embeds"].to(self.device)
            null = self.tasks.conventions.null(batch["null_embeds"].to(self.device))
        else:
            embeds = self.tasks.encode_ids(batch["prompt_ids"])
            null = self.tasks.encode_null(embeds.shape[1])
        if self.stage.writes_text:
            ids = batch["prompt_ids" if target == "prompt" else "caption_ids"]
            ids = fit_slot(ids, self.stage.text_length, self.foundation.pad_token_id, target)
            text_ids = self.tasks.encode_tokens(ids, target)
        return UniFlowBatch(self.latents_of(batch).float(), embeds, null, text_ids)

    def latents_of(self, batch: dict[str, Any]) -> Tensor:
        """Latents of a batch on the module's device, as the transformer expects them; encodes videos."""
        if "latents" not in batch:
            return self.tasks.encode_video(to_model_range(batch["video"].to(self.device)))
        latents, conventions = batch["latents"].to(self.device), self.tasks.conventions
        # Shards store normalised latents; the VAE is loaded only for a model that expects others.
        return latents if conventions.latents_normalized else conventions.from_normalized(latents, self.foundation.vae)

    def _log_losses(self, losses: UniFlowLosses) -> None:
        by_level = self.trainer.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        for modality in ("video", "text"):
            values, times = getattr(losses, modality).detach(), getattr(losses, f"{modality}_times")
            if values.numel():
                self.log(f"train/{modality}_loss", values.mean(), prog_bar=True, batch_size=values.numel())
                for level, value in by_noise_level(values, times).items() if by_level else ():
                    self.log(f"train/{modality}_loss_{level}", value, batch_size=values.numel())
        if losses.teacher is not None:
            self.log("train/teacher_distance", losses.teacher.detach().mean(), batch_size=losses.teacher.numel())

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out losses, with the same noise and times every time: of text, read from the clean video without its
        prompt (an answer with its question), and of video, denoised under the prompt."""
        size, inputs = len(batch["key"]), self.prepare(batch)
        dropout = ConditionDropout(understand=0.0 if questions_of(batch) else 1.0, generate=0.0)
        for modality, counts in (("text", (0, size, 0)), ("video", (0, 0, size))):
            if modality == "text" and inputs.text_ids is None:
                continue
            generator = make_generator(self.device, self.seed, 1, batch_idx)
            losses = self.objective(self._model, inputs, counts, dropout=dropout, generator=generator)
            value = getattr(losses, modality).mean()
            self.log(f"val/{modality}_loss", value, prog_bar=True, batch_size=size, sync_dist=True)

    def on_validation_start(self) -> None:
        """``lightning validate`` measures what ``test`` does, unless the model is sharded; ``fit`` only has losses."""
        sharded = self.device_mesh is not None and self.trainer.world_size > 1
        if self.trainer.state.fn == "validate" and not sharded:
            self.on_test_start()

    def on_test_start(self) -> None:
        if getattr(getattr(self.trainer, "datamodule", None), "precompute", False):  # else the first batch shows
            self.evaluation_options.refuse_latents(self.stage.writes_text)
        generator = load_generator(self.foundation.path / "transformer", self._half, self.device)
        evaluation = HeldOutEvaluation(self.stage.target, self.shift, generator, self.evaluation_options, self.seed)
        self._evaluation = (evaluation.to(self.device).eval(),)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.on_validation_batch_end(None, batch)

    def on_validation_batch_end(self, outputs: Any, batch: dict[str, Any], *numbers: int) -> None:
        loader = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        for evaluation in self._evaluation:
            if counted := own_samples(batch, getattr(loader, "own", None), evaluation.counted):
                evaluation.update(self.tasks, self.prepare(counted), counted)

    def on_test_epoch_end(self) -> None:
        prefix = "test" if self.trainer.testing else "val"
        for evaluation in self._evaluation:
            results = evaluation.compute(lambda tensor: self.trainer.strategy.reduce(tensor, reduce_op="sum"))
            self.log_dict({f"{prefix}/{name}": value for name, value in results.items()})
        self._evaluation = ()

    on_validation_epoch_end = on_test_epoch_end

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[int, Row]]:
        return predict_batch(self, batch, self.trainer.datamodule)  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- checkpoints

    @property
    def _model(self) -> UniViGUTransformer3DModel:
        self.configure_model()
        assert self.transformer is not None
        return self.transformer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what is needed to rebuild the model without its configuration file."""
        config = known_options(UniViGUTransformer3DModel, self._model.config)
        checkpoint["univigu"] = {"transformer_config": config}
        if self.lora is not None:
            checkpoint["univigu"]["lora"] = asdict(self.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Evaluation, prediction and plain loading take the checkpoint's architecture; a resumed fit must have it."""
        path = Path("ckpt_path")
        if self._trainer is not None:
            path = Path(self.trainer.strategy.broadcast(self.trainer.ckpt_path or path))
        if "univigu" not in checkpoint:
            raise ValueError(f"{path}: not a checkpoint of this project (it has no 'univigu' entry)")
        saved = checkpoint["univigu"]["transformer_config"]
        check_replaced(saved, path)
        if not self._fits:
            if isinstance(self._model, FSDPModule):
                raise MisconfigurationException(f"{path}: use model.init_from to evaluate with a sharded model")
            if hasattr(self, "ema"):  # of an earlier fit of this module; no callback updates it now
                del self.ema
            model = load_weights(path, dtype=self._weight_dtype, checkpoint=checkpoint)
            self._set_transformer(model.to(self.device))
            checkpoint["state_dict"] = {PREFIX + name: value for name, value in self._model.state_dict().items()}
            return
        differing = config_differences(saved, self._model.config)
        for name in {"text_length", "answer_length", *CONVENTIONS} & differing.keys():  # no weight depends on these
            self._model.register_to_config(**{name: differing.pop(name)[0]})
        if differing:
            raise MisconfigurationException(f"the checkpoint's model differs from the configuration: {differing}")
        check_resumed(checkpoint, path, self.lora, averages=hasattr(self, "ema"))
