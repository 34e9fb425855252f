"""What ``lightning test`` and ``lightning validate`` measure on held-out clips, in both directions and at once.

caption    texts read off clean videos without a prompt, against the truth
generate   videos made from prompts, against what the prompts ask for and against the true videos
joint      videos and texts made together, against each other
vae        the videos' way through the VAE and back
flow       the video's denoising loss beside the foundation's own: is the generator still what it was?

docs/EVALUATION.md lists every name that is logged.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from univigu.data.sample import questions_of
from univigu.data.video import to_frames
from univigu.evaluation.caption_metrics import CaptionScores
from univigu.flow.random import randn
from univigu.flow.time import shift_sigma, time_from_sigma, to_timestep
from univigu.flow.video import flow_matching_loss, interpolate
from univigu.shapes.metrics import ShapesAgreement, ShapesTextAccuracy, ShapesVideoAccuracy

CLIP_FRAMES = 8
"""Frames of a video that CLIPScore averages over."""


@dataclass
class EvaluationOptions:
    """What ``lightning test`` and ``lightning validate`` measure besides what costs little."""

    generation: bool = True
    """Draw videos and joint samples too, which is most of the work."""
    clip: str | None = None
    """Folder of a transformers CLIP; with it come CLIPScores (``*/clip``)."""
    video_features: str | None = None
    """TorchScript file of a detector (I3D as StyleGAN-V ships it) or folder of a transformers video encoder (VideoMAE);
    with it come Frechet video distances (``*/fvd``)."""

    def refuse_latents(self, writes_text: bool) -> None:
        """Raise a MisconfigurationException if something needs the true videos, which batches of latents lack.

        Args:
            writes_text: whether the stage trains text, so that captions are scored.
        """
        for name, needing, needed in (
            ("clip", "caption/clip compares captions with", writes_text),
            ("video_features", "Frechet distances compare with", self.generation),
        ):
            if needed and getattr(self, name) is not None:
                raise MisconfigurationException(
                    f"model.evaluation.{name}={getattr(self, name)!r}: {needing} the true videos, and the data are "
                    "latents; use shards of videos with --data.precompute false"
                )


class _Counts(Metric):
    """Samples that each metric has seen, on all ranks together: which of them to compute all ranks must agree on."""

    full_state_update = False
    seen: torch.Tensor

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.add_state("seen", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, name: str, number: int) -> None:
        self.seen[self.names.index(name)] += number

    def compute(self) -> dict[str, int]:
        return dict(zip(self.names, self.seen.tolist(), strict=True))


class HeldOutEvaluation(nn.Module):
    """Metrics of a held-out split; batches are added, ``compute`` reads them off, the same on every rank.

    Clips of the embedded world are checked property by property as well; all are compared by what papers report.

    Args:
        kind: which text the model was last trained to write, "prompt" or "caption".
        options: what is measured.

    Raises:
        ValueError: a model folder that cannot be read.
    """

    def __init__(self, kind: str, options: EvaluationOptions = EvaluationOptions()) -> None:  # noqa: B008
        super().__init__()
        self.options = options
        metrics: dict[str, nn.Module] = {
            "caption": ShapesTextAccuracy(kind),
            "captions": CaptionScores(),
            "tokens": MeanMetric(),
            "psnr": PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3, 4)),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
            "flow": MeanMetric(),
            "flow_foundation": MeanMetric(),
        }
        if options.generation:
            metrics |= {"generate": ShapesVideoAccuracy(positions=False), "joint": ShapesAgreement()}
        metrics |= _model_metrics(options)
        self.metrics: Any = nn.ModuleDict(metrics)
        self.counts = _Counts(list(metrics))

    @torch.no_grad()
    def update(self, module: Any, foundation_model: WanTransformer3DModel, batch: Mapping[str, Any]) -> None:
        """Add a batch of the test loader.

        Raises:
            MisconfigurationException: something was asked for that needs the videos, and the batch has latents alone.
        """
        if "video" not in batch:  # before anything is drawn
            self.options.refuse_latents(module.stage.writes_text)
        inputs = module.prepare(batch)
        length, shape = batch["prompt_ids"].shape[1], tuple(inputs.latents.shape[1:])
        # A sample's seed comes from its key: the same whatever the batch size or the number of ranks.
        tasks, questions = module.tasks, questions_of(batch)
        names = batch["key"] if questions is None else map("".join, zip(batch["key"], questions, strict=True))
        seeds = [zlib.crc32(name.encode()) for name in names]
        texts: list[str] | None = None
        if inputs.text_ids is not None:  # else the stage trains no text, and what the model writes means nothing
            samples = tasks.caption(inputs.latents, questions, length, module.generators(seeds))
            texts = tasks.texts(samples)
            matches = token_matches(samples.tokens, inputs.text_ids, module.foundation.pad_token_id)
            self._add("tokens", len(seeds), matches)
            self._texts(module.stage.target, texts, batch)
        self._videos(module, inputs.latents, texts, batch)
        self._flow(module, foundation_model, inputs, seeds)
        if not self.options.generation or questions:  # no video is made of a question
            return
        samples = tasks.generate(batch["prompt"], length, shape, module.generators(seeds))
        frames = to_frames(tasks.decode(samples.latents))
        self._made("generate", frames, batch["prompt"])
        self._add("generate", _known(batch), frames.cpu(), batch["scene"])
        if texts is None:
            return
        samples = tasks.joint(batch["prompt"], length, shape, module.generators(seeds))
        frames, captions = to_frames(tasks.decode(samples.latents)), tasks.texts(samples)
        self._made("joint", frames, captions)
        known = [i for i, scene in enumerate(batch["scene"]) if scene is not None]
        if known:
            self._add("joint", len(known), [captions[i] for i in known], frames.cpu()[known])

    def _add(self, name: str, number: int, *values: Any, **options: Any) -> None:
        self.metrics[name].update(*values, **options)
        self.counts.update(name, number)

    def _texts(self, kind: str, texts: list[str], batch: Mapping[str, Any]) -> None:
        """Captions, against the scenes where they are known and against the true texts where there are any."""
        if not questions_of(batch):  # an answer describes no scene
            self._add("caption", _known(batch), texts, batch["scene"])
        pairs = [(text, [truth]) for text, truth in zip(texts, batch[kind], strict=True) if truth.strip()]
        if pairs:
            self._add("captions", len(pairs), [text for text, _ in pairs], [truth for _, truth in pairs])

    def _videos(self, module: Any, latents: torch.Tensor, texts: list[str] | None, batch: Mapping[str, Any]) -> None:
        """The clips themselves: their way through the VAE, the captions beside them, the features of true videos."""
        videos = batch.get("video")
        if videos is None:
            return
        videos = videos.to(latents.device)
        back = module.decode(latents)
        self._add("psnr", len(videos), back.float() / 255, videos.float() / 255)
        self._add("ssim", len(videos), back.flatten(0, 1).float() / 255, videos.flatten(0, 1).float() / 255)
        if texts is not None and "caption_clip" in self.metrics:
            self._add("caption_clip", len(texts), videos, texts)
        for name in ("generate_fvd", "joint_fvd"):
            if name in self.metrics:
                self.metrics[name].update(videos, real=True)

    def _made(self, task: str, frames: torch.Tensor, texts: list[str]) -> None:
        """Videos that were made, against the text they belong to and as a set against the true ones."""
        if f"{task}_clip" in self.metrics:
            self._add(f"{task}_clip", len(texts), frames, texts)
        if f"{task}_fvd" in self.metrics:
            self._add(f"{task}_fvd", len(texts), frames, real=False)

    def _flow(self, module: Any, foundation_model: WanTransformer3DModel, inputs: Any, seeds: list[int]) -> None:
        """Both models' losses on the same noise, at eight times spread evenly over the (shifted) schedule."""
        generators = [torch.Generator(inputs.latents.device).manual_seed(seed) for seed in seeds]
        noise = randn(inputs.latents.shape, generators, inputs.latents.device)
        shift = module.shift
        for i in range(8):
            t = time_from_sigma(shift_sigma((i + 0.5) / 8, shift))
            times = t.to(inputs.latents.device).expand(inputs.latents.shape[0])
            noisy = interpolate(noise, inputs.latents, times)
            models = {"flow": module.transformer}
            if module.tasks.conventions.latents_normalized:  # else the foundation knows other latents
                models["flow_foundation"] = foundation_model
            for name, model in models.items():
                prediction = model(noisy, to_timestep(times), inputs.prompt_embeds, return_dict=False)[0]
                losses = flow_matching_loss(prediction, noise, inputs.latents)
                self._add(name, len(seeds), losses)

    def compute(self) -> dict[str, torch.Tensor]:
        """All results by name, such as "caption/cider" or "flow/ratio"; metrics without a sample are left out."""
        titles = {"tokens": "caption/tokens", "psnr": "vae/psnr", "ssim": "vae/ssim", "flow": "flow/loss",
                  "flow_foundation": "flow/foundation"}  # fmt: skip
        results: dict[str, torch.Tensor] = {}
        for name, seen in self.counts.compute().items():
            if seen == 0 or (name.endswith("_fvd") and seen < 2):  # of one video there is no covariance
                continue
            value = self.metrics[name].compute()
            if isinstance(value, dict):
                results |= {f"{name.removesuffix('s')}/{key}": part for key, part in value.items()}
            else:
                results[titles.get(name, name.replace("_", "/"))] = value
        if "flow/foundation" in results:
            results["flow/ratio"] = results["flow/loss"] / results["flow/foundation"]
        return results


