"""What a run has written to TensorBoard as one page: what it was, its curves, its scores, its samples, its cost."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

EARLIER = "earlier"  # folder of what `lightning fit` sets aside
SCORES = ("caption", "generate", "joint")  # groups with shares, that is numbers of this kind:
SHARES = (
    "count", "background", "size", "color", "shape", "motion", "speed", "relation", "start", "end", "mean", "exact",
    "exact_text", "tokens", "bleu4", "rouge_l", "unique",
)  # fmt: skip
CURVES = {
    "training loss": ("train/loss", "train/text_loss", "train/video_loss"),
    "held-out loss": ("val/text_loss", "val/video_loss"),
    "held-out accuracy of captions": ("val/caption/mean", "val/caption/shape", "val/caption/motion"),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
td, th { border: 1px solid #ccc; padding: .3em .6em }
th { background: #f2f2f2; text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; image-rendering: pixelated }
figure { margin: 1rem 0 } figcaption { color: #555; font-size: 13px }
figure.plot img { image-rendering: auto }
"""


@dataclass
class RunLog:
    """Everything a run wrote to TensorBoard.

    Attributes:
        folder: the run's folder.
        config: what `lightning fit` was given, as YAML reads it; empty if it was not kept.
        scalars: values by step of each tag.
        times: seconds since the epoch of the first and the last value of training.
        pictures: the last moving picture of each tag, GIFs.
        texts: the last text of each tag, Markdown.
    """

    folder: Path
    config: dict[str, Any]
    scalars: dict[str, dict[int, float]]
    times: tuple[float, float] | None
    pictures: dict[str, bytes]
    texts: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> RunLog:
        """Read a run's folder, or any folder above its event files.

        Raises:
            ValueError: there are no event files.
        """
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        homes = sorted({path.parent for path in folder.rglob("events.out.tfevents.*") if _is_present(path, folder)})
        if not homes:
            raise ValueError(f"{folder}: no TensorBoard events (events.out.tfevents.*) in it or below")
        scalars: dict[str, dict[int, float]] = {}
        texts, pictures, times = {}, {}, []
        for home in homes:
            events = EventAccumulator(str(home), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
            events.Reload()
            tags = events.Tags()
            for tag in tags["scalars"]:
                values = events.Scalars(tag)
                scalars.setdefault(tag, {}).update({value.step: value.value for value in values})
                times += [value.wall_time for value in values] if tag == "train/loss" else []
            for tag in tags["images"]:
                pictures[tag] = events.Images(tag)[-1].encoded_image_string
            for tag in tags["tensors"]:
                texts[tag.removesuffix("/text_summary")] = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        configs = sorted(path for path in folder.rglob("config.yaml") if _is_present(path, folder))
        config = yaml.safe_load(configs[0].read_text()) if configs else {}
        return cls(folder, config, scalars, (min(times), max(times)) if times else None, pictures, texts)

    def scores(self) -> dict[str, dict[str, float]]:
        """Results of `lightning test` by group, the last of each."""
        found: dict[str, dict[str, float]] = {}
        for tag, values in self.scalars.items():
            prefix, *names = tag.split("/")
            if prefix == "test" and len(names) == 2:
                found.setdefault(names[0], {})[names[1]] = values[max(values)]
        return found

    def stages(self) -> list[dict[str, Any]]:
        """The stages' options."""
        callbacks = (self.config.get("trainer") or {}).get("callbacks") or []
        switches = [c for c in callbacks if isinstance(c, dict) and str(c.get("class_path")).endswith("StageSwitch")]
        return [stage for switch in switches for stage in switch["init_args"]["stages"]]


def _is_present(path: Path, folder: Path) -> bool:
    """Whether a file below a run's folder is not of a training that a later one in it has set aside."""
    return EARLIER not in path.relative_to(folder).parts


# -------------------------------------------------------------------------- parts


def table(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells that are numbers stand to the right."""

    def cell(value: str) -> str:
        number = value.replace(".", "").replace("-", "").replace(",", "").isdigit()
        return f'<td class="number">{html.escape(value)}</td>' if number else f"<td>{html.escape(value)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def score_rows(scores: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the scores that are shares, in percent."""
    shares = {group: {n: v for n, v in scores.get(group, {}).items() if n in SHARES} for group in SCORES}
    groups = [group for group in SCORES if shares[group]]
    names = list(dict.fromkeys(name for group in groups for name in shares[group]))
    rows = [
        [group, *(f"{100 * shares[group][name]:.1f}" if name in shares[group] else "" for name in names)]
        for group in groups
    ]
    return ["percent", *names], rows


def other_rows(scores: dict[str, dict[str, float]]) -> list[list[str]]:
    """All other results, as they are."""
    return [
        [f"{group}/{name}", f"{value:.4g}"]
        for group, values in sorted(scores.items())
        for name, value in sorted(values.items())
        if group not in SCORES or name not in SHARES
    ]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def curves(log: RunLog) -> str:
    """The learning curves as one picture; empty without any.

    Raises:
        ValueError: matplotlib, which draws them, is not installed.
    """
    panels = {title: [tag for tag in tags if len(log.scalars.get(tag, {})) > 1] for title, tags in CURVES.items()}
    panels = {title: tags for title, tags in panels.items() if tags}
    if not panels:
        return ""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}, which draws the learning curves; run pip install -e ".[results]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, (title, tags) in zip(axes[0], panels.items(), strict=True):
        for tag in tags:
            steps = sorted(log.scalars[tag])
            axis.plot(steps, [log.scalars[tag][step] for step in steps], label=tag, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        axis.set_yscale("log" if "loss" in title else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return picture(buffer.getvalue(), "png", "Learning curves", "plot")


def picture(data: bytes, kind: str, caption: str, style: str = "") -> str:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = html.escape(caption)
    return f'<figure class="{style}"><img src="{url}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def samples(log: RunLog) -> str:
    """Generated videos with their prompts, captions beside the truth."""
    prompts = "; ".join(log.texts.get("held_out/prompts", "").split("  \n"))
    titles = {"held_out/clips": "Held-out clips", "held_out/generated": f"Generated from their prompts: {prompts}"}
    parts = [picture(log.pictures[tag], "gif", title) for tag, title in titles.items() if tag in log.pictures]
    lines = [line for line in log.texts.get("held_out/captions", "").splitlines() if line.startswith("|")]
    cells = [[html.unescape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    if len(cells) > 2:
        parts.append(table(cells[0], cells[2:]))
    return "".join(parts)


def cost(log: RunLog) -> list[list[str]]:
    """How long it took and how quick it was."""
    rows = []
    if log.times:
        steps = log.scalars["train/loss"]
        rows.append(["optimizer steps", str(max(steps) + 1)])
        rows.append(["time of training, from the first logged step to the last",
                     str(timedelta(seconds=round(log.times[1] - log.times[0])))])  # fmt: skip
    for tag, values in sorted(log.scalars.items()):
        if tag.startswith("throughput/"):
            ordered = sorted(values.values())
            rows.append([f"{tag.removeprefix('throughput/')}, median", f"{ordered[len(ordered) // 2]:.4g}"])
    return rows


def run_section(log: RunLog) -> str:
    """All about one run."""
    parts = [f"<h2>{html.escape(str(log.folder))}</h2>"]
    keys = (
        "name",
        "steps",
        "target",
        "text_length",
        "tasks",
        "condition_dropout",
        "learning_rate",
        "text_learning_rate",
    )
    stages = [[str(stage.get(key, "")) for key in keys] for stage in log.stages()]
    if stages:
        parts.append(table(["stage", *keys[1:]], stages))
    parts.append(curves(log))
    scores = log.scores()
    header, rows = score_rows(scores)
    if rows:
        parts.append(f"<h3>Held-out scores (lightning test)</h3>{table(header, rows)}")
    if others := other_rows(scores):
        parts.append(table(["score", "value"], others))
    if shown := samples(log):
        parts.append(f"<h3>Samples</h3>{shown}")
    if spent := cost(log):
        parts.append(f"<h3>Cost</h3>{table(['', 'value'], spent)}")
    return "".join(parts)


def page(logs: list[RunLog], pictures: list[Path], title: str) -> str:
    """One self-contained HTML page of runs, and of pictures that belong to them (ablations)."""
    body = "".join(run_section(log) for log in logs)
    if pictures:
        shown = (picture(path.read_bytes(), path.suffix[1:], path.stem.replace("_", " "), "plot") for path in pictures)
        body += "<h2>Ablations</h2>" + "".join(shown)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"


def split_around(text: str, begin: str, end: str, name: str) -> tuple[str, str]:
    """The text (of the file of that name) up to its line ``begin``, and from its line ``end`` on; both lines included.

    Raises:
        ValueError: it lacks one of them.
    """
    if begin not in text or end not in text:
        raise ValueError(f"{name}: lacks the lines {begin!r} and {end!r} to write between")
    return text.split(begin)[0] + begin, end + text.split(end)[1]
