"""Training and evaluating on questions: a held-out answer is read off the video under its own question."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from tests import tiny
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.options import LengthFilter
from univigu.data.sample import questions_of
from univigu.data.shards import write_shard
from univigu.data.video import encode_mp4
from univigu.evaluation.held_out import EvaluationOptions
from univigu.flow.objective import ConditionDropout, TaskMixture, UniFlowLosses, UniFlowObjective
from univigu.models.tokens import detokenize, tokenize
from univigu.pipeline import TaskRunner
from univigu.sampling.options import SamplingOptions
from univigu.shapes import texts as shapes_texts
from univigu.shapes.scenes import sample_scene
from univigu.training.callbacks.held_out import FinalReport
from univigu.training.conditions import ANSWER_WEIGHT, ask_questions
from univigu.training.module import UniViGU
from univigu.training.stages import Stage, StageSwitch

QA = [{"question": "a red circle", "answer": "moving left."}, {"question": "a green circle", "answer": "large."}]
ASKED = [pair["question"] for pair in QA]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    pipeline = tiny.make_pipeline()
    pipeline.save_pretrained(folder / "foundation")
    tiny.make_unified(pipeline.transformer, len(pipeline.tokenizer)).save_pretrained(folder / "unified")
    frames = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    texts = {"prompt": "a white circle", "caption": "it is white.", "qa": QA}
    for split in ("train", "val", "test"):
        (folder / "shards" / split).mkdir(parents=True)
        members = {"mp4": encode_mp4(frames), "json": json.dumps(texts).encode()}
        write_shard(folder / "shards" / split / "000000.tar", [("clip", members)])
    return folder


class Asked(UniViGU):
    """Notes under which prompts texts are read, and how many samples of a loss went without their prompt."""

    @property
    def tasks(self) -> TaskRunner:
        tasks, sample = super().tasks, TaskRunner.sample

        def noted(task: str, prompts: list[str] | None, length: int, **options: Any) -> Any:
            assert task == ("answer" if prompts else "caption")
            self.prompts.append((prompts, [generator.initial_seed() for generator in options["generator"]]))
            return sample(tasks, task, prompts, length, **options)

        tasks.sample = noted  # type: ignore[method-assign, assignment]
        return tasks


def run(folder: Path, command: str, texts: str) -> tuple[Asked, Trainer]:
    module = Asked(
        str(folder / "foundation"),
        str(folder / "unified"),
        seed=1,
        sampling=SamplingOptions(caption_steps=2),
        evaluation=EvaluationOptions(generation=texts == "qa"),
    )
    module.prompts = []  # type: ignore[assignment]
    data = VideoTextDataModule(
        str(folder / "foundation"),
        shards=str(folder / "shards"),
        height=32,
        width=32,
        num_frames=5,
        prompt_length=16,
        batch_size=2,
        num_workers=0,
        texts=texts,
        length_filter=LengthFilter(min_caption=0),
    )
    tasks = TaskMixture(joint=0, understand=1, generate=0)
    stage = Stage(steps=1, target="caption", text_length=16, tasks=tasks)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[StageSwitch({"refine": stage}), FinalReport(2)],
        limit_val_batches=0 if command == "fit" else None,
    )
    getattr(trainer, command)(module, datamodule=data)
    return module, trainer


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_answers_are_read_under_their_questions(folder: Path, command: str) -> None:
    module, trainer = run(folder, command, "qa")
    ((prompts, seeds),) = module.prompts  # type: ignore[misc]
    assert prompts == ASKED and seeds[0] != seeds[1]
    if command != "fit":
        results = {name.partition("/")[2] for name in trainer.callback_metrics}
        assert "caption/bleu4" in results and not {"caption/shape", "caption/mean"} & results


def test_captions_are_read_off_the_video_alone(folder: Path) -> None:
    module, _ = run(folder, "test", "caption")
    ((prompts, _),) = module.prompts  # type: ignore[misc]
    assert prompts is None


def test_the_held_out_loss_of_answers_depends_on_their_questions(folder: Path) -> None:
    """With the question shown, another question is another loss; of captions the prompt changes nothing."""
    losses = {}
    for texts in ("qa", "caption"):
        module, trainer = run(folder, "validate", texts)
        for other in (False, True):
            batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
            if other:
                batch["prompt_ids"] = batch["prompt_ids"].flip(0) if texts == "qa" else batch["prompt_ids"].roll(1, 1)
                batch.pop("prompt_embeds", None)
                batch.pop("null_embeds", None)
            logged: dict[str, float] = {}
            module.log = lambda name, value, logged=logged, **_: logged.update({name: float(value)})  # type: ignore
            module.validation_step(batch, 0)
            losses[texts, other] = logged["val/text_loss"]
    assert losses["qa", False] != losses["qa", True]
    assert losses["caption", False] == losses["caption", True]


def test_a_batch_of_captions_has_no_questions() -> None:
    assert questions_of({"question": [None, None]}) is None and questions_of({}) is None
    assert questions_of({"question": ["a", "b"]}) == ["a", "b"]
    assert questions_of({"question": ["a", None]}) is None


def test_samples_answer_questions(folder: Path) -> None:
    """Their condition is the question and their target the answer; those that only learn the video stay."""
    module, trainer = run(folder, "validate", "qa")
    batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
    batch["qa"] = [[], [{"question": "a red circle", "answer": "moving left."}]]
    before = module.prepare(batch)
    encoded: list[int] = []
    hook = module.foundation.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    after = ask_questions(before, batch, 2, module.tasks, random.Random(0), {})
    hook.remove()
    assert len(encoded) == 1  # the question, and not the empty prompt again
    tokenizer, slot = module.foundation.tokenizer, batch["prompt_ids"].shape[1]
    question = module.tasks.encode_ids(tokenize(tokenizer, ["a red circle"], slot))
    assert after is not None and torch.equal(after.latents, before.latents[1:])  # the first clip has no question
    torch.testing.assert_close(after.prompt_embeds, question)
    assert detokenize(tokenizer, after.text_ids) == ["moving left."]
    assert ask_questions(before, batch, 1, module.tasks, random.Random(0), {}) is None  # the second learns no text

    shown: list[torch.Tensor] = []
    read: list[torch.Tensor] = []

    def model(video: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor, *text: Any) -> Any:
        shown.append(embeds)
        read.append(text[0].prompt_embeds)
        return module.transformer(video, timestep, embeds, *text)

    model.config, model.token_table = module.transformer.config, module.transformer.token_table
    module.objective(model, after, (0, 1, 0), ConditionDropout(1.0, 0.0, 1.0))
    assert torch.equal(shown[0], after.prompt_embeds) and read[0] is None
    module.transformer.register_to_config(clean_video_reads_prompt=False)  # only the text sees the question
    module.objective(model, after, (0, 1, 0), ConditionDropout(1.0, 0.0, 1.0))
    assert torch.equal(shown[1], after.null_embeds) and torch.equal(read[1], shown[0])

    batch["qa"].reverse()
    mixed = ask_questions(before, batch, 1, module.tasks, random.Random(0), {})
    assert mixed is not None and torch.equal(mixed.latents, before.latents)
    assert torch.equal(mixed.prompt_embeds[1], before.prompt_embeds[1]) and len(mixed.text_ids) == 1


@pytest.mark.slow
def test_a_share_of_the_steps_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all samples that learn text answer, in a slot of answers; all processes ask in the same steps."""
    module, trainer = run(folder, "validate", "qa")
    batch, noted = next(iter(trainer.datamodule.val_dataloader())), []  # type: ignore[attr-defined]
    batch |= {name: torch.cat([batch[name]] * 2) for name in ("prompt_ids", "caption_ids", "latents")}
    batch["key"] *= 2
    module.stage = Stage(text_length=128, question_share=0.25, tasks=TaskMixture(1, 2, 1), teacher_weight=0)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    compute, total, weights = UniFlowObjective.__call__, UniFlowLosses.total, list[float]()

    def weighted(self: Any, size: int, teacher_weight: float, text_weight: float) -> Any:
        weights.append(text_weight)
        return total(self, size, teacher_weight, text_weight)

    monkeypatch.setattr(UniFlowLosses, "total", weighted)

    def note(self: Any, model: Any, inputs: Any, counts: Any, dropout: Any, **options: Any) -> Any:
        noted.append((inputs.text_ids.shape[1], counts, dropout.understand))
        return compute(self, model, inputs, counts, dropout, **options)

    monkeypatch.setattr(UniFlowObjective, "__call__", note)
    for rank, asked in ((0, [QA, QA, [], []]), (1, [[], [], [], QA])):  # in the second none of those that learn text
        monkeypatch.setattr(Asked, "global_rank", rank)
        for step in range(30):
            trainer.fit_loop.epoch_loop.batch_progress.total.ready = step + 1
            module.training_step(batch | {"qa": asked}, 0)
    assert weights == [ANSWER_WEIGHT if counts[0] == 0 and size == 64 else 1.0 for size, counts, _ in noted]
    first, second = noted[:30], noted[30:]
    module.stage = Stage(question_share=1.0, tasks=TaskMixture(0, 0, 1), teacher_weight=0)  # nothing learns text
    monkeypatch.setattr(UniFlowObjective, "__call__", compute)
    assert module.training_step(batch, 0).isfinite()
    assert 3 < first.count((64, (0, 2, 1), 0.0)) < 12
    for one, other in zip(first, second, strict=True):
        if one != (128, (1, 2, 1), 0.9):
            assert (one, other) == ((64, (0, 2, 1), 0.0), (128, (0, 3, 1), 0.9))  # the same passes


