"""The unified transformer: Wan inside it, the text stream beside it, both against an independent implementation."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from tests import tiny
from univigu.flow.text import TextInputs
from univigu.models.options import ArchitectureOptions, check_replaced
from univigu.models.transformer import UniViGUTransformer3DModel, UniViGUTransformerOutput

VOCAB = 11
TEXT_KEYS = ("ffn_t.", "attn1_t.", "time_embedding_t.", "vocab_embed.", "text_head.", "scale_shift_table_t")
FLOWS = ("embedding", "uniform", "mask")


def is_text_key(name: str) -> bool:
    return any(part in name for part in TEXT_KEYS)


def make_inputs(
    batch: int = 3, size: tuple[int, ...] = (3, 6, 10), length: int = 7, width: int | None = None, dtype: Any = None
) -> dict[str, Any]:
    """Model inputs at times that differ between samples and modalities; with a width, text as float states."""
    generator = torch.Generator().manual_seed(7)
    text: torch.Tensor = torch.randint(VOCAB, (batch, length), generator=generator)
    if width is not None:
        text = torch.randn(batch, length, width, generator=generator)
    return {
        "hidden_states": torch.randn(batch, tiny.CHANNELS, *size, generator=generator).to(dtype),
        "timestep": torch.tensor([637.5, 20.25, 999.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, 5, tiny.TEXT_DIM, generator=generator).to(dtype),
        "text_tokens": text,
        "text_timestep": torch.tensor([3.5, 811.0, 402.25])[:batch],
    }


def video_only(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith("text_")}


def arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``forward``: what is called text_* in a test goes into TextInputs."""
    text = {name.removeprefix("text_"): value for name, value in inputs.items() if name.startswith("text_")}
    return video_only(inputs) | ({"text": TextInputs(**text)} if text else {})


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> UniViGUTransformerOutput:
    return model(**arguments(inputs))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    return tiny.make_wan()


@pytest.fixture(scope="module")
def model(wan: WanTransformer3DModel) -> UniViGUTransformer3DModel:
    return tiny.make_unified(wan, VOCAB)


@pytest.fixture(scope="module")
def one_way(wan: WanTransformer3DModel) -> UniViGUTransformer3DModel:
    """As ``model``, but clean video does not read text."""
    return tiny.make_unified(wan, VOCAB, clean_video_reads_text=False)


# ---------------------------------------------------------------------- video alone is Wan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (3, 6, 10)),
        ({"num_attention_heads": 3, "attention_head_dim": 10, "ffn_dim": 17, "num_layers": 1}, (1, 6, 14)),
        ({"patch_size": (1, 1, 1), "freq_dim": 30}, (2, 3, 5)),
        ({"patch_size": (2, 1, 3), "cross_attn_norm": False, "num_layers": 3}, (4, 3, 9)),
    ],
)
def test_video_alone_is_bit_equal_to_wan(options: dict[str, Any], size: tuple[int, ...], dtype: torch.dtype) -> None:
    wan = tiny.make_wan(seed=3, **options).to(dtype)
    model = UniViGUTransformer3DModel.from_wan(wan, VOCAB).eval()
    inputs = video_only(make_inputs(size=size, dtype=dtype))
    expected, output = run(wan, inputs), run(model, inputs)
    assert output.sample.dtype == dtype
    assert torch.equal(output.sample, expected.sample)
    assert output.text is None
    assert len(run(model, inputs | {"return_dict": False})) == 1


def test_construction_at_wan_1_3b_has_wans_keys_and_count() -> None:
    options = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    with torch.device("meta"):
        wan = WanTransformer3DModel(**options, text_dim=4096)
        model = UniViGUTransformer3DModel(**options, text_dim=4096, vocab_size=256384)
    theirs = {name: value.shape for name, value in wan.state_dict().items()}
    ours = {name: value.shape for name, value in model.state_dict().items()}
    assert theirs.items() <= ours.items()
    assert {name for name in ours if not is_text_key(name)} == set(theirs)
    count = sum(value.numel() for name, value in model.named_parameters() if not is_text_key(name))
    assert count == sum(value.numel() for value in wan.parameters()) == 1_418_996_800
    width, vocab, hidden = 1536, 256384, 8960
    experts = 30 * (2 * width * hidden + width + hidden)
    time = (256 + width + 6 * width) * width + 8 * width
    text_stream = experts + time + vocab * width + 2 * width + width + vocab * (width + 1)  # embedding, table, head
    assert sum(value.numel() for name, value in model.named_parameters() if is_text_key(name)) == text_stream
    assert model.config.num_layers == 30


# ---------------------------------------------------------------------- the joint forward, written again


