"""What ``lightning test`` and ``lightning validate`` measure on held-out clips, in both directions and at once.

docs/EVALUATION.md says what each name means that is logged.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from univigu.data.sample import questions_of
from univigu.data.video import to_frames
from univigu.evaluation.caption_metrics import CaptionScores
from univigu.evaluation.video_metrics import ClipEncoder, FrechetVideoDistance, VideoCLIPScore, VideoFeatures
from univigu.flow.objective import UniFlowBatch
from univigu.flow.random import randn
from univigu.flow.time import shift_sigma, time_from_sigma, to_timestep
from univigu.flow.video import flow_matching_loss, interpolate
from univigu.pipeline import TaskRunner
from univigu.sampling.sampler import Task
from univigu.shapes.metrics import AttributeAccuracy, ShapesTextAccuracy, agreement
from univigu.shapes.scenes import Scene
from univigu.shapes.text_checker import normalize_text, parse_text
from univigu.shapes.video_checker import detect


@dataclass
class EvaluationOptions:
    """What ``lightning test`` and ``lightning validate`` measure besides what costs little."""

    generation: bool = True
    """Draw videos and joint samples too, which is most of the work."""
    clip: str | None = None
    """Folder of a transformers CLIP; with it come CLIPScores (``*/clip``)."""
    video_features: str | None = None
    """Folder of a transformers video encoder (VideoMAE), or "trusted:" and a TorchScript file (I3D as StyleGAN-V ships
    it), which is code; with it come Frechet video distances (``*/fvd``)."""

    def refuse_latents(self, writes_text: bool) -> None:
        """Raise a MisconfigurationException if an option needs the true videos, which batches of latents lack."""
        for name, needed in (("clip", writes_text), ("video_features", self.generation)):
            if needed and (value := getattr(self, name)) is not None:
                raise MisconfigurationException(
                    f"model.evaluation.{name}={value!r}: needs true videos, but the data are latents; "
                    "use shards of videos with --data.precompute false"
                )


class HeldOutEvaluation(nn.Module):
    """Metrics of a held-out split; batches are added, ``compute`` gives the results, the same on every rank.

    Clips of the embedded world are checked property by property as well; all are compared by what papers report.

    Args:
        target: which text the model was last trained to write, "prompt" or "caption".
        shift: the timestep shift of the foundation's scheduler.
        foundation: the generator before training, for comparison.
        seed: another one draws other samples of the same clips.
    """

    def __init__(
        self, target: str, shift: float, foundation: WanTransformer3DModel, options: EvaluationOptions, seed: int = 0
    ) -> None:
        super().__init__()
        self.target, self.shift, self.foundation, self.options, self.seed = target, shift, foundation, options, seed
        metrics: dict[str, nn.Module] = {
            "caption/properties": ShapesTextAccuracy(target),
            "answer/properties": AttributeAccuracy(),
            "caption/scores": CaptionScores(),
            "caption/tokens": MeanMetric(),
            "vae/psnr": PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3, 4)),
            "vae/ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
            "flow/loss": MeanMetric(),
            "flow/foundation": MeanMetric(),
        }
        tasks = ("generate", "joint") if options.generation else ()
        metrics |= {f"{task}/properties": AttributeAccuracy() for task in tasks}
        if options.clip is not None:
            clip = ClipEncoder(options.clip)
            metrics |= {f"{task}/clip": VideoCLIPScore(clip) for task in ("caption", *tasks)}
        if options.video_features is not None:
            features = VideoFeatures(options.video_features)
            metrics |= {f"{task}/fvd": FrechetVideoDistance(features) for task in tasks}
        self.metrics: Any = nn.ModuleDict(metrics)
        self.seen = dict.fromkeys(self.metrics, 0)
        """Samples of each metric on this rank."""
        self.counted = set[int]()
        """Numbers of the samples so far."""

    def add(self, name: str, number: int, *values: Any, **options: Any) -> None:
        if name in self.metrics:
            self.metrics[name].update(*values, **options)
            self.seen[name] += number

    @torch.no_grad()
    def update(self, tasks: TaskRunner, inputs: UniFlowBatch, batch: Mapping[str, Any]) -> None:
        """Add a batch of the test loader; ``inputs`` is the same batch encoded, with texts if the stage trains any."""
        if "video" not in batch:  # before anything is sampled
            self.options.refuse_latents(inputs.text_ids is not None)
        questions, length, shape = questions_of(batch), batch["prompt_ids"].shape[1], tuple(inputs.latents.shape[1:])
        scenes = {i: Scene.from_dict(scene) for i, scene in enumerate(batch["scene"]) if scene is not None}
        # A sample's seed comes from its key and ours: the same whatever the batch size or the number of ranks.
        names = batch["key"] if questions is None else map("".join, zip(batch["key"], questions, strict=True))
        seeds = [zlib.crc32(name.encode(errors="surrogateescape"), self.seed) for name in names]
        captions: list[str] | None = None
        if inputs.text_ids is not None:
            generator = tasks.generators(seeds)
            task: Task = "answer" if questions else "caption"
            samples = tasks.sample(task, questions, length, latents=inputs.latents, generator=generator)
            captions, ids, true = tasks.texts(samples), samples.tokens, batch[self.target]
            assert ids is not None
            size = min(ids.shape[1], inputs.text_ids.shape[1])
            true_ids = tasks.vocabulary.decode(inputs.text_ids[:, :size])
            real = true_ids != tasks.components.tokenizer.pad_token_id  # the text's end counts, its padding does not
            self.add("caption/tokens", len(captions), (ids[:, :size] == true_ids)[real].float())
            if pairs := [pair for pair in zip(captions, true, strict=True) if pair[1].strip()]:
                self.add("caption/scores", len(pairs), *zip(*pairs, strict=True))
            if questions:  # an answer does not describe the scene
                answers = zip(captions, true, batch["kind"], strict=True)
                right = [{str(kind): normalize_text(text) == normalize_text(answer)} for text, answer, kind in answers]
                self.add("answer/properties", len(right), right)
            else:
                self.add("caption/properties", len(scenes), captions, batch["scene"])
        if "video" in batch:
            self._true_videos(tasks, batch["video"].to(inputs.latents.device), inputs.latents, captions)
        if questions:  # no video is denoised or generated from a question
            return
        self._flow(tasks, inputs, seeds)
        made: tuple[Task, ...] = ("generate",) if captions is None else ("generate", "joint")
        for task in made if self.options.generation else ():
            samples = tasks.sample(task, batch["prompt"], length, shape=shape, generator=tasks.generators(seeds))
            frames = to_frames(tasks.decode(samples.latents))
            texts = batch["prompt"] if task == "generate" else tasks.texts(samples)
            self.add(f"{task}/clip", len(texts), frames, texts)
            self.add(f"{task}/fvd", len(texts), frames, real=False)
            said = {i: parse_text(texts[i]) for i in scenes}
            results = [agreement(reading, detect(frames[i])) for i, reading in said.items()]
            self.add(f"{task}/properties", len(scenes), results)

    def _true_videos(
        self, tasks: TaskRunner, videos: torch.Tensor, latents: torch.Tensor, captions: list[str] | None
    ) -> None:
        """The VAE's reconstruction, the captions of the clips, and the features of true videos."""
        decoded, true = to_frames(tasks.decode(latents)).float() / 255, videos.float() / 255
        self.add("vae/psnr", len(videos), decoded, true)
        self.add("vae/ssim", len(videos), decoded.flatten(0, 1), true.flatten(0, 1))
        if captions is not None:
            self.add("caption/clip", len(videos), videos, captions)
        for task in ("generate", "joint"):
            self.add(f"{task}/fvd", 0, videos, real=True)

    def _flow(self, tasks: TaskRunner, inputs: UniFlowBatch, seeds: list[int]) -> None:
        """Both models' losses on the same noise, at eight times spread evenly over the (shifted) schedule."""
        latents, device = inputs.latents, inputs.latents.device
        noise = randn(latents.shape, tasks.generators(seeds), device)
        models: dict[str, nn.Module] = {"flow/loss": tasks.transformer}
        if tasks.conventions.latents_normalized:  # else the foundation expects other latents
            models["flow/foundation"] = self.foundation
        for i in range(8):
            times = time_from_sigma(shift_sigma((i + 0.5) / 8, self.shift)).to(device).expand(len(latents))
            noisy = interpolate(noise, latents, times)
            for name, model in models.items():
                prediction = model(noisy, to_timestep(times), inputs.prompt_embeds, return_dict=False)[0]
                self.add(name, len(seeds), flow_matching_loss(prediction, noise, latents))

    def compute(self, sum_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """All results by name, such as "caption/cider" or "flow/ratio"; those without a sample are left out.

        ``sum_ranks`` sums a tensor over the ranks, because all ranks must compute the same metrics.
        """
        results: dict[str, torch.Tensor] = {}
        seen = sum_ranks(torch.tensor(list(self.seen.values()), device=self.foundation.device))
        for name, number in zip(self.seen, seen.tolist(), strict=True):
            if number < (2 if name.endswith("fvd") else 1):  # one video has no covariance
                continue
            value = self.metrics[name].compute()
            group = name.partition("/")[0]
            results |= {f"{group}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        if "flow/foundation" in results:
            results["flow/ratio"] = results["flow/loss"] / results["flow/foundation"]
        return results


def own_samples(batch: Mapping[str, Any], own: Set[int] | None, seen: set[int]) -> dict[str, Any] | None:
    """A batch without repeated samples, or None if nothing is left.

    The loader repeats samples where ranks need equally many batches, or where all samples of a batch are damaged.

    Args:
        batch: ``number`` holds the samples' positions in the split.
        own: the numbers that this rank counts; None counts all.
        seen: the numbers counted so far; this batch's are added.
    """
    numbers = batch.get("number")
    if numbers is None or own is None:
        return dict(batch)
    first = {number: i for i, number in reversed(list(enumerate(numbers)))}
    keep = sorted(i for number, i in first.items() if number in own and number not in seen)
    seen.update(numbers[i] for i in keep)

    def kept(value: Any) -> Any:
        if len(value) != len(numbers):  # the empty prompt's embeddings, one for all
            return value
        return value[keep] if isinstance(value, torch.Tensor) else [value[i] for i in keep]

    return {name: kept(value) for name, value in batch.items()} if keep else None
