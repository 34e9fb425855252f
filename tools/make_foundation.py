"""Make the embedded foundation except for its generator: tokenizer, text encoder, VAE, scheduler.

    python tools/make_foundation.py --output runs/foundation/start
    lightning fit --config configs/foundation.yaml --model.foundation runs/foundation/start   # trains the generator

The result is a folder in diffusers' WanPipeline layout.  Text encoder and VAE are trained on the embedded world, the
transformer is random.  ``tools/convert.py foundation`` writes a trained transformer into such a folder.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from univigu.cli import ToolParser, exit_code
from univigu.data.progress import track
from univigu.data.video import encode_mp4, read_video, to_model_range
from univigu.shapes import renderer, scenes, texts

LATENT_CHANNELS = 8  # the world fills about six; more channels would be copies of each other


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A UniGram tokenizer with UMT5's conventions: <pad>=0, </s>=1 closes every text, <unk>=2.

    Its pieces are the words of the embedded world and, for everything else, single characters.
    """
    words: dict[str, None] = {}
    for scene in (scenes.sample_scene(seed) for seed in range(2000)):
        for text in (texts.prompt_of(scene), texts.caption_of(scene)):
            words.update(dict.fromkeys(re.findall(r"\w+", text)))
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    pieces = ["<pad>", "</s>", "<unk>", *sorted(f"▁{word}" for word in words), "▁", *letters]
    scores = [0.0, 0.0, 0.0] + [-10.0] * len(words) + [-20.0] * (1 + len(letters))
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"[.,;:!?]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_vae(base_dim: int = 16, channels: int = LATENT_CHANNELS) -> AutoencoderKLWan:
    """8x8 spatial and 4x temporal compression, as Wan's, from 2x2 pixel patches."""
    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two UMT5 layers of width 64; see ``train_text_encoder``."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            feed_forward_proj="gated-gelu",
        )
    )


# What each token's embedding must tell: attributes of the object it describes, and of the scene.
OBJECT_FIELDS: dict[str, tuple[str, ...]] = {
    "size": tuple(scenes.SIZES),
    "color": tuple(scenes.COLORS),
    "shape": scenes.SHAPES,
    "motion": tuple(scenes.MOTIONS),
    "speed": ("", *scenes.SPEEDS),
}
SCENE_FIELDS: dict[str, tuple[str, ...]] = {
    "relation": ("", *scenes.RELATIONS),
    "background": tuple(scenes.BACKGROUNDS),
}
FIELD_SIZES = [3, *map(len, OBJECT_FIELDS.values()), *map(len, SCENE_FIELDS.values())]


def token_meanings(tokenizer: PreTrainedTokenizerFast, scene: scenes.Scene, length: int) -> tuple[Tensor, Tensor]:
    """A prompt's token ids [L] and the labels of each token, int64 [L, fields]; -100 is no label.

    The fields: whether the token's object is the only, the first or the second one; OBJECT_FIELDS of that object;
    SCENE_FIELDS, which every token is labelled with.
    """
    text = texts.prompt_of(scene)
    encoding = tokenizer(text, padding="max_length", max_length=length, return_offsets_mapping=True)
    about_scene = [options.index(getattr(scene, name)) for name, options in SCENE_FIELDS.items()]
    clauses = re.split(f"(, (?:{'|'.join(scenes.RELATIONS)}) |, on a )", text)  # object, relation, object, ...
    ends = [len("".join(clauses[: 2 * i + 1])) for i in range(len(scene.objects))]
    starts = [end - len(clauses[2 * i]) for i, end in enumerate(ends)]
    labels = []
    for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        row = [-100] * (1 + len(OBJECT_FIELDS)) + about_scene
        for i, obj in enumerate(scene.objects):
            if starts[i] <= start < end <= ends[i]:
                values = [options.index(getattr(obj, name)) for name, options in OBJECT_FIELDS.items()]
                row = [i + bool(scene.relation), *values, *about_scene]
        labels.append(row if token != tokenizer.pad_token_id else [-100] * len(row))
    return torch.tensor(encoding["input_ids"]), torch.tensor(labels)