def sinusoid(times: torch.Tensor, dim: int) -> torch.Tensor:
    angles = times[:, None] * torch.exp(-math.log(10000.0) * torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotate_pairs(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Interleaved pairs (2j, 2j+1) as complex numbers; states [B, S, heads, hd], angles [S, hd/2]."""
    pairs = torch.view_as_complex(states.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2).float()


def rotate_halves(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs (j, j + hd/2)."""
    first, second = states.double().chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).float()


def axis_angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    return positions.double()[:, None] / 10000.0 ** (torch.arange(0, dim, 2).double() / dim)


def video_angles(grid: tuple[int, ...], head_dim: int) -> torch.Tensor:
    """Wan's three axes side by side: height and width have a third each (even), time has the rest."""
    third = 2 * (head_dim // 6)
    dims = (head_dim - 2 * third, third, third)
    axes = torch.cartesian_prod(*[torch.arange(n) for n in grid])
    return torch.cat([axis_angles(axes[:, i], dims[i]) for i in range(3)], dim=1)


class Reference:
    """Joint forward of the unified model from its weights by formula, in float32; ``fault`` breaks one rule."""

    def __init__(self, model: UniViGUTransformer3DModel, fault: str | None = None) -> None:
        self.w = dict(model.state_dict())
        self.config, self.fault = model.config, fault

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def times(self, prefix: str, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.silu(self.linear(f"{prefix}.time_embedder.linear_1", sinusoid(times, self.config.freq_dim)))
        temb = self.linear(f"{prefix}.time_embedder.linear_2", hidden)
        return temb, self.linear(f"{prefix}.time_proj", F.silu(temb)).unflatten(1, (6, -1))

    def norm(self, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.config.num_attention_heads, -1))

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.fault == "norm_per_head":
            x = (self.heads(x) / self.heads(x).square().mean(-1, keepdim=True).sqrt()).flatten(-2)
        else:
            x = x / (x.square().mean(-1, keepdim=True) + self.config.eps).sqrt()
        return x * self.w[f"{name}.weight"]

    def qkv(self, name: str, x: torch.Tensor, source: torch.Tensor) -> list[torch.Tensor]:
        query = self.rms(f"{name}.norm_q", self.linear(f"{name}.to_q", x))
        key = self.rms(f"{name}.norm_k", self.linear(f"{name}.to_k", source))
        return [self.heads(y) for y in (query, key, self.linear(f"{name}.to_v", source))]

    def attention(
        self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1]) + bias
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        return self.linear(f"{name}.to_out.0", mixed)

    def rotate(self, x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        count, head_dim = math.prod(grid), x.shape[-1]
        video = rotate_pairs(x[:, :count], video_angles(grid, head_dim))
        positions = torch.arange(x.shape[1] - count) + (count if self.fault == "text_moves_with_one_token" else 0)
        turn = rotate_pairs if self.fault == "interleaved_text_rotary" else rotate_halves
        return torch.cat([video, turn(x[:, count:], axis_angles(positions, head_dim))], dim=1)

    def self_attention(self, name: str, x: torch.Tensor, grid: tuple[int, ...], bias: torch.Tensor) -> torch.Tensor:
        """Of [video ; text]; each stream's queries find keys and values of their own making or of the other's."""
        count = math.prod(grid)

        def turned(name: str) -> list[torch.Tensor]:
            query, key, value = self.qkv(name, x, x)
            return [self.rotate(query, grid), self.rotate(key, grid), value]

        video = turned(name)
        if self.config.text_attention == "shared":
            return self.attention(name, *video, bias)
        own = turned(f"{name}_t")
        each = [torch.cat([a[:, :count], b[:, count:]], dim=1) for a, b in zip(video, own, strict=True)]
        text = each if self.fault == "text_finds_the_generators_keys" else own
        out = self.attention(name, *each, bias)[:, :count]
        return torch.cat([out, self.attention(f"{name}_t", *text, bias)[:, count:]], dim=1)

    def feed_forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{name}.net.2", F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh"))

    def block(
        self,
        i: int,
        x: torch.Tensor,
        grid: tuple[int, ...],
        modulation: torch.Tensor,
        context: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """x: [video ; text]; modulation: [B, N + L, 6, D], each token's own."""
        name, count = f"blocks.{i}", math.prod(grid)
        parts = self.w[f"{name}.scale_shift_table"] + modulation
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = parts.unbind(2)
        y = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.self_attention(f"{name}.attn1", y, grid, bias)
        normed = self.norm(x) * self.w[f"{name}.norm2.weight"] + self.w[f"{name}.norm2.bias"]
        read = self.attention(f"{name}.attn2", *self.qkv(f"{name}.attn2", normed, context))
        if self.config.text_attention == "own" and self.fault != "text_reads_prompts_as_video":
            own = self.attention(f"{name}.attn2_t", *self.qkv(f"{name}.attn2_t", normed, context))
            read = torch.cat([read[:, :count], own[:, count:]], dim=1)
        if self.fault == "text_skips_prompt":
            read[:, count:] = 0
        x = x + read
        y = self.norm(x) * (1 + scale_ffn) + shift_ffn
        expert = "ffn" if self.fault == "one_feed_forward" else "ffn_t"
        halves = self.feed_forward(f"{name}.ffn", y[:, :count]), self.feed_forward(f"{name}.{expert}", y[:, count:])
        return x + gate_ffn * torch.cat(halves, dim=1)

    def bias(self, inputs: dict[str, Any], count: int, length: int) -> torch.Tensor:
        """Who may read whom: 0 or -inf, [B, 1, N + L, N + L]."""
        visible = torch.ones(len(inputs["timestep"]), count + length, count + length, dtype=torch.bool)
        if "text_mask" in inputs:
            visible[:, :, count:] &= inputs["text_mask"][:, None]
        if not self.config.clean_video_reads_text:
            visible[inputs["timestep"] == 0, :count, count:] = False
        return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)[:, None]

    def __call__(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        latents, tokens, (pt, ph, pw) = inputs["hidden_states"], inputs["text_tokens"], self.config.patch_size
        batch, length = tokens.shape[:2]
        grid = (latents.shape[2] // pt, latents.shape[3] // ph, latents.shape[4] // pw)
        count = math.prod(grid)

        # Tokens
        patches = latents.reshape(batch, -1, grid[0], pt, grid[1], ph, grid[2], pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, count, -1)
        video = patches @ self.w["patch_embedding.weight"].flatten(1).T + self.w["patch_embedding.bias"]
        text = 0.05 * tokens if tokens.is_floating_point() else self.w["vocab_embed.weight"][tokens]
        x = torch.cat([video, text], dim=1)

        # Times and prompt
        told = inputs["timestep"].masked_fill(inputs["timestep"] == 0, self.config.clean_video_timestep)
        temb_v, mod_v = self.times("condition_embedder", told)
        own = "condition_embedder" if self.fault == "one_time_embedding" else "time_embedding_t"
        temb_t, mod_t = self.times(own, inputs["timestep" if self.fault == "one_time" else "text_timestep"])
        each = [mod_v[:, None].expand(-1, count, -1, -1), mod_t[:, None].expand(-1, length, -1, -1)]
        context = self.linear("condition_embedder.text_embedder.linear_1", inputs["encoder_hidden_states"])
        context = self.linear("condition_embedder.text_embedder.linear_2", F.gelu(context, approximate="tanh"))

        bias = self.bias(inputs, count, length)
        for i in range(self.config.num_layers):
            x = self.block(i, x, grid, torch.cat(each, dim=1), context, bias)

        # Heads
        shift, scale = (self.w["scale_shift_table"] + temb_v[:, None])[:, :, None].unbind(1)
        out = self.linear("proj_out", self.norm(x[:, :count]) * (1 + scale) + shift)
        out = out.reshape(batch, *grid, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(latents.shape)
        shift, scale = (self.w["scale_shift_table_t"] + temb_t[:, None])[:, :, None].unbind(1)
        normed = self.norm(x[:, count:], eps=1e-5) * self.w["text_head.norm_final.weight"]
        if self.fault == "unmodulated_text_head":
            shift, scale = torch.zeros_like(shift), torch.zeros_like(scale)
        return out, self.linear("text_head.linear", normed * (1 + scale) + shift)


@pytest.mark.parametrize("text_flow", FLOWS)
@pytest.mark.parametrize(("reads", "told"), [(True, 0.0), (False, 300.5)])
def test_joint_forward_agrees_with_the_formulas(
    wan: WanTransformer3DModel, text_flow: str, reads: bool, told: float
) -> None:
    options = {"clean_video_reads_text": reads, "clean_video_timestep": told}
    model = tiny.make_unified(wan, VOCAB, text_flow=text_flow, **options)
    inputs = make_inputs(width=tiny.HEADS * tiny.HEAD_DIM if text_flow == "embedding" else None)
    inputs["timestep"][1] = 0.0  # a clean row among noisy ones
    inputs["text_mask"] = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    if text_flow == "mask":
        inputs["text_tokens"][0, 2] = VOCAB  # the mask state
    output = run(model, inputs)
    sample, text = Reference(model)(inputs)
    assert_close(output.sample, sample)
    assert_close(output.text, text)


def test_what_the_generator_is_told_of_clean_video(wan: WanTransformer3DModel) -> None:
    """With text as :class:`Reference` says, and without text nothing."""
    model, video = tiny.make_unified(wan, VOCAB, clean_video_timestep=300.0), video_only(make_inputs())
    video["timestep"][1] = 0.0
    assert torch.equal(run(model, video).sample, run(wan, video).sample)
    for wrong in (-1.0, 1000.0):
        with pytest.raises(ValueError, match="clean_video_timestep="):
            tiny.make_unified(wan, VOCAB, clean_video_timestep=wrong)


def test_self_conditioning_starts_as_nothing_and_learns(wan: WanTransformer3DModel) -> None:
    fresh = UniViGUTransformer3DModel.from_wan(wan, VOCAB, ArchitectureOptions("embedding")).eval()
    torch.nn.init.normal_(fresh.text_head.linear.weight)
    inputs = make_inputs(width=24)
    given = inputs | {"text_endpoint": torch.randn(3, 7, 24)}
    output = fresh(**arguments(given)).text
    assert torch.equal(output, run(fresh, inputs).text)
    output.square().mean().backward()
    assert fresh.text_endpoint_proj.weight.grad.abs().sum() > 0
    torch.nn.init.normal_(fresh.text_endpoint_proj.weight)
    assert (run(fresh, given).text - output).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"text\.endpoint is torch\.float32 \[3, 7, 5\]"):
        run(fresh, given | {"text_endpoint": torch.randn(3, 7, 5)})
    assert not any("endpoint" in name for name in tiny.make_unified(wan, VOCAB).state_dict())


def test_joint_forward_agrees_for_other_sizes() -> None:
    options = {"num_attention_heads": 3, "attention_head_dim": 10, "patch_size": (2, 1, 3), "num_layers": 3}
    model = tiny.make_unified(tiny.make_wan(seed=5, **options), VOCAB)
    inputs = make_inputs(batch=2, size=(4, 3, 9), length=1)
    output, expected = run(model, inputs), Reference(model)(inputs)
    assert_close(output.sample, expected[0])
    assert_close(output.text, expected[1])


@pytest.mark.parametrize("reads", [True, False])
def test_joint_forward_agrees_with_the_texts_own_attention(wan: WanTransformer3DModel, reads: bool) -> None:
    faults = ["text_finds_the_generators_keys", "text_reads_prompts_as_video"]
    model = tiny.make_unified(wan, VOCAB, clean_video_reads_text=reads, text_attention="own")
    inputs = make_inputs()
    for clean in (0, 1, 3):  # rows; the two streams part where a row is clean, and where the text projects the video
        inputs["timestep"][:clean] = 0.0
        output = run(model, inputs)
        sample, text = Reference(model)(inputs)
        assert_close(output.sample, sample)
        assert_close(output.text, text)
        for fault in faults:
            _, wrong = Reference(model, fault)(inputs)
            assert (wrong - text).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fault",
    [
        "interleaved_text_rotary",
        "text_moves_with_one_token",
        "norm_per_head",
        "text_skips_prompt",
        "one_feed_forward",
        "one_time_embedding",
        "one_time",
        "unmodulated_text_head",
    ],
)
def test_a_broken_rule_would_be_seen(model: UniViGUTransformer3DModel, fault: str) -> None:
    inputs = make_inputs()
    _, text = Reference(model, fault)(inputs)
    assert (run(model, inputs).text - text).abs().max() > 1e-3


# ---------------------------------------------------------------------- batches, masks, reach


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_sample_does_not_depend_on_its_batch(model: Any, one_way: Any, reads: bool, with_text: bool) -> None:
    unified, inputs = (model if reads else one_way), make_inputs()
    inputs["timestep"][2] = 0.0
    inputs = inputs if with_text else video_only(inputs)
    together = run(unified, inputs)
    for i in range(3):
        alone = run(unified, {name: value[i : i + 1] for name, value in inputs.items()})
        assert_close(alone.sample, together.sample[i : i + 1])
        if with_text:
            assert_close(alone.text, together.text[i : i + 1])


@pytest.mark.parametrize("reads", [True, False])
def test_masked_text_equals_truncated_text(model: Any, one_way: Any, reads: bool) -> None:
    unified, inputs, kept = (model if reads else one_way), make_inputs(), 3
    inputs["timestep"][0] = 0.0
    mask = (torch.arange(7) < kept).expand(3, -1)
    short = run(unified, inputs | {"text_tokens": inputs["text_tokens"][:, :kept]})
    masked = run(unified, inputs | {"text_mask": mask})
    assert_close(masked.sample, short.sample)
    assert_close(masked.text[:, :kept], short.text)
    unmasked = run(unified, inputs).text
    assert (unmasked[:, :kept] - short.text).abs().max() > 1e-3
    assert_close(run(unified, inputs | {"text_mask": torch.ones_like(mask)}).text, unmasked)


@pytest.mark.parametrize("options", [{}, {"text_positions": 9}])
def test_some_positions_of_a_slot_equal_the_slot_with_the_others_masked(
    wan: WanTransformer3DModel, options: dict[str, Any]
) -> None:
    """Each sample with positions of its own: every token keeps the position that it has in the whole slot."""
    model, inputs = tiny.make_unified(wan, VOCAB, **options), make_inputs()
    positions = torch.tensor([[0, 1, 4], [2, 5, 6], [1, 3, 6]])
    few = {"text_tokens": inputs["text_tokens"].gather(1, positions), "text_positions": positions}
    some = run(model, inputs | few)
    mask = torch.zeros(3, 7, dtype=torch.bool).scatter(1, positions, True)
    masked = run(model, inputs | {"text_mask": mask})
    assert_close(some.sample, masked.sample)
    assert_close(some.text, masked.text.gather(1, positions[..., None].expand(-1, -1, VOCAB)))
    moved = run(model, inputs | few | {"text_positions": torch.arange(3).expand(3, -1)})
    assert (moved.text - some.text).abs().max() > 1e-4  # where they stand does matter
    whole = run(model, inputs | {"text_positions": torch.arange(7).expand(3, -1)})
    assert_close(whole.text, run(model, inputs).text)


def video_states(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The video's hidden states after every block, and its output."""
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: states.append(args[2][0])) for block in model.blocks]
    sample = run(model, inputs).sample
    for hook in hooks:
        hook.remove()
    return [*states, sample]


