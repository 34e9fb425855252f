"""Several sources, mixed by weights, through the data module and the command line's trainer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import fit, ranked
from univigu.data import sources as encode
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.sample import DataError
from univigu.data.sources import Source
from univigu.shapes.write import write_shapes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, foundation: str) -> list[Path]:
    """Sources of 12, 8 and 4 clips, encoded; the last has training clips alone, and all have the same names."""
    made = [tmp_path_factory.mktemp(name) for name in ("a", "b", "c")]
    for number, (folder, count) in enumerate(zip(made, (12, 8, 4), strict=True)):
        for split in ("train", "val", "test") if number < 2 else ("train",):
            clips = count if split == "train" else 2
            write_shapes(folder / split, split, clips, 100 * number, shard_size=3)  # type: ignore[arg-type]
    sources = [Source(str(folder)) for folder in made]
    VideoTextDataModule(foundation=foundation, shards=sources, prompt_length=64).prepare_data()
    return made


def data(folders: list[Path], *weights: float | None, **changes: Any) -> VideoTextDataModule:
    sources = [Source(str(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    options: dict[str, Any] = {"batch_size": 2, "num_workers": 0, "prompt_length": 64}
    return VideoTextDataModule(shards=sources, **options | changes)


def keys(loader: Any) -> list[tuple[int, str]]:
    return [pair for batch in loader for pair in zip(batch["source"], batch["key"], strict=True)]


@pytest.mark.slow
def test_without_weights_an_epoch_is_everything_once(folders: list[Path]) -> None:
    module = data(folders, None, None, None)
    module.setup("fit")
    assert module.filter_counts == {"train": {"kept": 24}, "val": {"kept": 4}}
    assert Counter(ref.source for ref in module._refs["train"]) == {0: 12, 1: 8, 2: 4}
    seen = keys(module.train_dataloader())
    assert len(seen) == len(set(seen)) == 24
    assert Counter(int(key) // 100 for _, key in seen) == Counter(source for source, _ in seen)


def test_weights_are_shares_of_training_alone(folders: list[Path]) -> None:
    module = data(folders, 1, 1, 2)
    module.setup("fit")
    loader = module.train_dataloader()
    for _ in range(2):
        seen = Counter(keys(loader))
        assert Counter(source for source, _ in seen.elements()) == {0: 6, 1: 6, 2: 12}
        assert {count for (source, _), count in seen.items() if source < 2} == {1}
        assert {count for (source, _), count in seen.items() if source == 2} == {3}
    val = keys(module.val_dataloader())
    assert sorted(val) == [(0, "00000000"), (0, "00000001"), (1, "00000100"), (1, "00000101")]


@pytest.mark.slow
def test_resuming_goes_on_exactly(folders: list[Path], tmp_path: Path) -> None:
    whole = fit(data(folders, 1, 1, 2, num_workers=2), tmp_path / "a", 26).seen
    assert len(whole) == 26
    for step in (3, 12, 17):
        rest = fit(data(folders, 1, 1, 2), tmp_path / f"{step}", 26, tmp_path / "a" / f"step={step}.ckpt").seen
        assert rest == whole[step:]


@pytest.mark.slow
def test_two_ranks_share_what_is_drawn(folders: list[Path]) -> None:
    module = data(folders, 3, 2, 1, num_workers=2)
    module.setup("fit")
    seen: list[tuple[int, str]] = []
    for loader, again in zip(ranked(module, 2), ranked(module, 2), strict=True):
        first = keys(loader)
        seen += first
        again.load_state_dict({**again.state_dict(), "samples": 8})
        assert keys(again)[: len(first) - 4] == first[4:]
    assert len(seen) == len(set(seen)) == 24


def test_a_position_under_other_weights_is_refused(folders: list[Path]) -> None:
    module = data(folders, 1, 1, 1)
    module.setup("fit")
    state = module.train_dataloader().state_dict()
    for weights, order in (((1, 1, 2), folders), ((None, None, None), folders), ((1, 1, 1), folders[::-1])):
        other = data(order, *weights)
        other.setup("fit")
        with pytest.raises(DataError, match="the checkpoint's data position refers to dataset="):
            other.train_dataloader().load_state_dict(state)
    same = data(folders, 5, 5, 5)
    same.setup("fit")
    same.train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"data\.shards=\[\]: expected at least one"),
        ([("a", 1.0), ("a", 2.0)], r"data\.shards=\['a', 'a'\]: expected .* each of them once"),
        ([("a", 1.0), ("b", None)], r"data\.shards: 'b' has no weight, but others have"),
        ([("a", 0.0)], r"data\.shards: weight=0.0 of 'a': expected a number over 0"),
        ([("a", float("nan"))], r"data\.shards: weight=nan"),
    ],
)
def test_unusable_sources_are_named(given: list[tuple[str, float | None]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoTextDataModule(shards=[Source(*source) for source in given])


def test_what_is_missing_is_named(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"/train: no such folder of shards"):
        data([folders[0], tmp_path], None, None, precompute=False).setup("fit")
    with pytest.raises(DataError, match=r"/x/val: no such folder of shards"):
        copies = [tmp_path / "x", tmp_path / "y"]
        for copy in copies:
            copy.mkdir()
            (copy / "train").symlink_to(folders[2] / "train")
        data(copies, None, None, precompute=False).setup("fit")


def test_the_command_line_takes_sources_and_buckets(tmp_path: Path) -> None:
    from univigu.training.lightning_cli import UniViGUCLI

    config = tmp_path / "data.yaml"
    config.write_text(
        "data:\n  shards:\n    - {path: a, weight: 3}\n    - {path: 's3://b', weight: 1}\n"
        "  buckets:\n    - {height: 480, width: 832, num_frames: 81}\n    - {height: 832, width: 480, num_frames: 81}\n"
    )
    parsed = UniViGUCLI(["--config=configs/recall.yaml", f"--config={config}"], run=False).datamodule
    assert [(source.path, source.weight) for source in parsed.sources] == [("a", 3), ("s3://b", 1)]
    assert [bucket.width for bucket in parsed.buckets] == [832, 480]


def test_a_missing_split_is_named_before_another_is_encoded(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(folders[2] / "train")
    module = VideoTextDataModule(shards=str(tmp_path))
    with pytest.raises(DataError, match=r"/val: no such folder of shards"):
        module.prepare_data()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"/val: holds no .tar shard"):
        module.prepare_data()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]


def test_a_large_encoder_is_known(foundation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not encode.is_large(foundation, "text_encoder") and not encode.is_large(foundation, "vae")
    monkeypatch.setitem(encode.LARGE, "text_encoder", 1000)
    assert encode.is_large(foundation, "text_encoder") and not encode.is_large(foundation, "vae")
