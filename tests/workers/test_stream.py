"""A model read block by block computes what transformers computes, and damaged checkpoints are refused."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, modeling_utils

from tests import fake_hub
from tests.tiny_models import EXPERTS, FAMILIES, build, tiny_model
from tests.workers.stage_runs import context, quantize_spec, quantized, tiny_context
from workers.artifact import payload_files
from workers.checkpoint import locate
from workers.errors import InputError, NumericalError, Unreachable, UnsupportedModel
from workers.rebuild import load_model
from workers.request import Location
from workers.specs import ModelSpec
from workers.stream import BlockModel, open_blocks

TOKENS = torch.arange(2, 38).view(3, 12)
MODEL = ModelSpec("model")


def reference_logits(folder: Path, dtype: torch.dtype = torch.float32, experts: str | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts).eval()
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_whole_model(family: str, tmp_path: Path) -> None:
    opened = open_blocks(tiny_context(family, tmp_path), MODEL)
    prepared = opened.prepare([TOKENS])
    hidden = prepared.hidden[0]
    with torch.no_grad():
        for b in range(opened.structure.count):
            hidden = prepared.calls[0][b].run(opened.load(b), hidden)
            opened.release(b)
            assert all(p.is_meta for p in opened.blocks[b].parameters())
    assert torch.equal(opened.logits(TOKENS, hidden), reference_logits(tiny_model(family), experts=EXPERTS.get(family)))


def test_tensors_read_ahead_are_used(tmp_path: Path) -> None:
    """As `prefetch` leaves them for a GPU; other values than the file's show which were taken."""
    opened = open_blocks(tiny_context("llama", tmp_path), MODEL)
    names = opened._tensors_of(1)
    files = load_file(opened.checkpoint.folder / "model.safetensors")
    opened._ahead[1] = Future()
    opened._ahead[1].set_result({n: files[n] + 1 for n in names[:2]})
    state = opened.load(1).state_dict()
    for i, name in enumerate(names):
        own = state[name.removeprefix("model.layers.1.")]
        assert torch.equal(own, files[name] + 1 if i < 2 else files[name])
    opened.release(1)
    assert torch.equal(opened.load(1).state_dict()[names[0].removeprefix("model.layers.1.")], files[names[0]]), "once"


AHEAD = [("read", 0), ("asked", 1), ("done", 0), ("ahead", 1), ("done", 1)]


def test_a_block_is_read_while_the_one_before_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU, whose pinned memory is stood in for; the artifact is the same."""
    events: list[tuple[str, int]] = []
    prefetch, load, release = BlockModel.prefetch, BlockModel.load, BlockModel.release

    def prefetched(self: BlockModel, i: int) -> None:
        on_gpu = copy.copy(self)
        on_gpu.device = torch.device("cuda")
        prefetch(on_gpu, i)
        events.append(("asked", i))

    def loaded(self: BlockModel, i: int) -> torch.nn.Module:
        events.extend([] if i in self.loaded else [("ahead" if i in self._ahead else "read", i)])
        return load(self, i)

    ctx = tiny_context("llama", tmp_path)
    plain, _ = quantized(ctx, tmp_path / "plain", quantize_spec(), {})
    want = reference_logits(tiny_model("llama"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(BlockModel, "prefetch", prefetched)
    monkeypatch.setattr(BlockModel, "load", loaded)
    monkeypatch.setattr(BlockModel, "release", lambda self, i: events.append(("done", i)) or release(self, i))
    ahead, _ = quantized(ctx, tmp_path / "ahead", quantize_spec(), {})
    assert events == AHEAD
    assert payload_files(ahead)["tensors_0001.safetensors"] == payload_files(plain)["tensors_0001.safetensors"]
    events.clear()
    with torch.no_grad():
        assert torch.equal(load_model(tiny_context("llama", tmp_path, streamed=True), MODEL)(TOKENS, use_cache=False).logits, want)
    assert events == AHEAD


@pytest.mark.parametrize("family", FAMILIES)
def test_resident_and_streamed_models_equal_from_pretrained(family: str, tmp_path: Path) -> None:
    want = reference_logits(tiny_model(family), experts=EXPERTS.get(family))
    resident = load_model(tiny_context(family, tmp_path), MODEL)
    streamed = load_model(tiny_context(family, tmp_path, streamed=True), MODEL)
    with torch.no_grad():
        assert torch.equal(resident(TOKENS, use_cache=False).logits, want)
        assert torch.equal(streamed(TOKENS, use_cache=False).logits, want)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_dtype_of_the_spec_is_used(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_model(tiny_context("llama", tmp_path), ModelSpec("model", name))
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(model(TOKENS, use_cache=False).logits, reference_logits(tiny_model("llama"), dtype))


def test_sharded_checkpoints_with_per_expert_names_load(tmp_path: Path) -> None:
    """Mixtral as published: w1, w2, w3 per expert, over several shards."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    assert any(".experts.0.w1.weight" in n for s in shards for n in load_file(s))
    loaded = load_model(context(tmp_path / "m", tmp_path), MODEL)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)


def test_gpt2_checkpoints_without_the_prefix_load(tmp_path: Path) -> None:
    """As the first GPT-2 checkpoints were published: `h.0...` instead of `transformer.h.0...`."""
    folder = shutil.copytree(tiny_model("gpt2"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(context(folder, tmp_path), MODEL)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, use_cache=False).logits, reference_logits(tiny_model("gpt2")))


