"""The three text flows behind one interface: embedding, uniform and mask.

In each of them the network gives logits of the posterior p(x_1 | x_t) of every token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from univigu.flow.discrete import cross_entropy, jump_probability, nucleus, reveal_surest, sample_categorical
from univigu.flow.random import Device, Generators, rand, randint, randn
from univigu.flow.time import expand_time
from univigu.flow.video import interpolate

Order = Literal["random", "confidence"]
EMBEDDING_TIME_POWER = 4
"""Times of the embedding flow are ``u ** 4`` of an even u, because most tokens are decided at small t."""
EMBEDDING_INPUT_SCALE = 0.05
"""Factor of z_t where it enters the network; noise of full size would drown the position embeddings."""

TextReader = Callable[[torch.Tensor, nn.Linear], torch.Tensor]
"""Computes an output from the text's last hidden states [B, L, D] and the linear layer that would give logits."""


class TextInputs(NamedTuple):
    """The text's inputs of one forward pass. A named tuple, so that FSDP, DDP and offloading find its tensors."""

    tokens: torch.Tensor
    """Ids [B, L], or for the ``embedding`` flow float states [B, L, D]."""
    timestep: torch.Tensor
    """Timestep 1000 * (1 - t) of the text, [B]."""
    positions: torch.Tensor | None = None
    """Positions of the tokens in the text, int64 [B, L] from 0; None is 0 to L-1."""
    endpoint: torch.Tensor | None = None
    """The previous step's prediction of the data [B, L, D], for the ``embedding`` flow's self-conditioning."""
    reader: TextReader | None = None
    """Replaces the text output by a function of the head's hidden states, see ``univigu.models.text.TextHead``."""
    prompt_embeds: torch.Tensor | None = None
    """Embeddings [B, S, text_dim] of the prompt (or question) that only the text reads. None: the video's prompt."""


