"""Random draws whose result for one sample does not depend on the batch that it is in.

With one generator a sample, sample i draws from generator i alone; so a sample can be reproduced by itself, in
another batch size or on another number of devices. Draws are made where the generator lives and moved afterwards:
a CPU generator gives the same numbers on every accelerator. ``randn`` gives the very numbers of diffusers'
``randn_tensor``, so that a seed means the same as in ``WanPipeline``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

Generators = torch.Generator | list[torch.Generator] | None
"""None (torch's global generator), one generator for the batch, or a list of B generators, one a sample."""


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal numbers [B, ...].

    Raises:
        ValueError: the list of generators has another length than the batch.
    """

    def draw(size: Sequence[int], source: torch.Generator | None, where: torch.device) -> torch.Tensor:
        return torch.randn(size, generator=source, device=where, dtype=dtype)

    return _draw(draw, shape, generator, device)


def rand(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Numbers uniform on [0, 1), [B, ...]; errors as :func:`randn`."""

    def draw(size: Sequence[int], source: torch.Generator | None, where: torch.device) -> torch.Tensor:
        return torch.rand(size, generator=source, device=where, dtype=dtype)

    return _draw(draw, shape, generator, device)


def randint(
    high: int,
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Integers uniform on 0..high-1, int64 [B, ...]; errors as :func:`randn`."""

    def draw(size: Sequence[int], source: torch.Generator | None, where: torch.device) -> torch.Tensor:
        return torch.randint(high, size, generator=source, device=where)

    return _draw(draw, shape, generator, device)


def make_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator seeded by a hash of integers, so that neighbouring steps get unrelated streams."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def _draw(
    draw: Callable[[Sequence[int], torch.Generator | None, torch.device], torch.Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str | None,
) -> torch.Tensor:
    target = torch.device("cpu" if device is None else device)
    if generator is None:
        return draw(shape, None, target)
    if isinstance(generator, torch.Generator):
        return draw(shape, generator, generator.device).to(target)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: {len(generator)} generators for a batch of {shape[0]}")
    rows = [draw((1, *shape[1:]), source, source.device) for source in generator]
    return torch.cat(rows).to(target)
