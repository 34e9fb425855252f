"""A tiny random image-text-to-text model with its processor, as a folder that transformers loads like any other."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

try:  # transformers 5 loads the other one only where torchvision is
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

SIZE, PATCH = 32, 16
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def write_captioner(folder: Path) -> Path:
    """Save the model and its processor; it writes letters at random and ends after some hundred of them."""
    special = ["<pad>", "</s>", "<unk>", "<image>"]
    vocab = {token: i for i, token in enumerate([*special, *string.ascii_letters, *string.digits, *",.:;'-", "▁"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    pixels = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=pixels), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **small)
    vision = CLIPVisionConfig(
        image_size=SIZE, patch_size=PATCH, projection_dim=16, **(small | {"num_hidden_layers": 2})
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=3))
    with torch.no_grad():
        for weight in model.parameters():  # the initial ones are so small that nothing depends on the input
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
