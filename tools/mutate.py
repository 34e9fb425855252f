"""Break the model, the flow, the cache and the data's resume, one line at a time, and see that tests notice.

    python tools/mutate.py                        # all of them, about ten minutes on two cores
    python tools/mutate.py --only cache resume    # some areas
    python tools/mutate.py --document docs/MUTATIONS.md

Every mutant is a copy of the project with one wrong line (a sign, a swapped stream, a stale key), on which the tests
of that part run. Tests that pass on one are blind to that mistake. Prints what became of each and ends with exit code 1
unless all were noticed. The tests first run on the copy as it is, so that none counts as noticed by tests that fail
anyway.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.progress import track
from rich.table import Table

from univigu.cli import exit_code
from univigu.data.build import usable_cores

REPO = Path(__file__).resolve().parents[1]
COPIED = ("univigu", "tests", "configs", "tools", "docs", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    area: str
    """Part of the project: model, flow, sampling, cache, resume."""
    what: str
    """The mistake in words."""
    file: str
    """Where, in ``univigu``."""
    right: str
    """Text that stands there exactly once."""
    wrong: str
    """What is put in its place."""
    tests: str
    """Tests that should notice, separated by blanks."""


MODEL, CACHE = "tests/models/test_transformer.py", "tests/models/test_cache.py"
DISCRETE, TIME, VIDEO, TEXT = (f"tests/flow/test_{name}.py" for name in ("discrete", "time", "video", "text"))
OBJECTIVE = "tests/flow/test_objective.py"
TASKS, SOLVERS = "tests/sampling/test_sampler.py", "tests/sampling/test_solvers.py"
LOADER, ORDER, STAGES = "tests/data/test_loader.py", "tests/data/test_order.py", "tests/training/test_stages.py"

# fmt: off
MUTANTS = (
    Mutant("model", "text is modulated by the video's time", "models/block.py",
           "*ffn_t = self._modulation(temb_t)\n\n", "*ffn_t = self._modulation(temb)\n\n", MODEL),
    Mutant("model", "text goes through the video's FFN", "models/block.py",
           "self._feed_forward(self._expert, text_states, *ffn_t)", "self._feed_forward(self.ffn, text_states, *ffn_t)",
           MODEL),
    Mutant("model", "text takes the video's projections", "models/attention.py",
           "_project(attn_t or attn, text)", "_project(attn, text)", MODEL),
    Mutant("model", "text finds the generator's keys of the video", "models/attention.py",
           "_project_key_value(attn_t, video)", "_project_key_value(attn, video)", MODEL),
    Mutant("model", "text's own keys of the video are not rotated", "models/attention.py",
           "rotate_video(key_r, rotary_v)", "key_r", MODEL),
    Mutant("model", "gates of attention swapped", "models/block.py",
           "text_states = _gated(text_states, text_out, gate_t)", "text_states = _gated(text_states, text_out, gate_v)",
           MODEL),
    Mutant("model", "rotary pairs next to each other", "models/text.py",
           "full.roll(full.shape[-1] // 2, dims=-1)", "full.roll(1, dims=-1)", MODEL),
    Mutant("model", "text's keys are not rotated", "models/attention.py",
           "rotate_text(query_t, rotary_t), rotate_text(key_t, rotary_t)\n    alone,",
           "rotate_text(query_t, rotary_t), key_t\n    alone,", MODEL),
    Mutant("model", "padding is not masked", "models/attention.py",
           "mask = _key_mask(text_mask, length_v)", "mask = None", MODEL),
    Mutant("model", "only text is asked of the prompt", "models/attention.py",
           "return video_out, text_out", "return video, text_out", MODEL),
    Mutant("model", "text head modulated by the video's table", "models/transformer.py",
           "(self.scale_shift_table_t.to(temb.device) + temb[:, None])",
           "(self.scale_shift_table.to(temb.device) + temb[:, None])", MODEL),
    Mutant("model", "height and width of a patch swapped", "models/transformer.py",
           "permute(0, 7, 1, 4, 2, 5, 3, 6)", "permute(0, 7, 1, 4, 2, 6, 3, 5)", MODEL),
    Mutant("model", "clean video is told its own timestep", "models/transformer.py",
           "masked_fill(clean, self.config.clean_video_timestep)", "masked_fill(clean, 0.0)", MODEL),
    Mutant("model", "noisy video kept from the text, not clean", "models/transformer.py",
           "VideoOnly.where(clean)", "VideoOnly.where(~clean)", MODEL),
    Mutant("model", "a part of the text stands at the beginning of its slot", "models/transformer.py",
           "self.text_position_embed(places)", "self.text_position_embed(torch.arange(places.shape[-1]))", MODEL),
    Mutant("flow", "a part of the text is its beginning", "flow/objective.py",
           "tokens = tokens.gather(1, places)", "tokens = tokens[:, : places.shape[1]]", OBJECTIVE),
    Mutant("cache", "a part of the text stands at the beginning of its slot beside a cache", "models/transformer.py",
           "cache.prompt_embeds.dtype, text_places", "cache.prompt_embeds.dtype, None", CACHE),
    Mutant("resume", "a stage's text is never whole", "callbacks/stage.py",
           "pl_module.stage_step = step", "pl_module.stage_step = 0", STAGES),
    Mutant("flow", "sigma is the flow time", "flow/time.py",
           "return 1.0 - _float32(t)", "return _float32(t)", TIME),
    Mutant("flow", "shift's denominator", "flow/time.py", "(shift - 1.0) * sigma)", "shift * sigma)", TIME),
    Mutant("flow", "text times may reach 1", "flow/time.py", "(1.0 - self.eps) * rand", "rand", TIME),
    Mutant("flow", "noise and data swapped", "flow/video.py",
           "(1.0 - time) * noise.float() + time * data.float()", "time * noise.float() + (1.0 - time) * data.float()",
           VIDEO),
    Mutant("flow", "the prediction's sign", "flow/video.py", "return -prediction.float()", "return prediction.float()",
           VIDEO),
    Mutant("flow", "loss against the velocity, not Wan's prediction", "flow/video.py",
           "target = prediction_from_velocity(velocity(noise, data))", "target = velocity(noise, data)", VIDEO),
    Mutant("flow", "jumps do not know what is left", "flow/discrete.py",
           "math.expm1(exponent * math.log(t_next)) / kept", "math.expm1(exponent * math.log(t_next))", DISCRETE),
    Mutant("flow", "the generalised KL without the state's probability", "flow/discrete.py",
           "-p_state - log_p_data", "-log_p_data", DISCRETE),
    Mutant("flow", "the jump rate's exponent", "flow/discrete.py",
           "return exponent * t ** (exponent - 1.0) / -torch", "return t ** (exponent - 1.0) / -torch", DISCRETE),
    Mutant("flow", "revealed tokens count in the mask flow's loss", "flow/text.py",
           "torch.where(self.may_jump(corrupted.x_t), super()", "torch.where(corrupted.x_t >= 0, super()",
           f"{DISCRETE} {TEXT}"),
    Mutant("flow", "the similarity is not scaled", "flow/text.py",
           "F.linear(x.float(), table) / math.sqrt(table.shape[1])", "F.linear(x.float(), table)", TEXT),
    Mutant("flow", "clean video is noisy", "flow/objective.py",
           "t_video[joint:with_text] = 1.0", "t_video[joint:with_text] = 0.5", OBJECTIVE),
    Mutant("flow", "the condition is kept where it should be dropped", "flow/objective.py",
           "generator, device) < dropout", "generator, device) >= dropout", OBJECTIVE),
    Mutant("flow", "video and text share one time", "flow/objective.py",
           "to_timestep(t_text[rows])", "to_timestep(t_video[rows])", OBJECTIVE),
    Mutant("sampling", "guidance from the prompt's side", "sampling/tasks.py",
           "prediction = unconditional + self", "prediction = prediction + self", TASKS),
    Mutant("sampling", "edits start from the other end", "sampling/tasks.py",
           "start=1.0 - strength", "start=strength", TASKS),
    Mutant("sampling", "Heun adds both slopes", "sampling/solvers.py",
           "(t_next - t) * 0.5 * (u.float()", "(t_next - t) * (u.float()", SOLVERS),
    Mutant("sampling", "text's time stands still", "sampling/tasks.py",
           "output, times[i], times[i + 1], self._table()", "output, times[0], times[1], self._table()", TASKS),
    Mutant("cache", "clean video reads text after all", "models/attention.py",
           "return _attend(attn, query, *video, None)", "return _attend(attn, query, *_concatenate(video, text), mask)",
           f"{CACHE} {MODEL}"),
    Mutant("cache", "what the generator finds is kept for the text", "models/attention.py",
           "cache.joint = read", "cache.joint = _concatenate(alone, of_text)", f"{CACHE} {MODEL}"),
    Mutant("cache", "cached pass: keys of the first step", "models/attention.py",
           "    key[:, length_v:] = rotate_text(key_t, rotary_t)\n", "", f"{CACHE} {TASKS}"),
    Mutant("cache", "cached pass: values of the first step", "models/attention.py",
           "    value[:, length_v:] = value_t\n", "", f"{CACHE} {TASKS}"),
    Mutant("cache", "cached pass: the padding mask is forgotten", "models/attention.py",
           "key, value, _key_mask(text_mask, length_v))\n    return _project_out(attn, out)",
           "key, value, None)\n    return _project_out(attn, out)", CACHE),
    Mutant("cache", "another prompt's keys are taken", "models/cache.py",
           "not torch.equal(self.prompt_embeds, prompt_embeds)", "False", CACHE),
    Mutant("cache", "the approximate cache is never refreshed", "sampling/tasks.py",
           "step % self.refresh == 0", "step == 0", f"{CACHE} {TASKS}"),
    Mutant("resume", "a new pass starts at the beginning", "data/loader.py",
           "self._window.start = self.position", "self._window.start = 0", LOADER),
    Mutant("resume", "the epoch is not restored", "data/loader.py",
           'state["epoch"] * len(self) + min(number, len(self))', "min(number, len(self))", LOADER),
    Mutant("resume", "the position counts a batch too much", "data/loader.py",
           '"samples": number * self.order', '"samples": (number + 1) * self.order', LOADER),
    Mutant("resume", "another data set's position is taken", "data/loader.py",
           "if state[name] != ours:", "if False:", LOADER),
    Mutant("resume", "ranks read the same samples", "data/order.py",
           "[self.rank :: self.world_size]", "[: self.batch_size]", ORDER),
    Mutant("resume", "every epoch in the same order", "data/order.py",
           '_generator(f"{self.seed}/{epoch}")', '_generator(f"{self.seed}")', ORDER),
    Mutant("resume", "oversampling starts anew every epoch", "data/order.py",
           "+ epoch * self.quota", "", ORDER),
    Mutant("resume", "a stage lasts a step too long", "callbacks/stage.py",
           "if global_step < stage.steps:", "if global_step <= stage.steps:", STAGES),
    Mutant("resume", "resuming with other stages is let through", "callbacks/stage.py",
           "if saved != ours:", "if False:", STAGES),
)
# fmt: on


def mutate(mutant: Mutant, package: Path) -> str:
    """Break a copy of the package; gives the file as it was.

    Raises:
        ValueError: what the mutant changes does not stand there once, since the code has moved on.
    """
    file = package / mutant.file
    text = file.read_text()
    if (count := text.count(mutant.right)) != 1:
        raise ValueError(f"univigu/{mutant.file}: {mutant.right!r} stands there {count} times, expected once")
    file.write_text(text.replace(mutant.right, mutant.wrong))
    return text


def passes(project: Path, tests: Sequence[str]) -> bool:
    """Whether tests pass in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0", *tests]
    environment = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):  # 2 and above: not a failing test, but no tests, or a crash of pytest itself
        raise RuntimeError(f"pytest ended with {result.returncode} on {tests}:\n{result.stdout[-2000:]}{result.stderr}")
    return result.returncode == 0


