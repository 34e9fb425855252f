"""Weights from elsewhere: incomplete, damaged, of other formats, or with code in them. Each is refused in one line."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.models.test_official import official_state, original_wan
from tests.test_checkpoint import plain_config, save
from tests.test_pipeline import make_pipe
from tools import convert
from univigu.checkpoint import check_checkpoint_file, load_weights, read_checkpoint, saved_names
from univigu.models.foundation import Foundation
from univigu.models.official import import_official, import_wan
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import CheckpointError, read_weights, sharded_reader
from univigu.pipeline import UniViGUPipeline


def refused(call: Callable[[], Any]) -> str:
    """The message of an error, which has one line and never advises to run what a file holds."""
    with pytest.raises(CheckpointError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "weights_only" not in message
    return message


class Payload:
    """What unpickling must not run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.make_pipeline().save_pretrained(tmp_path / "foundation")
    return tmp_path / "foundation"


# ---------------------------------------------------------------------- indices


def write_sharded_wan(folder: Path) -> dict[str, str]:
    """Wan's original weights in three files with an index; the last file holds the whole last block."""
    wan = tiny.make_wan(attention_head_dim=128, ffn_dim=32, freq_dim=8, num_layers=3)
    state, files = original_wan(wan), {}
    for name in state:
        part = 3 if name.startswith("blocks.2.") else 1 + ("blocks." in name)
        files[name] = f"model-{part:05d}-of-00003.safetensors"
    folder.mkdir()
    for file in set(files.values()):
        save_file({name: state[name].contiguous() for name in state if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return files


def test_every_file_and_key_of_an_index_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_sharded_wan(tmp_path / "wan")
    assert import_wan(tmp_path / "wan").config.num_layers == 3
    last = tmp_path / "wan" / "model-00003-of-00003.safetensors"
    state = load_file(last)
    key = "blocks.2.ffn.0.bias"
    save_file({name: value for name, value in state.items() if name != key}, last)
    assert f"index.json: keys that no file has: ['{key}']" in refused(lambda: import_wan(tmp_path / "wan"))
    last.unlink()
    arguments = ["wan", "--checkpoint", str(tmp_path / "wan"), "--output", str(tmp_path / "out")]
    assert convert.main(arguments) == 2 and not (tmp_path / "out").exists()
    assert "index.json: files that are not there: ['model-00003-of-00003" in capsys.readouterr().err
    (tmp_path / "wan" / "model.safetensors.index.json").unlink()
    assert "2 .safetensors files in this folder, expected 00003" in refused(lambda: import_wan(tmp_path / "wan"))
    assert files[key] == last.name


@pytest.mark.parametrize("loader", ["load_weights", "from_wan", "text_encoder", "vae"])
def test_a_lost_shard_of_a_folder_is_named(folder: Path, loader: str) -> None:
    part = folder / {"load_weights": "transformer", "from_wan": "transformer"}.get(loader, loader)
    if loader == "load_weights":
        shutil.rmtree(part)
        tiny.make_unified(tiny.make_wan()).save_pretrained(part, max_shard_size="60KB")
        calls: Any = lambda: load_weights(part)  # noqa: E731
    elif loader == "from_wan":
        tiny.make_wan().save_pretrained(part, max_shard_size="40KB")
        calls = lambda: UniViGUTransformer3DModel.from_wan(part, 11)  # noqa: E731
    else:
        getattr(Foundation(folder), loader).save_pretrained(part, max_shard_size="20KB")
        calls = lambda: getattr(Foundation(folder), loader)  # noqa: E731
    calls()
    lost = sorted(part.glob("*-of-*.safetensors"))[-1]
    content = lost.read_bytes()
    lost.unlink()
    assert part.name in refused(calls)
    lost.write_bytes(content)
    state = load_file(lost)
    save_file(dict(list(state.items())[1:]), lost, metadata={"format": "pt"})
    assert next(iter(state)) in refused(calls)


@pytest.mark.parametrize("command", ["transformer", "pipeline", "foundation", "wan"])
def test_a_folder_that_holds_anything_is_not_written_into(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    arguments = [command, "--checkpoint", str(tmp_path / "x"), "--output", str(tmp_path / "out")]
    assert convert.main(arguments) == 2
    assert f"--output {tmp_path / 'out'}: this folder is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


# ---------------------------------------------------------------------- other formats, and damage


@pytest.mark.parametrize("read", [read_weights, import_wan, read_checkpoint, load_weights])
def test_other_formats_say_what_to_use(tmp_path: Path, read: Any) -> None:
    (tmp_path / "wan.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "GGUF is not read; use the model's .safetensors or its folder" in refused(
        lambda: read(tmp_path / "wan.gguf")
    )
    (tmp_path / "model.onnx").write_bytes(bytes(range(200)))
    assert "of another format than torch.save's" in refused(lambda: read(tmp_path / "model.onnx"))


def flip(path: Path, value: bytes) -> None:
    """Flip a bit in the bytes of a stored weight."""
    content = bytearray(path.read_bytes())
    place = content.index(value) + len(value) // 2
    content[place] ^= 64
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["ckpt", "pth", "text_encoder.bin"])
def test_a_flipped_bit_is_seen_by_its_checksum(tmp_path: Path, folder: Path, kind: str) -> None:
    model = tiny.make_unified(tiny.make_wan())
    if kind == "ckpt":
        path, read = save(tmp_path / "x.ckpt", model), [read_checkpoint, load_weights, check_checkpoint_file]
        weight = model.proj_out.weight
    elif kind == "pth":
        path, weight = tmp_path / "x.pth", model.proj_out.weight
        torch.save({"model": official_state(model), "step": 1}, path)
        read = [lambda path: import_official(path, tiny.make_wan())]
    else:
        path, encoder = folder / "text_encoder" / "pytorch_model.bin", Foundation(folder).text_encoder
        (folder / "text_encoder" / "model.safetensors").unlink()
        state = encoder.state_dict()
        torch.save(state, path)
        weight, read = state["shared.weight"], [lambda path: Foundation(folder).text_encoder]
    for call in read:
        call(path)
    flip(path, weight.detach().numpy().tobytes())
    for call in read:
        assert f"{path}: damaged: the checksum of " in refused(lambda call=call: call(path))
    path.write_bytes(path.read_bytes()[:-200])
    for call in read:
        assert "not a readable checkpoint" in refused(lambda call=call: call(path))


def test_a_scheduler_of_an_unknown_class_is_named(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "FancyScheduler"}))
    assert "scheduler_config.json" in (message := refused(Foundation(folder).scheduler)) and "FancyScheduler" in message


