"""A pruned vocabulary: smaller tables, and otherwise the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests import tiny
from tests.test_offload import make_pipe
from tests.training import test_stages as stages
from tools import convert
from univigu.checkpoint import load_weights, prune_foundation, prune_model, used_tokens
from univigu.flow.text import TextInputs
from univigu.models.foundation import Foundation
from univigu.models.lora import LoraOptions
from univigu.models.official import export_official, import_official
from univigu.models.tokens import Vocabulary, tokenize
from univigu.models.weights import CheckpointError
from univigu.training.module import UniViGU
from univigu.training.plan import workloads_of
from univigu.training.stages import StageSwitch

TEXTS = ["a large red circle moving left", "two small blue rings"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foundation")
    tiny.make_pipeline().save_pretrained(path)
    return path


@pytest.mark.parametrize("flow", ["mask", "uniform", "embedding"])
def test_kept_tokens_have_the_same_logits(flow: str, folder: Path) -> None:
    tokenizer = Foundation(folder).tokenizer
    ids = used_tokens(Foundation(folder), TEXTS)
    model = tiny.make_unified(tiny.make_wan(), len(tokenizer), text_flow=flow)
    pruned, vocabulary = prune_model(model, ids).eval(), Vocabulary(ids)
    tokens = tokenize(tokenizer, TEXTS, 12)
    own = vocabulary.encode(tokens, tokenizer, "caption")
    assert torch.equal(vocabulary.decode(own), tokens) and own.max() < len(ids) < len(tokenizer)
    assert pruned.config.vocab_size == len(ids) and pruned.text_head.linear.out_features == len(ids)
    video = torch.randn(2, tiny.CHANNELS, 2, 4, 4), torch.tensor([0.0, 500.0]), torch.randn(2, 6, tiny.TEXT_DIM)
    logits = []
    for each, shown in ((model, tokens), (pruned, own)):
        if flow == "mask":  # the mask state moves with the end of the table
            shown = shown.index_fill(1, torch.tensor([3]), each.config.vocab_size)
        state = each.token_table()[shown] if flow == "embedding" else shown
        with torch.no_grad():
            logits.append(each(*video, TextInputs(state, torch.tensor([300.0, 700.0]))).text)
    assert torch.equal(logits[0][..., ids], logits[1])
    with pytest.raises(CheckpointError, match=r"does not have the tokens"):
        prune_model(pruned, list(range(len(tokenizer))))


def test_another_token_is_named_with_its_text(folder: Path) -> None:
    tokenizer = Foundation(folder).tokenizer
    vocabulary = Vocabulary(used_tokens(Foundation(folder), TEXTS[:1]))
    with pytest.raises(ValueError, match=r"^caption 'two small blue rings': token '.*two.*' \(id \d+\) is not in"):
        vocabulary.encode(tokenize(tokenizer, TEXTS, 12), tokenizer, "caption")


@pytest.mark.parametrize("flow", ["mask", "uniform", "embedding"])
def test_a_pipeline_writes_only_kept_tokens(flow: str, folder: Path, tmp_path: Path) -> None:
    pipe = make_pipe(flow)
    ids = used_tokens(Foundation(folder), TEXTS)
    pipe.register_modules(transformer=prune_model(pipe.transformer, ids).eval())
    pipe.save_pretrained(tmp_path)
    pipe = type(pipe).from_pretrained(tmp_path)
    made = pipe.caption(torch.rand(5, 3, 32, 32), caption_steps=3, max_sequence_length=16)
    assert set(made.tokens.flatten().tolist()) <= set(ids)
    assert pipe.transformer.config.token_ids == ids


class Clips(stages.Clips):
    """Texts of the pruned vocabulary."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {name: TOKENS[index % 2] for name in ("prompt_ids", "caption_ids")}


