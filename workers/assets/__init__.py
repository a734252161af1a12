"""Shipped content: a small model of our own and text it generated. Standard library only.

`wikitext_llama/` is the model (fp16 safetensors, tokenizer); `self_text/` its own generations, made once by
`python -m workers.assets.generate_text` and never again: keys contain the digests of these files.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent
