"""A model for the tools that look at samples."""

from __future__ import annotations

import pytest
import torch

from univigu.models.foundation import Foundation
from univigu.models.options import ArchitectureOptions
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.pipeline import UniViGUPipeline


@pytest.fixture(scope="session")
def untrained_model(foundation: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline's folder: the shipped generator with an untrained text stream."""
    folder, parts = tmp_path_factory.mktemp("model"), Foundation(foundation)
    torch.manual_seed(0)
    transformer = UniViGUTransformer3DModel.from_wan(foundation, len(parts.tokenizer), ArchitectureOptions("mask"))
    transformer.register_to_config(text_length=16)
    pipe = UniViGUPipeline(parts.tokenizer, parts.text_encoder, parts.vae, parts.scheduler(), transformer)
    pipe.save_pretrained(folder)
    return str(folder)
