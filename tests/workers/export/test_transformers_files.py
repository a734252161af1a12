"""Configuration and tokenizer files that old and new transformers read alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, GemmaConfig

from workers.export.transformers_files import copy_tokenizer, unreadable_by_old, with_both_spellings

SHIPPED = Path(__file__).resolve().parents[3] / "workers" / "assets" / "wikitext_llama"


def test_new_rope_keys_get_their_old_spelling() -> None:
    new = {"model_type": "llama", "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    both = with_both_spellings(new, "float16")
    assert (both["rope_theta"], both["rope_scaling"], both["torch_dtype"], both["dtype"]) == (500000.0, None, "float16", "float16")
    assert both["rope_parameters"] == new["rope_parameters"]


def test_old_rope_keys_get_their_new_spelling() -> None:
    old = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    both = with_both_spellings(old, "float16")
    assert both["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}
    assert both["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_gpt_neox_has_names_of_its_own() -> None:
    new = {
        "model_type": "gpt_neox",
        "rope_parameters": {"rope_theta": 20000.0, "partial_rotary_factor": 0.5, "rope_type": "linear", "factor": 4},
    }
    both = with_both_spellings(new, "float16")
    assert (both["rotary_emb_base"], both["rotary_pct"]) == (20000.0, 0.5)
    assert both["rope_scaling"] == {"type": "linear", "factor": 4.0}


SCALINGS: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 64},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "mixtral", "gpt_neox", "falcon"])
def test_new_transformers_turns_positions_by_the_same_angles(family: str, scaling: str, old: bool) -> None:
    """It reads rope_scaling before rope_parameters: one that lacked a parameter would be another model, or none."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    if family == "mixtral":
        sizes["head_dim"] = 16  # transformers checks longrope's factors by it
    theta, rope = {"rope_theta": 5000.0}, {"rope_type": scaling, **SCALINGS[scaling]}
    partial: dict[str, object] = {"partial_rotary_factor": 1.0} if family == "gpt_neox" else {}
    of_family = {"rotary_emb_base": 5000.0, "rotary_pct": 1.0} if family == "gpt_neox" else theta
    spelled = {**of_family, "rope_scaling": rope} if old else {"rope_parameters": {**theta, **partial, **rope}}
    config = {"model_type": family, **sizes, **spelled}

    def read(given: dict) -> dict:
        values = {k: v for k, v in json.loads(json.dumps(given)).items() if k != "model_type"}
        found = AutoConfig.for_model(family, **values).rope_parameters
        return {k: v for k, v in found.items() if k != "type"}

    assert read(with_both_spellings(config, "float16")) == read(config)


def test_a_gpt_neox_is_turned_by_its_own_names_alone() -> None:
    """transformers ignores the other families' names there."""
    given = {"model_type": "gpt_neox", "rope_theta": 5.0, "rotary_emb_base": 20000, "partial_rotary_factor": 1.0}
    both = with_both_spellings(given, "float16")
    assert (both["rope_parameters"]["rope_theta"], "partial_rotary_factor" in both["rope_parameters"]) == (20000.0, False)


@pytest.mark.parametrize("given", [{"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "relu"}, {}])
def test_a_gemma_keeps_the_activation_that_new_transformers_gives_it(given: dict) -> None:
    """4.44 reads `hidden_activation` as it stands; the "gelu" of the first published files means the tanh form."""
    config = {"model_type": "gemma", "hidden_activation": "silu", **given}
    assert with_both_spellings(config, "float16")["hidden_activation"] == GemmaConfig(**given).hidden_act


def test_a_config_without_rope_keeps_none() -> None:
    assert "rope_parameters" not in with_both_spellings({"model_type": "gpt2"}, "float16")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"model_type": "llama", "head_dim": 128, "hidden_size": 1024, "num_attention_heads": 16}, "head_dim 128"),
        ({"model_type": "llama", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding-window"),
        ({"model_type": "mixtral", "sliding_window": 4096, "max_position_embeddings": 32768}, "window of 4096 tokens"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "4.44 ignores"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "4.44 ignores"),
    ],
)
def test_what_old_transformers_would_misread_is_named(config: dict, reason: str) -> None:
    assert reason in str(unreadable_by_old(config))


@pytest.mark.parametrize(
    "config",
    [
        json.loads((SHIPPED / "config.json").read_text()),
        {"model_type": "mixtral", "sliding_window": 4096, "max_position_embeddings": 4096},
        {"model_type": "mixtral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
        {"model_type": "gpt2"},
    ],
)
def test_a_model_both_read_alike_has_no_reason(config: dict) -> None:
    assert unreadable_by_old(config) is None


def test_the_adapted_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    assert copy_tokenizer(SHIPPED, tmp_path) == []
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(m, str) for m in merges)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "Naïve café — the 2nd   band released\n\ttheir album ."
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == AutoTokenizer.from_pretrained(SHIPPED)(text)["input_ids"]


def test_merges_that_old_files_cannot_hold_are_kept_and_noted(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    merges = [["a ", "b"]]
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": merges}}))
    assert "tokens with spaces" in copy_tokenizer(source, out)[0]
    assert json.loads((out / "tokenizer.json").read_text())["model"]["merges"] == merges


@pytest.mark.parametrize("more", [False, True], ids=["one", "several"])
def test_chat_templates_are_where_old_and_new_transformers_look(more: bool, tmp_path: Path) -> None:
    """4.44 knows no template in a file of its own."""
    source, out = Path(shutil.copytree(SHIPPED, tmp_path / "source")), tmp_path / "out"
    out.mkdir()
    (source / "chat_template.jinja").write_text("plain {{ messages }}")
    if more:
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ messages }}")
    assert copy_tokenizer(source, out) == []
    wanted = AutoTokenizer.from_pretrained(source).chat_template
    assert AutoTokenizer.from_pretrained(out).chat_template == wanted
    old = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert (old if isinstance(old, str) else {t["name"]: t["template"] for t in old}) == wanted