def test_code_beside_a_tokenizer_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    file = folder / "tokenizer" / "tokenizer_config.json"
    custom = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **custom}))
    (folder / "tokenizer" / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    with contextlib.suppress(CheckpointError):
        Foundation(folder).tokenizer  # noqa: B018
    assert not Path("executed").exists()


# ---------------------------------------------------------------------- sharded folders


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """As Lightning writes it."""
    model = tiny.make_unified(tiny.make_wan())
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "last.ckpt"
    weights = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    rates = {"param_groups.0.lr": 1e-3, "param_groups.0.betas": optimizer.defaults["betas"]}
    dcp.save({"state_dict": weights, "optimizer_0": rates}, checkpoint_id=path, no_dist=True)
    torch.save({"univigu": {"transformer_config": plain_config(model)}, "epoch": 0}, path / "meta.pt")
    return path


def test_a_sharded_folder_is_read(sharded: Path) -> None:
    model = load_weights(sharded)
    expected = tiny.make_unified(tiny.make_wan()).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert saved_names(sharded) == {f"transformer.{name}" for name in expected}
    names = sharded_reader(sharded).read_metadata().state_dict_metadata
    assert names == pickle.loads((sharded / ".metadata").read_bytes()).state_dict_metadata


@pytest.mark.parametrize("where", ["metadata", "class", "bytes"])
def test_a_sharded_folder_runs_no_code(sharded: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded.parent)
    metadata: Any = pickle.loads((sharded / ".metadata").read_bytes())
    if where == "bytes":  # what torch unpickles of the parts
        rates = {"lr": Payload()}
        dcp.save({"optimizer_0": rates}, checkpoint_id=sharded, no_dist=True)
    else:
        metadata.planner_data = {"a": Payload() if where == "metadata" else torch.nn.Linear}
        (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (load_weights, read_checkpoint, saved_names, check_checkpoint_file):
        message = refused(lambda read=read: read(sharded))
        assert "could run code" in message
    arguments = ["transformer", "--checkpoint", str(sharded), "--output", str(sharded.parent / "out")]
    assert convert.main(arguments) == 2
    assert not Path("executed").exists()


def test_a_pipelines_folder_is_checked_in_all_its_parts(tmp_path: Path) -> None:
    make_pipe().save_pretrained(tmp_path, max_shard_size="20KB")
    UniViGUPipeline.from_pretrained(tmp_path)
    sorted((tmp_path / "text_encoder").glob("*-of-*.safetensors"))[0].unlink()
    assert "text_encoder" in refused(lambda: UniViGUPipeline.from_pretrained(tmp_path))