def test_clean_video_that_does_not_read_text_is_independent_of_it(model: Any, one_way: Any) -> None:
    inputs = make_inputs()
    inputs["timestep"][1] = 0.0  # clean; rows 0 and 2 are noisy
    changed = inputs | {"text_tokens": (inputs["text_tokens"] + 1) % VOCAB, "text_timestep": torch.full((3,), 77.0)}
    before, after = video_states(one_way, inputs), video_states(one_way, changed)
    assert len(before) == one_way.config.num_layers + 1
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[1], b[1])
        assert all((a[row] - b[row]).abs().max() > 1e-4 for row in (0, 2))
    assert_close(before[-1][1], run(one_way, video_only(inputs)).sample[1])
    for a, b in zip(video_states(model, inputs), video_states(model, changed), strict=True):
        assert (a[1] - b[1]).abs().max() > 1e-4


# ---------------------------------------------------------------------- weights in and out


@pytest.mark.parametrize("source", ["memory", "transformer", "pipeline"])
def test_from_wan_copies_wan(tmp_path: Path, wan: WanTransformer3DModel, source: str) -> None:
    wan.save_pretrained(tmp_path / "transformer")
    origin = {"memory": wan, "transformer": str(tmp_path / "transformer"), "pipeline": tmp_path}[source]
    model = UniViGUTransformer3DModel.from_wan(origin, VOCAB, ArchitectureOptions("mask", clean_video_reads_text=False))
    ours, theirs = model.state_dict(), wan.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert not {value.data_ptr() for value in ours.values()} & {value.data_ptr() for value in theirs.values()}
    assert len({value.data_ptr() for value in ours.values()}) == len(ours)  # the copies below share nothing
    for name, value in ours.items():
        if "ffn_t." in name:
            assert torch.equal(value, theirs[name.replace("ffn_t.", "ffn.")])
        if name.startswith("time_embedding_t."):
            assert torch.equal(value, theirs[name.replace("time_embedding_t.", "condition_embedder.")])
    assert torch.equal(ours["scale_shift_table_t"], theirs["scale_shift_table"])
    assert not ours["text_head.linear.weight"].any() and not ours["text_head.linear.bias"].any()
    assert ours["vocab_embed.weight"].shape[0] == VOCAB + 1 and ours["text_head.linear.weight"].shape[0] == VOCAB
    config = model.config
    assert (config.vocab_size, config.text_flow, config.clean_video_reads_text) == (VOCAB, "mask", False)
    assert config.num_layers == wan.config.num_layers


