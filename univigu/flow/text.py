"""The three text flows behind one interface.

* :class:`EmbeddingFlow`: tokens are rows of a learned matrix and flow continuously from Gaussian noise.
* :class:`UniformFlow`: a discrete mixture path from uniform random tokens.
* :class:`MaskFlow`: the same path from a mask state.

A flow holds options and no weights: it corrupts tokens for training, scores a network's output, and steps a sample
from noise (t = 0) to text (t = 1). The path's own formulas are in :mod:`univigu.flow.discrete`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F

from univigu.flow.discrete import (
    Jump,
    cross_entropy,
    generalized_kl,
    generalized_kl_per_token,
    jump_probability,
    kappa,
    reveal_surest,
    sample_categorical,
)
from univigu.flow.random import Generators, rand, randint, randn
from univigu.flow.time import check_positive, expand_time
from univigu.flow.video import data_from_velocity, interpolate, velocity

Order = Literal["random", "confidence"]

__all__ = [
    "CorruptedText",
    "DiscreteFlow",
    "EmbeddingFlow",
    "MaskFlow",
    "TextFlow",
    "UniformFlow",
    "cross_entropy",
    "generalized_kl",
    "make_text_flow",
]


class CorruptedText(NamedTuple):
    """A text somewhere on its way from noise, with what the loss needs to know about it."""

    x_t: torch.Tensor
    """What the network is given: int64 ids [B, L], or float32 [B, L, D] for the embedding flow."""
    tokens: torch.Tensor
    """The data's tokens x_1, int64 [B, L]."""
    noise: torch.Tensor | None = None
    """The noise z_0, float32 [B, L, D]; the embedding flow only."""


