"""Make a foundation for a data set, except for its generator: tokenizer, text encoder, VAE, scheduler.

    python tools/make_foundation.py --output runs/foundation/start                  # the embedded world
    python tools/make_foundation.py --output runs/foundation/start --data mine      # videos and texts of your own

The result is a folder in diffusers' WanPipeline layout.  Everything is trained on the train split of the data (the
format is in docs/DATA.md), the transformer is random; docs/TRAINING.md says how to train it.  The same command
continues an interrupted run, with the same result.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from univigu.cli import ToolParser
from univigu.data.engine import this_device
from univigu.data.index import find_split, index_folder
from univigu.data.options import check_least
from univigu.data.progress import track
from univigu.data.sample import SampleError, SampleRef
from univigu.data.video import to_model_range
from univigu.models.tokens import clean_text
from univigu.shapes.write import write_shapes
from univigu.training.loop import optimize

NEIGHBOURS = 4  # tokens on either side that each token's embedding must tell; with 8, width 64 learned none well
TOKENS_A_STEP = 1024
LONGEST_TEXT = 256
PUNCTUATION = r"[.,;:!?()\"]"


def read_all(refs: Iterable[SampleRef], read: Callable[[SampleRef], Any], name: str) -> list[Any]:
    """What is read of all samples that can be read."""
    found = []
    for ref in track(list(refs), f"reading {name}"):
        try:
            found.append(read(ref))
        except SampleError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return found


def read_clips(refs: Sequence[SampleRef], count: int, size: dict[str, int]) -> Tensor:
    """Up to ``count`` clips, spread evenly over the samples, uint8 [B, F, C, H, W]."""
    count = min(count, len(refs))
    chosen = [refs[i * len(refs) // count] for i in range(count)]
    found = read_all(chosen, lambda ref: ref.video(**size).contiguous(), "videos")
    if not found:
        raise ValueError("--data: none of its videos can be read")
    return torch.stack(found)


# ------------------------------------------------------------- tokenizer


def make_tokenizer(texts: Sequence[str], num_words: int = 4000) -> PreTrainedTokenizerFast:
    """A UniGram tokenizer with UMT5's conventions: <pad>=0, </s>=1 closes every text, <unk>=2.

    Its pieces are the most frequent words of the texts and, for everything else, single characters.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.sub(PUNCTUATION, " ", clean_text(text).lower()).split())
    words = [word for word, _ in counts.most_common(num_words)]
    ascii_letters = {chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()}
    letters = sorted(ascii_letters | {letter for text in texts for letter in text.lower() if not letter.isspace()})
    pieces = ["<pad>", "</s>", "<unk>", *sorted(f"▁{word}" for word in words), "▁", *letters]
    scores = [0.0, 0.0, 0.0] + [-10.0] * len(words) + [-20.0] * (1 + len(letters))
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(PUNCTUATION), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


# ---------------------------------------------------------- text encoder