def test_samples_without_a_fitting_question_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, trainer = run(folder, "validate", "qa")
    batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
    batch["qa"] = [[], [{"question": "a circle " * 99, "answer": "large."}]]
    assert ask_questions(module.prepare(batch), batch, 2, module.tasks, random.Random(0), {}) is None
    assert "skipped a question of sample 'clip': question has" in caplog.text


def test_kinds_of_questions_are_drawn_by_their_weights(folder: Path) -> None:
    module, trainer = run(folder, "validate", "qa")
    batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
    pairs = [
        {"kind": "size", "question": "a red circle", "answer": "large."},
        {"kind": "motion", "question": "a red circle", "answer": "moving left."},
        {"question": "a red circle", "answer": "white."},
    ]
    batch["qa"] = [pairs, pairs[1:2]]
    inputs, draw = module.prepare(batch), random.Random(0)

    def answers(times: int, **weights: float) -> list[list[str]]:
        made = [ask_questions(inputs, batch, 2, module.tasks, draw, weights) for _ in range(times)]
        return [[] if part is None else detokenize(module.foundation.tokenizer, part.text_ids) for part in made]

    drawn = [texts[0] for texts in answers(120, motion=4.0)]
    assert 60 <= drawn.count("moving left.") <= 100  # of 80, with a standard deviation of 5
    assert {"large.", "white."} <= set(drawn)
    assert [len(texts) for texts in answers(3, motion=0.0)] == [1, 1, 1]  # the second clip has no other
    with pytest.warns(UserWarning, match="question_weights: 'colour': a batch has no question of this kind"):
        answers(1, colour=2.0)
    with pytest.raises(ValueError, match=r"question_weights={'size': -1.0}: expected numbers of at least 0"):
        Stage(question_weights={"size": -1.0})


