"""Jobs that are killed and taken up again come to the same; one point here, twenty by the command's default."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import REPO

tool = SimpleNamespace(**runpy.run_path(str(REPO / "tools" / "check_resume.py")))


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fit", "synthesize", "encode"])
def test_killed_jobs_come_to_the_same(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [job, "--points", "1", "--keep", str(tmp_path), "--seed", "3"]
    assert tool.main(args) == 0, (tmp_path / job / "log.txt").read_text()[-3000:]
    assert f"{job}: 1 of 1 killed runs came to the same" in capsys.readouterr().out


def test_a_difference_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    before = tool.files(tmp_path)
    (tmp_path / ".hidden").write_text("left behind")
    assert set(tool.files(tmp_path)) - set(before) == {".hidden"}
    with pytest.raises(SystemExit):
        tool.main(["nothing"])
    with pytest.raises(RuntimeError, match="exit code 3"):
        tool.run(["python3", "-c", "raise SystemExit(3)"], tmp_path / "log.txt")
    ended, seconds = tool.run(["sleep", "60"], tmp_path / "log.txt", kill_after=0.2)
    assert not ended and seconds < 10


def test_a_folder_of_an_earlier_check_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "encode").mkdir()
    (tmp_path / "file").touch()
    for keep, message in ((tmp_path, f"{tmp_path}/encode is there already"), (tmp_path / "file", "found a file")):
        with pytest.raises(SystemExit) as raised:
            tool.main(["fit", "encode", "--points", "1", "--keep", str(keep)])
        assert raised.value.code == 2
        assert f"--keep {keep}: " in (printed := capsys.readouterr().err) and message in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encode", "file"]  # nothing has begun