def make_text_encoder(vocab_size: int, dim: int = 64) -> UMT5EncoderModel:
    """Two UMT5 layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=dim,
            d_kv=16,
            d_ff=2 * dim,
            num_layers=2,
            num_heads=dim // 16,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
        )
    )


def neighbours(ids: Tensor, offset: int) -> Tensor:
    """The token at an offset (at most ``NEIGHBOURS``) from each of ids [B, L]; -100 where there is none or padding."""
    found = F.pad(ids, (NEIGHBOURS, NEIGHBOURS))[:, NEIGHBOURS + offset :][:, : ids.shape[1]]
    return found.masked_fill(found == 0, -100)


def train_text_encoder(
    encoder: UMT5EncoderModel, texts: Sequence[tuple[Tensor, int]], held: Tensor, steps: int, state: Path | None = None
) -> dict[str, float]:
    """Train in place until each word's embedding tells the words around it and its position.

    A generator finds words by attention, whose keys have no positions, so the embedding of "red" must tell that it
    belongs to the first object.  A pretrained language encoder does; training on the generator's loss alone learns
    this late or never.  The rate is moderate because T5's attention is unscaled: after large updates its logits
    outweigh the position biases for good.

    Args:
        texts: token ids, int64 [N, L], and the size of a batch of them; batches come from each in turn.
        held: token ids of other texts, for the accuracies.
        state: see ``optimize``.

    Returns:
        held-out accuracies: of the position, the next token, and the token ``NEIGHBOURS`` further.
    """
    device, dim = next(encoder.parameters()).device, encoder.config.d_model
    offsets = [k for k in range(-NEIGHBOURS, NEIGHBOURS + 1) if k]
    shifts = nn.ModuleList(nn.Linear(dim, dim) for _ in offsets).to(device)
    words = nn.Linear(dim, encoder.config.vocab_size).to(device)
    position = nn.Linear(dim, LONGEST_TEXT).to(device)

    def read(ids: Tensor, which: Sequence[int], share: float = 1.0) -> list[tuple[Tensor, Tensor]]:
        """Logits and labels of the position and of some neighbours, for a share of the tokens."""
        asked = (torch.rand(ids.shape, device=device) < share) & (ids != 0)
        embeds = encoder(ids, (ids != 0).long()).last_hidden_state[asked]
        places = torch.arange(ids.shape[1], device=device).expand_as(ids)
        found = [(position(embeds), places[asked])]
        return found + [(words(shifts[n](embeds)), neighbours(ids, offsets[n])[asked]) for n in which]

    def loss_of(step: int) -> Tensor:
        known, size = texts[step % len(texts)]
        ids = known[torch.randint(0, len(known), (size,))].to(device)
        which = torch.randperm(len(offsets))[:4].tolist()
        share = TOKENS_A_STEP / int((ids != 0).sum())  # logits over the vocabulary cost more than the encoder
        return torch.stack([F.cross_entropy(a, b) for a, b in read(ids, which, share)]).mean()

    encoder.train()
    optimize("text encoder", nn.ModuleList([encoder, shifts, words, position]), loss_of, steps, 3e-3, state=state)
    encoder.eval()
    with torch.no_grad():
        results = read(held[:256].to(device), [offsets.index(1), offsets.index(NEIGHBOURS)])
    names = ("position", "next token", f"token {NEIGHBOURS} further")
    right = [(a.argmax(-1) == b)[b >= 0].float().mean().item() for a, b in results]
    return dict(zip(names, right, strict=True))


# ------------------------------------------------------------------- VAE


def make_vae(channels: int = 8, base_dim: int = 16) -> AutoencoderKLWan:
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


def vae_loss(vae: AutoencoderKLWan, video: Tensor, kl_weight: float) -> Tensor:
    """Weighted L1 reconstruction plus a KL term; pixels near what differs from the median colour weigh five times.

    A heavy KL term leaves only details that exceed the posterior's noise: a generator only learns details with a large
    share of the latents.  With 3e-4 simple shapes remain sharp; what has many details needs less.
    """
    # In bfloat16 a CPU without instructions for it takes eight times as long.
    quick = video.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    with torch.autocast(video.device.type, dtype=torch.bfloat16, enabled=quick):
        moments = vae.encode(video).latent_dist.parameters.float()
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 10)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        decoded = vae.decode(latents).sample.float()
    background = video.flatten(2).median(-1).values[..., None, None, None]
    objects = ((video - background).abs().amax(1, keepdim=True) > 0.15).float()
    weight = 1 + 4 * F.max_pool3d(objects, (1, 7, 7), 1, (0, 3, 3))  # with the notches that tell a cross from a square
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return (weight * (decoded - video).abs()).mean() + kl_weight * kl


def train_vae(
    vae: AutoencoderKLWan, clips: Tensor, steps: int, kl: float | None, batch_size: int = 4, state: Path | None = None
) -> None:
    """Train in place on clips, uint8 [N, F, C, H, W]; without ``kl``, its weight, the decoder alone, at half the rate.

    The first 70% of the steps use windows of 5 frames (two latent frames), which is cheap and enough for a frame's
    content; the others, and those of the decoder, use whole clips, which the later chunks of the causal VAE need.
    """
    device, frames, encoder_too = next(vae.parameters()).device, clips.shape[1], kl is not None
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(encoder_too)

    def loss_of(step: int) -> Tensor:
        window = min(5, frames) if encoder_too and step < 0.7 * steps else frames
        start = int(torch.randint(0, frames - window + 1, ()))
        rows = torch.randint(0, len(clips), (batch_size,))
        return vae_loss(vae, to_model_range(clips[rows, start : start + window]).to(device), kl or 0.0)

    optimize("VAE" if encoder_too else "decoder", vae, loss_of, steps, 2e-3 if encoder_too else 1e-3, state=state)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Mode latents [N, C, T, H, W] of clips, uint8 [N, F, C, H, W], without normalisation."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(to_model_range(two).to(device)).latent_dist.mode() for two in clips.split(2)])


@torch.no_grad()
def rotate_latents(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Make the channels the principal axes of these latents [N, C, T, H, W]: decorrelated, by falling variance.

    The rotation is folded into the convolutions beside the latents, so that reconstructions do not change.  Without it
    most channels are mixtures of few directions, and a generator wastes its capacity on their correlations.
    """
    axes = torch.linalg.eigh(torch.cov(latents.transpose(0, 1).flatten(1).double().cpu())).eigenvectors.flip(1)
    turn = axes.T.to(latents)  # rows are the new channels
    channels = len(turn)
    for parameter in (vae.quant_conv.weight, vae.quant_conv.bias):
        parameter[:channels] = torch.tensordot(turn, parameter[:channels], 1)
    weight = vae.post_quant_conv.weight
    weight.copy_(torch.einsum("oi...,ci->oc...", weight, turn))


