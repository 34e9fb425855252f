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
from univigu import demo as module
from univigu.cli import main
from univigu.data.video import encode_mp4, read_video
from univigu.demo import HOST, Demo, DemoOptions, build, launch
from univigu.pipeline import UniViGUPipeline

gradio_client = pytest.importorskip("gradio_client", reason="needs the extra univigu[demo]")
TASKS = ("caption", "ask", "generate", "joint", "describe", "edit")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pipe() -> UniViGUPipeline:
    wan = tiny.make_pipeline()
    model = tiny.make_unified(wan.transformer, len(wan.tokenizer), text_flow="mask")
    model.register_to_config(text_length=12, answer_length=6)
    components = {name: wan.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return UniViGUPipeline(**components, transformer=model)


@pytest.fixture(scope="module")
def client(pipe: UniViGUPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
    options = DemoOptions(height=48, width=32, num_frames=5, max_sequence_length=16)
    demo = Demo(pipe, options)
    page = build(demo)
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    assert url.startswith(f"http://{HOST}:")
    yield gradio_client.Client(url, verbose=False, download_files=str(folder / "downloads"))
    page.close()
    examples = {Path(path).read_bytes() for path in demo.examples()}
    copies = {path.read_bytes() for path in (folder / "gradio").rglob("*.mp4")}
    assert copies <= examples  # none of what it was given and made
    patch.undo()


def test_tasks_run_one_at_a_time(pipe: UniViGUPipeline) -> None:
    """All share the model, so they are one group of the queue, with one place."""
    functions = [f for f in build(Demo(pipe, DemoOptions())).fns.values() if f.api_name in TASKS]
    assert len(functions) == 6 and {f.concurrency_id for f in functions} == {"model"}
    assert {f.concurrency_limit for f in functions} == {"default"}


def test_its_own_folder_goes_with_it(pipe: UniViGUPipeline) -> None:
    demo = Demo(pipe, DemoOptions())
    folder = Path(demo.folder.name)
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
def test_every_task(client: Any, clip: Any, pipe: UniViGUPipeline) -> None:
    video, page = client.predict("one", 2, 2.0, 0, api_name="/generate")
    assert read_video(path_of(video), 5, 48, 32).shape == (5, 3, 48, 32)
    assert "step" in page and page.startswith("<iframe")
    again, _ = client.predict("one", 2, 2.0, 0, api_name="/generate")
    other, _ = client.predict("one", 2, 2.0, 1, api_name="/generate")
    bytes_of = [Path(path_of(made)).read_bytes() for made in (video, again, other)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    frames = read_video(clip["path"], 5, 48, 32)[None].float() / 255
    for name, task, question in (("/caption", pipe.caption, ()), ("/ask", pipe.answer, ("a red circle",))):
        text, page = client.predict(clip, *question, 2, 0, api_name=name)
        options = {"generator": torch.Generator().manual_seed(0), "caption_steps": 2, "max_sequence_length": 16}
        assert [text] == task(frames, *question, **options).text and page.startswith("<iframe")
    video, text, page = client.predict("one two", 2, 2.0, 0, api_name="/joint")
    assert isinstance(text, str) and read_video(path_of(video), 5, 48, 32).shape == (5, 3, 48, 32)
    prompt = client.predict(clip, 0, api_name="/describe")
    assert isinstance(prompt, str)
    video, page = client.predict(clip, "two", 0.5, 2, 2.0, 0, api_name="/edit")
    assert read_video(path_of(video), 5, 48, 32).shape == (5, 3, 48, 32)


@pytest.mark.slow
def test_progress_is_reported(client: Any, clip: Any) -> None:
    for name, values in (("/generate", ("one", 50, 2.0, 0)), ("/caption", (clip, 50, 0))):
        steps: set[tuple[int, int]] = set()
        for _ in range(5):  # how many of them a visitor sees depends on how busy the machine is
            job = client.submit(*values, api_name=name)
            while not job.done():
                steps |= {(unit.index, unit.length) for unit in job.status().progress_data or ()}
            if len(steps) > 2:
                break
        assert len(steps) > 2 and {length for _, length in steps} == {50}, name


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
        browser.click(named("Joint", "button[role=tab]"), until=named("Joint", "button[aria-selected=true]"))
        browser.click(named("Run", "button"))
        browser.wait(f"{frame} && {inside.format('step')} && {inside.format('step')}.textContent")
        browser.read(f"{frame}.scrollIntoView({{behavior: 'instant'}})")
        assert browser.read(f"{inside.format('step')}.textContent") == "step 1 of 30"
        before = browser.read(f"{inside.format('video')}.src"), browser.read(f"{inside.format('text')}.textContent")
        left, top, width, height = browser.box(inside.format("slider"), frame)
        browser.drag(left + 8, top + height / 2, left + width - 8)
        last = browser.read(f"{inside.format('step')}.textContent")  # the text may end before the schedule does
        assert last.endswith(" of 30") and 20 <= int(last.split()[1]) <= 30
        after = browser.read(f"{inside.format('video')}.src"), browser.read(f"{inside.format('text')}.textContent")
        assert before[0] != after[0] and before[1] != after[1]
        assert "·" in before[1] and "·" not in after[1]


@pytest.mark.slow
def test_a_visitors_mistakes_are_named(
    client: Any, pipe: UniViGUPipeline, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Exception, match="prompt: is empty"):
        client.predict("  ", 2, 2.0, 0, api_name="/generate")
    with pytest.raises(Exception, match="video: none was given"):
        client.predict(None, 2, 0, api_name="/caption")
    with pytest.raises(Exception, match="question: it has 2001 characters, over the limit of 2000"):
        client.predict(clip, 2001 * "a", 2, 0, api_name="/ask")
    long = 5 * "a large red circle "  # than the 16 tokens of this page's prompts
    for name, values in (("/generate", (2, 2.0, 0)), ("/joint", (2, 2.0, 0))):
        with pytest.raises(Exception, match=r"max_sequence_length=16: prompt has .* over the limit of 16"):
            client.predict(long, *values, api_name=name)
    with pytest.raises(Exception, match=r"max_sequence_length=16: prompt has .* over the limit of 16"):
        client.predict(clip, long, 2, 0, api_name="/ask")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"broken.mp4: not a readable video"):
        Demo(pipe, DemoOptions(height=48, width=32, num_frames=5)).caption(str(broken), 2, 0)
    monkeypatch.setattr(module, "MAX_FRAMES", 6)
    with pytest.raises(Exception, match="video: it has 7 frames, over the limit of 6"):
        client.predict(clip, 2, 0, api_name="/caption")


@pytest.mark.slow
def test_a_large_upload_is_refused(client: Any) -> None:
    import httpx

    for size, status in ((1, 200), (51, 413)):
        files = {"files": ("clip.mp4", bytes(size << 20))}
        assert httpx.post(f"{client.src}gradio_api/upload", files=files).status_code == status


def test_the_commands_mistakes_are_named(
    pipe: UniViGUPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(*args: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(["demo", *args])
        return capsys.readouterr().err

    assert "nowhere" in message("--model", str(tmp_path / "nowhere"))
    assert "height=33" in message("--height", "33")
    assert "unknown option --hight; did you mean --height?" in message("--hight", "33")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert message() == 'error: univigu demo needs gradio: pip install "univigu[demo]"\n'


@pytest.mark.slow
@pytest.mark.skipif(COMMAND is None, reason="needs the command chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_visitor_edits_an_example(client: Any, tmp_path: Path, width: int) -> None:
    """In a real browser, as wide as a desktop's and as a phone's: pick a clip, read it, change the text, run."""

    def visible(kind: str, condition: str = "true") -> str:
        return f"[...document.querySelectorAll('{kind}')].find(e => e.offsetParent && {condition})"

    def named(kind: str, text: str) -> str:
        return visible(kind, f"e.textContent.trim() === '{text}'")

    with Browser(tmp_path / "profile") as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        browser.open(client.src)
        browser.wait(visible("button[role=tab]"))
        edit = named("button[role=tab]", "Edit")
        if width < 500:  # tabs that do not fit are in a menu
            edit = named(".overflow-dropdown button", "Edit")
            browser.click(visible(".overflow-menu > button"), until=edit)
        browser.click(edit, until=named("button", "Read the video"))
        chosen = "!e.closest('.gallery-item')"  # the examples are videos, too
        browser.click(visible(".gallery-item"), until=visible("video", chosen))
        browser.wait(visible("video", f"e.readyState > 1 && {chosen}"))
        browser.click(named("button", "Read the video"), until=f"{visible('textarea')}.value")
        browser.read(f"{visible('textarea')}.focus()")
        browser.call("Input.insertText", text=" one")
        browser.click(named("button", "Run"))
        browser.wait(f"{visible('iframe')}")
        assert browser.read("document.documentElement.scrollWidth") <= width  # nothing sticks out
        assert browser.read("performance.getEntriesByType('resource').every(e => e.name.includes('127.0.0.1'))")