def _model_metrics(options: EvaluationOptions) -> dict[str, nn.Module]:
    """Those that need a pretrained model, as far as one is given."""
    from univigu.evaluation.video_metrics import ClipEncoder, FrechetVideoDistance, VideoCLIPScore, VideoFeatures

    tasks = ("generate", "joint") if options.generation else ()
    metrics: dict[str, nn.Module] = {}
    if options.clip is not None:
        clip = ClipEncoder(options.clip)
        metrics |= {f"{task}_clip": VideoCLIPScore(clip, CLIP_FRAMES) for task in ("caption", *tasks)}
    if options.video_features is not None:
        features = VideoFeatures(options.video_features)
        metrics |= {f"{task}_fvd": FrechetVideoDistance(features) for task in tasks}
    return metrics


def _known(batch: Mapping[str, Any]) -> int:
    """Clips whose scene is known, because they are of the embedded world."""
    return sum(scene is not None for scene in batch["scene"])


def token_matches(tokens: torch.Tensor, truth: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Which of the true text's tokens (its end counted, its padding not) are right: float [number of them]."""
    length = min(tokens.shape[1], truth.shape[1])
    real = truth[:, :length] != pad_token_id
    return (tokens[:, :length] == truth[:, :length])[real].float()


def own_samples(batch: Mapping[str, Any], own: Collection[int] | None, seen: set[int]) -> dict[str, Any] | None:
    """A batch without the samples that are repeated, here or by other ranks, so that all count once.

    The loader repeats samples where ranks need equally many batches, or where a batch would be empty because its
    samples are damaged.

    Args:
        batch: of an evaluation loader; ``number`` holds the samples' places in the split.
        own: the numbers that are this rank's to count; None counts all.
        seen: the numbers that have been counted; this batch's are added.

    Returns:
        None where nothing is left.
    """
    numbers = batch.get("number")
    if numbers is None or own is None:
        return dict(batch)
    keep = []
    for i, number in enumerate(numbers):
        if number in own and number not in seen:
            seen.add(number)
            keep.append(i)
    if len(keep) == len(numbers):
        return dict(batch)

    def part(value: Any) -> Any:
        if len(value) != len(numbers):  # the empty prompt's embeddings, one for all
            return value
        return value[keep] if isinstance(value, torch.Tensor) else [value[i] for i in keep]

    return {name: part(value) for name, value in batch.items()} if keep else None


class EvaluatedModule(LightningModule):
    """The part of the LightningModule that runs :class:`HeldOutEvaluation` in ``test`` and in ``validate``.

    In ``fit`` validation stays as cheap as it is: held-out losses alone.
    """

    evaluation_options: EvaluationOptions
    _evaluation: tuple[HeldOutEvaluation, WanTransformer3DModel] | None = None
    """In a tuple, to stay outside of the module tree: none of it belongs into checkpoints."""

    def _start_evaluation(self) -> None:
        this: Any = self
        evaluation = HeldOutEvaluation(this.stage.target, self.evaluation_options).to(self.device)
        # Latents that were made of videos are known of now; shards that hold nothing else show in the first batch.
        if getattr(getattr(self.trainer, "datamodule", None), "precompute", False):
            self.evaluation_options.refuse_latents(this.stage.writes_text)
        foundation = WanTransformer3DModel.from_pretrained(this.foundation.path / "transformer")
        self._evaluation = (evaluation, foundation.to(self.device).eval())
        self._counted: set[int] = set()

    def _evaluate(self, batch: Mapping[str, Any]) -> None:
        assert self._evaluation is not None
        testing = self.trainer.state.fn == TrainerFn.TESTING
        loader: Any = self.trainer.test_dataloaders if testing else self.trainer.val_dataloaders
        share = getattr(getattr(loader, "order", None), "own", None)
        counted = own_samples(batch, share, self._counted)
        if counted is not None:
            self._evaluation[0].update(self, self._evaluation[1], counted)

    def _log_evaluation(self, prefix: str) -> None:
        assert self._evaluation is not None
        self.log_dict({f"{prefix}/{name}": value for name, value in self._evaluation[0].compute().items()})
        self._evaluation = None

    def on_test_start(self) -> None:
        self._start_evaluation()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def on_validation_start(self) -> None:
        # Samples end at different steps on different processes, which a sharded model cannot do.
        sharded = self.device_mesh is not None and self.trainer.world_size > 1
        if self.trainer.state.fn == TrainerFn.VALIDATING and not sharded:
            self._start_evaluation()

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self._evaluation is not None:
            self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        if self._evaluation is not None:
            self._log_evaluation("val")
