"""What ``lightning test`` measures on held-out clips, in both directions and for both at once.

caption    texts read off clean videos without a prompt, against the truth
generate   videos made from prompts, against what the prompts ask for
joint      videos and texts made together, against each other
flow       the video's denoising loss beside the foundation's own: is the generator still what it was?
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torchmetrics import MeanMetric

from univigu.flow.random import randn
from univigu.flow.time import shift_sigma, time_from_sigma, to_timestep
from univigu.flow.video import flow_matching_loss, interpolate
from univigu.metrics import ShapesAgreement, ShapesTextAccuracy, ShapesVideoAccuracy


class HeldOutEvaluation(nn.Module):
    """Metrics of a held-out split; batches are added, ``compute`` reads them off.

    Clips of the embedded world are checked property by property; others count for losses and token accuracy only.

    Args:
        kind: which text the model was last trained to write, "prompt" or "caption".
        generation: whether to draw videos too, which is most of the work.
    """

    def __init__(self, kind: str, generation: bool = True) -> None:
        super().__init__()
        self.generation = generation
        self.metrics: Any = nn.ModuleDict(
            {
                "caption": ShapesTextAccuracy(kind),
                "generate": ShapesVideoAccuracy(places=False),
                "joint": ShapesAgreement(),
                "tokens": MeanMetric(),
                "flow": MeanMetric(),
                "flow_foundation": MeanMetric(),
            }
        )

    @torch.no_grad()
    def update(self, module: Any, foundation_model: WanTransformer3DModel, batch: Mapping[str, Any]) -> None:
        """Add a batch of the test loader."""
        inputs = module.prepare(batch)
        length, shape = batch["prompt_ids"].shape[1], tuple(inputs.latents.shape[1:])
        # A sample's seed comes from its key: the same whatever the batch size or the number of ranks.
        seeds = [zlib.crc32(key.encode()) for key in batch["key"]]
        tokens, texts = module.caption_tokens(inputs.latents, length, seeds)
        self.metrics["caption"].update(texts, batch["scene"])
        if inputs.text_ids is not None:
            self.metrics["tokens"].update(token_matches(tokens, inputs.text_ids, module.foundation.pad_token_id))
        self._flow(module, foundation_model, inputs, seeds)
        if not self.generation:
            return
        frames, _ = module.generate(batch["prompt"], length, shape, seeds)
        self.metrics["generate"].update(frames.cpu(), batch["scene"])
        frames, captions = module.generate(batch["prompt"], length, shape, seeds, joint=True)
        known = [i for i, scene in enumerate(batch["scene"]) if scene is not None]
        if known:
            self.metrics["joint"].update([captions[i] for i in known], frames.cpu()[known])

    def _flow(self, module: Any, foundation_model: WanTransformer3DModel, inputs: Any, seeds: list[int]) -> None:
        """Both models' losses on the same noise, at eight times spread evenly over the (shifted) schedule."""
        generators = [torch.Generator(inputs.latents.device).manual_seed(seed) for seed in seeds]
        noise = randn(inputs.latents.shape, generators, inputs.latents.device)
        shift = module.flow_options.video_times.shift
        for i in range(8):
            t = time_from_sigma(shift_sigma((i + 0.5) / 8, shift))
            times = t.to(inputs.latents.device).expand(inputs.latents.shape[0])
            noisy = interpolate(noise, inputs.latents, times)
            models = {"flow": module.transformer}
            if module.conventions.latents_normalized:  # else the foundation knows other latents
                models["flow_foundation"] = foundation_model
            for name, model in models.items():
                prediction = model(noisy, to_timestep(times), inputs.prompt_embeds, return_dict=False)[0]
                self.metrics[name].update(flow_matching_loss(prediction, noise, inputs.latents))

    def compute(self) -> dict[str, torch.Tensor]:
        """All results by name, such as "caption/shape" or "flow/ratio"; metrics without a sample are left out."""
        results: dict[str, torch.Tensor] = {}
        for group in ("caption", "generate", "joint"):
            metric = self.metrics[group]
            if int(metric.samples) > 0:
                results |= {f"{group}/{name}": value for name, value in metric.compute().items()}
        titles = {"tokens": "caption/tokens", "flow": "flow/loss", "flow_foundation": "flow/foundation"}
        for name, title in titles.items():
            if self.metrics[name].update_called:
                results[title] = self.metrics[name].compute()
        if "flow/foundation" in results:
            results["flow/ratio"] = results["flow/loss"] / results["flow/foundation"]
        return results


def token_matches(tokens: torch.Tensor, truth: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Which of the true text's tokens (its end counted, its padding not) are right: float [number of them]."""
    length = min(tokens.shape[1], truth.shape[1])
    real = truth[:, :length] != pad_token_id
    return (tokens[:, :length] == truth[:, :length])[real].float()
