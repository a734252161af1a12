"""Writes `self_text/{calibration,evaluation}.jsonl`: text sampled from the shipped model, without any data set.

The technique is the data-free generation of LLM-QAT (Liu et al., 2023, section 2.1): a random first token, the next few
tokens greedily, the rest drawn from the model's own distribution (temperature 1). Splits differ in seed and in first
tokens. The files are shipped as made once; sampling depends on the torch version, so a new run gives other text and,
with it, other keys. Run it as

    python -m workers.assets.generate_text FOLDER
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.assets import ASSETS

TOKENS = 512
"""Per document: the context the model was trained with."""
GREEDY = 4
"""Tokens after the first that are taken greedily ("3 to 5" in the paper)."""
BATCH = 32


@dataclass(frozen=True)
class Split:
    name: str
    documents: int
    seed: int
    first_tokens: slice
    """Of one fixed permutation of the vocabulary, so that no two splits share a first token."""


SPLITS = (Split("calibration", 128, 20_001, slice(0, 2000)), Split("evaluation", 128, 20_002, slice(2000, 4000)))


@torch.inference_mode()
def generate(model: nn.Module, first: Tensor, banned: Tensor, generator: torch.Generator, length: int = TOKENS) -> Tensor:
    """first `[B]` ▸ tokens `[B, length]`; tokens in `banned` are never drawn."""
    tokens, cache = [first], None
    for step in range(length - 1):
        out = model(tokens[-1][:, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[:, -1].float()  # [B, V]
        logits[:, banned] = -torch.inf
        drawn = logits.argmax(-1) if step < GREEDY else torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        tokens.append(drawn)
    return torch.stack(tokens, dim=1)


def documents(split: Split) -> list[str]:
    """The texts of a split; deterministic for one version of torch on one kind of processor."""
    folder = ASSETS / "wikitext_llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    special = torch.tensor(tokenizer.all_special_ids)
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(20_000))
    firsts = order[~torch.isin(order, special)][split.first_tokens]
    generator = torch.Generator().manual_seed(split.seed)
    texts: list[str] = []
    drawn = 0
    for batch in torch.split(firsts, BATCH):
        if len(texts) >= split.documents:
            break
        for tokens in generate(model, batch, special, generator):
            text = tokenizer.decode(tokens)
            drawn += 1
            # A document may tokenize a little differently than it was drawn (merges), but not lose bytes.
            if "\ufffd" not in text and len(tokenizer(text)["input_ids"]) >= 0.97 * TOKENS:
                texts.append(text)
        print(f"{split.name}: {len(texts)} of {split.documents} ({drawn} drawn)", flush=True)
    if len(texts) < split.documents:
        raise RuntimeError(f"only {len(texts)} of {split.documents} documents of {split.name} survive tokenizing back; raise first_tokens")
    return texts[: split.documents]


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate calibration and evaluation text with the shipped model.")
    parser.add_argument("folder", type=Path, help="where calibration.jsonl and evaluation.jsonl are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in documents(split)]
        (folder / f"{split.name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
