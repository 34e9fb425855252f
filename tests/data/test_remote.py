"""Shards behind a URL: a real http server on the loopback interface."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from univigu.data.datamodule import VideoTextDataModule
from univigu.data.sample import DataError
from univigu.data.sources import Source, SourceFolder, fetch_shards
from univigu.shapes.write import write_shapes


class Handler(SimpleHTTPRequestHandler):
    """Notes what it is asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "secret" in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of shards and the URL it is served under."""
    folder = tmp_path / "served"
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        write_shapes(folder / split, split, count, shard_size=2)  # type: ignore[arg-type]
    Handler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def make(url: str, root: Path) -> VideoTextDataModule:
    return VideoTextDataModule(shards=url, root=str(root), batch_size=2, num_workers=0, precompute=False)


def test_training_from_a_url_is_training_from_the_folder(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    here, there = make(str(folder), tmp_path), make(url, tmp_path / "root")
    batches = []
    for data in (here, there):
        data.prepare_data()
        data.setup("fit")
        batches.append([batch["key"] for batch in data.train_dataloader()])
    assert batches[0] == batches[1] and len(batches[0]) == 2


def tars(asked: list[str]) -> list[str]:
    return [path for path in asked if path.endswith(".tar")]


def test_only_what_is_missing_is_fetched(
    served: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, url = served
    copy = SourceFolder(url, str(tmp_path / "root"), "", (), False).base / "train"
    fetch_shards(f"{url}/train", copy)
    theirs, ours = (
        {p.name: p.read_bytes() for p in f.iterdir() if p.name != ".lock"} for f in (folder / "train", copy)
    )
    assert ours == theirs
    Handler.asked.clear()
    fetch_shards(f"{url}/train", copy)
    assert tars(Handler.asked) == []
    (copy / "train-000001.tar").write_bytes(b"cut off")
    fetch_shards(f"{url}/train/", copy)
    assert set(tars(Handler.asked)) == {"/train/train-000001.tar"}
    (folder / "train" / "manifest.json").unlink()  # without one the sizes count, and the server's listing
    (folder / "val" / "manifest.json").unlink()
    other = tmp_path / "other"
    fetch_shards(f"{url}/train", other)
    assert sorted(p.name for p in other.iterdir()) == ["train-000000.tar", "train-000001.tar"]
    (folder / "train" / "below").mkdir()
    (folder / "train" / "train-000001.tar").rename(folder / "train" / "last.TAR")
    fetch_shards(f"{url}/train", tmp_path / "third")
    assert sorted(p.name for p in (tmp_path / "third").iterdir()) == ["last.TAR", "train-000000.tar"]
    assert "/train: 1 files and folders that are no shards are left out" in caplog.text


def test_damage_on_the_way_and_wrong_places_are_named(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    tar = folder / "train" / "train-000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(DataError, match=r"train-000000\.tar: arrived with another checksum"):
        fetch_shards(f"{url}/train", tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*.tar"))
    with pytest.raises(DataError, match=r"/gone: "):
        fetch_shards(f"{url}/gone", tmp_path / "gone")
    with pytest.raises(DataError, match=r"/secret: cannot be read .*403"):
        fetch_shards(f"{url}/secret", tmp_path / "secret")
    with pytest.raises(DataError, match="nothing://here"):
        fetch_shards("nothing://here", tmp_path / "none")


def test_sources_behind_urls_may_be_for_training_alone(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    shutil.copytree(folder / "train", folder / "more" / "train")
    sources = [Source(url, 1.0), Source(f"{url}/more/", 3.0)]
    data = VideoTextDataModule(shards=sources, root=str(tmp_path / "r"), batch_size=2, num_workers=0, precompute=False)
    data.prepare_data()
    data.setup("fit")
    counts = {split: Counter(ref.source for ref in data._refs[split]) for split in ("train", "val")}
    assert counts == {"train": {0: 4, 1: 4}, "val": {0: 2}}
    drawn = [source for batch in data.train_dataloader() for source in batch["source"]]
    assert (drawn.count(0), drawn.count(1)) == (2, 6)
    with pytest.raises(DataError, match=r"/gone: cannot be read|/gone/train"):
        VideoTextDataModule(shards=[Source(f"{url}/gone"), Source(url)], root=str(tmp_path / "r")).prepare_data()
