"""Latents and embeddings do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from univigu.data.video import to_model_range
from univigu.models.encode import encode_clips, encode_prompts, group_size, normalize_latents
from univigu.models.foundation import Foundation
from univigu.models.tokens import tokenize
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene


@pytest.mark.parametrize("threads", [1, 2])
def test_latents_do_not_depend_on_the_batch(foundation: str, threads: int) -> None:
    clips = to_model_range(torch.stack([render(sample_scene(seed, "train")) for seed in range(7)]))
    vae = Foundation(foundation).vae
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            latents = encode_clips(vae, clips)
            assert torch.get_num_threads() == threads
            for order in ([3], [6, 0, 2, 5, 1], [4, 3]):
                assert torch.equal(encode_clips(vae, clips[order]), latents[order])
            together = normalize_latents(vae.encode(clips).latent_dist.mode(), vae)
            torch.testing.assert_close(together, latents, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)
    assert group_size(9, 64, 64) == 4 and group_size(81, 480, 832) == 1


def test_embeddings_do_not_depend_on_batch_and_padding(foundation: str) -> None:
    parts = Foundation(foundation)
    texts = ["a red circle", "", "a large blue ring moving left quickly, on a white background"]
    short, long = (tokenize(parts.tokenizer, texts, length) for length in (24, 128))
    encoder, pad = parts.text_encoder, parts.pad_token_id
    with torch.no_grad():
        ours = [encode_prompts(encoder, ids, pad) for ids in (short, long)]
        mask = (long != pad).long()
        together = encoder(long, mask).last_hidden_state * mask[..., None]
        torch.testing.assert_close(ours[1], together, atol=1e-5, rtol=0)
        padded = encode_prompts(encoder, short, pad, zero_padding=False)
        assert torch.equal(encode_prompts(encoder, short[1:2], pad, zero_padding=False), padded[1:2])
        together = encoder(short, (short != pad).long()).last_hidden_state
        torch.testing.assert_close(padded, together, atol=1e-5, rtol=0)
    assert torch.equal(ours[0], ours[1][:, :24]) and not ours[1][:, 24:].any() and padded[1, -1].any()