def copy_project(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    return folder


def survivors(mutants: Sequence[Mutant], jobs: int) -> dict[Mutant, bool]:
    """Whether each mutant passes its tests, which none should.

    Raises:
        ValueError: tests that fail without any mutant.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            free.put(copy_project(Path(scratch) / str(number)))

        def survives(mutant: Mutant | None, tests: Sequence[str]) -> bool:
            project = free.get()
            try:
                before = None if mutant is None else mutate(mutant, project / "univigu")
                result = passes(project, tests)
                if mutant is not None and before is not None:
                    (project / "univigu" / mutant.file).write_text(before)
                return result
            finally:
                free.put(project)

        suites = sorted({test for mutant in mutants for test in mutant.tests.split()})
        console = Console(stderr=True)
        sound = pool.map(lambda suite: survives(None, [suite]), suites)
        for suite, fine in track(zip(suites, sound, strict=True), "as it is", len(suites), console=console):
            if not fine:
                raise ValueError(f"{suite} fails without any mutant")
        results = pool.map(lambda mutant: survives(mutant, mutant.tests.split()), mutants)
        return dict(track(zip(mutants, results, strict=True), "mutants", len(mutants), console=console))


def main(args: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    areas = list(dict.fromkeys(mutant.area for mutant in MUTANTS))
    parser.add_argument("--only", nargs="+", choices=areas, default=areas, help="areas")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="mutants at once (default: one a core)")
    parser.add_argument("--document", type=Path, help="write the table here, as Markdown")
    options = parser.parse_args(args)
    chosen, noticed, start = [m for m in MUTANTS if m.area in options.only], False, time.perf_counter()

    def run() -> None:
        nonlocal noticed
        results = survivors(chosen, max(1, options.jobs))
        noticed = not any(results.values())
        report(results, time.perf_counter() - start, options.document)

    return exit_code(run) or (0 if noticed else 1)


def report(results: dict[Mutant, bool], seconds: float, document: Path | None) -> None:
    """Print, and write if asked to, what became of each mutant."""
    table = Table("area", "mistake", "file", "tests")
    told = {True: "NOT noticed", False: "noticed"}
    rows = [(mutant.area, mutant.what, f"univigu/{mutant.file}", told[alive]) for mutant, alive in results.items()]
    for row in rows:
        table.add_row(*row)
    console = Console(width=130)
    console.print(table)
    line = f"{sum(not alive for alive in results.values())} of {len(results)} mistakes noticed in {seconds:.0f} s"
    console.print(line)
    if document is not None:
        lines = ["| area | mistake | file | tests |", "|---|---|---|---|", *("| " + " | ".join(r) + " |" for r in rows)]
        document.write_text("\n".join([line, "", *lines]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