def test_a_tied_weight_may_be_stored_under_either_name(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(context(folder, tmp_path), MODEL)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, use_cache=False).logits, reference_logits(tiny_model("llama")))


def test_a_model_above_the_memory_given_is_streamed_and_says_so(tmp_path: Path) -> None:
    whole = load_model(tiny_context("llama", tmp_path), MODEL)
    size = 4 * sum(p.numel() for p in whole.parameters())
    ctx = tiny_context("llama", tmp_path, memory_bytes=size - 1)
    streamed = load_model(ctx, MODEL)
    assert any(f"{size} bytes of weights" in n for n in ctx.notes)
    assert all(p.is_meta for p in streamed.model.layers.parameters())
    with torch.no_grad():
        assert torch.equal(streamed(TOKENS, use_cache=False).logits, whole(TOKENS, use_cache=False).logits)


def test_a_model_that_does_not_fit_even_streamed_is_refused_with_the_numbers(tmp_path: Path) -> None:
    opened = open_blocks(tiny_context("llama", tmp_path), MODEL)
    needed = opened.outer_bytes() + opened.block_bytes(0)
    assert open_blocks(tiny_context("llama", tmp_path, memory_bytes=needed), MODEL)
    with pytest.raises(InputError, match=rf"{needed} bytes are needed.*{needed - 1} are given"):
        open_blocks(tiny_context("llama", tmp_path, memory_bytes=needed - 1), MODEL)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_memory_is_taken_beforehand_but_for_what_is_read(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU transformers takes as much at once as the parameters need that it expects: of a model that is read by blocks, of each
    block anew, more than there is."""
    taken: list[set[str]] = []
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda model, devices, quantizer: taken.append(set(devices)))
    opened = open_blocks(tiny_context(family, tmp_path), MODEL)
    for b in range(opened.structure.count):
        opened.load(b)
    blocks = [{f"{opened.structure.blocks}.{b}.{n}" for n, _ in opened.blocks[b].named_parameters()} for b in range(2)]
    assert taken[1:] == blocks
    assert taken[0] == set(opened.model.state_dict()) - set().union(*blocks) - set(opened.model.all_tied_weights_keys)


# --- damaged input --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "m")


def refused(folder: Path, says: str, error: type[Exception] = InputError) -> None:
    with pytest.raises(error, match=says):
        load_model(context(folder, folder.parent), MODEL)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")


def test_a_missing_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"config\.json .* is missing")


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_file_is_refused_with_both_sizes(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    refused(folder, rf"model\.safetensors is truncated: expected {len(whole)} bytes, got {len(whole) - cut}")


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_a_file_cut_inside_its_header_is_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, rf"is truncated: expected at least \d+ bytes, got {kept}")


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "m", rf"{shard.name} is missing")


def test_a_missing_tensor_is_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"lacks 1 tensors of its model, first model\.layers\.1\.mlp\.up_proj\.weight")


def test_a_checkpoint_of_other_shapes_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    refused(folder, r"does not fit its config\.json")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_under_their_own_name_are_refused(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"up_proj\.weight as (I8|F8_E4M3), expected F16, BF16, F32, F64: it is quantized already")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "none such"},
        {"hidden_act": 7},
        {"pad_token_id": 5000},
        {"rms_norm_eps": "1e-5"},
        {"num_attention_heads": 3},
    ],
)
def test_a_configuration_of_which_transformers_makes_no_model_is_told_with_its_file(folder: Path, change: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    refused(folder, r"config\.json: transformers makes no llama model of it \(\w+: .*\); correct it, or copy it again")


def test_tensors_without_a_place_in_the_model_are_noted(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    older = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **older}, folder / "model.safetensors", {"format": "pt"})
    whole, cut = context(folder, tmp_path), context(folder, tmp_path)
    load_model(whole, MODEL)
    assert whole.notes == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    load_model(cut, MODEL)
    of_block = sum(name.startswith("model.layers.1.") for name in tensors)
    assert cut.notes == [
        f"{of_block} tensors of the checkpoint have no place in the model of its config.json, first model.layers.1.input_layernorm.weight"
    ]


def test_weights_that_are_not_finite_are_refused_with_name_and_count(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, :2] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][4, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"model\.layers\.1\.mlp\.up_proj\.weight hold 3 NaN or infinite values", NumericalError)


def test_damaged_pickled_weights_are_refused_with_the_way_to_convert(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    refused(folder, r"pytorch_model\.bin is refused by torch's restricted loader.*save_pretrained")


def test_an_unknown_kind_of_location_is_refused(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    ctx.models = {"model": Location("tape", "x")}
    with pytest.raises(InputError, match="allowed: folder, hub_model"):
        load_model(ctx, MODEL)


def test_a_hub_model_that_is_not_cached_offline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ctx = tiny_context("llama", tmp_path)
    ctx.models = {"model": Location("hub_model", "bitgrid-tests/absent", "0" * 40)}
    with pytest.raises(InputError, match="not in the local hub cache"):
        load_model(ctx, MODEL)


def test_a_hub_that_does_not_answer_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:\d+ does not answer \(ConnectError\)"):
            locate(Location("hub_model", "bitgrid-tests/absent", "main"))


def test_a_model_that_the_hub_does_not_have_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with fake_hub.serve({"org/other": tmp_path / "empty"}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        with pytest.raises(InputError, match="cannot be fetched"):
            locate(Location("hub_model", "bitgrid-tests/absent", "main"))


def test_a_family_outside_the_table_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    refused(folder, "state-space", UnsupportedModel)
