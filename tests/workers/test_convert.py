"""Pickled weights give the same model as safetensors, are converted once, and never run code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.hub_cache import pickled_copy
from tests.tiny_models import tiny_model
from tests.workers.stage_runs import context, quantize_spec, quantized
from workers import convert
from workers.checkpoint import open_checkpoint
from workers.convert import convert_once
from workers.errors import InputError
from workers.rebuild import load_model
from workers.request import Location
from workers.specs import ModelSpec

TOKENS = torch.arange(2, 26).view(2, 12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITGRID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def logits(model: Path, scratch: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = load_model(context(model, scratch), ModelSpec("model"))(TOKENS).logits
    return out


@pytest.mark.parametrize(
    ("family", "shards", "tied", "strip"),
    [
        ("llama", 1, ("lm_head.weight", "model.embed_tokens.weight"), ""),
        ("opt", 1, ("lm_head.weight", "model.decoder.embed_tokens.weight"), ""),
        ("opt", 1, None, "model."),  # names as in files saved from the base model
        ("opt", 2, None, ""),
        ("gpt2", 1, None, ""),
        ("mixtral", 1, None, ""),
    ],
)
def test_pickled_weights_make_the_same_model(family: str, shards: int, tied: tuple[str, str] | None, strip: str, tmp_path: Path) -> None:
    folder = pickled_copy(tiny_model(family), tmp_path / "pickled", shards, tied, strip)
    assert torch.equal(logits(folder, tmp_path), logits(tiny_model(family), tmp_path))
    plain, converted = (open_checkpoint(Location("folder", str(f))) for f in (tiny_model(family), folder))
    assert converted.bytes == plain.bytes


def test_bytes_of_a_tensor_with_two_names_are_counted_once_where_both_are_replaced(tmp_path: Path) -> None:
    """A rotation writes the embedding and, untied, the head."""
    folder = pickled_copy(tiny_model("llama"), tmp_path / "pickled", 1, ("lm_head.weight", "model.embed_tokens.weight"), "")
    plain, pickled = (
        quantized(context(f, tmp_path), tmp_path / str(i), quantize_spec("rtn", "quarot"), {})[1]
        for i, f in enumerate((tiny_model("llama"), folder))
    )
    assert pickled["model_bytes"] == plain["model_bytes"]


def test_conversion_happens_once_and_is_noted(tmp_path: Path, cache: Path) -> None:
    folder = pickled_copy(tiny_model("llama"), tmp_path / "pickled")
    contexts = [context(folder, tmp_path) for _ in range(2)]
    load_model(contexts[0], ModelSpec("model"))
    written = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    load_model(contexts[1], ModelSpec("model"))
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == written
    assert "converted once" in contexts[0].notes[0]
    assert "weights_only" in contexts[0].notes[0]
    assert "converted before" in contexts[1].notes[0]


def test_a_conversion_that_is_not_whole_is_made_again(tmp_path: Path, cache: Path) -> None:
    folder = pickled_copy(tiny_model("llama"), tmp_path / "pickled")
    want = logits(folder, tmp_path)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(logits(folder, tmp_path), want)


def test_what_another_worker_converted_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first writer wins: its files may be in use."""
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    write, first = convert._write, []

    def slower(pickled: list[Path], folder: Path) -> None:
        write(pickled, folder)
        if not first:
            first.append(None)  # the other worker's own conversion comes here, too
            first[0] = convert_once(pickled).files[0].stat().st_ino

    monkeypatch.setattr(convert, "_write", slower)
    (file,) = convert_once([tmp_path / "pytorch_model.bin"]).files
    assert [file.stat().st_ino] == first
    assert [p.name for p in file.parents[1].iterdir()] == [file.parent.name]


def test_parts_of_one_memory_become_tensors_of_their_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"whole": whole, "row": whole[1], "turned": whole.T, "again": whole.view(3, 4)}, tmp_path / "pytorch_model.bin")
    from safetensors.torch import load_file

    found = convert_once([tmp_path / "pytorch_model.bin"])
    tensors = {n: t for f in found.files for n, t in load_file(f).items()}
    assert torch.equal(tensors["row"], whole[1])
    assert torch.equal(tensors["turned"], whole.T)
    assert found.aliases == {"again": "whole"}


def test_legacy_files_without_a_zip_archive_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert convert_once([tmp_path / "pytorch_model.bin"]).files


class Runs:
    """Unpickling it would make a file."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (Path("ran"),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "evil": Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"refused by torch's restricted loader.*save_pretrained"):
        convert_once([tmp_path / "pytorch_model.bin"])
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "cache" / "converted").iterdir())


@pytest.mark.parametrize("content", [{"w": 1}, [torch.ones(2)], {"state_dict": {"w": torch.ones(1)}}])
def test_what_is_not_tensors_by_name_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="expected tensors by name"):
        convert_once([tmp_path / "pytorch_model.bin"])


@pytest.mark.parametrize("keep", [0, 100, 4000])
def test_a_truncated_file_is_told(keep: int, tmp_path: Path) -> None:
    folder = pickled_copy(tiny_model("llama"), tmp_path / "pickled")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"pytorch_model.bin .*(fetch it again|damaged)"):
        open_checkpoint(Location("folder", str(folder)))


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITGRID_CACHE", str(tmp_path / "file"))
    folder = pickled_copy(tiny_model("llama"), tmp_path / "pickled")
    with pytest.raises(InputError, match="set BITGRID_CACHE"):
        open_checkpoint(Location("folder", str(folder)))


def test_safetensors_are_preferred_and_nothing_is_converted(tmp_path: Path, cache: Path) -> None:
    folder = pickled_copy(tiny_model("llama"), tmp_path / "both")
    shutil.copy(tiny_model("llama") / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert not open_checkpoint(Location("folder", str(folder))).notes
    assert not cache.exists()
