"""Export as an ordinary float16 transformers folder: dequantized weights, for tools that know no quantized format."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from workers.export.model import as_half, head_is_embedding, left_out, open_model
from workers.export.transformers_files import copy_tokenizer, unreadable_by_old, with_both_spellings
from workers.recipe import Recipe


def write(artifact: Path, model_folder: Path, out: Path) -> tuple[int, list[str]]:
    """Write the folder `out` (existing, empty); returns the number of quantized linears and notes.

    Raises InputError, ExportError (values beyond float16), CorruptArtifactError.
    """
    recipe = Recipe(artifact)
    opened = open_model(recipe, model_folder)
    for i in range(opened.structure.count):
        opened.load(i)
    model = opened.model
    _, notes = as_half(dict(model.named_parameters()))
    # transformers writes the names of published files (experts apart, a GPT-NeoX's head as embed_out, tied heads once): by what it noted
    # of the last block read, unless that is taken away.
    model._weight_conversions = None
    model.to(torch.float16).save_pretrained(out)
    # The model's own is copied below; without one readers take what config.json says, all of which transformers has not written here.
    (out / "generation_config.json").unlink(missing_ok=True)
    config = with_both_spellings(opened.checkpoint.config, "float16", tied=head_is_embedding(model))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    reason = unreadable_by_old(config)
    if reason is not None:
        notes.append(f"the model has {reason}: read it with transformers 5")
    return len(recipe.replaced()), [*left_out(recipe), *notes, *copy_tokenizer(model_folder, out)]
