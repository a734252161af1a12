"""Texts: how files become documents and calibration samples, and what is said when they cannot."""

from __future__ import annotations

import json
import random
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.shared import shared_path
from tests.tiny_models import tiny_model
from workers.assets import ASSETS
from workers.datasets import (
    byte_tokens,
    calibration_tokens,
    document_starts,
    load_documents,
    load_tokenizer,
    tokenize,
    tokenize_documents,
)
from workers.errors import InputError, Unreachable
from workers.request import Location
from workers.specs import CalibrationSpec, TextSpec

CONF = Path(__file__).resolve().parents[2] / "conf"


def text(name: str = "t", **fields: Any) -> TextSpec:
    return TextSpec(name, **fields)


def written(folder: Path, content: str, name: str = "text.txt") -> Location:
    (folder / name).write_text(content, encoding="utf-8")
    return Location("file", str(folder / name))


def characters(content: str, verbose: bool = True) -> dict[str, list[int]]:
    """A tokenizer whose tokens are code points."""
    return {"input_ids": [ord(c) for c in content]}


PLAIN = "one\ntwo\n\nthree\n \nfour<|endoftext|>\nfive\n"


@pytest.mark.parametrize(
    ("split", "documents"),
    [
        ("rows", ["one", "two", "three", "four<|endoftext|>", "five"]),
        ("paragraphs", ["one\ntwo", "three", "four<|endoftext|>\nfive"]),
        ("endoftext", ["one\ntwo\n\nthree\n \nfour", "five"]),
        ("whole", [PLAIN]),
    ],
)
def test_plain_text_is_cut_as_its_spec_says(tmp_path: Path, split: str, documents: list[str]) -> None:
    assert load_documents(written(tmp_path, PLAIN), text(split=split)) == documents


def test_json_rows_keep_empty_documents_and_odd_line_breaks(tmp_path: Path) -> None:
    rows = ["a\n", "", "b\u2028c", "ü"]
    location = written(tmp_path, "".join(json.dumps({"text": r}, ensure_ascii=False) + "\n" for r in rows), "rows.jsonl")
    assert load_documents(location, text(field="text")) == rows


def test_documents_are_skipped_then_counted(tmp_path: Path) -> None:
    location = written(tmp_path, "a\nb\nc\nd\n")
    assert load_documents(location, text(skip_documents=1, documents=2)) == ["b", "c"]
    with pytest.raises(InputError, match="no text is left of 4 documents after skip_documents=4"):
        load_documents(location, text(skip_documents=4))


@pytest.mark.parametrize(
    ("name", "content", "fields", "said"),
    [
        ("a.txt", "", {}, "is empty"),
        ("a.txt", " \n\n", {}, "is empty"),
        ("a.txt", "x", {"split": "words"}, "allowed: endoftext, paragraphs, rows, whole"),
        ("a.jsonl", '{"text": "x"}\n{"tex', {"field": "text"}, "line 2, is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', {"field": "text"}, "no text under 'text'; it has body"),
        ("a.jsonl", '{"body": "x"}\n', {}, "need text.field"),
        ("a.jsonl", "[1]\n", {"field": "text"}, "row 1 is a JSON list; expected one object a line"),
        ("a.json", '[\n{"text": "x"}\n]\n', {"field": "text"}, "one JSON value over several lines; expected one object a line"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', {"field": "text"}, "row 2 has NoneType under 'text', expected text"),
        ("a.jsonl", '{"text": ""}\n', {"field": "text"}, "no text is left"),
        ("a.jsonl", '{"text": "x"}\n{"text": "a\\ud83d"}\n', {"field": "text"}, r"row 2 has half a surrogate pair \('\\ud83d' at"),
        ("a.txt", '{"text": "x"}\n', {"field": "text"}, "holds rows of JSON with 'text'; name it .jsonl"),
    ],
)
def test_unusable_texts_say_what_is_wrong(tmp_path: Path, name: str, content: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_documents(written(tmp_path, content, name), text(**fields))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    assert load_documents(written(tmp_path, '\ufeff{"text": "x"}\n', "a.jsonl"), text(field="text")) == ["x"]
    assert load_documents(written(tmp_path, "\ufeff = T = \n\nx\n"), text()) == [" = T = ", "x"]


@pytest.mark.parametrize("fields", [{}, {"field": "body"}])
def test_json_is_plain_text_where_no_row_of_it_is_asked_for(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert load_documents(written(tmp_path, '{"text": "x"}\n'), text(**fields)) == ['{"text": "x"}']


def test_missing_file_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        load_documents(Location("file", str(tmp_path / "none.txt")), text())
    (tmp_path / "latin.txt").write_bytes("año".encode("latin-1"))
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 1\)"):
        load_documents(Location("file", str(tmp_path / "latin.txt")), text())


def test_windows_are_drawn_as_in_the_gptq_repository(tmp_path: Path) -> None:
    content = "".join(chr(65 + i % 50) for i in range(97))
    location = written(tmp_path, content)
    spec = CalibrationSpec(text(split="whole"), samples=9, sequence_length=8, seed=5)
    random.seed(5)
    starts = [random.randint(0, 97 - 8 - 1) for _ in range(9)]
    samples = calibration_tokens(location, spec, characters)
    assert samples.dtype == torch.int64
    assert samples.tolist() == [[ord(c) for c in content[i : i + 8]] for i in starts]


def test_random_documents_are_drawn_until_one_is_long_enough(tmp_path: Path) -> None:
    documents = ["short", "a rather long document", "tiny", "another long document here", "just8chr"]
    location = written(tmp_path, "\n".join(documents))
    spec = CalibrationSpec(text(), samples=6, sequence_length=8, seed=3, sampling="documents")
    random.seed(3)
    expected = []
    for _ in range(6):
        while True:
            chosen = documents[random.randint(0, len(documents) - 1)]
            if len(chosen) > 8:
                break
        i = random.randint(0, len(chosen) - 8 - 1)
        expected.append([ord(c) for c in chosen[i : i + 8]])
    assert calibration_tokens(location, spec, characters).tolist() == expected


def test_sequential_windows_start_at_the_beginning(tmp_path: Path) -> None:
    spec = CalibrationSpec(text(join="+"), samples=2, sequence_length=4, sampling="sequential")
    samples = calibration_tokens(written(tmp_path, "abc\ndefgh\n"), spec, characters)
    assert ["".join(map(chr, s)) for s in samples.tolist()] == ["abc+", "defg"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sequence_length": 30}, "has 30 tokens; windows of calibration.sequence_length=30 need more"),
        ({"sequence_length": 16, "samples": 2, "sampling": "sequential"}, "has 30 tokens; 2 consecutive windows of 16 need 32"),
        ({"sequence_length": 15, "sampling": "documents"}, "the longest seen has 14"),
        ({"sampling": "random"}, "allowed: documents, sequential, windows"),
        ({"samples": 0}, "at least 1 sample"),
    ],
)
def test_too_short_calibration_texts_give_the_numbers(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    location = written(tmp_path, "x" * 14 + "\n" + "y" * 14 + "\n")
    with pytest.raises(InputError, match=said):
        calibration_tokens(location, CalibrationSpec(text(join="--"), **{"samples": 4, "sequence_length": 8, **fields}), characters)


def test_seeds_draw_different_samples() -> None:
    location = Location("file", str(ASSETS / "self_text" / "calibration.jsonl"))
    tokenizer = load_tokenizer(Location("folder", str(ASSETS / "wikitext_llama")))
    draws = [
        calibration_tokens(location, CalibrationSpec(text(field="text", documents=8), samples=4, sequence_length=32, seed=s), tokenizer)
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_tokenizer_that_adds_a_beginning_adds_it_once(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(tmp_path)
    tokens = tokenize(load_tokenizer(Location("folder", str(tmp_path))), "ab\n\ncd")
    assert tokens[0] == 0
    assert (tokens[1:] == 0).sum() <= 2  # the line breaks, which this tokenizer does not know


LINES = ["", " = One = \n", "", " ratio \n", " = 1 and k = \n", "", " = = Part = = \n", "", " = Two ( film ) = \n", "", " text \n"]


@pytest.mark.parametrize(
    ("documents", "starts"),
    [
        (LINES, [1, 8]),  # neither a section nor a line of a formula
        (["the end", *LINES], [0, 2, 9]),
        ([x for x in LINES if x and "1 and k" not in x], [0, 3]),  # plain text without its blank rows
        (["a", "", "= b =c", "= = d = ="], [0, 1, 2, 3]),
        (["= a ="], [0]),
    ],
)
def test_lines_are_put_together_to_articles_and_other_documents_stand_alone(documents: list[str], starts: list[int]) -> None:
    assert document_starts(documents) == starts


@pytest.mark.parametrize("name", ["test", "valid"])
def test_wikitext2_has_the_sixty_articles_that_its_paper_counts(name: str) -> None:
    # Merity et al. 2016, table 1: 60 articles each.
    documents = load_documents(Location("file", str(shared_path("data", "wikitext2", f"{name}.jsonl"))), text(field="text"))
    assert len(document_starts(documents)) == 60


@given(st.lists(st.text(st.sampled_from("ab é\n😀"), max_size=5), min_size=1, max_size=6).filter(any), st.sampled_from(["", "\n\n", "ü"]))
def test_every_byte_is_of_the_document_it_was_written_in(documents: list[str], join: str) -> None:
    found = tokenize_documents(byte_tokens, documents, join)
    written = [*(d + join for d in documents[:-1]), documents[-1]]
    assert bytes(found.tokens.tolist()) == "".join(written).encode()
    assert found.documents is not None
    assert found.documents.tolist() == [i for i, d in enumerate(written) for _ in d.encode()]


@pytest.mark.parametrize("trim", [False, True])
def test_every_token_is_of_the_document_its_last_character_lies_in(trim: bool) -> None:
    from tokenizers.processors import ByteLevel

    tokenizer: Any = load_tokenizer(Location("folder", str(ASSETS / "wikitext_llama")))
    tokenizer._tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    documents = ["One two.\n", "", " = indented,  and   spaces", "x", "The end of   it \n", "  \n", "Last"]
    for join in ("\n\n", " ", ""):
        found = tokenize_documents(tokenizer, documents, join)
        # Independent of offsets: in ASCII every token of a byte-level tokenizer reads back as so many characters.
        sizes = [len(tokenizer.decode([t])) for t in found.tokens.tolist()]
        assert sum(sizes) == len(join.join(documents))
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        starts = [sum(len(d) + len(join) for d in documents[:i]) for i in range(len(documents))]
        expected = [max(d for d, start in enumerate(starts) if start < end) for end in ends]
        assert found.documents is not None
        # Trimmed, a token that ends in blanks ends before them; here only blanks stand where documents meet.
        differing = [i for i, (a, b) in enumerate(zip(found.documents.tolist(), expected, strict=True)) if a != b]
        assert not differing or (trim and all(not join.join(documents)[ends[i] - 1].strip() for i in differing))


def test_added_tokens_count_to_the_document_they_stand_beside() -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    found = tokenize_documents(tokenizer, ["ab", "cd"], ".")
    assert found.documents is not None
    assert found.documents.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_tokenizer_without_offsets_tells_no_documents() -> None:
    found = tokenize_documents(characters, ["ab", "cd"], ".")
    assert found.documents is None
    assert found.tokens.tolist() == [ord(c) for c in "ab.cd"]


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("tokenizer.json", '{"version": "1.0", "added'), ("tokenizer_config.json", '{"a')]
)
def test_a_damaged_tokenizer_is_told_with_its_files(name: str, content: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "wikitext_llama", tmp_path / "m")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=rf"the tokenizer of {folder} \(tokenizer.json.*\) cannot be read: .*; copy these files again"):
        load_tokenizer(Location("folder", str(folder)))


def test_a_configuration_that_the_tokenizer_reads_is_told_as_such(tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "wikitext_llama", tmp_path / "m")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": "1e-5"}))
    with pytest.raises(
        InputError, match=rf"{config}: transformers makes no configuration of it .*'rms_norm_eps'.*; correct it, or copy it again"
    ):
        load_tokenizer(Location("folder", str(folder)))


def test_a_tokenizer_that_needs_sentencepiece_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(ASSETS / "wikitext_llama", tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x00" * 8)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"tokenizer\.model needs the package sentencepiece; `pip install sentencepiece`, or copy"):
        load_tokenizer(Location("folder", str(folder)))


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(Location("folder", str(tmp_path)))


def test_hub_data_set_out_of_reach_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    location = Location("hub_dataset", "nobody/nothing", "0" * 40, {"config": None, "split": "train", "data_files": None})
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load_documents(location, text(field="text"))


@pytest.mark.parametrize(("status", "error"), [(429, Unreachable), (503, Unreachable), (404, InputError)])
def test_a_hub_in_trouble_is_asked_again_for_a_data_set(status: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def load(*_: object, **__: object) -> None:
        """As the library, which tells of its own search for a local folder."""
        try:
            answer = types.SimpleNamespace(status_code=status, headers={}, request=None)
            raise LocalEntryNotFoundError("not here") from HfHubHTTPError("not now", response=answer)  # type: ignore[arg-type]
        except LocalEntryNotFoundError:
            raise FileNotFoundError("Couldn't find any data file") from None

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(error, match=rf"answers with {status}; run again" if error is Unreachable else "Couldn't find any data file"):
        load_documents(Location("hub_dataset", "org/tiny", "0" * 40), text(field="text"))


def cached_data_set(cache: Path, commit: str) -> None:
    """org/tiny at `commit` as the datasets library leaves it in its cache."""
    import datasets

    made = datasets.load_dataset("json", data_files=written(cache, '{"text": "a"}\n', "rows.jsonl").path, split="train")
    source = Path(made.cache_files[0]["filename"]).parent
    folder = cache / "org___tiny" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    (folder / "tiny-train.arrow").write_bytes((source / "json-train.arrow").read_bytes())
    info = (source / "dataset_info.json").read_text().replace('"dataset_name": "json"', '"dataset_name": "tiny"')
    (folder / "dataset_info.json").write_text(json.dumps({**json.loads(info), "config_name": "default"}))


def test_a_cached_data_set_of_another_commit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    here, other = "a" * 40, "b" * 40
    cached_data_set(tmp_path, here)
    options = {"config": None, "split": "train", "data_files": None}
    assert load_documents(Location("hub_dataset", "org/tiny", here, options), text(field="text")) == ["a"]
    with pytest.raises(InputError, match=f"commit {other} is asked for, the local cache holds {here}"):
        load_documents(Location("hub_dataset", "org/tiny", other, options), text(field="text"))


def test_rows_of_a_hub_data_set_without_text_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = written(tmp_path, '{"text": "a"}\n{"text": null}\n', "rows.jsonl").path
    location = Location("hub_dataset", "json", None, {"config": None, "split": "train", "data_files": file})
    with pytest.raises(InputError, match="row 2, has NoneType under 'text', expected text"):
        load_documents(location, text(field="text"))
    assert load_documents(location, text(field="text", documents=1)) == ["a"]


@pytest.mark.parametrize("name", ["c4", "tinystories"])
def test_calibration_and_task_of_one_file_share_no_document(name: str) -> None:
    parts = []
    for group in ("calibration", "task"):
        values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["text"]
        location = Location("file", str(shared_path("data", *values["file"].split("/"))))
        fields = {k: values[k] for k in ("field", "split", "join", "documents", "skip_documents")}
        parts.append(set(load_documents(location, text(**fields))))
    assert min(map(len, parts)) > 100
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("name", ["self_text", "wikitext2", "c4", "tinystories"])
def test_calibration_defaults_suit_the_shipped_model(name: str) -> None:
    values = yaml.safe_load((CONF / "calibration" / f"{name}.yaml").read_text())
    source = values["text"]
    path = ASSETS / source["asset"] if source["asset"] else shared_path("data", *source["file"].split("/"))
    # Of a long text the beginning is enough to see that windows fit, and tokenizes faster.
    fields = {**{k: source[k] for k in ("field", "split", "join", "skip_documents")}, "documents": 300}
    spec = CalibrationSpec(text(**fields), **{k: v for k, v in values.items() if k in ("samples", "sequence_length", "seed", "sampling")})
    samples = calibration_tokens(Location("file", str(path)), spec, load_tokenizer(Location("folder", str(ASSETS / "wikitext_llama"))))
    assert samples.shape == (values["samples"], values["sequence_length"])
    assert values["sequence_length"] <= 512