def test_the_model_knows_the_slot_of_its_answers(folder: Path) -> None:
    """Once a stage has asked; before that answers have the slot of other texts."""
    module, trainer = run(folder, "validate", "qa")
    latents = module.prepare(next(iter(trainer.datamodule.val_dataloader()))).latents  # type: ignore[attr-defined]
    for share, length, expected in ((0.0, 128, 128), (0.5, 128, 64), (0.5, 16, 16)):
        module.enter_stage(Stage(text_length=length, question_share=share))
        for task, prompts, size in (("answer", ASKED, expected), ("caption", None, length)):
            generator = module.tasks.generators([0, 1])
            samples = module.tasks.sample(task, prompts, 16, latents=latents, generator=generator)
            assert samples.tokens.shape == (2, size)


def test_questions_of_the_embedded_world_are_answered_by_the_scene() -> None:
    for seed in range(300):
        scene = sample_scene(seed)
        asked = shapes_texts.questions_of(scene)
        assert {pair["kind"] for pair in asked} >= {"count", "background"}
        assert len({pair["question"] for pair in asked}) == len(asked), asked  # each has one answer
        for pair in asked:
            if pair["kind"] == "color":
                shape = pair["question"].removesuffix("?").rpartition(" ")[2]
                right = [obj.color for obj in scene.objects if shape in (obj.shape, "object")]
                assert pair["answer"].removesuffix(".") in right
            if pair["kind"] == "relation" and pair["answer"] in ("left.", "right."):
                assert scene.relation == "left of"
