"""The demo page, through the HTTP API a browser uses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.browser import COMMAND, Browser
from tools import demo as tool
from univigu.data.video import encode_mp4, read_video
from univigu.demo import Demo, DemoOptions, build
from univigu.pipeline import UniViGUPipeline

gradio_client = pytest.importorskip("gradio_client", reason="needs the extra univigu[demo]")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pipe() -> UniViGUPipeline:
    wan = tiny.make_pipeline()
    model = tiny.make_unified(wan.transformer, len(wan.tokenizer), text_flow="mask")
    model.register_to_config(text_length=12)
    components = {name: wan.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return UniViGUPipeline(**components, transformer=model)


@pytest.fixture(scope="module")
def client(pipe: UniViGUPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
    options = DemoOptions(height=48, width=32, num_frames=5, max_sequence_length=16)
    page = build(Demo(pipe, options, folder / "videos"))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(folder)])
    yield gradio_client.Client(url, verbose=False, download_files=str(folder / "downloads"))
    page.close()
    assert not list((folder / "gradio").rglob("*.mp4"))  # its copies of what it was given and made
    patch.undo()


def test_its_own_folder_goes_with_it(pipe: UniViGUPipeline) -> None:
    demo = Demo(pipe)
    folder = demo.folder
    assert folder.is_dir()
    del demo
    gc.collect()
    assert not folder.exists()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("clip") / "odd.mp4"
    frames = torch.randint(256, (7, 3, 50, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path.write_bytes(encode_mp4(frames))
    return gradio_client.handle_file(str(path))


def path_of(video: Any) -> str:
    return video["video"] if isinstance(video, dict) else video


@pytest.mark.slow
def test_every_task(client: Any, clip: Any) -> None:
    video, page = client.predict("one", 2, 2.0, 0, api_name="/generate")
    assert read_video(path_of(video), 5, 48, 32).shape == (5, 3, 48, 32)
    assert "step" in page and page.startswith("<iframe")
    again, _ = client.predict("one", 2, 2.0, 0, api_name="/generate")
    other, _ = client.predict("one", 2, 2.0, 1, api_name="/generate")
    bytes_of = [Path(path_of(made)).read_bytes() for made in (video, again, other)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    text, page = client.predict(clip, "", 2, 0, api_name="/caption")
    assert isinstance(text, str) and page.startswith("<iframe")
    video, text, page = client.predict("one two", 2, 2.0, 0, api_name="/joint")
    assert isinstance(text, str) and read_video(path_of(video), 5, 48, 32).shape == (5, 3, 48, 32)
    video, page = client.predict(clip, "two", 0.5, 2, 2.0, 0, api_name="/edit")
    assert read_video(path_of(video), 5, 48, 32).shape == (5, 3, 48, 32)


@pytest.mark.slow
@pytest.mark.skipif(COMMAND is None, reason="needs the command chromium")
def test_a_visitor_drags_the_trajectorys_slider(client: Any, tmp_path: Path) -> None:
    """In a real browser: make both, then move the slider of the page inside the page."""

    def named(text: str, kind: str) -> str:
        return (
            f"[...document.querySelectorAll('{kind}')].find(b => b.textContent.trim() === '{text}' && b.offsetParent)"
        )

    frame = "document.querySelector('iframe[srcdoc]')"
    inside = frame + ".contentDocument.getElementById('{}')"
    with Browser(tmp_path / "profile") as browser:
        browser.open(client.src)
        browser.wait(named("Joint", "button[role=tab]"))
        browser.click(named("Joint", "button[role=tab]"), until=named("Run", "button"))
        browser.click(named("Run", "button"))
        browser.wait(f"{frame} && {inside.format('step')} && {inside.format('step')}.textContent")
        browser.read(f"{frame}.scrollIntoView({{behavior: 'instant'}})")
        assert browser.read(f"{inside.format('step')}.textContent") == "step 1 of 20"
        before = browser.read(f"{inside.format('video')}.src"), browser.read(f"{inside.format('text')}.textContent")
        left, top, width, height = browser.box(inside.format("slider"), frame)
        browser.drag(left + 8, top + height / 2, left + width - 8)
        assert browser.read(f"{inside.format('step')}.textContent") == "step 20 of 20"
        after = browser.read(f"{inside.format('video')}.src"), browser.read(f"{inside.format('text')}.textContent")
        assert before[0] != after[0] and before[1] != after[1]
        assert "·" in before[1] and "·" not in after[1]


def test_a_visitors_mistakes_are_named(client: Any, pipe: UniViGUPipeline, clip: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="prompt: is empty"):
        client.predict("  ", 2, 2.0, 0, api_name="/generate")
    with pytest.raises(Exception, match="video: none was given"):
        client.predict(None, "", 2, 0, api_name="/caption")
    long = 5 * "a large red circle "  # than the 16 tokens of this page's prompts
    for name, values in (("/generate", (2, 2.0, 0)), ("/joint", (2, 2.0, 0))):
        with pytest.raises(Exception, match=r"max_sequence_length=16: prompt has .* over the limit of 16"):
            client.predict(long, *values, api_name=name)
    with pytest.raises(Exception, match=r"max_sequence_length=16: prompt has .* over the limit of 16"):
        client.predict(clip, long, 2, 0, api_name="/caption")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"broken.mp4: not a readable video"):
        Demo(pipe, DemoOptions(height=48, width=32, num_frames=5)).caption(str(broken), "", 2, 0)


def test_the_commands_mistakes_are_named(
    pipe: UniViGUPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    pipe.save_pretrained(tmp_path / "model")
    assert tool.main(["--model", str(tmp_path / "model"), "--height", "33"]) == 2
    assert "height=33" in capsys.readouterr().err
