"""Every shipped configuration runs, and every mistake of a user gets one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningDataModule
from lightning.pytorch.cli import SaveConfigCallback
from torch.utils.data import DataLoader

from tests.conftest import REPO
from univigu.cli import main
from univigu.data.video import encode_mp4, read_video
from univigu.models.options import ArchitectureOptions
from univigu.models.text import is_text_parameter
from univigu.sampling.options import SamplingOptions
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene
from univigu.training.lightning_cli import UniViGUCLI, curves, lock_folder
from univigu.training.module import UniViGU
from univigu.training.parallel import ShardedStrategy
from univigu.training.parser import REPLACED
from univigu.training.prediction import predict_batch

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
FIT = ("recall", "refine", "two_stage", "foundation")
OVERLAYS = ("frozen", "wan2.1-1.3b", "wan2.1-14b", "fsdp", "gpu-24gb", "lora")
RECALL = ["--config=configs/recall.yaml", "--config=configs/frozen.yaml"]
REFINE = ["--config=configs/refine.yaml", "--config=configs/frozen.yaml"]
# Few steps and small pictures, real parts.
QUICK = ["--model.sampling.num_inference_steps=2", "--model.sampling.caption_steps=2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> Path:
    """A recall checkpoint, two steps old."""
    folder = tmp_path_factory.mktemp("recall")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "configs").symlink_to(REPO / "configs")
        main(["fit", *RECALL, *small_data, "--trainer.max_steps=2", *QUICK])
    path = folder / "runs/recall/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2  # the end is saved, not the last multiple of n
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five good clips of different shapes and three broken ones."""
    folder = tmp_path_factory.mktemp("clips")
    for i, (height, width, frames) in enumerate([(64, 64, 9), (48, 86, 23), (100, 60, 1)]):
        clip = encode_mp4(render(sample_scene(i), height, width, frames), fps=(8, 25, 3)[i])
        (folder / f"good{i}.mp4").write_bytes(clip)
    (folder / "good3 \x85\u2028ü.mp4").write_bytes(clip)  # marks that some readers of lines take for an end
    (folder / "good4 \udc80.mp4").write_bytes(clip)  # bytes that are no text
    (folder / "broken_empty.mp4").write_bytes(b"")
    (folder / "broken_text.mp4").write_text("not a video")
    (folder / "broken_cut.mp4").write_bytes(clip[: len(clip) // 3])
    return folder


Predict = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def predict(in_tmp: Path, foundation: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Predict:
    """Run ``lightning predict`` with a shipped configuration; gives the rows of the file that it names."""

    def run(name: str, *args: str, ckpt_path: Path | None = checkpoint) -> list[dict[str, Any]]:
        given = [] if ckpt_path is None else [f"--ckpt_path={ckpt_path}"]
        options = [f"--model.foundation={foundation}", "--data.num_workers=0", *QUICK, *given]
        main(["predict", f"--config=configs/{name}.yaml", *options, *args])
        (path,) = (in_tmp / "runs" / name).glob("*.jsonl")
        out, err = capsys.readouterr()
        assert str(path.relative_to(in_tmp)) in out and f"predict {name}: 1/" in err
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


def test_every_configuration_is_covered() -> None:
    assert {path.stem for path in CONFIGS} == {*FIT, *OVERLAYS, "caption", "generate", "joint", "edit", "qa"}


@pytest.mark.parametrize("name", ["recall", "two_stage", "foundation"])
def test_fit_configurations_run(name: str, in_tmp: Path, small_data: list[str]) -> None:
    cli = UniViGUCLI(["fit", f"--config=configs/{name}.yaml", *small_data, *QUICK, "--trainer.fast_dev_run=2"])
    assert cli.trainer.global_step == 2 and torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert list(cli.stages) == cli.config["fit"].run


def test_refine_starts_from_recalls_weights(in_tmp: Path, small_data: list[str], checkpoint: Path) -> None:
    args = ["fit", *REFINE, *small_data, *QUICK, f"--model.init_from={checkpoint}"]
    cli = UniViGUCLI([*args, "--trainer.fast_dev_run=1"])
    saved, ours = torch.load(checkpoint, weights_only=True)["state_dict"], cli.model.state_dict()
    changed = {key for key, value in saved.items() if not torch.equal(ours[key], value)}
    assert "transformer.text_head.linear.weight" in changed
    assert all(is_text_parameter(key.removeprefix("transformer.")) for key in changed)  # the generator is frozen
    assert all((ours[key] - saved[key]).abs().max() < 1e-3 for key in changed)  # a step at a small learning rate


@pytest.mark.slow
def test_caption_writes_a_row_for_every_file(predict: Predict, checkpoint: Path, clips: Path) -> None:
    rows = predict("caption", f"--data.videos={clips}/*.mp4", "--data.batch_size=4")
    assert [Path(row["video"]).stem for row in rows] == sorted(p.stem for p in clips.iterdir())
    for row in rows:
        assert set(row) == {"video", "caption", "error", "seconds", "seed"}
        broken = "broken" in row["video"]
        assert (row["error"] is not None) == broken and (row["caption"] is None) == broken
        assert not broken or Path(row["video"]).name in row["error"]
    # The same seed gives the same captions in any batch size. caption.yaml reads the weights where refine writes them,
    # and does not describe their architecture.
    Path("runs/refine/checkpoints").mkdir(parents=True)
    Path("runs/refine/checkpoints/last.ckpt").symlink_to(checkpoint)
    again = predict("caption", f"--data.videos={clips}/*.mp4", "--data.batch_size=1", ckpt_path=None)
    assert [row["caption"] for row in again] == [row["caption"] for row in rows]


@pytest.mark.parametrize("name", ["generate", "joint"])
def test_generation_writes_videos_and_a_manifest(name: str, in_tmp: Path, predict: Predict) -> None:
    odd = "a small red circle\u2028 moving left slowly,\x85 on a black background"
    prompts = [{"prompt": odd}, {"prompt": "a red circle " * 60}, {"prompt": "half \ud83d"}]
    lines = [json.dumps(prompts[0], ensure_ascii=False), *map(json.dumps, prompts[1:])]
    (in_tmp / "prompts.jsonl").write_text("\n\n".join(lines))
    rows = predict(name, "--data.prompts=prompts.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts]
    assert Path(rows[0]["video"]).is_file() and rows[0]["error"] is None
    assert (rows[0]["caption"] is not None) == (name == "joint")
    assert rows[1]["video"] is None and "over the limit of 128" in rows[1]["error"]
    assert rows[2]["video"] is None and "no valid Unicode" in rows[2]["error"]


@pytest.mark.slow
def test_edits_write_videos_and_a_manifest(in_tmp: Path, predict: Predict, clips: Path) -> None:
    prompt = "a small red circle moving left slowly, on a black background"
    edits = [
        {"video": str(clips / "good0.mp4"), "prompt": prompt, "strength": 1.0},
        {"video": str(clips / "broken_text.mp4"), "prompt": prompt},
        {"video": str(clips / "good1.mp4"), "prompt": prompt},
        {"video": str(clips / "good0.mp4"), "prompt": prompt, "strength": 2},
        {"video": str(clips / "good0.mp4"), "prompt": prompt, "strength": 0.25},
        {"video": str(clips / "good0.mp4"), "prompt": prompt, "replace": {"red": "blue", "small": "large"}},
        {"video": str(clips / "good0.mp4"), "replace": {"zebra": "horse"}},
    ]
    (in_tmp / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    args = "edit", "--data.pairs=edits.jsonl", "--model.sampling.num_inference_steps=4"
    rows = predict(*args)
    assert [row["strength"] for row in rows] == [1.0, 0.8, 0.8, None, 0.25, 0.8, 0.8]
    assert [row["source"] for row in rows] == [edit["video"] for edit in edits]
    assert [row["error"] is None for row in rows] == [True, False, True, False, True, True, False]
    assert rows[5]["prompt"] == "a large blue circle moving left slowly, on a black background"
    assert "replace: 'zebra' does not occur in" in rows[6]["error"]  # in the model's own prompt
    assert "broken_text.mp4" in rows[1]["error"] and "edits.jsonl:4: strength=2" in rows[3]["error"]
    made = {i: Path(rows[i]["video"]).read_bytes() for i in (0, 2, 4, 5)}
    # The less strength, the nearer to its source.
    source = render(sample_scene(0), 64, 64, 9).float()
    distance = {i: (read_video(made[i], 9, 64, 64).float() - source).abs().mean() for i in (0, 4)}
    assert distance[4] < distance[0]
    # The same seed makes the same video in any batch size.
    assert [row["seed"] for row in predict(*args, "--data.batch_size=1")] == [row["seed"] for row in rows]
    for i, video in made.items():
        again = read_video((in_tmp / f"runs/edit/videos/{i:05d}.mp4").read_bytes(), 9, 64, 64)
        assert (again.float() - read_video(video, 9, 64, 64).float()).abs().mean() < 0.5


def test_questions_are_answered(predict: Predict, clips: Path) -> None:
    questions = [
        {"video": f"{clips}/*.mp4", "question": "what colour is the circle?"},
        {"video": str(clips / "good0.mp4"), "question": "where is the ring?"},
        {"video": str(clips / "good0.mp4"), "prompt": "not a question"},
    ]
    rows = predict("qa", f"--data.pairs={json.dumps(questions)}")
    assert len(rows) == 10
    for row in rows[:9]:
        assert set(row) == {"video", "question", "answer", "error", "seconds", "seed"}
        broken = "broken" in row["video"]
        assert (row["error"] is not None) == broken and (row["answer"] is None) == broken
    assert "data.pairs[2]: " in rows[9]["error"]


def test_a_question_is_a_condition(foundation: str) -> None:
    """What is asked reaches the model: the logits under it are others than under the empty prompt."""
    module = UniViGU(foundation, predict_task="qa")
    seen: list[torch.Tensor] = []
    module.configure_model()
    assert module.transformer is not None
    module.transformer.text_head.register_forward_hook(lambda _, __, output: seen.append(output))
    torch.nn.init.normal_(module.transformer.text_head.linear.weight)
    batch = {
        "index": [0],
        "row": [{"video": "a", "question": "a red circle"}],
        "error": [None],
        "video": render(sample_scene(0), 64, 64, 9)[None],
        "clip": [0],
    }
    module.sampling.caption_steps = 1
    data = SimpleNamespace(prompt_length=16)
    predict_batch(module, batch, data)
    predict_batch(module, {**batch, "row": [{"video": "a", "question": "where is the blue ring"}]}, data)
    predict_batch(module, batch, data)
    assert torch.equal(seen[0], seen[2]) and (seen[0] - seen[1]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("reads", [True, False])
def test_the_questions_about_a_video_share_its_pass(foundation: str, reads: bool) -> None:
    """If the video does not read them; in any case they are answered as one by one."""
    options = ArchitectureOptions("mask", clean_video_reads_text=False, clean_video_reads_prompt=reads)
    module = UniViGU(foundation, predict_task="qa", architecture=options, sampling=SamplingOptions(caption_steps=2))
    module.configure_model()
    torch.nn.init.normal_(module.transformer.text_head.linear.weight)
    module.transformer.register_to_config(text_length=8)
    passes: list[int] = []
    module.transformer.patch_embedding.register_forward_hook(lambda _, __, output: passes.append(len(output)))
    clips, asked = [0, 0, 1, 2, 2], ["a red circle", "where is it", "a", "which", "a"]
    inputs = [{"video": "v", "question": text} for text in asked]
    rows = {"index": range(5), "row": inputs, "error": [None] * 5}
    videos = torch.stack([render(sample_scene(i), 64, 64, 9) for i in range(3)])
    data = SimpleNamespace(prompt_length=16)
    together = predict_batch(module, {**rows, "clip": clips, "video": videos}, data)
    assert passes == ([2, 2, 1] if reads else [2, 1])
    for i, clip in enumerate(clips):
        row = {name: values[i : i + 1] for name, values in rows.items()}
        (alone,) = predict_batch(module, {**row, "clip": [0], "video": videos[clip][None]}, data)
        assert alone[1]["answer"] == together[i][1]["answer"]
    assert len({row["answer"] for _, row in together}) == 5


def test_an_interrupted_run_continues_exactly(in_tmp: Path, small_data: list[str], checkpoint: Path) -> None:
    """Four steps at once, and two steps then two more: the same weights, optimizer state and position."""

    def final(root: str, *args: str) -> dict[str, Any]:
        options = [*RECALL, *small_data, *QUICK, "--trainer.max_steps=4", f"--trainer.default_root_dir={root}", *args]
        main(["fit", *options])
        return torch.load(f"{root}/checkpoints/last.ckpt", weights_only=True)

    whole, resumed = final("whole"), final("resumed", f"--ckpt_path={checkpoint}")
    assert whole["global_step"] == resumed["global_step"] == 4
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    moments = [c["optimizer_states"][0]["state"] for c in (whole, resumed)]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) > 30
    for i, state in moments[0].items():
        assert state.keys() == moments[1][i].keys() and state.keys() & {"exp_avg", "momentum_buffer"}
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][i][k])) for k, value in state.items())


@pytest.mark.slow
def test_last_is_found_before_training(
    in_tmp: Path, small_data: list[str], checkpoint: Path, failing: Callable[[list[str]], str]
) -> None:
    """In the folder where it will be written; the first run starts anew."""
    run = [*RECALL, *small_data, *QUICK, "--ckpt_path=last", "--trainer.max_steps=3"]
    assert WithoutRun(["fit", *run]).config["fit"].ckpt_path is None
    Path("runs/recall/checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, "runs/recall/checkpoints/last.ckpt")
    main(["fit", *run])  # one step more
    last = torch.load("runs/recall/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3 and last["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] == 3
    shutil.move("runs/recall/checkpoints", "elsewhere")
    assert WithoutRun(["fit", *run, "--checkpoint.dirpath=elsewhere"]).config["fit"].ckpt_path == "elsewhere/last.ckpt"
    assert "lightning fit --config configs/recall.yaml" in failing(["test", *run[:-1]])
    assert "use 'last' or a path" in failing(["fit", *RECALL, "--ckpt_path=best"])


def test_a_folder_has_one_training(in_tmp: Path, small_data: list[str], failing: Callable[[list[str]], str]) -> None:
    run = ["fit", *RECALL, *small_data, *QUICK, "--trainer.max_steps=1"]
    with lock_folder(Path("runs/recall")):
        assert "default_root_dir='runs/recall': another training writes" in failing(run)
    main(run)


class WithoutRun(UniViGUCLI):
    """Makes model, data and trainer, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.slow
def test_curves_and_configuration_of_a_training_stay_its_own(in_tmp: Path, small_data: list[str]) -> None:
    """Another training in the same folder, and an evaluation with another configuration, overwrite neither."""
    run = ["fit", *RECALL, *small_data, *QUICK, "--trainer.max_steps=1"]
    main([*run, "--seed_everything=5", "--trainer.log_every_n_steps=1"])
    folder = Path("runs/recall/tensorboard")
    config = (folder / "version_0/config.yaml").read_text()
    assert "seed_everything: 5" in config and list(folder.glob("version_0/events.*"))

    def savers(cli: UniViGUCLI) -> list[SaveConfigCallback]:
        return [callback for callback in cli.trainer.callbacks if isinstance(callback, SaveConfigCallback)]

    cli = WithoutRun(["test", *REFINE, *small_data, "--trainer.default_root_dir=runs/recall"])
    assert not savers(cli) and Path(cli.trainer.log_dir) == folder / "version_0"
    cli = WithoutRun([*run, "--ckpt_path=runs/recall/checkpoints/last.ckpt"])
    assert Path(cli.trainer.log_dir) == folder / "version_0"  # it continues: these are its own
    cli = WithoutRun(run)
    assert Path(cli.trainer.log_dir) == folder / "version_1"
    (saver,) = savers(cli)
    saver.setup(cli.trainer, cli.model, "fit")
    assert "seed_everything: 0" in (folder / "version_1/config.yaml").read_text()
    assert (folder / "version_0/config.yaml").read_text() == config


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, 3])
def test_validate_takes_every_clip(in_tmp: Path, checkpoint: Path, given: int | None) -> None:
    """By default fit validates on a few batches and validate on all."""
    args = [*REFINE, f"--ckpt_path={checkpoint}", *([f"--trainer.limit_val_batches={given}"] if given else [])]
    limits = [WithoutRun([command, *args]).trainer.limit_val_batches for command in ("validate", "fit")]
    assert limits == [given or 1.0, given or 4]


def test_weights_to_evaluate_may_be_named(
    in_tmp: Path, small_data: list[str], checkpoint: Path, failing: Callable[[list[str]], str]
) -> None:
    """As those to predict with: in place of what the configuration would have trained, with their own architecture."""
    args = ["test", *REFINE, *small_data, *QUICK, "--model.evaluation.generation=false"]
    cli = UniViGUCLI([*args, f"--model.init_from={checkpoint}", "--model.architecture.text_positions=300"])
    assert cli.model.transformer.config.text_positions == 256  # the configuration's of recall
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in cli.model.state_dict().items() if name in saved)
    assert saved.keys() <= cli.model.state_dict().keys()
    assert "lightning fit --config configs/refine.yaml" in failing(args)  # what the configuration names is fit's


def test_what_is_evaluated_by_default_is_named(
    in_tmp: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result of the training, not what its configuration starts from."""
    Path("mine.yaml").write_text(f"model: {{init_from: {checkpoint}}}")
    Path("runs/refine/checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, "runs/refine/checkpoints/last.ckpt")
    cli = WithoutRun(["validate", *REFINE, "--config=mine.yaml"])
    assert cli.model.init_from == "runs/refine/checkpoints/last.ckpt" and cli.config["validate"].ckpt_path is None
    assert "evaluating runs/refine/checkpoints/last.ckpt; --ckpt_path or --model" in capsys.readouterr().out


def test_a_prediction_of_which_nothing_could_be_made_fails(in_tmp: Path, clips: Path) -> None:
    args = ["predict", "--config=configs/caption.yaml", "--data.num_workers=0", *QUICK]
    with pytest.raises(SystemExit, match=r"^error: no input could be used"):
        main([*args, f"--data.videos={clips}/broken*.mp4"])
    assert len(Path("runs/caption/captions.jsonl").read_text().splitlines()) == 3


def test_earlier_curves_have_numbers_of_their_own(tmp_path: Path) -> None:
    for new, number in ((False, 0), (True, 0), (True, 1), (False, 1), (True, 2)):
        folder = Path(curves(tmp_path, new).log_dir)
        assert folder == tmp_path / f"tensorboard/version_{number}"
        if new:
            folder.mkdir(parents=True)


@pytest.mark.slow
def test_held_out_evaluation(
    in_tmp: Path, small_data: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the weights that the configuration trains, here those of another stage: only a resumed fit needs the same."""
    Path("runs/refine/checkpoints").mkdir(parents=True)
    Path("runs/refine/checkpoints/last.ckpt").symlink_to(checkpoint)
    cli = UniViGUCLI(["test", *REFINE, *small_data, *QUICK])
    results = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    for name in ("shape", "cider", "unique", "tokens", "exact_text"):
        assert results[f"test/caption/{name}"] >= 0, name
    assert min(results[f"test/{name}"] for name in ("generate/color", "joint/mean", "flow/loss")) >= 0
    assert results["test/flow/ratio"] == 1.0  # recall leaves the generator's weights as they are
    assert "test/generate/start" not in results  # no prompt says where
    assert "test: 1/1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clip", "video_features"])
def test_evaluation_with_models_that_are_not_there(
    name: str, in_tmp: Path, small_data: list[str], checkpoint: Path, failing: Callable[[list[str]], str]
) -> None:
    arguments = [
        *small_data,
        f"--ckpt_path={checkpoint}",
        "--data.precompute=false",
        f"--model.evaluation.{name}=/nowhere",
    ]
    assert f"evaluation.{name}='/nowhere': no such file or folder" in failing(["test", *RECALL, *arguments])


# ---------------------------------------------------------------- overlays


def parse(*names: str) -> UniViGUCLI:
    return UniViGUCLI([f"--config=configs/{name}.yaml" for name in names], run=False)


@pytest.mark.parametrize("name", ["recall", "refine"])
@pytest.mark.parametrize("sizes", [["1.3b"], ["1.3b", "14b"]], ids=["1.3b", "14b"])
def test_overlays_change_the_scale(in_tmp: Path, name: str, sizes: list[str]) -> None:
    cli = parse(name, *(f"wan2.1-{size}" for size in sizes), "fsdp")
    assert list(cli.stages) == [name]
    stage, model, data = cli.stages[name], cli.model, cli.datamodule
    assert (stage.steps, stage.text_length, stage.tasks.generate, stage.condition_dropout.joint) == (
        5000,
        256,
        0.25,
        0.5,
    )
    assert stage.target == {"recall": "prompt", "refine": "caption"}[name]
    rates = {"video": {"1.3b": 1e-5, "14b": 5e-6}[sizes[-1]], "text": 1e-4}
    assert model.optimizer_options.rates(stage) == rates and model.optimizer_options.name == "adamw"
    assert model.foundation_path.endswith(f"Wan2.1-T2V-{sizes[-1].upper()}-Diffusers")
    assert model.architecture == ArchitectureOptions() and model.gradient_checkpointing
    assert (data.height, data.width, data.num_frames, data.caption_length) == (480, 832, 81, 256)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, ShardedStrategy) and strategy.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("overlays", [["wan2.1-1.3b", "frozen"], ["frozen"]], ids="+".join)
@pytest.mark.parametrize("name", ["recall", "refine", "two_stage"])
def test_the_frozen_recipe_combines_with_any_stage_and_scale(in_tmp: Path, name: str, overlays: list[str]) -> None:
    cli = parse(name, *overlays)
    assert list(cli.stages) == (["recall", "refine"] if name == "two_stage" else [name])
    for stage in cli.stages.values():
        assert stage.learning_rate == 0 == stage.tasks.generate and stage.condition_dropout.understand == 0.9
        assert stage.steps == (5000 if len(overlays) == 2 else {"recall": 5000, "refine": 5500, "two_stage": 600}[name])
        assert (stage.teacher_weight == 0) == (len(overlays) == 2)
        assert stage.text_share == (0.5 if stage.target == "caption" and len(overlays) == 1 else 1.0)
    assert (cli.model.optimizer_options.learning_rate == 1e-5) == (len(overlays) == 2)
    options = cli.model.architecture
    assert (options.text_flow, options.text_attention, options.clean_video_timestep) == ("mask", "own", 300)


def test_options_of_stages_and_callbacks_merge(in_tmp: Path, small_data: list[str]) -> None:
    Path("mine.yaml").write_text("stages: {recall: {steps: 7, tasks: {joint: 0.0}}}\nmedia: {num_samples: 1}\n")
    args = ["--media.every_n_steps=0", "--report.num_samples=2", "--stages.recall.warmup_steps=3"]
    cli = WithoutRun(["fit", *RECALL, "--config=mine.yaml", *small_data, *args])
    found = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    (stage,) = cli.stages.values()
    assert (stage.steps, stage.warmup_steps, stage.tasks.joint, stage.tasks.understand) == (7, 3, 0.0, 0.875)
    assert (found["MediaLogger"].num_samples, found["MediaLogger"].every_n_steps) == (1, 0)
    assert found["FinalReport"].num_samples == 2


def test_there_are_at_most_70_options(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the model with its sampling, the data, and one stage."""
    with pytest.raises(SystemExit):
        main(["fit", "--config=configs/recall.yaml", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)

    def leaves(value: Any) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) and value else 1

    counted = {"model": config["model"], "data": config["data"]["init_args"], "stage": config["stages"]["recall"]}
    assert "sampling" in config["model"]
    assert leaves(counted) <= 70, {name: leaves(part) for name, part in counted.items()}


class OwnData(LightningDataModule):
    """A data module that knows only the form of a batch."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self) -> Any:
        ids = torch.tensor([[5, 6, 1] + [0] * 29] * self.count)
        batch = {"key": [str(i) for i in range(self.count)], "prompt_ids": ids, "caption_ids": ids}
        batch |= {name: ["a"] * self.count for name in ("prompt", "caption")}
        frames = torch.randint(256, (self.count, 9, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        return DataLoader([batch | {"video": frames.to(torch.uint8)}] * 2, batch_size=None)

    val_dataloader = train_dataloader


@pytest.mark.slow
def test_a_data_module_of_ones_own(in_tmp: Path, foundation: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", *RECALL, f"--data={__name__}.OwnData", "--data.count=3", f"--model.foundation={foundation}", *QUICK]
    options = ["--media.every_n_steps=1", "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    cli = UniViGUCLI([*args, *options])
    assert cli.datamodule.count == 3 and cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["val/text_loss"] > 0
    assert "held-out clips" in capsys.readouterr().out


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--data.batchsize=4", "batchsize"),
        ("--stages.recall.conditon_dropout.joint=1", "conditon_dropout"),
        ("--stages.recall.condition_dropout.joint=1.75", "condition_dropout.joint=1.75"),
        ("--stages.recall.steps=0", "steps=0"),
        ("--stages.recal.steps=4", "stages.recal: no such stage"),
        ("--run=[polish]", "stages.polish is not configured"),
        ("--model.foundation=nowhere", "WanPipeline"),
        ("--overrides.stages.recall.steps=1", "use stages"),
        ("--model.trains=text", "learning_rate: 0"),
        ("--model.text_rotary=true", "model.architecture.text_positions"),
        ("--model.architecture.text_rotary=true", "model.architecture.text_positions"),
        ("--model.text_flow=mask", "model.architecture.text_flow"),
        ("--model.prompt_slots=[1]", "removed"),
        ("--stages.recall.condition_dropout=0.9", "understand"),
        ("--stages.recall.joint_dropout=0.9", "condition_dropout.joint"),
        (
            "--trainer.callbacks={class_path: univigu.training.callbacks.StageSwitch, init_args: {stages: [{a: 1}]}}",
            "top-level 'stages'",
        ),
    ],
)
def test_a_wrong_or_former_option_is_named(
    option: str, named: str, in_tmp: Path, failing: Callable[[list[str]], str]
) -> None:
    assert named in failing(["fit", *RECALL, option])


@pytest.mark.parametrize(
    ("option", "count"),
    [
        ("--model.architecture={text_flow: other}", 0),
        ("--model.architecture.text_flow=other", 0),
        ("--stages.recall.trains=text", 1),
    ],
)
def test_a_former_option_is_named_once_and_a_wrong_value_is_no_former_option(
    option: str, count: int, in_tmp: Path, failing: Callable[[list[str]], str]
) -> None:
    assert failing(["fit", *RECALL, option]).count("was replaced") == count


def test_a_former_configuration_is_refused(in_tmp: Path, failing: Callable[[list[str]], str]) -> None:
    Path("old.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: univigu.training.callbacks.StageSwitch\n"
        "      init_args: {stages: [{name: recall, steps: 3, condition_dropout: 0.9}]}\n"
    )
    assert "'StageSwitch' was replaced" in failing(["fit", "--config=old.yaml"])


def test_former_keys_are_not_present_ones(in_tmp: Path) -> None:
    config = parse("recall").config
    present = {*vars(config), *vars(config.model), *vars(config.stages["recall"])}
    assert REPLACED.keys() & present == {"condition_dropout"}


@pytest.mark.slow
def test_missing_inputs_are_named(
    in_tmp: Path,
    small_data: list[str],
    foundation: str,
    checkpoint: Path,
    clips: Path,
    failing: Callable[[list[str]], str],
) -> None:
    printed = failing(["fit", *REFINE, *small_data])
    assert "runs/recall/checkpoints/last.ckpt" in printed
    assert "lightning fit --config configs/recall.yaml" in printed
    Path("empty.ckpt").write_bytes(b"")
    Path("bad.ckpt").write_bytes(b"garbage")
    Path("other").symlink_to(foundation)  # the model that ships belongs to the embedded foundation only
    videos, weights = f"--data.videos={clips}", f"--ckpt_path={checkpoint}"
    for args, named in (
        ([videos, "--model.foundation=other"], "lightning fit --config configs/refine.yaml"),
        ([videos, "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        ([videos, "--ckpt_path=empty.ckpt"], "empty.ckpt: not a readable checkpoint"),
        ([videos, "--ckpt_path=bad.ckpt"], "bad.ckpt: not a readable checkpoint"),
        ([videos, "--model.init_from=bad.ckpt"], "bad.ckpt: not a readable checkpoint"),
        ([weights], "data.videos"),
        ([weights, "--data.videos=nothing/*.mp4"], "nothing/*.mp4"),
        ([weights, "--data.prompts=a red circle"], "model.predict_task='caption' needs data.videos, not data.prompts"),
    ):
        printed = failing(["predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", *args])
        assert named in printed, args