def test_from_wan_in_bfloat16_keeps_wans_dtypes(tmp_path: Path, wan: WanTransformer3DModel) -> None:
    wan.save_pretrained(tmp_path)
    reference = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    model = UniViGUTransformer3DModel.from_wan(tmp_path, VOCAB, torch_dtype=torch.bfloat16).eval()
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    assert all(dtypes[name] == value.dtype for name, value in reference.named_parameters())
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16} and model.dtype == torch.bfloat16
    for name, dtype in dtypes.items():
        if "ffn_t" in name or name.startswith(("vocab_embed", "text_head.linear")):
            assert dtype == torch.bfloat16
        if name in ("scale_shift_table_t", "text_head.norm_final.weight"):
            assert dtype == torch.float32
    inputs = make_inputs(dtype=torch.bfloat16)
    assert torch.equal(run(model, video_only(inputs)).sample, run(reference, video_only(inputs)).sample)
    model.save_pretrained(tmp_path / "saved")
    again = UniViGUTransformer3DModel.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert {name: value.dtype for name, value in again.named_parameters()} == dtypes


@pytest.mark.parametrize(("text_flow", "dtype"), [("embedding", torch.float32), ("mask", torch.bfloat16)])
def test_save_and_load_is_bit_equal(
    tmp_path: Path, wan: WanTransformer3DModel, text_flow: str, dtype: torch.dtype
) -> None:
    model = tiny.make_unified(wan, VOCAB, text_flow=text_flow)
    model.save_pretrained(tmp_path / "float32")
    model = UniViGUTransformer3DModel.from_pretrained(tmp_path / "float32", torch_dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    again = UniViGUTransformer3DModel.from_pretrained(tmp_path / "again", torch_dtype=dtype)
    assert dict(again.config).items() >= {k: v for k, v in model.config.items() if not k.startswith("_")}.items()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    inputs = make_inputs(width=24 if text_flow == "embedding" else None, dtype=dtype)
    first, second = run(model, inputs), run(again, inputs)
    assert first.sample.dtype == first.text.dtype == dtype
    assert torch.equal(first.sample, second.sample) and torch.equal(first.text, second.text)
    assert first.text.isfinite().all()


def edit_weights(folder: Path, remove: str | None = None, add: str | None = None) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if remove:
        del weights[remove]
    if add:
        weights[add] = torch.zeros(2)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [{"remove": "proj_out.bias"}, {"add": "blocks.0.extra.weight"}])
