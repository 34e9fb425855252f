"""Random draws whose result for one sample does not depend on the rest of its batch.

With one generator a sample, sample i draws from generator i only, so it is reproduced in any batch size and on any
number of devices. Draws are made on the generator's device and moved afterwards: a CPU generator gives the same
numbers on every accelerator. ``randn`` gives the numbers of diffusers' ``randn_tensor``, so a seed means the same as
in ``WanPipeline``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

Generators = torch.Generator | list[torch.Generator] | None
"""None (torch's global generator), one generator for the batch, or a list of B generators, one a sample."""
Device = torch.device | str | None


def randn(shape: Sequence[int], generator: Generators = None, device: Device = None) -> torch.Tensor:
    """Standard normal numbers, float32 [B, ...]; a ValueError unless a list of generators has length B."""
    return _draw(torch.randn, shape, generator, device)


def rand(shape: Sequence[int], generator: Generators = None, device: Device = None) -> torch.Tensor:
    """Numbers uniform on [0, 1), float32 [B, ...]; errors as ``randn``."""
    return _draw(torch.rand, shape, generator, device)


def randint(high: int, shape: Sequence[int], generator: Generators = None, device: Device = None) -> torch.Tensor:
    """Integers uniform on 0..high-1, int64 [B, ...]; errors as ``randn``."""
    return _draw(partial(torch.randint, high), shape, generator, device)


def make_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator seeded by a hash of integers, so that neighbouring steps get unrelated streams."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def _draw(
    draw: Callable[..., torch.Tensor], shape: Sequence[int], generator: Generators, device: Device
) -> torch.Tensor:
    target = torch.device("cpu" if device is None else device)
    if generator is None:
        return draw(tuple(shape), device=target)
    if isinstance(generator, torch.Generator):
        return draw(tuple(shape), generator=generator, device=generator.device).to(target)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: {len(generator)} generators for a batch of {shape[0]}")
    return torch.cat([draw((1, *shape[1:]), generator=one, device=one.device) for one in generator]).to(target)
