"""Components that are elsewhere until they are called: every task makes the same of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from tests import tiny
from univigu.models.weights import compute_device
from univigu.pipeline import UniViGUPipeline

SIZE = {"height": 32, "width": 48, "num_frames": 5}
QUICK = {"num_inference_steps": 2, "max_sequence_length": 16}
READ = {"caption_steps": 2, "max_sequence_length": 16}


def make_pipe(flow: str) -> UniViGUPipeline:
    wan = tiny.make_pipeline()
    options = {"text_flow": flow, "text_positions": 12, "clean_video_reads_text": False}
    model = tiny.make_unified(wan.transformer, len(wan.tokenizer), **options)
    model.register_to_config(text_length=12)
    components = {name: wan.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = UniViGUPipeline(**components, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def every_task(pipe: UniViGUPipeline) -> dict[str, np.ndarray]:
    video = np.random.default_rng(0).random((2, 7, 32, 48, 3), dtype=np.float32)

    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in (1, 2)]

    joint = pipe.joint(["one", "two"], **SIZE, generator=seeds(), **QUICK)
    generate = pipe("one", **SIZE, num_inference_steps=2, max_sequence_length=16, generator=seeds()[0])
    return {
        "caption": pipe.caption(video, generator=seeds(), **READ).tokens.cpu().numpy(),
        "answer": pipe.answer(video, "two", generator=seeds(), **READ).tokens.cpu().numpy(),
        "joint text": joint.tokens.cpu().numpy(),
        "joint video": joint.frames,
        "edit": pipe.edit(video, "two", 0.5, generator=seeds(), **QUICK).frames,
        "generate": generate.frames,
    }


def offload_whole(pipe: UniViGUPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe: UniViGUPipeline) -> None:
    """As ``enable_sequential_cpu_offload`` does; that itself refuses a device that is no accelerator."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
    assert all(weight.is_meta for weight in pipe.transformer.parameters())
    assert pipe.vae.device.type == "meta" and compute_device(pipe.vae).type == "cpu"


def offload_groups(pipe: UniViGUPipeline) -> None:
    pipe.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)


def test_group_offloading_computes_on_the_device_that_it_loads_to() -> None:
    pipe = make_pipe("embedding")
    pipe.enable_group_offload(torch.device("cuda"), num_blocks_per_group=1)  # nothing is moved before it is used
    assert [compute_device(part).type for part in (pipe.text_encoder, pipe.transformer, pipe.vae)] == ["cuda"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offload", "flow"), [(offload_whole, "mask"), (offload_layers, "embedding"), (offload_groups, "embedding")]
)
def test_every_task_is_the_same(offload: Any, flow: str) -> None:
    expected, pipe = every_task(make_pipe(flow)), make_pipe(flow)
    offload(pipe)
    for _ in range(2):  # the second time from where the first left the components
        for task, made in every_task(pipe).items():
            assert np.array_equal(made, expected[task]), task


def test_components_come_in_the_order_of_their_use() -> None:
    pipe = make_pipe("mask")
    offload_whole(pipe)
    every_task(pipe)
    names = {id(component): name for name, component in pipe.components.items()}
    hooks = pipe._all_hooks
    assert [names[id(hook.model)] for hook in hooks] == ["text_encoder", "transformer", "vae"]
    # Each sends the one before it away.
    assert [hook.hook.prev_module_hook for hook in hooks] == [None, *hooks[:-1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
def test_offloading_on_a_gpu(method: str) -> None:
    expected, pipe = every_task(make_pipe("embedding").to("cuda")), make_pipe("embedding")
    options = {"onload_device": torch.device("cuda"), "num_blocks_per_group": 1} if "group" in method else {}
    getattr(pipe, method)(**options)
    for task, made in every_task(pipe).items():
        assert np.allclose(made, expected[task], atol=1e-3), task
    assert all(weight.device.type in ("cpu", "meta") for weight in pipe.transformer.parameters())
