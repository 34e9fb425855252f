"""Writes the reference figures of caption_pairs.json with coco-caption itself: its Java tokenizer and its scorers.

    pip install --no-deps --target coco pycocoevalcap==1.2   # 100 MB; its BLEU is not for commercial use, so it is no
    PYTHONPATH=coco python tests/evaluation/reference_captions.py   # dependency, not even of the tests; needs java

The figures that are committed came from this command with OpenJDK 17 and numpy 2.4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAIRS = Path(__file__).with_name("caption_pairs.json")


def main() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    pairs = json.loads(PAIRS.read_text())["pairs"]
    tokenizer: Any = PTBTokenizer()
    truth = tokenizer.tokenize({i: [{"caption": pair["reference"]}] for i, pair in enumerate(pairs)})
    made = tokenizer.tokenize({i: [{"caption": pair["caption"]}] for i, pair in enumerate(pairs)})
    bleu, _ = Bleu(4).compute_score(truth, made, verbose=0)
    rouge, rouges = Rouge().compute_score(truth, made)
    cider, ciders = Cider().compute_score(truth, made)
    data = {
        "pairs": [
            {**pair, "tokens": [made[i][0], *truth[i]], "rouge_l": float(rouges[i]), "cider": float(ciders[i])}
            for i, pair in enumerate(pairs)
        ],
        "bleu4": float(bleu[3]),
        "rouge_l": float(rouge),
        "cider": float(cider),
    }
    PAIRS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
