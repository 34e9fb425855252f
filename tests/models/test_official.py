"""The official preview's files and Wan's original ones, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from tests import tiny
from tests.models import test_transformer as formulas
from tools import convert
from univigu.checkpoint import load_weights
from univigu.models.encode import CONVENTIONS, OFFICIAL, Conventions, encode_prompts, normalize_latents
from univigu.models.official import export_official, import_official, import_wan, official_differences
from univigu.models.tokens import tokenize
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import CheckpointError
from univigu.pipeline import UniViGUPipeline
from univigu.training.module import UniViGU

VOCAB = 11


def official_state(model: UniViGUTransformer3DModel, **prefixes: str) -> dict[str, torch.Tensor]:
    """The names the preview's files use, written down once more."""
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("condition_embedder.time_"):
            name = name.replace("condition_embedder", "time_embedding_v", 1)
        elif name.startswith("condition_embedder.text_embedder."):
            name = name.replace("condition_embedder.text_embedder", "cond_text_embedder")
        elif name == "scale_shift_table":
            name = "scale_shift_table_v"
        elif name.startswith("proj_out."):
            name = f"video_head.{name}"
        state[name] = value.clone()
    state["rotary_emb_text.inv_freq"] = 10000.0 ** -(torch.arange(tiny.HEAD_DIM // 2) * 2 / tiny.HEAD_DIM)
    return state


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    return tiny.make_wan()


@pytest.fixture(scope="module")
def model(wan: WanTransformer3DModel) -> UniViGUTransformer3DModel:
    return tiny.make_unified(wan, VOCAB)


@pytest.fixture
def official(tmp_path: Path, model: UniViGUTransformer3DModel) -> Path:
    torch.save({"model": official_state(model), "step": 7}, tmp_path / "preview.pth")
    return tmp_path / "preview.pth"


def assert_same_weights(first: Any, second: Any) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# ---------------------------------------------------------------------- import and export


def test_names_of_the_official_files(model: UniViGUTransformer3DModel, tmp_path: Path) -> None:
    export_official(model, tmp_path / "ours.pth", step=3, accept_differences=True)
    content = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert set(content) == {"model", "step"} and content["step"] == 3
    expected = official_state(model)
    assert content["model"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(content["model"][name], value, rtol=1e-6, atol=0)
    assert {"video_head.proj_out.weight", "scale_shift_table_t", "blocks.1.ffn_t.net.0.proj.weight"} <= expected.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pth"]


@pytest.mark.parametrize("source", ["model", "folder"])
def test_import_export_import_is_the_identity(
    official: Path, wan: WanTransformer3DModel, model: UniViGUTransformer3DModel, tmp_path: Path, source: str
) -> None:
    wan.save_pretrained(tmp_path / "wan")
    origin = wan if source == "model" else tmp_path / "wan"
    first = import_official(official, origin)
    assert_same_weights(first, model)
    assert (first.config.text_flow, first.config.vocab_size) == ("uniform", VOCAB)
    assert Conventions.of(first.config) == OFFICIAL
    export_official(first, tmp_path / "again.pth")
    again = import_official(tmp_path / "again.pth", origin)
    assert_same_weights(again, first)
    assert dict(again.config) == dict(first.config)
    assert torch.equal(again.rope.freqs_cos, model.rope.freqs_cos)


@pytest.mark.parametrize("prefix", ["_fsdp_wrapped_module.", "_orig_mod."])
def test_wrappers_prefixes_are_stripped(
    official: Path, wan: WanTransformer3DModel, model: UniViGUTransformer3DModel, prefix: str
) -> None:
    state = torch.load(official, weights_only=True)["model"]
    state = {prefix + key.replace("blocks.1.", f"blocks.1.{prefix}"): value for key, value in state.items()}
    torch.save({"model": state, "step": 0}, official)
    assert_same_weights(import_official(official, wan), model)


def test_output_follows_the_formulas(official: Path, wan: WanTransformer3DModel) -> None:
    """The official file's weights, in the independent implementation of the model's rules."""
    inputs = formulas.make_inputs()
    imported = import_official(official, wan)
    assert not imported.training and all(p.requires_grad for p in imported.parameters())
    with torch.no_grad():
        output = imported(**formulas.arguments(inputs))
    theirs = torch.load(official, weights_only=True)["model"]
    reference = formulas.Reference(imported)
    reference.w = dict(
        zip(imported.state_dict(), theirs.values(), strict=False)
    )  # in the same order, see official_state
    sample, text = reference(inputs)
    torch.testing.assert_close(output.sample, sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.text, text, rtol=1e-5, atol=1e-5)


def rewrite(path: Path, edit: Any) -> None:
    content = torch.load(path, weights_only=True)
    edit(content["model"])
    torch.save(content, path)


def test_what_does_not_fit_is_refused_by_name(official: Path, wan: WanTransformer3DModel) -> None:
    keys = ("blocks.1.ffn_t.net.2.bias", "time_embedding_v.time_proj.weight")
    rewrite(official, lambda state: [state.pop(key) for key in keys])
    with pytest.raises(CheckpointError, match=r"preview\.pth.*missing keys \['blocks\.1.*bias', 'time_embedding_v\."):
        import_official(official, wan)
    rewrite(official, lambda state: state.update({keys[1]: torch.zeros(2, 2), "extra.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError) as error:
        import_official(official, wan)
    assert "unexpected keys ['extra.weight']" in str(error.value)
    assert "'time_embedding_v.time_proj.weight': ([2, 2], [144, 24])" in str(error.value)


def test_permuted_keys_are_refused_by_name(official: Path, wan: WanTransformer3DModel) -> None:
    a, b = "blocks.0.ffn_t.net.0.proj.weight", "blocks.0.ffn_t.net.2.weight"

    def swap(state: dict[str, torch.Tensor]) -> None:
        state[a], state[b] = state[b], state[a]

    rewrite(official, swap)
    with pytest.raises(CheckpointError) as error:
        import_official(official, wan)
    assert a in str(error.value) and b in str(error.value) and "blocks.1" not in str(error.value)
    rewrite(official, lambda state: state.update({a: state.pop(a).T, "blocks.0.ffn_t.net.proj.0.weight": state.pop(b)}))
    with pytest.raises(CheckpointError, match=r"missing keys \['blocks\.0\.ffn_t\.net\.2\.weight'\].*net\.proj\.0"):
        import_official(official, wan)


def test_other_files_are_refused(tmp_path: Path, wan: WanTransformer3DModel, model: Any) -> None:
    path = tmp_path / "x.pth"
    with pytest.raises(CheckpointError, match=r"x\.pth: no such"):
        import_official(path, wan)
    for content, message in (
        (model.state_dict(), "holds no 'model'"),
        ([1], "expected a dict"),
        ({"model": {}, "step": 1}, r"missing keys \[.*'text_head\.linear\.weight'"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            import_official(path, wan)
    path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        import_official(path, wan)
    torch.save({"model": {}, "payload": Payload()}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        import_official(path, wan)


class Payload:
    """What unpickling must not run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"separate_text_ffn": False}, "separate_text_ffn=False"),
        ({"text_positions": 4}, "text_positions=4"),
        ({"text_flow": "embedding"}, "text_flow='embedding'"),
        # as the embedded world's recipes
        (
            {"text_attention": "own", "text_positions": 4},
            r"text_attention='own' \(official: 'shared'\), text_positions",
        ),
    ],
)
@pytest.mark.parametrize("accept", [False, True])
def test_models_unlike_the_official_one_are_not_exported(
    tmp_path: Path, wan: WanTransformer3DModel, options: dict[str, Any], name: str, accept: bool
) -> None:
    with pytest.raises(CheckpointError, match=name):
        export_official(tiny.make_unified(wan, VOCAB, **options), tmp_path / "x.pth", accept_differences=accept)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "official"),
    [
        ("clean_video_reads_text", False, True),
        ("clean_video_timestep", 300.0, 0),
        ("text_length", 32, 256),
        ("latents_normalized", True, False),
        ("null_condition", "encoded", "zeros"),
        ("prompt_padding", "zeros", "encoded"),
    ],
)
def test_what_a_file_of_weights_does_not_tell_is_not_dropped_silently(
    tmp_path: Path, wan: WanTransformer3DModel, name: str, value: Any, official: Any
) -> None:
    """A model that was trained, in one respect, otherwise than import-official will run it."""
    trained = tiny.make_unified(wan, VOCAB)
    trained.register_to_config(**vars(OFFICIAL))
    export_official(trained, tmp_path / "theirs.pth")
    trained.register_to_config(**{name: value})
    assert official_differences(trained) == {name: (value, official)}
    with pytest.raises(CheckpointError) as error:
        export_official(trained, tmp_path / "x.pth")
    assert f"{name}={value!r} (official: {official!r})" in str(error.value)
    assert "--accept-differences" in str(error.value) and not (tmp_path / "x.pth").exists()
    export_official(trained, tmp_path / "x.pth", accept_differences=True)
    read = import_official(tmp_path / "x.pth", wan)
    assert_same_weights(read, trained)
    assert read.config[name] == official  # this is what was lost


def test_the_command_exports_what_it_imported_and_asks_about_the_rest(
    wan: WanTransformer3DModel, official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wan.save_pretrained(tmp_path / "wan")
    imported, ours, again = (tmp_path / name for name in ("imported", "ours", "again.pth"))
    reading = ["import-official", "--wan", str(tmp_path / "wan")]
    assert convert.main([*reading, "--checkpoint", str(official), "--output", str(imported)]) == 0
    export = ["export-official", "--output", str(again), "--checkpoint"]
    assert convert.main([*export, str(imported)]) == 0
    again.unlink()
    tiny.make_unified(wan, VOCAB).save_pretrained(ours)
    capsys.readouterr()
    assert convert.main([*export, str(ours)]) == 2
    printed = capsys.readouterr().err
    assert all(name in printed for name in CONVENTIONS) and "--accept-differences" in printed and not again.exists()
    assert convert.main([*export, str(ours), "--accept-differences"]) == 0
    # What is said of the file at the next import brings all of it back.
    reading += ["--latents", "normalized", "--null-condition", "encoded", "--prompt-padding", "zeros"]
    assert convert.main([*reading, "--checkpoint", str(again), "--output", str(tmp_path / "back")]) == 0
    back, first = (UniViGUTransformer3DModel.from_pretrained(path) for path in (tmp_path / "back", ours))
    assert_same_weights(back, first)
    assert all(value == back.config[name] for name, value in first.config.items() if not name.startswith("_"))


def test_a_mask_state_is_one_more_embedding(tmp_path: Path, wan: WanTransformer3DModel) -> None:
    masked = tiny.make_unified(wan, VOCAB, text_flow="mask")
    export_official(masked, tmp_path / "mask.pth", accept_differences=True)
    assert_same_weights(import_official(tmp_path / "mask.pth", wan, "mask"), masked)
    with pytest.raises(CheckpointError, match=r"'vocab_embed\.weight': \(\[12, 24\], \[11, 24\]\)"):
        import_official(tmp_path / "mask.pth", wan)


# ---------------------------------------------------------------------- its conventions are honoured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foundation")
    tiny.make_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer folder made by the command from a file that fits the tiny foundation."""
    path = tmp_path_factory.mktemp("official")
    made = tiny.make_unified(tiny.make_wan(), len(UniViGU(str(folder)).foundation.tokenizer))
    torch.save({"model": official_state(made), "step": 1}, path / "preview.pth")
    arguments = ["--checkpoint", str(path / "preview.pth"), "--wan", str(folder), "--output", str(path / "imported")]
    assert convert.main(["import-official", *arguments]) == 0
    return path / "imported"


def test_training_honours_the_conventions(folder: Path, imported: Path) -> None:
    module = UniViGU(str(folder), init_from=str(imported))
    module.configure_model()
    assert module.tasks.conventions == OFFICIAL
    foundation = module.foundation
    ids = tokenize(foundation.tokenizer, ["a red circle"], 8)
    batch = {"key": ["0"], "latents": torch.randn(1, tiny.CHANNELS, 2, 4, 4), "prompt_ids": ids}
    inputs = module.prepare(batch)
    torch.testing.assert_close(inputs.latents, normalize_latents(batch["latents"], foundation.vae, inverse=True))
    assert not inputs.null_embeds.any()
    assert inputs.prompt_embeds[:, -1].any()  # a place behind the prompt's end
    clean = encode_prompts(foundation.text_encoder, ids, foundation.pad_token_id)
    end = int((ids != foundation.pad_token_id).sum())
    torch.testing.assert_close(inputs.prompt_embeds[:, :end], clean[:, :end])  # bits depend on the instructions used
    assert not clean[:, end:].any()
    assert not module.tasks.encode_null(8).any()

    plain = UniViGU(str(folder))
    inputs = plain.prepare(batch)
    assert plain.tasks.conventions == Conventions() and torch.equal(inputs.latents, batch["latents"])
    assert inputs.null_embeds.any() and not inputs.prompt_embeds[:, -1].any()


def test_frames_go_through_the_same_latents(folder: Path, imported: Path) -> None:
    """What a model without normalisation is shown, and what is made of its samples, are the VAE's own latents."""
    theirs, ours = (UniViGU(str(folder), init_from=path) for path in (str(imported), None))
    theirs.configure_model()
    frames = torch.randint(256, (1, 5, 3, 32, 32), dtype=torch.uint8)
    raw, normalized = (module.latents_of({"video": frames}) for module in (theirs, ours))
    torch.testing.assert_close(raw, normalize_latents(normalized, ours.foundation.vae, inverse=True))
    decoded = [m.tasks.conventions.decode(m.foundation.vae, z) for m, z in ((theirs, raw), (ours, normalized))]
    torch.testing.assert_close(*decoded, rtol=1e-4, atol=1e-4)


def test_the_pipeline_honours_the_conventions(folder: Path, imported: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(imported), "--foundation", str(folder), "--output", str(tmp_path / "model")]
    assert convert.main(["pipeline", *arguments]) == 0
    pipe = UniViGUPipeline.from_pretrained(tmp_path / "model")
    assert Conventions.of(pipe.transformer.config) == OFFICIAL
    pipe.set_progress_bar_config(disable=True)
    embeds, null = pipe.encode_prompt("a red", max_sequence_length=8)
    assert embeds[0, -1].any() and not null.any()
    assert pipe.encode_prompt("a red", "a blue", max_sequence_length=8)[1].any()
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 8}

    def sample(output_type: str) -> torch.Tensor:
        return pipe("a red", generator=torch.Generator().manual_seed(0), output_type=output_type, **size).frames

    latents, video = sample("latent"), sample("pt")
    expected = pipe.vae.decode(latents).sample  # no mean, no deviation
    torch.testing.assert_close(video, pipe.video_processor.postprocess_video(expected, "pt"), rtol=1e-4, atol=1e-4)
    assert pipe.caption(torch.rand(5, 3, 32, 32), caption_steps=2, max_sequence_length=8).tokens.shape[0] == 1


def test_conventions_are_checked() -> None:
    with pytest.raises(ValueError, match="null_condition='noise'"):
        UniViGUTransformer3DModel(num_layers=0, null_condition="noise")


def test_a_checkpoint_from_before_there_were_conventions(tmp_path: Path, model: UniViGUTransformer3DModel) -> None:
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    for name in vars(OFFICIAL):
        del config[name]
    weights = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    torch.save({"univigu": {"transformer_config": config}, "state_dict": weights}, tmp_path / "old.ckpt")
    for like in (None, tiny.make_unified(tiny.make_wan(seed=3), VOCAB).config):
        loaded = load_weights(tmp_path / "old.ckpt", like)
        assert_same_weights(loaded, model)
        assert Conventions.of(loaded.config) == Conventions()


# ---------------------------------------------------------------------- Wan's original files


def original_wan(wan: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """Names as in Wan's own repository, written down from it."""
    state = {}
    for name, value in wan.state_dict().items():
        for ours, theirs in (
            ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
            ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
            ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
            ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
            ("condition_embedder.time_proj", "time_projection.1"),
            ("attn1.", "self_attn."),
            ("attn2.", "cross_attn."),
            ("norm2.", "norm3."),
            ("to_out.0.", "o."),
            ("to_q.", "q."),
            ("to_k.", "k."),
            ("to_v.", "v."),
            ("ffn.net.0.proj", "ffn.0"),
            ("ffn.net.2", "ffn.2"),
            ("proj_out.", "head.head."),
        ):
            name = name.replace(ours, theirs)
        if name.endswith("scale_shift_table"):
            name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        state[name] = value
    return state


@pytest.mark.parametrize("form", ["pth", "safetensors", "folder"])
def test_wans_own_files_become_a_folder(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A Wan of two heads of 128, whose sizes can be read off the weights."""
    wan = tiny.make_wan(attention_head_dim=128, ffn_dim=32, freq_dim=8)
    state, path = original_wan(wan), tmp_path / f"wan.{form}"
    if form == "pth":
        torch.save(state, path)
    elif form == "safetensors":
        save_file(state, path)
    else:
        path.mkdir()
        names = sorted(state)
        for i, part in enumerate((names[::2], names[1::2])):
            save_file({name: state[name] for name in part}, path / f"part-{i}.safetensors")
    assert convert.main(["wan", "--checkpoint", str(path), "--output", str(tmp_path / "made")]) == 0
    made = WanTransformer3DModel.from_pretrained(tmp_path / "made")
    assert_same_weights(made, wan)
    ours, theirs = ({k: v for k, v in m.config.items() if not k.startswith("_")} for m in (made, wan))
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))  # tuples as lists


def test_wans_own_file_is_read_strictly(tmp_path: Path, wan: WanTransformer3DModel) -> None:
    wan.save_pretrained(tmp_path / "wan")
    state = original_wan(wan)
    torch.save(state, tmp_path / "wan.pth")
    with pytest.raises(CheckpointError, match="width 24"):
        import_wan(tmp_path / "wan.pth")
    assert_same_weights(import_wan(tmp_path / "wan.pth", tmp_path / "wan"), wan)
    del state["blocks.1.self_attn.q.weight"]
    torch.save(state, tmp_path / "wan.pth")
    with pytest.raises(CheckpointError, match=r"missing keys \['blocks\.1\.attn1\.to_q\.weight'\]"):
        import_wan(tmp_path / "wan.pth", tmp_path / "wan")
    torch.save({"a": torch.zeros(1)}, tmp_path / "wan.pth")
    with pytest.raises(CheckpointError, match="not a Wan transformer"):
        import_wan(tmp_path / "wan.pth")


def test_the_commands_print_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("wan", "export-official", "transformer"):
        arguments = [command, "--checkpoint", str(tmp_path / "nothing.pth"), "--output", str(tmp_path / "out")]
        assert convert.main(arguments) == 2
        assert "nothing.pth: no such checkpoint" in capsys.readouterr().err