TOKENS = torch.zeros(0)


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)])
def test_training_prunes_evaluates_and_resumes(lora: Any, folder: Path, tmp_path: Path) -> None:
    global TOKENS
    foundation = Foundation(folder)
    ids = used_tokens(foundation, TEXTS)
    prune_foundation(folder, ids, tmp_path / "pruned")
    TOKENS = tokenize(foundation.tokenizer, TEXTS, 12)

    def fit(path: Path, tokens: torch.Tensor, **options: Any) -> UniViGU:
        module = UniViGU(str(path), optimizer=stages.ADAMW, seed=3, lora=lora, **options)
        trainer = stages.make_trainer(tmp_path, [StageSwitch(stages.STAGES)], max_steps=3)
        trainer.fit(module, DataLoader(Clips(), batch_size=stages.BATCH))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return module

    module = fit(tmp_path / "pruned", TOKENS)
    assert module.transformer is not None and module.transformer.config.token_ids == ids
    loaded = load_weights(tmp_path / "x.ckpt")
    assert loaded.config.token_ids == ids and loaded.vocab_embed.num_embeddings == len(ids)
    again = fit(folder, TOKENS, init_from=str(tmp_path / "x.ckpt"))  # the vocabulary comes with the weights
    assert again.transformer is not None and again.transformer.config.token_ids == ids
    full = tiny.make_unified(tiny.make_wan(), len(foundation.tokenizer))
    full.save_pretrained(tmp_path / "full")
    module = UniViGU(str(tmp_path / "pruned"), str(tmp_path / "full"))
    with pytest.raises(CheckpointError, match=rf"'vocab_size': \(\d+, {len(ids)}\).*\(None, '{len(ids)} ids'\)"):
        module.configure_model()
    TOKENS = tokenize(foundation.tokenizer, [*TEXTS[:1], "a green cross"], 12)
    with pytest.raises(ValueError, match=r"'a green cross': token '.*green.*is not in the model's vocabulary"):
        fit(tmp_path / "pruned", TOKENS)


def test_the_official_export_has_the_full_tables(folder: Path, tmp_path: Path) -> None:
    size = len(Foundation(folder).tokenizer)
    model = tiny.make_unified(tiny.make_wan(), size, text_flow="uniform")
    ids = used_tokens(Foundation(folder), TEXTS)
    export_official(prune_model(model, ids), tmp_path / "x.pth", accept_differences=True, vocab_size=size)
    back = import_official(tmp_path / "x.pth", tiny.make_wan())
    assert back.config.vocab_size == size and back.config.token_ids is None
    for table, ours in (
        ("vocab_embed.weight", model.vocab_embed.weight),
        ("text_head.linear.bias", model.text_head.linear.bias),
    ):
        assert torch.equal(back.state_dict()[table][ids], ours[ids])
    unused = sorted(set(range(size)) - set(ids))
    assert (back.text_head.linear.bias[unused] == -1e4).all() and not back.vocab_embed.weight[unused].any()


def test_the_command_prunes_folders_and_models(shapes_root: Path, folder: Path, tmp_path: Path) -> None:
    texts = ["--foundation", str(folder), "--texts", str(next(shapes_root.glob("*/train"))), "--keep", "zebra"]
    assert convert.main(["prune", *texts, "--output", str(tmp_path / "pruned")]) == 0
    ids = json.loads((tmp_path / "pruned" / "vocabulary.json").read_text())
    tokenizer = Foundation(tmp_path / "pruned").tokenizer
    assert {*tokenizer("zebra").input_ids, tokenizer.pad_token_id, tokenizer.eos_token_id} <= set(ids)
    tiny.make_unified(tiny.make_wan(), len(tokenizer)).save_pretrained(tmp_path / "full")
    model = ["--checkpoint", str(tmp_path / "full"), "--output", str(tmp_path / "model")]
    assert convert.main(["prune", *texts, *model]) == 0
    assert load_weights(tmp_path / "model").config.token_ids == ids
    args = ["--config=configs/recall.yaml", f"--model.foundation={tmp_path / 'pruned'}"]
    assert workloads_of(args)["recall"].transformer["vocab_size"] == len(ids)
