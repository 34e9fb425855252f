"""Weights in and out, and what is said when they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from tests import tiny
from univigu.checkpoint import export_pipeline, load_weights, read_checkpoint, saved_names, to_wan
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import CheckpointError

VOCAB = 11


@pytest.fixture(scope="module")
def model() -> UniViGUTransformer3DModel:
    return tiny.make_unified(tiny.make_wan(), VOCAB, text_flow="mask")


def plain_config(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def save(path: Path, model: Any, **state: Any) -> Path:
    """A file as Lightning writes it."""
    weights = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    info = {"transformer_config": plain_config(model), "stage": "recall"}
    torch.save({"epoch": 0, "global_step": 3, "univigu": info, "state_dict": weights | state}, path)
    return path


def save_as(kind: str, path: Path, model: Any) -> Path:
    if kind == "ckpt":
        return save(path, model)
    model.save_pretrained(path)
    return path


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("path", "stage"),
    [("runs/foundation/last.ckpt", "foundation"), ("runs/refine/last.ckpt", "refine"), ("x.ckpt", "recall")],
)
def test_a_missing_checkpoint_says_how_to_make_it(tmp_path: Path, path: str, stage: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{path}: no such .*lightning fit --config configs/{stage}\.yaml"):
        read_checkpoint(tmp_path / path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip", None])
def test_garbage_is_not_readable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "garbage.ckpt"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"garbage\.ckpt: not a readable checkpoint \(.+\)"):
        read_checkpoint(path)


class Payload:
    """What unpickling must not run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"univigu": Payload(), "state_dict": {}}, "evil.ckpt")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint("evil.ckpt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"model": {}, "step": 1}, {"univigu": {}}, [1], torch.ones(2)])
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"foreign\.ckpt: not a checkpoint of this project"):
        read_checkpoint(tmp_path / "foreign.ckpt")


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["ckpt", "folder"])
@pytest.mark.parametrize("given", [False, True])
def test_weights_load_bit_equal(tmp_path: Path, model: Any, kind: str, given: bool) -> None:
    path = save_as(kind, tmp_path / "saved", model)
    like = tiny.make_unified(tiny.make_wan(seed=9), VOCAB, text_flow="mask", clean_video_reads_text=False)
    loaded = load_weights(path, like.config if given else None)
    assert_same_weights(loaded, model)
    # Attention's reach belongs to the run that asks, everything else to the checkpoint.
    assert loaded.config.clean_video_reads_text is not given


def test_a_run_chooses_what_shapes_no_weight(model: UniViGUTransformer3DModel, tmp_path: Path) -> None:
    chosen = {"clean_video_reads_text": False, "clean_video_reads_prompt": False, "clean_video_timestep": 300.0}
    assert all(model.config[name] != value for name, value in chosen.items())
    config = load_weights(save(tmp_path / "a.ckpt", model), plain_config(model) | chosen).config
    assert {name: config[name] for name in chosen} == chosen


@pytest.mark.parametrize("kind", ["ckpt", "folder"])
def test_another_architecture_is_refused_by_option(tmp_path: Path, model: Any, kind: str) -> None:
    path = save_as(kind, tmp_path / "saved", model)
    like = tiny.make_unified(tiny.make_wan(ffn_dim=48), VOCAB, text_flow="uniform")
    with pytest.raises(CheckpointError, match=r"saved: made for another model") as error:
        load_weights(path, like.config)
    assert "'ffn_dim': (40, 48)" in str(error.value) and "'text_flow': ('mask', 'uniform')" in str(error.value)
    assert "num_layers" not in str(error.value)


def test_missing_and_unexpected_keys_are_named(tmp_path: Path, model: Any) -> None:
    path = save(tmp_path / "more.ckpt", model, **{"transformer.blocks.7.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"more\.ckpt: .*unexpected keys \['blocks\.7\.extra'\]"):
        load_weights(path)
    checkpoint = torch.load(path)
    del checkpoint["state_dict"]["transformer.blocks.7.extra"], checkpoint["state_dict"]["transformer.proj_out.bias"]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    with pytest.raises(CheckpointError, match=r"less\.ckpt: .*missing keys \['proj_out\.bias'\]"):
        load_weights(tmp_path / "less.ckpt")


def test_a_wan_folder_holds_no_unified_weights(tmp_path: Path) -> None:
    tiny.make_wan().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"text_head\.linear\.weight"):
        load_weights(tmp_path)


def test_names_are_read_without_weights(tmp_path: Path, model: Any) -> None:
    assert saved_names(save(tmp_path / "last.ckpt", model)) == {f"transformer.{name}" for name in model.state_dict()}


# ---------------------------------------------------------------------- exporting


@pytest.mark.parametrize("text_flow", ["embedding", "mask"])
def test_wan_comes_out_as_it_went_in(text_flow: str) -> None:
    wan = tiny.make_wan()
    back = to_wan(tiny.make_unified(wan, VOCAB, text_flow=text_flow))
    assert type(back) is WanTransformer3DModel
    assert_same_weights(back, wan)
    assert plain_config(back) == plain_config(wan)
    places = {value.data_ptr() for value in back.state_dict().values()}
    assert places.isdisjoint(value.data_ptr() for value in wan.state_dict().values())


def test_an_exported_foundation_is_a_wan_pipeline(tmp_path: Path) -> None:
    source = tiny.make_pipeline()
    source.save_pretrained(tmp_path / "source")
    trained = tiny.make_unified(tiny.make_wan(seed=4), len(source.tokenizer))
    save(tmp_path / "stage0.ckpt", trained)
    export_pipeline(to_wan(load_weights(tmp_path / "stage0.ckpt")), tmp_path / "source", tmp_path / "target")
    made = WanPipeline.from_pretrained(tmp_path / "target")
    assert_same_weights(made.transformer, to_wan(trained))
    assert_same_weights(made.text_encoder, source.text_encoder)
    assert_same_weights(made.vae, source.vae)
    assert made.scheduler.config.flow_shift == 3.0 and made.tokenizer("a red").input_ids[-1] == 1
    made.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "np"}
    assert made("a red circle", max_sequence_length=16, **arguments).frames.shape == (1, 5, 32, 32, 3)
