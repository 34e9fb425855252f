"""Shards as docs/DATA.md documents them are what other libraries read."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.damage import good_sample
from univigu.data.index import index_folder
from univigu.data.shards import write_shard

SAMPLES = {f"{i:04d}": good_sample(i) for i in range(3)}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "clips-000000.tar", SAMPLES.items())
    return tmp_path / "clips-000000.tar"


def test_huggingface_datasets_reads_them(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = datasets.load_dataset(
        "webdataset", data_files=str(shard), split="train", cache_dir=str(shard.parent / "cache"), streaming=True
    )
    for feature in ("mp4",):  # videos are only decoded where torchcodec is
        loaded = loaded.cast_column(feature, datasets.Video(decode=False))
    rows = list(loaded)
    assert [row["__key__"] for row in rows] == list(SAMPLES)
    for row, members in zip(rows, SAMPLES.values(), strict=True):
        texts = json.loads(members["json"])
        assert (row["json"]["prompt"], row["json"]["caption"]) == (texts["prompt"], texts["caption"])
        assert row["mp4"]["bytes"] == members["mp4"]


def test_the_documented_writer_writes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "DATA.md").read_text(), re.S)[0]
    (tmp_path / "mine" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    samples = [(key, members["mp4"], "a prompt", "a caption") for key, members in SAMPLES.items()]
    exec(code, {"my_samples": samples, "tarfile": tarfile, "io": io})
    refs, errors = index_folder(tmp_path / "mine" / "train")
    assert not errors and [ref.key for ref in refs] == list(SAMPLES)
    assert json.loads(refs[0].read("json")) == {"prompt": "a prompt", "caption": "a caption"}