@dataclass(frozen=True)
class TextFlow(ABC):
    """Interface of a text flow for training and sampling; it holds options and no weights."""

    name: ClassVar[str]
    vocab_size: int
    """V, the number of the tokenizer's ids."""
    temperature: float = 1.0
    """Sampling: softmax(logits / temperature); 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sampling: probability of the likeliest tokens to draw from, in (0, 1]; 1 is all."""
    order: Order = "random"
    """Sampling with the mask flow: a step reveals "random" tokens, as the path does, or those drawn with the highest
    "confidence"."""
    self_conditioning = False  # whether the network is given EmbeddingFlow.endpoint of its previous output

    def bind(self, model: Any) -> Self:
        """This flow with what it needs of a transformer; call it before the methods below."""
        return self

    def warp(self, u: Any) -> Any:
        """Flow times of even times u in [0, 1], floats or tensors, for training and sampling."""
        return u

    @abstractmethod
    def corrupt(self, tokens: torch.Tensor, t: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """Draw the network's input x_t given the data: tokens int64 [B, L], t [B] in [0, 1]."""

    def loss(self, logits: torch.Tensor, x_t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Loss of every token x_1 [B, L] given logits [B, L, V] for x_t: float32 [B, L], to be averaged over them."""
        return cross_entropy(logits, tokens)

    @abstractmethod
    def initial(self, batch: int, length: int, generator: Generators = None, device: Device = None) -> torch.Tensor:
        """Draw x_0, the state to start sampling from."""

    @abstractmethod
    def step(
        self, x_t: torch.Tensor, logits: torch.Tensor, t: float, t_next: float, generator: Generators = None
    ) -> torch.Tensor:
        """Move the state from t to t_next (0 <= t <= t_next <= 1) given logits [B, L, V]; its type is kept."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [B, L] of a state at t = 1."""
        return x

    def close(self, x_t: torch.Tensor, eos_token_id: int, pad_token_id: int) -> tuple[torch.Tensor, bool]:
        """Finish the texts that are known to be complete; returns the state, and whether all texts are."""
        return x_t, False


@dataclass(frozen=True)
class EmbeddingFlow(TextFlow):
    """Continuous flow matching on rows of a learned matrix E, on the straight path to z_1 = E[y].

    The network's posterior p gives the velocity, which minimises the squared error of flow matching:

        x1_hat = sum_k p_k E_k        u = (x1_hat - z_t) / (1 - t)

    The loss is the cross-entropy of p (Dieleman et al., 2022, arXiv:2211.15089). The rows of E have RMS 1
    (``model.token_table()``), so that E cannot grow to lower the loss.
    """

    name: ClassVar[str] = "embedding"
    self_conditioning = True  # Chen et al., 2022, arXiv:2208.04202
    table: Any = None
    """E, float32 [V, D]; ``bind`` sets it."""

    def bind(self, model: Any) -> Self:
        return replace(self, table=model.token_table())

    def warp(self, u: Any) -> Any:
        """Sampling at even u takes the quantiles of the training times."""
        return u**EMBEDDING_TIME_POWER

    def corrupt(self, tokens: torch.Tensor, t: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """z_t = (1 - t) z_0 + t E[tokens], float32 [B, L, D]; differentiable in E."""
        data = F.embedding(tokens, self.table)
        return interpolate(randn(data.shape, generator, data.device), data, t)

    def initial(self, batch: int, length: int, generator: Generators = None, device: Device = None) -> torch.Tensor:
        """Gaussian noise, float32 [B, L, D], on the table's device unless another is named."""
        return randn((batch, length, self.table.shape[1]), generator, device or self.table.device)

    def step(
        self, x_t: torch.Tensor, logits: torch.Tensor, t: float, t_next: float, generator: Generators = None
    ) -> torch.Tensor:
        """The Euler step ``z_t + (t_next - t) u``; the last one takes the likeliest token's row. Draws nothing."""
        if t_next == 1.0:
            return F.embedding(logits.argmax(dim=-1), self.table)
        return x_t + (t_next - t) / (1.0 - t) * (self.endpoint(logits) - x_t)

    def endpoint(self, logits: torch.Tensor) -> torch.Tensor:
        """The posterior mean of the data, float32 [B, L, D]; temperature and nucleus change the posterior.

        At temperature 0 it is the likeliest token's row.
        """
        if self.temperature == 0:
            return F.embedding(logits.argmax(dim=-1), self.table)
        p = torch.softmax(logits.float() / self.temperature, dim=-1)
        if self.top_p < 1.0:
            kept, order = nucleus(p, self.top_p)
            p = torch.zeros_like(p).scatter(-1, order, kept / kept.sum(dim=-1, keepdim=True))
        return _product(p, self.table.T)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The most similar row of E for every vector of x [B, L, D]."""
        return _product(x.float(), self.table).argmax(dim=-1)


def _product(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``x @ table.T`` in float32, also inside autocast, where it would become bfloat16."""
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.linear(x, table)


@dataclass(frozen=True)
class UniformFlow(TextFlow):
    """The path of ``univigu.flow.discrete`` from uniform tokens. All count in the loss: none shows it is corrupt."""

    name: ClassVar[str] = "uniform"

    def corrupt(self, tokens: torch.Tensor, t: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """Each token is kept with probability t, else drawn from the source: int64 [B, L]."""
        keep = rand(tokens.shape, generator, tokens.device) < expand_time(t, tokens)
        batch, length = tokens.shape
        return torch.where(keep, tokens, self.initial(batch, length, generator, tokens.device))

    def initial(self, batch: int, length: int, generator: Generators = None, device: Device = None) -> torch.Tensor:
        """Draw from the source: uniform random tokens, int64 [B, L]."""
        return randint(self.vocab_size, (batch, length), generator, device)

    def step(
        self, x_t: torch.Tensor, logits: torch.Tensor, t: float, t_next: float, generator: Generators = None
    ) -> torch.Tensor:
        """Draw x_hat ~ softmax(logits / temperature) and jump to it or not; at t_next = 1 always."""
        x_hat = sample_categorical(logits, self.temperature, generator, self.top_p)
        jumps = rand(x_t.shape, generator, x_t.device) < jump_probability(t, t_next)  # always at probability 1
        return torch.where(jumps, x_hat, x_t)


@dataclass(frozen=True)
class MaskFlow(UniformFlow):
    """The same path from a mask state, whose id is V, one past the vocabulary.

    A revealed token is the data's, and the sampler does not change it: its posterior is certain whatever the network
    says. So the loss counts masked tokens only (Sahoo et al., 2024, arXiv:2406.07524).
    """

    name: ClassVar[str] = "mask"

    def loss(self, logits: torch.Tensor, x_t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """As for every flow, and 0 where a token is revealed."""
        return torch.where(x_t == self.vocab_size, super().loss(logits, x_t, tokens), 0.0)

    def initial(self, batch: int, length: int, generator: Generators = None, device: Device = None) -> torch.Tensor:
        """Masks everywhere, int64 [B, L]. Draws nothing."""
        return torch.full((batch, length), self.vocab_size, dtype=torch.int64, device=device)

    def step(
        self, x_t: torch.Tensor, logits: torch.Tensor, t: float, t_next: float, generator: Generators = None
    ) -> torch.Tensor:
        """Masked tokens jump as in the uniform flow, or the most certain of them first."""
        masked = x_t == self.vocab_size
        if self.order == "random":
            return torch.where(masked, super().step(x_t, logits, t, t_next, generator), x_t)
        x_hat = sample_categorical(logits, self.temperature, generator, self.top_p)
        confidence = (-cross_entropy(logits, x_hat)).exp()
        return torch.where(reveal_surest(masked, confidence, jump_probability(t, t_next)), x_hat, x_t)

    def close(self, x_t: torch.Tensor, eos_token_id: int, pad_token_id: int) -> tuple[torch.Tensor, bool]:
        """Pad what follows an end of text before which no mask is left; done once no mask is left anywhere."""
        masked = x_t == self.vocab_size
        ended = (x_t == eos_token_id).cumsum(dim=1) > 0
        complete = ended & (masked.cumsum(dim=1) == 0)  # from the first end on, where nothing before it is masked
        x_t = torch.where(masked & (complete.cumsum(dim=1) > 0), pad_token_id, x_t)
        return x_t, not bool((x_t == self.vocab_size).any())


TEXT_FLOWS: dict[str, type[TextFlow]] = {flow.name: flow for flow in (EmbeddingFlow, UniformFlow, MaskFlow)}


def make_text_flow(name: str, vocab_size: int, **options: Any) -> TextFlow:
    """The text flow called ``name``, with options of sampling (temperature, top_p, order)."""
    return TEXT_FLOWS[name](vocab_size, **options)
