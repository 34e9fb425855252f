"""The model "univigu" of lmms-eval (0.7), which finds it by the entry point ``lmms_eval.models``.

lmms-eval is no dependency; docs/EVALUATION.md says how to install and call it.
"""

from __future__ import annotations

from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from univigu.data.video import read_video
from univigu.pipeline import UniViGUPipeline

MODEL = ModelManifest("univigu", simple_class_path="univigu.evaluation.lmms_eval.UniViGU")


class UniViGU(lmms):
    """Texts of videos for lmms-eval's ``generate_until`` tasks.

    Args:
        pretrained: folder of a pipeline; by default the model that ships.
        ask: condition the text on the task's question, for models trained on questions; else it is a caption.
        height, width, num_frames: size to read videos at.
        caption_steps: denoising steps of the text.
        max_sequence_length: slot of a question in tokens.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        ask: bool = False,
        height: int = 64,
        width: int = 64,
        num_frames: int = 9,
        caption_steps: int = 50,
        max_sequence_length: int = 512,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        pipe = UniViGUPipeline.from_pretrained(pretrained, torch_dtype=getattr(torch, dtype))
        self.pipe = pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.pipe.set_progress_bar_config(disable=True)
        self.ask, self.size, self.batch_size, self.seed = ask, (num_frames, height, width), int(batch_size), seed
        self.options: dict[str, Any] = {"caption_steps": caption_steps, "max_sequence_length": max_sequence_length}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            questions, videos, seeds = [], [], []
            for request in requests[start : start + self.batch_size]:
                question, _, doc_to_visual, doc_id, task, split = request.args
                visuals = doc_to_visual(self.task_dict[task][split][doc_id])
                if len(visuals) != 1 or not isinstance(visuals[0], str):
                    raise ValueError(f"{task}, document {doc_id}: expected one video file, got {visuals!r:.200}")
                questions.append(question)
                videos.append(read_video(visuals[0], *self.size))
                seeds.append(torch.Generator().manual_seed(self.seed + doc_id))
            frames = torch.stack(videos).float() / 255
            options = self.options | {"generator": seeds}
            made = self.pipe.answer(frames, questions, **options) if self.ask else self.pipe.caption(frames, **options)
            texts += made.text or []
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("univigu gives no likelihood of a text: choose tasks of type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("univigu holds no conversation: choose tasks of type generate_until")