def train_text_encoder(
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    num_scenes: int = 8000,
    learning_rate: float = 3e-3,
) -> dict[str, float]:
    """Train in place until each word's embedding tells which object it describes and that object's attributes.

    A generator finds words by attention, whose keys have no positions, so the embedding of "red" must tell that it
    belongs to the first object.  A pretrained language encoder does; training on the generator's loss alone learns
    this late or never.  The rate is moderate because T5's attention is unscaled: after large updates its logits
    outweigh the position biases for good.

    Returns:
        the accuracies on prompts of held-out scenes, by field.
    """
    names = ["object", *OBJECT_FIELDS, *SCENE_FIELDS]
    train, held = (
        [torch.stack(column) for column in zip(*rows, strict=True)]
        for rows in (
            [token_meanings(tokenizer, scenes.sample_scene(seed, split), 32) for seed in range(count)]
            for split, count in (("train", num_scenes), ("val", 500))
        )
    )
    head = torch.nn.Linear(text_encoder.config.d_model, sum(FIELD_SIZES))
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *head.parameters()], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)

    def answers(ids: Tensor) -> Sequence[Tensor]:
        mask = (ids != tokenizer.pad_token_id).long()
        embeds = text_encoder(ids, mask).last_hidden_state * mask[..., None]
        return head(embeds).split(FIELD_SIZES, -1)

    text_encoder.train()
    for _ in track(range(steps), "training the text encoder"):
        rows = torch.randint(0, len(train[0]), (128,))
        labels = train[1][rows].unbind(-1)
        loss = sum(F.cross_entropy(a.mT, b) for a, b in zip(answers(train[0][rows]), labels, strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    text_encoder.eval()
    with torch.no_grad():
        pairs = zip(names, answers(held[0]), held[1].unbind(-1), strict=True)
        return {name: (a.argmax(-1) == b)[b >= 0].float().mean().item() for name, a, b in pairs}


def make_transformer() -> WanTransformer3DModel:
    """Wan's architecture, 4 heads of 32 and 6 layers."""
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=384,
        num_layers=6,
    )


def clips(first_seed: int, count: int) -> torch.Tensor:
    """Clips as training will see them, through an mp4 file: float32 [B, C, F, H, W] in [-1, 1]."""
    size = (scenes.NUM_FRAMES, scenes.CANVAS, scenes.CANVAS)
    drawn = [scenes.sample_scene(first_seed + i) for i in range(count)]
    return to_model_range(torch.stack([read_video(encode_mp4(renderer.render(s)), *size) for s in drawn]))


def vae_loss(vae: AutoencoderKLWan, video: torch.Tensor, kl_weight: float = 1e-3) -> torch.Tensor:
    """Weighted L1 reconstruction plus a KL term; pixels of and near objects weigh five times the background.

    The KL term is so heavy that every detail that matters must exceed the posterior's noise: a generator only learns
    details with a large share of the latents.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = vae.encode(video).latent_dist.parameters.float()
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 10)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        decoded = vae.decode(latents).sample.float()
    background = video[..., :1, :1]
    objects = ((video - background).abs().amax(1, keepdim=True) > 0.15).float()
    weight = 1 + 4 * F.max_pool3d(objects, (1, 7, 7), 1, (0, 3, 3))  # with the notches that tell a cross from a square
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return (weight * (decoded - video).abs()).mean() + kl_weight * kl


def train_vae(
    vae: AutoencoderKLWan, steps: int, num_clips: int = 3000, batch_size: int = 4, num_measured: int = 512
) -> None:
    """Train in place, then record the latents' mean and standard deviation in the config.

    The first 70% of the steps use windows of 5 frames (two latent frames), which is cheap and enough for a frame's
    content; the others use whole clips, which the later chunks of the causal VAE need.
    """
    pool = clips(0, num_clips)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = min(100, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / steps)) + 1e-3
    )
    for step in track(range(steps), "training the VAE"):
        window = 5 if step < 0.7 * steps else scenes.NUM_FRAMES
        start = int(torch.randint(0, scenes.NUM_FRAMES - window + 1, ()))
        video = pool[torch.randint(0, num_clips, (batch_size,)), :, start : start + window]
        loss = vae_loss(vae, video)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    record_latent_statistics(vae, num_measured)


@torch.no_grad()
def record_latent_statistics(vae: AutoencoderKLWan, num_clips: int) -> None:
    """Measure the per-channel mean and standard deviation of the mode latents and store them in the config."""
    latents = torch.cat([vae.encode(clips(10**6 + i, 2)).latent_dist.mode() for i in range(0, num_clips, 2)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    held = clips(2 * 10**6, 16)
    error = F.l1_loss(vae.decode(vae.encode(held).latent_dist.mode()).sample, held)
    print(f"latents: mean {mean.tolist()}, std {std.tolist()}; held-out mean absolute error {error:.4f}")


def run(options: argparse.Namespace) -> None:
    """Make and train everything, write the folder."""
    for name in ("text_steps", "vae_steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    vae = make_vae()
    text_encoder = make_text_encoder(len(tokenizer))
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=make_transformer(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )
    pipeline.save_pretrained(options.output)  # fails now if the folder is not writable
    accuracies = train_text_encoder(text_encoder, tokenizer, options.text_steps)
    print("text encoder, held-out prompts:", {name: round(value, 3) for name, value in accuracies.items()})
    train_vae(vae, options.vae_steps)
    pipeline.save_pretrained(options.output)
    print(f"wrote {options.output}")


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write, in WanPipeline layout")
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--vae-steps", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