def test_loading_is_strict_and_names_the_key(tmp_path: Path, model: Any, wan: Any, change: dict[str, str]) -> None:
    (name,) = change.values()
    model.save_pretrained(tmp_path / "unified")
    edit_weights(tmp_path / "unified", **change)
    with pytest.raises(ValueError, match=name):
        UniViGUTransformer3DModel.from_pretrained(tmp_path / "unified")
    wan.save_pretrained(tmp_path / "wan")
    edit_weights(tmp_path / "wan", **change)
    with pytest.raises(ValueError, match=name):
        UniViGUTransformer3DModel.from_wan(tmp_path / "wan", VOCAB)


def test_loading_wrong_folders(tmp_path: Path, wan: WanTransformer3DModel) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.*config\.json"):
        UniViGUTransformer3DModel.from_wan(tmp_path / "nothing", VOCAB)
    wan.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ffn_t\.net\.2\.weight"):  # Wan's folder is no unified model
        UniViGUTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("text_flow", "autoregressive"), ("vocab_size", 0), ("image_dim", 8)])
def test_constructor_names_the_wrong_option(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        UniViGUTransformer3DModel(num_layers=0, **{field: value})


@pytest.mark.parametrize("text_flow", ["embedding", "mask"])  # the mask state is not data
def test_token_table_has_rows_of_rms_one_and_is_differentiable(wan: WanTransformer3DModel, text_flow: str) -> None:
    model = tiny.make_unified(wan, VOCAB, text_flow=text_flow)
    table = model.token_table()
    assert table.shape == (VOCAB, 24)
    assert_close(table.square().mean(-1).sqrt(), torch.ones(VOCAB))
    assert_close(F.cosine_similarity(table, model.vocab_embed.weight[:VOCAB]), torch.ones(VOCAB))
    table[:, 0].sum().backward()
    assert model.vocab_embed.weight.grad[:VOCAB].abs().sum() > 0


def test_diffusers_finds_our_blocks(model: UniViGUTransformer3DModel) -> None:
    block = type(model.blocks[0]).__name__
    assert model._no_split_modules == [block] and model._repeated_blocks == [block]
    assert {"scale_shift_table_t", "norm_final", "time_embedder"} <= set(model._keep_in_fp32_modules)


# ---------------------------------------------------------------------- inputs and gradients


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": torch.zeros(2)}, r"^timestep is torch\.float32 \[2\]: expected float \[3\]"),
        ({"text_timestep": torch.tensor(5.0)}, r"^text\.timestep is torch\.float32 \[\]: expected float \[3\]"),
        (
            {"text_tokens": torch.zeros(3, 7, 24)},
            r"text\.tokens is torch\.float32 \[3, 7, 24\]: the uniform .*\[B, L\]",
        ),
        ({"text_tokens": torch.zeros(21, dtype=torch.int64)}, r"text\.tokens is torch\.int64 \[21\]"),
        ({"text_tokens": torch.zeros(2, 7, dtype=torch.int64)}, r"text\.tokens has 2 rows: expected 3"),
        ({"text_mask": torch.ones(3, 7)}, r"text\.mask is torch\.float32 \[3, 7\]: expected torch\.bool \[3, 7\]"),
        ({"text_mask": torch.ones(3, 6).bool()}, r"text\.mask is torch\.bool \[3, 6\]: expected torch\.bool \[3, 7\]"),
        ({"text_positions": torch.arange(7)}, r"text\.positions is torch\.int64 \[7\]: expected torch\.int64 \[3, 7\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(model: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, make_inputs() | changes)


def test_embedding_flow_wants_states(wan: WanTransformer3DModel) -> None:
    with pytest.raises(ValueError, match=r"text\.tokens is torch\.int64 \[3, 7\]: the embedding .*\[B, L, D\]"):
        run(tiny.make_unified(wan, VOCAB, text_flow="embedding"), make_inputs())


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    output = model(**arguments(inputs))
    (output.sample.square().mean() + output.text.square().mean()).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_reach_every_parameter(model: UniViGUTransformer3DModel) -> None:
    for name, gradient in gradients(model, make_inputs()).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0, name


def test_a_fresh_text_head_is_undecided_and_learns(wan: WanTransformer3DModel) -> None:
    model = UniViGUTransformer3DModel.from_wan(wan, VOCAB)
    inputs = make_inputs()
    logits = model(**arguments(inputs)).text
    assert not logits.any()  # the first posterior is uniform
    F.cross_entropy(logits.flatten(0, 1), inputs["text_tokens"].flatten()).backward()
    assert model.text_head.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reads", [True, False])
def test_gradient_checkpointing_changes_nothing(wan: WanTransformer3DModel, reads: bool) -> None:
    model = tiny.make_unified(wan, VOCAB, clean_video_reads_text=reads).train()
    inputs = make_inputs()
    inputs["timestep"][0] = 0.0
    plain = gradients(model, inputs)
    calls = []

    def counting(function: Any, *args: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(counting)
    checkpointed = gradients(model, inputs)
    assert calls == list(model.blocks)
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


# ---------------------------------------------------------------------- one FFN for both streams


def test_a_shared_ffn_is_an_own_one_with_the_same_weights(wan: WanTransformer3DModel) -> None:
    """As built from Wan, where the text's FFN is a copy, both agree; they no longer do once the copy is changed."""
    torch.manual_seed(0)
    separate = UniViGUTransformer3DModel.from_wan(wan, VOCAB, ArchitectureOptions("mask")).eval()
    shared = UniViGUTransformer3DModel.from_wan(wan, VOCAB, ArchitectureOptions("mask", separate_text_ffn=False)).eval()
    text_only = {name: value for name, value in separate.state_dict().items() if "ffn_t." not in name}
    text_only["text_head.linear.weight"] = torch.randn_like(text_only["text_head.linear.weight"])  # zero at first
    separate.load_state_dict(text_only, strict=False)
    assert set(shared.state_dict()) == set(text_only)
    shared.load_state_dict(text_only)
    inputs = make_inputs()
    expected, actual = run(separate, inputs), run(shared, inputs)
    assert_close(actual.text, expected.text)
    assert_close(actual.sample, expected.sample)
    with torch.no_grad():
        separate.blocks[0].ffn_t.net[2].bias += 1.0
    assert (run(separate, inputs).text - actual.text).abs().max() > 1e-3


# ---------------------------------------------------------------------- absolute text positions


def test_learned_positions_are_added_to_the_tokens(wan: WanTransformer3DModel) -> None:
    model, inputs = tiny.make_unified(wan, VOCAB, text_flow="mask", text_positions=9), make_inputs()
    states = model.vocab_embed(inputs["text_tokens"]) + model.text_position_embed.weight[:7]
    streams = []
    hook = model.blocks[0].register_forward_hook(lambda *args: streams.append(args[1][4]))
    run(model, inputs)
    hook.remove()
    assert torch.equal(streams[0].states, states) and streams[0].rotary is None
    assert torch.equal(run(model, video_only(inputs)).sample, run(wan, video_only(inputs)).sample)
    with pytest.raises(ValueError, match="10 positions: the model has 9"):
        run(model, make_inputs(length=10))
    with pytest.raises(ValueError, match="text_positions=-1"):
        ArchitectureOptions(text_positions=-1)


@pytest.mark.parametrize("learned", [True, False])
def test_only_positions_tell_text_tokens_apart(wan: WanTransformer3DModel, learned: bool) -> None:
    """Text tokens shuffled together with their positions shuffle the output, and nothing else changes."""
    model, inputs = tiny.make_unified(wan, VOCAB, text_flow="mask", text_positions=7 * learned), make_inputs()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    shuffled = inputs | {"text_tokens": inputs["text_tokens"][:, order]}
    output, moved = run(model, inputs), run(model, shuffled)
    same = run(model, shuffled | {"text_positions": order.expand(3, -1)})
    assert_close(output.text[:, order], same.text)
    assert_close(output.sample, same.sample)
    assert (output.text[:, order] - moved.text).abs().max() > 1e-3 < (output.sample - moved.sample).abs().max()


def test_a_frozen_generators_clean_video_takes_no_part_in_the_backward_pass(wan: WanTransformer3DModel) -> None:
    """What text learns is the same as if the graph went through the video, but the video has no graph."""
    model = UniViGUTransformer3DModel.from_wan(wan, VOCAB, ArchitectureOptions("mask", clean_video_reads_text=False))
    torch.nn.init.normal_(model.text_head.linear.weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_text_key(name))
    inputs = make_inputs() | {"timestep": torch.zeros(3)}
    gradients = []
    for through_video in (False, True):
        output = model(
            **arguments(inputs) | {"hidden_states": inputs["hidden_states"].clone().requires_grad_(through_video)}
        )
        assert output.sample.requires_grad == through_video
        model.zero_grad()
        output.text.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("ffn_t" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name])


def test_own_attention_projections_start_as_the_videos(wan: WanTransformer3DModel, tmp_path: Path) -> None:
    """A new model is the shared one; then text alone has what text alone learns, in an attention still joint."""
    options = {"text_positions": 7, "clean_video_reads_text": False}
    models = []
    for attention in ("shared", "own"):
        torch.manual_seed(0)
        models.append(
            UniViGUTransformer3DModel.from_wan(
                wan, VOCAB, ArchitectureOptions("mask", text_attention=attention, **options)
            ).eval()
        )
        torch.nn.init.normal_(models[-1].text_head.linear.weight, generator=torch.Generator().manual_seed(1))
    shared, own = models
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    attentions = [block.get_submodule(layer) for block in wan.blocks for layer in ("attn1", "attn2")]
    assert sizes[1] - sizes[0] == sum(p.numel() for attention in attentions for p in attention.parameters())
    inputs = make_inputs()
    before = run(own, inputs)
    assert_close(before.text, run(shared, inputs).text)
    assert_close(before.sample, run(shared, inputs).sample)
    after = before
    names = ("to_q", "to_k", "to_v", "to_out.0")
    for layer, name in itertools.product(("attn1_t", "attn2_t"), names):  # changing it changes what text computes
        for block in own.blocks:
            torch.nn.init.normal_(block.get_submodule(f"{layer}.{name}").weight, std=0.3)
        earlier, after = after, run(own, inputs)
        assert (after.text - earlier.text).abs().max() > 1e-4, (layer, name)
    assert (after.sample - before.sample).abs().max() > 1e-5  # noisy video reads the text's new keys
    alone = video_only(inputs)
    assert torch.equal(run(own, alone).sample, run(shared, alone).sample)
    own.save_pretrained(tmp_path)
    assert torch.equal(run(UniViGUTransformer3DModel.from_pretrained(tmp_path), inputs).text, after.text)


@pytest.mark.parametrize("key", ["text_rotary", "separate_text_attention", "text_projects_video"])
def test_a_config_with_a_former_key_is_refused(model: UniViGUTransformer3DModel, tmp_path: Path, key: str) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{key} is no longer an option of the transformer; use text_\w+: "):
        UniViGUTransformer3DModel.from_pretrained(tmp_path)
    check_replaced(model.config, "x")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["shared", "own"])
def test_it_compiles_as_one_graph(wan: WanTransformer3DModel, attention: str) -> None:
    """Also where clean video does not read text, for samples alike and not."""
    options: Any = {"text_attention": attention, "clean_video_reads_text": False, "clean_video_timestep": 300.0}
    model, inputs = tiny.make_unified(wan, VOCAB, **options), make_inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in ([], [1], [0, 1, 2]):
        inputs["timestep"] = torch.full((3,), 500.0).index_fill(0, torch.tensor(rows, dtype=torch.int64), 0.0)
        with torch.no_grad():
            ours, theirs = model(**arguments(inputs)), compiled(**arguments(inputs))
        assert_close(theirs.sample, ours.sample)
        assert_close(theirs.text, ours.text)
