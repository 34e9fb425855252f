"""What training puts in place of a sample's prompt: questions about the clip, or other conditions of a generator."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from univigu.data.sources import is_large
from univigu.flow.objective import UniFlowBatch
from univigu.models.tokens import TextTooLongError, tokenize
from univigu.pipeline import TaskRunner

log = logging.getLogger(__name__)

GENERATOR_CONDITIONS = (("prompt", 0), ("prompt", 0), ("prompt", 0), ("prompt", 128), ("prompt", 512), ("caption", 0))
"""A generator that is trained alone sees one of these conditions a step, in a slot of so many tokens (0: the data's):
also in the slots of prediction and of WanPipeline, because padding takes part in attention."""


ANSWER_LENGTH = 64
"""Slot of answers, in tokens: most of a caption's slot would be padding, which costs as much and says nothing."""
ANSWER_WEIGHT = 4.0
"""Weight of the loss in steps of answers. It is a mean over their slot, whose padding is soon learned: without a weight
the gradients of captions, about four times as large, would decide which way the weights move."""


def vary_conditions(
    inputs: UniFlowBatch, batch: dict[str, Any], tasks: TaskRunner, foundation: Path, generator: random.Random
) -> UniFlowBatch:
    """Condition an encoded batch on one of ``GENERATOR_CONDITIONS``; captions only if they are encoded in training."""
    text, slot = generator.choice(GENERATOR_CONDITIONS)
    captions = text == "caption" and all(batch.get("caption", [""]))
    if captions and not is_large(foundation, "text_encoder"):
        embeds = tasks.encode_ids(batch["caption_ids"])
        inputs = replace(inputs, prompt_embeds=embeds, null_embeds=tasks.encode_null(embeds.shape[1]))
    missing = max(0, slot - inputs.prompt_embeds.shape[1])  # padding is zero
    prompts, null = (F.pad(embeds, (0, 0, 0, missing)) for embeds in (inputs.prompt_embeds, inputs.null_embeds))
    return replace(inputs, prompt_embeds=prompts, null_embeds=null)


def ask_questions(
    inputs: UniFlowBatch,
    batch: dict[str, Any],
    texts: int,
    tasks: TaskRunner,
    generator: random.Random,
    weights: Mapping[str, float],
) -> UniFlowBatch | None:
    """The batch with questions as conditions and their answers, in a slot of their own, as targets.

    Args:
        inputs: the encoded batch, with target tokens.
        batch: as from the loader; its ``qa`` holds each sample's pairs ``{question, answer}``, of which one is drawn.
        texts: how many samples, the first ones, learn text. Left out are those without questions, or whose question or
            answer is too long; None if all of them are.
        weights: of the kinds of questions, see ``univigu.training.stages.Stage``.
    """
    assert inputs.text_ids is not None
    slot, length = inputs.prompt_embeds.shape[1], min(inputs.text_ids.shape[1], ANSWER_LENGTH)
    tokenizer, asked = tasks.components.tokenizer, {}
    for kind in weights:
        if not any(pair.get("kind") == kind for pairs in batch["qa"] for pair in pairs):
            rank_zero_warn(f"stages: question_weights: {kind!r}: a batch has no question of this kind")
    for row in range(texts):
        pairs = batch["qa"][row]
        chances = [weights.get(pair.get("kind"), 1.0) for pair in pairs]
        if any(chances):
            (pair,) = generator.choices(pairs, chances)
            try:
                question = tokenize(tokenizer, [pair["question"]], slot, "question")
                asked[row] = question, tokenize(tokenizer, [pair["answer"]], length, "answer")
            except TextTooLongError as error:
                log.warning("skipped a question of sample %r: %s", batch["key"][row], error)
    if not asked:
        return None
    questions, answers = (torch.cat(ids) for ids in zip(*asked.values(), strict=True))
    latents = torch.cat([inputs.latents[list(asked)], inputs.latents[texts:]])
    embeds = torch.cat([tasks.encode_ids(questions).to(inputs.prompt_embeds), inputs.prompt_embeds[texts:]])
    targets = tasks.encode_tokens(answers, "answer").to(inputs.text_ids)
    return UniFlowBatch(latents, embeds, inputs.null_embeds, targets)
