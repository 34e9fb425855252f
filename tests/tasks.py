"""A sampler with a method for each task."""

from __future__ import annotations

from typing import Any

import torch

from univigu.sampling.sampler import SampleInputs, Sampler, Samples


class Tasks(Sampler):
    """Give what a task needs by position, then ``generator`` and ``on_step``."""

    def generate(self, prompt: torch.Tensor, null: torch.Tensor, shape: Any, *args: Any, **kwargs: Any) -> Samples:
        return self.sample("generate", SampleInputs(prompt, null, None, shape, 0, 1.0, *args, **kwargs))

    def edit(self, video: Any, strength: float, prompt: Any, null: Any, *args: Any, **kwargs: Any) -> Samples:
        return self.sample("edit", SampleInputs(prompt, null, video, (), 0, strength, *args, **kwargs))

    def caption(self, video: Any, prompt: Any, null: Any, length: int, *args: Any, **kwargs: Any) -> Samples:
        return self.sample("caption", SampleInputs(prompt, null, video, (), length, 1.0, *args, **kwargs))

    def joint(self, prompt: Any, null: Any, shape: Any, length: int, *args: Any, **kwargs: Any) -> Samples:
        return self.sample("joint", SampleInputs(prompt, null, None, shape, length, 1.0, *args, **kwargs))