@dataclass(frozen=True)
class TextFlow(ABC):
    """What training and sampling ask of a text flow."""

    name: ClassVar[str]
    needs_table: ClassVar[bool] = False
    """Whether the methods must be given the model's token table [V, D]."""
    vocab_size: int
    """V, the number of the tokenizer's ids."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size: must be at least 1, got {self.vocab_size}")

    @abstractmethod
    def corrupt(
        self, tokens: torch.Tensor, t: torch.Tensor, table: torch.Tensor | None = None, generator: Generators = None
    ) -> CorruptedText:
        """Draw x_t given the data: tokens int64 [B, L], t [B] in [0, 1], table [V, D] (the embedding flow only)."""

    @abstractmethod
    def loss(
        self,
        output: torch.Tensor,
        corrupted: CorruptedText,
        t: torch.Tensor,
        table: torch.Tensor | None = None,
        kind: str = "cross_entropy",
    ) -> torch.Tensor:
        """Score the network's output [B, L, V or D] at time t [B]: float32 [B, L], to be averaged over all tokens."""

    @abstractmethod
    def initial(
        self,
        batch: int,
        length: int,
        table: torch.Tensor | None = None,
        generator: Generators = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Draw the state at t = 0: int64 [B, L] or float32 [B, L, D]."""

    @abstractmethod
    def step(
        self,
        x_t: torch.Tensor,
        output: torch.Tensor,
        t: float,
        t_next: float,
        table: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """Move a sample from t to t_next (0 <= t <= t_next <= 1), given the network's output at x_t."""

    @abstractmethod
    def tokens(self, x: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Read a state at t = 1 as int64 ids [B, L]."""

    def close(self, x_t: torch.Tensor, eos_token_id: int, pad_token_id: int) -> tuple[torch.Tensor, bool]:
        """Finish the texts that can be seen to be complete; the state, and whether that is all of them."""
        return x_t, False


@dataclass(frozen=True)
class EmbeddingFlow(TextFlow):
    r"""Continuous flow matching on rows of a learned matrix E: z_1 = E[y], straight path, Euler steps.

    The loss of a token is the velocity's mean squared error over D plus a cross-entropy on the predicted endpoint,

    .. math:: \hat x_1 = z_t + (1-t) \hat u, \qquad p = \mathrm{softmax}(\hat x_1 E^\top / \sqrt D)

    because the error alone can be made small by moving all rows of E together. The rows must have RMS 1
    (``model.token_table()``), which keeps E from growing instead, and makes the product a cosine. A matching row
    scores :math:`\sqrt D` against others' standard normal; undivided, it would score D, and p would be certain of
    the likeliest of several tokens where the endpoint is their posterior mean.
    """

    name: ClassVar[str] = "embedding"
    needs_table: ClassVar[bool] = True
    cross_entropy_weight: float = 1.0
    """Weight of the cross-entropy beside the squared error, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("cross_entropy_weight", self.cross_entropy_weight)

    def corrupt(
        self, tokens: torch.Tensor, t: torch.Tensor, table: torch.Tensor | None = None, generator: Generators = None
    ) -> CorruptedText:
        """z_t = (1 - t) z_0 + t E[tokens], float32 [B, L, D]; differentiable in the table [V, D]."""
        data = F.embedding(tokens, self._check_table(table))
        noise = randn(data.shape, generator, data.device)
        return CorruptedText(interpolate(noise, data, t), tokens, noise)

    def loss(
        self,
        output: torch.Tensor,
        corrupted: CorruptedText,
        t: torch.Tensor,
        table: torch.Tensor | None = None,
        kind: str = "cross_entropy",
    ) -> torch.Tensor:
        """Squared error of the velocity ``output`` [B, L, D] plus weighted cross-entropy: float32 [B, L].

        Raises:
            ValueError: kind is ``generalized_kl``, which only a discrete path has; or no table, or a wrong shape.
        """
        if kind != "cross_entropy":
            raise ValueError(f"kind: the embedding flow has 'cross_entropy' only, got {kind!r}")
        table = self._check_table(table)
        if corrupted.noise is None:
            raise ValueError("corrupted.noise: the embedding flow needs it; take the result of its own corrupt()")
        if output.shape != corrupted.x_t.shape:
            raise ValueError(f"output: expected {list(corrupted.x_t.shape)}, got {list(output.shape)}")
        target = velocity(corrupted.noise, F.embedding(corrupted.tokens, table))
        error = (output.float() - target).square().mean(dim=-1)
        logits = self._similarity(data_from_velocity(corrupted.x_t, output, t), table)
        return error + self.cross_entropy_weight * cross_entropy(logits, corrupted.tokens)

    def initial(
        self,
        batch: int,
        length: int,
        table: torch.Tensor | None = None,
        generator: Generators = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Gaussian noise, float32 [B, L, D]; the table gives D, and the device where none is named."""
        table = self._check_table(table)
        return randn((batch, length, table.shape[1]), generator, table.device if device is None else device)

    def step(
        self,
        x_t: torch.Tensor,
        output: torch.Tensor,
        t: float,
        t_next: float,
        table: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """The Euler step ``z_t + (t_next - t) u``; the last one lands on the predicted endpoint. Draws nothing."""
        if not 0.0 <= t <= t_next <= 1.0:
            raise ValueError(f"t, t_next: must satisfy 0 <= t <= t_next <= 1, got {t}, {t_next}")
        return x_t.float() + (t_next - t) * output.float()

    def tokens(self, x: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """The most similar row of the table for every vector of x [B, L, D]."""
        return self._similarity(x, self._check_table(table)).argmax(dim=-1)

    def _check_table(self, table: torch.Tensor | None) -> torch.Tensor:
        if table is None:
            raise ValueError("table: the embedding flow needs the token table [V, D], got None")
        if table.dim() != 2 or table.shape[0] != self.vocab_size:
            raise ValueError(f"table: expected [{self.vocab_size}, D], got {list(table.shape)}")
        return table.float()

    @staticmethod
    def _similarity(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """``x E^T / sqrt(D)``: float32 [B, L, V], also inside autocast, where the product would become bfloat16."""
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.linear(x.float(), table) / math.sqrt(table.shape[1])


@dataclass(frozen=True)
class DiscreteFlow(TextFlow):
    """The mixture path of :mod:`univigu.flow.discrete`; the two subclasses say what its source is."""

    exponent: float = 1.0
    """n of kappa = t^n, above 0; above 1 keeps the text corrupt for longer."""
    temperature: float = 1.0
    """Of the sampler's draws: softmax(logits / temperature); 0 takes the likeliest token."""
    top_p: float = 1.0
    """Of the sampler's draws: the probability of the likeliest tokens it draws from, in (0, 1]; 1 is all."""
    jump: Jump = "exact"
    """Jump probability of a step, see :func:`univigu.flow.discrete.jump_probability`. ``exact`` is the default
    because it keeps to the path's schedule for any number of steps, for the same cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("exponent", self.exponent)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: must be a finite number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be over 0 and at most 1, got {self.top_p}")
        if self.jump not in ("exact", "euler"):
            raise ValueError(f"jump: must be 'exact' or 'euler', got {self.jump!r}")

    @abstractmethod
    def may_jump(self, x_t: torch.Tensor) -> torch.Tensor:
        """Which tokens the sampler may still change: bool [B, L]."""

    def corrupt(
        self, tokens: torch.Tensor, t: torch.Tensor, table: torch.Tensor | None = None, generator: Generators = None
    ) -> CorruptedText:
        """Each token is kept with probability t^n, else drawn from the source: int64 [B, L]."""
        keep = rand(tokens.shape, generator, tokens.device) < kappa(expand_time(t, tokens), self.exponent)
        batch, length = tokens.shape
        source = self.initial(batch, length, generator=generator, device=tokens.device)
        return CorruptedText(torch.where(keep, tokens, source), tokens)

    def loss(
        self,
        output: torch.Tensor,
        corrupted: CorruptedText,
        t: torch.Tensor,
        table: torch.Tensor | None = None,
        kind: str = "cross_entropy",
    ) -> torch.Tensor:
        """Cross-entropy or generalised KL of the logits ``output`` [B, L, V]: float32 [B, L].

        Raises:
            ValueError: an unknown kind, or logits of another shape.
        """
        self._check_logits(output, corrupted.x_t)
        if kind == "cross_entropy":
            return cross_entropy(output, corrupted.tokens)
        if kind == "generalized_kl":
            return generalized_kl_per_token(output, corrupted.tokens, corrupted.x_t, t, self.exponent)
        raise ValueError(f"kind: must be 'cross_entropy' or 'generalized_kl', got {kind!r}")

    def step(
        self,
        x_t: torch.Tensor,
        output: torch.Tensor,
        t: float,
        t_next: float,
        table: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """Draw x_hat ~ softmax(output / temperature) and jump to it, or not; at t_next = 1 always.

        Args:
            x_t: int64 [B, L].
            output: logits [B, L, V].
            t, t_next: flow times, 0 <= t <= t_next <= 1.
            table: not used.
            generator: see :data:`univigu.flow.random.Generators`.

        Returns:
            int64 [B, L].

        Raises:
            ValueError: times out of order or range, or logits of another shape.
        """
        self._check_logits(output, x_t)
        probability = jump_probability(t, t_next, self.exponent, self.jump)
        x_hat = sample_categorical(output, self.temperature, generator, self.top_p)
        return torch.where(self._jumps(x_t, x_hat, output, probability, generator), x_hat, x_t)

    def _jumps(
        self,
        x_t: torch.Tensor,
        x_hat: torch.Tensor,
        logits: torch.Tensor,
        probability: float,
        generator: Generators,
    ) -> torch.Tensor:
        """Which tokens a step moves to their draws: bool [B, L]."""
        return self.may_jump(x_t) & (rand(x_t.shape, generator, x_t.device) < probability)  # rand < 1 always holds

    def tokens(self, x: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """The state is the text."""
        return x

    def _check_logits(self, logits: torch.Tensor, x_t: torch.Tensor) -> None:
        if logits.shape != (*x_t.shape, self.vocab_size):
            raise ValueError(f"output: expected logits {[*x_t.shape, self.vocab_size]}, got {list(logits.shape)}")


@dataclass(frozen=True)
class UniformFlow(DiscreteFlow):
    """The path from uniform random tokens. Every token counts in the loss: none shows whether it is corrupt."""

    name: ClassVar[str] = "uniform"

    def initial(
        self,
        batch: int,
        length: int,
        table: torch.Tensor | None = None,
        generator: Generators = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Uniform random tokens, int64 [B, L]."""
        return randint(self.vocab_size, (batch, length), generator, device)

    def may_jump(self, x_t: torch.Tensor) -> torch.Tensor:
        """All of them, at any time."""
        return torch.ones_like(x_t, dtype=torch.bool)


@dataclass(frozen=True)
class MaskFlow(DiscreteFlow):
    """The path from a mask state, whose id is V, one past the vocabulary.

    A revealed token is the data's and the sampler leaves it alone: its posterior is certain whatever the network
    says. So both losses are 0 there and count masked tokens only, and the generalised KL becomes
    ``-kappa'/(1-kappa) log p(x_1)`` on them (Sahoo et al., 2024, arXiv:2406.07524). The mean over all tokens is
    then defined even if none is masked (it is 0).
    """

    name: ClassVar[str] = "mask"
    order: Order = "random"
    """Which tokens a step reveals: "random" ones, as the path does, or the "confidence" with which they are drawn
    decides, and the surest go first."""
    threshold: float = 1.0
    """With order "confidence": tokens drawn with at least this probability need not wait; 1 makes all wait."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("random", "confidence"):
            raise ValueError(f"order: must be 'random' or 'confidence', got {self.order!r}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: must be over 0 and at most 1, got {self.threshold}")

    @property
    def mask_id(self) -> int:
        """The mask state's id, V."""
        return self.vocab_size

    def loss(
        self,
        output: torch.Tensor,
        corrupted: CorruptedText,
        t: torch.Tensor,
        table: torch.Tensor | None = None,
        kind: str = "cross_entropy",
    ) -> torch.Tensor:
        """As :meth:`DiscreteFlow.loss`, and 0 where a token is revealed."""
        return torch.where(self.may_jump(corrupted.x_t), super().loss(output, corrupted, t, table, kind), 0.0)

    def initial(
        self,
        batch: int,
        length: int,
        table: torch.Tensor | None = None,
        generator: Generators = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Masks everywhere, int64 [B, L]. Draws nothing."""
        return torch.full((batch, length), self.mask_id, dtype=torch.int64, device=device)

    def may_jump(self, x_t: torch.Tensor) -> torch.Tensor:
        """Those still masked."""
        return x_t == self.mask_id

    def _jumps(
        self,
        x_t: torch.Tensor,
        x_hat: torch.Tensor,
        logits: torch.Tensor,
        probability: float,
        generator: Generators,
    ) -> torch.Tensor:
        """As the path does, or the surest tokens first."""
        if self.order == "random":
            return super()._jumps(x_t, x_hat, logits, probability, generator)
        confidence = (-cross_entropy(logits, x_hat)).exp()
        return reveal_surest(self.may_jump(x_t), confidence, probability, self.threshold)

    def close(self, x_t: torch.Tensor, eos_token_id: int, pad_token_id: int) -> tuple[torch.Tensor, bool]:
        """Pad what lies behind an end of text before which no mask is left; done once no mask is left anywhere."""
        masked = self.may_jump(x_t)
        ended = (x_t == eos_token_id).cumsum(dim=1) > 0
        complete = ended & (masked.cumsum(dim=1) == 0)  # from the first end on, where nothing before it is masked
        x_t = torch.where(masked & (complete.cumsum(dim=1) > 0), pad_token_id, x_t)
        return x_t, not bool(self.may_jump(x_t).any())

    def tokens(self, x: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """The state is the text once no mask is left; a ValueError before that."""
        masked = int(self.may_jump(x).sum())
        if masked:
            raise ValueError(f"x: {masked} of {x.numel()} tokens are still masked; sample up to t = 1 first")
        return x


def make_text_flow(name: str, vocab_size: int, **options: Any) -> TextFlow:
    """Build the text flow called ``name`` ("embedding", "uniform" or "mask"); options are its class's fields.

    Raises:
        ValueError: no such flow, no such option, or an option's value is out of range.
    """
    flows: dict[str, type[TextFlow]] = {flow.name: flow for flow in (EmbeddingFlow, UniformFlow, MaskFlow)}
    if name not in flows:
        raise ValueError(f"text flow: must be one of {', '.join(flows)}, got {name!r}")
    known = [field.name for field in fields(flows[name]) if field.name != "vocab_size"]
    for option in options:
        if option not in known:
            raise ValueError(f"text flow {name!r}: no option {option!r}; it has {', '.join(known)}")
    return flows[name](vocab_size, **options)