def record_latent_statistics(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Store the channels' mean and standard deviation in the config; a channel that hardly varies is not amplified."""
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp(min=0.1 * std.max().item())
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


# ------------------------------------------------------------------- all


def find_samples(data: Path | None) -> dict[str, list[SampleRef]]:
    """The samples of the splits train and val; without data those of the embedded world, which is rendered."""
    if data is None:
        data = Path("runs/data/foundation")
        for split, count in (("train", 4000), ("val", 200)):
            write_shapes(data / split, split, count)  # type: ignore[arg-type]
    return {split: index_folder(find_split(data, split))[0] for split in ("train", "val")}


def start_or_continue(options: argparse.Namespace) -> Path:
    """The folder of an unfinished run's states; a run with other options is not continued."""
    folder, wanted = options.output / "training", {name: str(value) for name, value in vars(options).items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "options.json"
    if not file.exists():
        file.write_text(json.dumps(wanted))
    for name, value in json.loads(file.read_text()).items():
        if wanted[name] != value:
            message = f"{folder} is of an unfinished run with {value}; continue that one or delete it"
            raise ValueError(f"--{name.replace('_', '-')} {wanted[name]}: {message}")
    return folder


def run(options: argparse.Namespace) -> None:
    """Make and train everything, write the folder."""
    check_least(options, text_steps=1, vae_steps=1, decoder_steps=1, heads=1, layers=1, channels=1)
    training = start_or_continue(options)
    torch.manual_seed(options.seed)
    samples = find_samples(options.data)
    texts = {split: read_all(refs, SampleRef.texts, "texts") for split, refs in samples.items()}
    questions = [row["qa"][i % len(row["qa"])]["question"] for i, row in enumerate(texts["train"][::4]) if row["qa"]]
    tokenizer = make_tokenizer([text for row in texts["train"] for text in (row["prompt"], row["caption"])] + questions)
    encoder = make_text_encoder(len(tokenizer), 16 * options.heads)
    vae = make_vae(options.channels)
    transformer = WanTransformer3DModel(
        num_attention_heads=options.heads,
        attention_head_dim=32,
        in_channels=options.channels,
        out_channels=options.channels,
        text_dim=encoder.config.d_model,
        freq_dim=64,
        ffn_dim=96 * options.heads,
        num_layers=options.layers,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer, encoder, vae, scheduler, transformer)

    def ids(texts: Sequence[str], name: str) -> Tensor:
        kept = [text for text in texts if len(tokenizer(text).input_ids) <= LONGEST_TEXT]
        if not kept:
            raise ValueError(f"--data: no {name} of at most {LONGEST_TEXT} tokens")
        return tokenizer(kept, padding=True, return_tensors="pt").input_ids

    learned = [(ids([row["prompt"] for row in texts["train"]] + questions, "prompt"), 128)]
    if captions := [row["caption"] for row in texts["train"] if row["caption"]]:
        learned.append((ids(captions, "caption"), 16))
    held = ids([row["prompt"] for row in texts["val"]], "prompt")
    state = training / "text_encoder.pt"
    accuracies = train_text_encoder(encoder.to(this_device()), learned, held, options.text_steps, state)
    print("text encoder, held-out prompts:", {name: round(value, 3) for name, value in accuracies.items()})

    size = {name: getattr(options, name) for name in ("num_frames", "height", "width")}
    clips = read_clips(samples["train"], options.num_clips, size)
    train_vae(vae.to(this_device()), clips, options.vae_steps, options.kl_weight, state=training / "vae.pt")
    rotate_latents(vae, encode(vae, clips[:512]))
    record_latent_statistics(vae, encode(vae, clips[:512]))
    train_vae(vae, clips, options.decoder_steps, None, state=training / "decoder.pt")
    unseen = read_clips(samples["val"], 16, size)
    with torch.no_grad():
        decoded = vae.decode(encode(vae, unseen)).sample.cpu()
    print(f"latents: standard deviations {[round(value, 3) for value in vae.config.latents_std]}")
    print(f"held-out mean absolute error of reconstructions: {F.l1_loss(decoded, to_model_range(unseen)):.4f}")
    pipeline.to("cpu").save_pretrained(options.output)
    shutil.rmtree(training)
    print(f"wrote {options.output}")


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write, in WanPipeline layout")
    parser.add_argument("--data", type=Path, help="folder with the splits train and val; default: the embedded world")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-frames", type=int, default=9, help="4k + 1")
    parser.add_argument("--num-clips", type=int, default=3000, help="clips in memory that the VAE is trained on")
    parser.add_argument("--channels", type=int, default=8, help="channels of the latents")
    parser.add_argument("--heads", type=int, default=4, help="the transformer's heads of 32 channels")
    parser.add_argument("--layers", type=int, default=6, help="the transformer's blocks")
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument("--vae-steps", type=int, default=12000)
    parser.add_argument("--decoder-steps", type=int, default=3000, help="further ones of the VAE's decoder alone")
    parser.add_argument("--kl-weight", type=float, default=3e-4, help="of the VAE; less keeps more details")
    parser.add_argument("--seed", type=int, default=0)
    return parser.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
