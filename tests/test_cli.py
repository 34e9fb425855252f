"""Every shipped configuration runs, and every mistake of a user gets one clear line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import REPO
from univigu.cli import main
from univigu.data.video import encode_mp4, read_video
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene
from univigu.training.lightning_cli import parse_fit
from univigu.training.prediction import predict_batch
from univigu.training.report import RunLog

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
FIT = ("recall", "refine", "two_stage", "foundation")
OVERLAYS = ("wan2.1-1.3b", "wan2.1-14b", "fsdp")
# Few steps and small pictures, real parts.
QUICK = ["--model.sampling.num_inference_steps=2", "--model.sampling.caption_steps=2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path, foundation: str) -> Path:
    """A recall checkpoint, two steps old."""
    folder = tmp_path_factory.mktemp("recall")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(
            [
                "fit", f"--config={REPO}/configs/recall.yaml", f"--model.foundation={foundation}",
                f"--data.root={shapes_root}", "--data.num_train_clips=8", "--data.num_val_clips=4",
                "--data.batch_size=4", "--data.num_workers=0",
                "--trainer.max_steps=2", *QUICK,
            ]
        )  # fmt: skip
    path = folder / "runs/recall/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2  # the end is saved, not the last multiple of n
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four good clips of different shapes and four broken ones."""
    folder = tmp_path_factory.mktemp("clips")
    for i, (height, width, frames) in enumerate([(64, 64, 9), (48, 86, 23), (100, 60, 1)]):
        clip = encode_mp4(render(sample_scene(i), height, width, frames), fps=(8, 25, 3)[i])
        (folder / f"good{i}.mp4").write_bytes(clip)
    (folder / "good3 \x85\u2028ü.mp4").write_bytes(clip)  # marks that some readers of lines take for an end
    (folder / "broken\udc80.mp4").write_bytes(clip)  # bytes that are no text, which decoders do not open
    (folder / "broken_empty.mp4").write_bytes(b"")
    (folder / "broken_text.mp4").write_text("not a video")
    (folder / "broken_cut.mp4").write_bytes(clip[: len(clip) // 3])
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_configuration_is_covered() -> None:
    assert {path.stem for path in CONFIGS} == {*FIT, *OVERLAYS, "caption", "generate", "joint", "edit", "qa"}


@pytest.mark.parametrize("name", FIT)
def test_fit_configurations_run(name: str, in_tmp: Path, small_data: list[str], checkpoint: Path) -> None:
    args = ["fit", f"--config=configs/{name}.yaml", *small_data, *QUICK, "--trainer.fast_dev_run=2"]
    if name == "refine":
        args.append(f"--model.init_from={checkpoint}")
    main(args)


def test_caption_writes_a_row_for_every_file(
    in_tmp: Path, foundation: str, checkpoint: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", f"--ckpt_path={checkpoint}",
        f"--data.videos={clips}/*.mp4", "--data.batch_size=4", *QUICK,
    ]  # fmt: skip
    main(args)
    path = in_tmp / "runs/caption/captions.jsonl"
    assert str(path.relative_to(in_tmp)) in capsys.readouterr().out
    rows = rows_of(path)
    assert [Path(row["video"]).stem for row in rows] == sorted(p.stem for p in clips.iterdir())
    for row in rows:
        assert set(row) == {"video", "caption", "error", "seconds", "seed"}
        broken = "broken" in row["video"]
        assert (row["error"] is not None) == broken and (row["caption"] is None) == broken
        assert not broken or Path(row["video"]).name in row["error"]
    # The same seed gives the same captions, whatever the batch.
    main([*args[:-3], "--data.batch_size=1", *QUICK])
    again = rows_of(path)
    assert [row["caption"] for row in again] == [row["caption"] for row in rows]


def test_weights_to_predict_with_bring_their_architecture(
    in_tmp: Path, foundation: str, checkpoint: Path, clips: Path
) -> None:
    """What refine wrote is where caption.yaml looks for it, and caption.yaml does not say what model that is."""
    Path("runs/refine/checkpoints").mkdir(parents=True)
    Path("runs/refine/checkpoints/last.ckpt").symlink_to(checkpoint)
    args = ["predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", "--data.num_workers=0"]
    captions = []
    for given in ([], [f"--ckpt_path={checkpoint}"]):
        main([*args, f"--data.videos={clips}/good0.mp4", *QUICK, *given])
        captions.append([row["caption"] for row in rows_of(in_tmp / "runs/caption/captions.jsonl")])
    assert captions[0] == captions[1] and captions[0][0] is not None


@pytest.mark.parametrize("name", ["generate", "joint"])
def test_generation_writes_videos_and_a_manifest(name: str, in_tmp: Path, foundation: str, checkpoint: Path) -> None:
    odd = "a small red circle\u2028 moving left slowly,\x85 on a black background"
    prompts = [{"prompt": odd}, {"prompt": "a red circle " * 60}, {"prompt": "half \ud83d"}]
    lines = [json.dumps(prompts[0], ensure_ascii=False), *map(json.dumps, prompts[1:])]
    (in_tmp / "prompts.jsonl").write_text("\n\n".join(lines))
    main(
        [
            "predict", f"--config=configs/{name}.yaml", f"--model.foundation={foundation}", "--data.num_workers=0",
            f"--ckpt_path={checkpoint}", "--data.prompts=prompts.jsonl", *QUICK,
        ]
    )  # fmt: skip
    rows = rows_of(in_tmp / f"runs/{name}/manifest.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts]
    assert Path(rows[0]["video"]).is_file() and rows[0]["error"] is None
    assert (rows[0]["caption"] is not None) == (name == "joint")
    assert rows[1]["video"] is None and "over the limit of 128" in rows[1]["error"]
    assert rows[2]["video"] is None and "no valid Unicode" in rows[2]["error"]


def test_edits_write_videos_and_a_manifest(in_tmp: Path, foundation: str, checkpoint: Path, clips: Path) -> None:
    prompt = "a small red circle moving left slowly, on a black background"
    edits = [
        {"video": str(clips / "good0.mp4"), "prompt": prompt, "strength": 1.0},
        {"video": str(clips / "broken_text.mp4"), "prompt": prompt},
        {"video": str(clips / "good1.mp4"), "prompt": prompt},
        {"video": str(clips / "good0.mp4"), "prompt": prompt, "strength": 2},
        {"video": str(clips / "good0.mp4"), "prompt": prompt, "strength": 0.25},
    ]
    (in_tmp / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    args = [
        "predict", "--config=configs/edit.yaml", f"--model.foundation={foundation}", "--data.num_workers=0",
        f"--ckpt_path={checkpoint}", *QUICK[1:], "--model.sampling.num_inference_steps=4",
    ]  # fmt: skip
    main([*args, "--data.pairs=edits.jsonl"])
    folder = in_tmp / "runs/edit"
    rows = rows_of(folder / "manifest.jsonl")
    assert [row["strength"] for row in rows] == [1.0, 0.8, 0.8, None, 0.25]
    assert [row["source"] for row in rows] == [edit["video"] for edit in edits]
    assert [row["error"] is None for row in rows] == [True, False, True, False, True]
    assert "broken_text.mp4" in rows[1]["error"] and "edits.jsonl:4: strength=2" in rows[3]["error"]
    made = {i: Path(rows[i]["video"]).read_bytes() for i in (0, 2, 4)}
    # The less strength, the nearer to its source.
    source = render(sample_scene(0), 64, 64, 9).float()
    distance = {i: (read_video(made[i], 9, 64, 64).float() - source).abs().mean() for i in (0, 4)}
    assert distance[4] < distance[0]
    # The same seed makes the same video, whatever is in the batch.
    main([*args, "--data.pairs=edits.jsonl", "--data.batch_size=1"])
    assert [row["seed"] for row in rows_of(folder / "manifest.jsonl")] == [row["seed"] for row in rows]
    for i, video in made.items():
        again = read_video((folder / f"videos/{i:05d}.mp4").read_bytes(), 9, 64, 64)
        assert (again.float() - read_video(video, 9, 64, 64).float()).abs().mean() < 0.5


def test_questions_are_answered(in_tmp: Path, foundation: str, checkpoint: Path, clips: Path) -> None:
    args = [
        "predict", "--config=configs/qa.yaml", f"--model.foundation={foundation}", f"--ckpt_path={checkpoint}",
        "--data.num_workers=0", *QUICK,
    ]  # fmt: skip
    questions = [
        {"video": f"{clips}/*.mp4", "question": "what colour is the circle?"},
        {"video": str(clips / "good0.mp4"), "question": "where is the ring?"},
        {"video": str(clips / "good0.mp4"), "prompt": "not a question"},
    ]
    main([*args, f"--data.pairs={json.dumps(questions)}"])
    path = in_tmp / "runs/qa/answers.jsonl"
    rows = rows_of(path)
    assert len(rows) == 10
    for row in rows[:9]:
        assert set(row) == {"video", "question", "answer", "error", "seconds", "seed"}
        broken = "broken" in row["video"]
        assert (row["error"] is not None) == broken and (row["answer"] is None) == broken
    assert "data.pairs[2]: " in rows[9]["error"]
    main([*args, f"--data.pairs={json.dumps(questions)}", "--data.batch_size=1"])
    assert [row["answer"] for row in rows_of(path)] == [row["answer"] for row in rows]


def test_a_question_is_a_condition(foundation: str) -> None:
    """What is asked reaches the model: the logits under it are others than under the empty prompt."""
    from univigu.training.module import UniViGU

    module = UniViGU(foundation, predict_task="qa")
    seen: list[torch.Tensor] = []
    module.configure_model()
    assert module.transformer is not None
    module.transformer.text_head.register_forward_hook(lambda _, __, output: seen.append(output))
    torch.nn.init.normal_(module.transformer.text_head.linear.weight)
    batch = {
        "index": [0], "path": ["a"], "error": [None], "text": ["a red circle"], "strength": [None],
        "video": render(sample_scene(0), 64, 64, 9)[None],
    }  # fmt: skip
    module.sampling.caption_steps = 1
    data = SimpleNamespace(prompt_length=16)
    predict_batch(module, batch, data)
    predict_batch(module, {**batch, "text": ["where is the blue ring"]}, data)
    predict_batch(module, batch, data)
    assert torch.equal(seen[0], seen[2]) and (seen[0] - seen[1]).abs().max() > 1e-4


def test_refine_takes_recalls_weights(in_tmp: Path, small_data: list[str], checkpoint: Path) -> None:
    from univigu.training.lightning_cli import UniViGUCLI

    args = ["fit", "--config=configs/refine.yaml", *small_data, *QUICK, f"--model.init_from={checkpoint}"]
    cli = UniViGUCLI([*args, "--trainer.fast_dev_run=1"])
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    ours = cli.model.state_dict()
    # One step with a warming-up learning rate moves weights a little; random ones would be far off.
    for key, value in saved.items():
        assert (ours[key] - value).abs().max() < 1e-3, key


def test_an_interrupted_run_continues_exactly(in_tmp: Path, small_data: list[str], checkpoint: Path) -> None:
    """Four steps at once, and two steps then two more: the same weights, optimizer state and position."""

    def final(root: str, *args: str) -> dict[str, object]:
        main(["fit", "--config=configs/recall.yaml", *small_data, *QUICK, "--trainer.max_steps=4",
              f"--trainer.default_root_dir={root}", *args])  # fmt: skip
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


def test_curves_and_configuration_of_a_training_stay_its_own(in_tmp: Path, small_data: list[str]) -> None:
    """Another training in the same folder, and its evaluation with another configuration, write over neither."""
    run = ["fit", "--config=configs/recall.yaml", *small_data, *QUICK, "--trainer.max_steps=1"]
    main([*run, "--seed_everything=5", "--trainer.log_every_n_steps=1"])
    (first,) = Path("runs/recall/tensorboard").glob("events.*")
    main([*run, "--seed_everything=5", "--ckpt_path=runs/recall/checkpoints/last.ckpt", "--trainer.max_steps=2"])
    assert first.exists() and not Path("runs/recall/earlier").exists()  # it went on: these are its own
    main(run)
    moved = Path("runs/recall/earlier/tensorboard-1")
    assert (moved / first.name).exists() and "seed_everything: 5" in (moved / "config.yaml").read_text()
    config = Path("runs/recall/tensorboard/config.yaml").read_text()
    assert "seed_everything: 5" not in config
    log = RunLog.read(Path("runs/recall"))
    assert log.config["seed_everything"] == 0 and "train/loss" not in log.scalars
    assert RunLog.read(moved).config["seed_everything"] == 5 and "train/loss" in RunLog.read(moved).scalars
    main(["test", "--config=configs/refine.yaml", *small_data, *QUICK, "--trainer.default_root_dir=runs/recall",
          "--trainer.logger.init_args.save_dir=runs/recall", "--model.evaluation.generation=false"])  # fmt: skip
    assert Path("runs/recall/tensorboard/config.yaml").read_text() == config


@pytest.mark.parametrize("given, limit", [([], 1.0), (["--trainer.limit_val_batches=3"], 3)])
def test_validate_takes_every_clip(
    in_tmp: Path, checkpoint: Path, given: list[str], limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit in the configurations is for the looks that fit takes in between."""
    from univigu.training.lightning_cli import UniViGUCLI

    monkeypatch.setattr(UniViGUCLI, "instantiate_classes", lambda self: sys.exit(0))
    seen: list[Any] = []
    parse = UniViGUCLI.parse_arguments
    monkeypatch.setattr(
        UniViGUCLI, "parse_arguments", lambda self, *args: (parse(self, *args), seen.append(self.config))
    )
    for command in ("validate", "fit"):
        with pytest.raises(SystemExit):
            UniViGUCLI([command, "--config=configs/refine.yaml", f"--ckpt_path={checkpoint}", *given])
    assert [c[c.subcommand].trainer.limit_val_batches for c in seen] == [limit, 3 if given else 4]


def test_weights_to_evaluate_may_be_named(
    in_tmp: Path, small_data: list[str], checkpoint: Path, failing: Callable[[list[str]], str]
) -> None:
    """As those to predict with: in place of what the configuration would have trained, with their own architecture."""
    from univigu.training.lightning_cli import UniViGUCLI

    args = ["test", "--config=configs/refine.yaml", *small_data, *QUICK, "--model.evaluation.generation=false"]
    cli = UniViGUCLI([*args, f"--model.init_from={checkpoint}", "--model.architecture.text_positions=300"])
    assert cli.model.transformer.config.text_positions == 256  # the configuration's of recall
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in cli.model.state_dict().items() if name in saved)
    assert saved.keys() <= cli.model.state_dict().keys()
    assert "lightning fit --config configs/refine.yaml" in failing(args)  # what the configuration names is fit's


def test_earlier_curves_have_numbers_of_their_own(tmp_path: Path) -> None:
    from univigu.training.lightning_cli import set_aside

    for number in (1, 2, 3):
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "tensorboard" / f"events.out.tfevents.{number}").touch()
        set_aside(tmp_path / "tensorboard")
        if number == 2:
            shutil.rmtree(tmp_path / "earlier" / "tensorboard-1")
    assert sorted(path.name for path in (tmp_path / "earlier").iterdir()) == ["tensorboard-2", "tensorboard-3"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    set_aside(tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").exists()


def test_held_out_evaluation(
    in_tmp: Path, small_data: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from univigu.training.lightning_cli import UniViGUCLI

    Path("runs/recall/checkpoints").mkdir(parents=True)
    Path("runs/recall/checkpoints/last.ckpt").symlink_to(checkpoint)
    cli = UniViGUCLI(["test", "--config=configs/recall.yaml", *small_data, *QUICK])
    results = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    for name in (
        "caption/shape",
        "caption/cider",
        "caption/unique",
        "caption/tokens",
        "caption/exact_text",
        "generate/color",
        "joint/mean",
        "flow/loss",
    ):
        assert results[f"test/{name}"] >= 0, name
    assert results["test/flow/ratio"] == 1.0  # recall leaves the generator's weights as they are
    assert "test/generate/start" not in results  # no prompt says where


def test_a_checkpoint_is_evaluated_with_another_stages_configuration(
    in_tmp: Path, small_data: list[str], checkpoint: Path
) -> None:
    """As what both stages made in one fit is with refine's; only resuming a fit needs the same stages."""
    from univigu.training.lightning_cli import UniViGUCLI

    cli = UniViGUCLI(["validate", "--config=configs/refine.yaml", *small_data, *QUICK, f"--ckpt_path={checkpoint}"])
    assert cli.trainer.callback_metrics["val/text_loss"] > 0


@pytest.mark.parametrize(
    "option,message",
    [
        ("clip=/nowhere", "evaluation.clip='/nowhere': no such folder"),
        ("video_features=/nowhere", "evaluation.video_features='/nowhere': no such file or folder"),
        ("clip_frames=0", "evaluation.clip_frames=0: expected at least 1"),
    ],
)
def test_evaluation_with_models_that_are_not_there(
    in_tmp: Path,
    small_data: list[str],
    checkpoint: Path,
    failing: Callable[[list[str]], str],
    option: str,
    message: str,
) -> None:
    arguments = [*small_data, *QUICK, f"--ckpt_path={checkpoint}", f"--model.evaluation.{option}"]
    assert message in failing(["test", "--config=configs/recall.yaml", *arguments])


def test_evaluation_without_a_run_names_the_command(
    in_tmp: Path, small_data: list[str], failing: Callable[[list[str]], str]
) -> None:
    printed = failing(["test", "--config=configs/refine.yaml", *small_data])
    assert "lightning fit --config configs/refine.yaml" in printed


# ---------------------------------------------------------------- overlays


@pytest.mark.parametrize("name", ["recall", "refine"])
@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_overlays_change_the_scale(in_tmp: Path, name: str, size: str) -> None:
    args = [f"--config=configs/{file}.yaml" for file in (name, f"wan2.1-{size}", "fsdp")]
    fit = parse_fit(args)
    (stage,) = fit.stages
    assert (stage.name, stage.text_length, stage.tasks.generate, stage.condition_dropout.joint) == (
        name,
        256,
        0.25,
        0.5,
    )
    assert stage.learning_rate > 0 and stage.target == {"recall": "prompt", "refine": "caption"}[name]
    assert (
        fit.model.foundation.endswith(f"Wan2.1-T2V-{size.upper()}-Diffusers")
        and fit.model.architecture.text_flow == "uniform"
    )
    assert (fit.data.height, fit.data.width, fit.data.num_frames, fit.data.caption_length) == (480, 832, 81, 256)
    assert fit.strategy.class_path == "univigu.training.parallel.ShardedStrategy" and fit.model.gradient_checkpointing
    assert fit.model.parallel.compute_dtype == "bfloat16"
    assert {"StageSwitch", "LastCheckpoint", "MediaLogger"} <= set(fit.callbacks)
    alone = parse_fit(args[:1])
    assert (
        alone.stages[0].text_length == {"recall": 32, "refine": 256}[name]
        and alone.model.architecture.text_flow == "mask"
    )


def test_overrides_reach_callbacks_and_stages(in_tmp: Path, small_data: list[str]) -> None:
    from univigu.training.lightning_cli import UniViGUCLI

    Path("mine.yaml").write_text(
        "overrides:\n  stages: {recall: {steps: 7, tasks: {joint: 0.0}}, other: {steps: 1}}\n"
        "  callbacks: {MediaLogger: {num_samples: 1, every_n_steps: 0}, FinalReport: {num_samples: 2}}\n"
    )
    args = ["fit", "--config=configs/recall.yaml", "--config=mine.yaml", *small_data, *QUICK]
    cli = UniViGUCLI([*args, "--trainer.fast_dev_run=1"])
    found = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    (stage,) = found["StageSwitch"].stages
    assert (stage.steps, stage.tasks.joint, stage.tasks.understand) == (7, 0.0, 0.875)
    assert (found["MediaLogger"].num_samples, found["FinalReport"].num_samples) == (1, 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{stages: {recall: {stepz: 7}}}", "overrides.stages.recall.stepz"),
        ("{stages: {recall: {tasks: {caption: 1}}}}", "overrides.stages.recall.tasks.caption"),
        ("{stages: {recall: {condition_dropout: {joint: 2}}}}", "condition_dropout"),
        ("{callbacks: {MediaLogger: {samples: 7}}}", "samples"),
    ],
)
def test_overrides_that_fit_nothing(
    text: str, named: str, in_tmp: Path, small_data: list[str], failing: Callable[[list[str]], str]
) -> None:
    Path("mine.yaml").write_text(f"overrides: {text}\n")
    assert named in failing(["fit", "--config=configs/recall.yaml", "--config=mine.yaml", *small_data])


# ---------------------------------------------------------------- mistakes


def test_misspelt_key(in_tmp: Path, failing: Callable[[list[str]], str]) -> None:
    assert "data.batchsize" in failing(["fit", "--config=configs/recall.yaml", "--data.batchsize=4"])


def test_misspelt_stage_field(in_tmp: Path, failing: Callable[[list[str]], str]) -> None:
    text = (REPO / "configs/recall.yaml").read_text().replace("condition_dropout", "conditon_dropout")
    Path("typo.yaml").write_text(text)
    assert "conditon_dropout" in failing(["fit", "--config=typo.yaml"])


def test_stage_value_out_of_range(in_tmp: Path, failing: Callable[[list[str]], str]) -> None:
    text = (REPO / "configs/recall.yaml").read_text().replace("understand: 0.9", "understand: 1.75")
    Path("wrong.yaml").write_text(text)
    printed = failing(["fit", "--config=wrong.yaml"])
    assert "condition_dropout" in printed and "1.75" in printed


def test_refine_without_recall_names_the_command(
    in_tmp: Path, small_data: list[str], failing: Callable[[list[str]], str]
) -> None:
    printed = failing(["fit", "--config=configs/refine.yaml", *small_data])
    assert "runs/recall/checkpoints/last.ckpt" in printed
    assert "lightning fit --config configs/recall.yaml" in printed


def test_caption_without_a_model_names_the_command(
    in_tmp: Path, foundation: str, clips: Path, failing: Callable[[list[str]], str]
) -> None:
    args = ["predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", f"--data.videos={clips}"]
    assert "lightning fit --config configs/refine.yaml" in failing(args)


def test_checkpoint_that_does_not_exist(
    in_tmp: Path, foundation: str, clips: Path, failing: Callable[[list[str]], str]
) -> None:
    args = ["predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", f"--data.videos={clips}"]
    assert "nowhere.ckpt" in failing([*args, "--ckpt_path=nowhere.ckpt"])


@pytest.mark.parametrize("content", [b"", b"garbage"], ids=["empty", "garbage"])
def test_checkpoint_that_is_none(
    content: bytes, in_tmp: Path, foundation: str, clips: Path, failing: Callable[[list[str]], str]
) -> None:
    Path("bad.ckpt").write_bytes(content)
    args = ["predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", f"--data.videos={clips}"]
    assert "bad.ckpt" in failing([*args, "--model.init_from=bad.ckpt"])
    assert "bad.ckpt" in failing([*args, "--ckpt_path=bad.ckpt"])


def test_inputs_that_name_nothing(
    in_tmp: Path, foundation: str, checkpoint: Path, failing: Callable[[list[str]], str]
) -> None:
    args = ["predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", f"--ckpt_path={checkpoint}"]
    assert "nothing/*.mp4" in failing([*args, "--data.videos=nothing/*.mp4"])
    assert "data.videos" in failing(args)


def test_foundation_that_is_none(in_tmp: Path, failing: Callable[[list[str]], str]) -> None:
    printed = failing(["fit", "--config=configs/recall.yaml", "--model.foundation=nowhere"])
    assert "nowhere" in printed and "WanPipeline" in printed


def test_prompts_given_to_captioning(
    in_tmp: Path, foundation: str, checkpoint: Path, failing: Callable[[list[str]], str]
) -> None:
    args = ["predict", "--config=configs/caption.yaml", f"--model.foundation={foundation}", f"--ckpt_path={checkpoint}"]
    printed = failing([*args, "--data.prompts=a red circle", "--data.num_workers=0"])
    assert "model.predict_task='caption' needs data.videos, not data.prompts" in printed
