"""Methods of other toolkits in a sweep: what planning refuses, and the whole way through an environment of their own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from orchestrator import cli
from orchestrator.errors import ConfigError, PlanError
from orchestrator.grid import compose_grid
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.sources import Sources
from orchestrator.store import Store
from orchestrator.toolkits import INSTALLED, folders_of, install, require_toolkits, toolkits_dir
from quant.tensors.affine import AffineTensor
from tests.fake_toolkit import HQQ_RELEASE, QUANTIZER, fake_hqq
from tests.orchestrator.sweeping import committed, sweep
from tests.tiny_models import tiny_model
from workers.recipe import Recipe
from workers.specs import QuantizeSpec, StageKind
from workers.toolkits.environments import TOOLKITS, installed_release

PlanOf = Callable[..., Plan]
FEW = (
    "task.params.limit=1",
    "task.params.window=32",
    "scheme=w4a16_g64",
    "scheme.weight.group_size=16",
    "scheme.weight.scale_dtype=float32",
)


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    def make(*overrides: str) -> Plan:
        grid = compose_grid(["task=self_perplexity", f"toolkits_dir={tmp_path / 'toolkits'}", *overrides], multirun=True)
        return build_plan(grid, Sources(None, None, tmp_path / "digests.json"))

    return make


def quantize_stages(plan: Plan) -> list[str]:
    return [k for k, s in plan.stages.items() if s.kind is StageKind.QUANTIZE]


def test_a_missing_environment_is_told_with_the_command_that_makes_it(plan_of: PlanOf) -> None:
    plan = plan_of("method=rtn,hqq_package,auto_round")
    with pytest.raises(PlanError) as told:
        require_toolkits(plan, plan.stages)
    for toolkit in ("hqq", "auto_round"):
        assert f"bitgrid toolkit install {toolkit}" in str(told.value)
    assert "llm_compressor" not in str(told.value)


def test_stages_that_need_not_run_need_no_environment(plan_of: PlanOf) -> None:
    plan = plan_of("method=rtn,hqq_package")
    require_toolkits(plan, [k for k in plan.stages if k not in plan.toolkits])


def test_the_release_must_be_the_one_the_method_names(plan_of: PlanOf, tmp_path: Path) -> None:
    fake_hqq(tmp_path / "toolkits")
    plan = plan_of("method=hqq_package")
    require_toolkits(plan, plan.stages)
    other = plan_of("method=hqq_package", "method.rounding.params.release=0.3.0")
    with pytest.raises(PlanError, match=rf"holds hqq {HQQ_RELEASE}, and the method asks for 0\.3\.0"):
        require_toolkits(other, other.stages)
    assert quantize_stages(plan) != quantize_stages(other)


def test_requests_name_only_the_environments_their_stages_run_in(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of("method=rtn,hqq_package")
    (ours,) = plan.toolkits
    (plain,) = [k for k in quantize_stages(plan) if k != ours]
    assert folders_of(plan, [ours]) == {"hqq": str(tmp_path / "toolkits" / "hqq")}
    assert folders_of(plan, [plain]) == {}


def test_toolkits_that_feed_text_get_the_calibration_and_hqq_does_not(plan_of: PlanOf) -> None:
    plan = plan_of("method=hqq_package,llm_compressor,llm_compressor_sequential,auto_round", "replicate=r0,r1")
    fed: dict[str, list[Any]] = {}
    for key in quantize_stages(plan):
        spec = plan.stages[key].spec
        assert isinstance(spec, QuantizeSpec)
        method = spec.rules[0].method
        fed.setdefault(method.rounding.name, []).append((method.propagation, spec.calibration is not None, spec.seed is not None))
    assert fed == {
        "hqq_package": [("original", False, False)],
        "llm_compressor": [("original", True, False), ("original", True, False), ("quantized", True, False), ("quantized", True, False)],
        "auto_round": [("original", True, True)] * 2,
    }
    # They collect their statistics themselves.
    assert not any(s.kind is StageKind.CALIBRATE for s in plan.stages.values())


def test_transforms_before_a_toolkit_are_refused(plan_of: PlanOf) -> None:
    with pytest.raises(PlanError, match="quantizes the checkpoint as it is"):
        plan_of("method=hqq_package", "+method.transforms.clip={kind:clip,version:1,needs:[],reads:[],uses_seed:false,params:{}}")


def test_a_sweep_stores_what_the_toolkit_made(tmp_path: Path) -> None:
    fake_hqq(tmp_path / "toolkits")
    given = ("method=hqq_package", f"model.path={tiny_model('llama')}", *FEW)
    run = sweep(tmp_path / "store", f"toolkits_dir={tmp_path / 'toolkits'}", *given)
    assert run.exit_code == 0
    store = Store(tmp_path / "store")
    ((key, _),) = run.plan.toolkits.items()
    record = store.record(StageKind.QUANTIZE, key)
    told = record["summary"]["toolkit"]
    assert (told["toolkit"], told["package"], told["release"]) == ("hqq", "hqq", HQQ_RELEASE)
    assert told["environment"]["packages"]["hqq"] == HQQ_RELEASE
    assert record["summary"]["working_set"]["declared"] == "model"
    assert record["summary"]["coverage"]["quantized"] == 2 * 7
    assert set(record["files"]) == {"recipe.json", "layers.parquet", *(f"tensors_{b:04d}.safetensors" for b in range(2))}
    # Codes, scales and zeros are those of the package, which is called here as well.
    recipe = Recipe(store.folder(StageKind.QUANTIZE, key))
    weights = load_file(tiny_model("llama") / "model.safetensors")
    for op in recipe.replaced():
        stored = recipe.stored(op)
        assert isinstance(stored, AffineTensor)
        codes, meta = package().quantize(
            weights[f"{op['module']}.weight"], nbits=4, channel_wise=True, group_size=16, optimize=True, round_zero=True, axis=1,
            bitpack=False, compute_dtype=torch.float32, device="cpu",
        )  # fmt: skip
        assert torch.equal(stored.codes, codes.reshape(stored.shape).to(torch.uint8)), op["module"]
        assert torch.equal(stored.scale, meta["scale"].reshape(stored.scale.shape))
        assert torch.equal(stored.zero, meta["zero"].reshape(stored.zero.shape))
    # What is there is not made again, and then the environment may be gone.
    before = committed(tmp_path / "store")
    again = sweep(tmp_path / "store", f"toolkits_dir={tmp_path / 'gone'}", *given)
    assert again.exit_code == 0
    assert committed(tmp_path / "store") == before


def package() -> Any:
    """The stand-in's Quantizer in this process."""
    names: dict[str, Any] = {}
    exec(QUANTIZER, names)
    return names["Quantizer"]


def test_an_environment_that_has_its_lock_is_left_alone(tmp_path: Path) -> None:
    folder = fake_hqq(tmp_path)
    (folder / INSTALLED).write_text(TOOLKITS["hqq"].lock.read_text())
    python = (folder / "bin" / "python").read_text()
    assert install("hqq", tmp_path, "no-such-python", Console(quiet=True)) == folder
    assert (folder / "bin" / "python").read_text() == python


def test_installing_says_what_it_cannot_do(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    quiet = Console(quiet=True)
    with pytest.raises(ConfigError, match=r"unknown toolkit 'llmcompressor'; nearest: llm_compressor"):
        install("llmcompressor", tmp_path, sys.executable, quiet)
    with pytest.raises(ConfigError, match=r"is Python 3\.9; .* --python"):
        install("hqq", tmp_path, str(old), quiet)
    with pytest.raises(ConfigError, match="cannot be run"):
        install("hqq", tmp_path, str(tmp_path / "none"), quiet)
    assert not (tmp_path / "hqq").exists()


def test_installing_removes_nothing_but_an_environment(tmp_path: Path) -> None:
    sources = tmp_path / "hqq" / "setup.py"
    sources.parent.mkdir()
    sources.write_text("mine")
    with pytest.raises(ConfigError, match=r"hqq is there and is no virtual environment; give --dir another folder, or move it away"):
        install("hqq", tmp_path, "no-such-python", Console(quiet=True))
    assert sources.read_text() == "mine"


def test_an_environment_is_back_where_the_newer_one_cannot_be_made(tmp_path: Path) -> None:
    folder, python = fake_hqq(tmp_path), tmp_path / "python"
    (folder / "pyvenv.cfg").touch()
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 3 11; else mkdir -p "$3"; touch "$3/pyvenv.cfg"; exit 1; fi\n')
    python.chmod(0o755)
    kept = (folder / "bin" / "python").read_text()
    for killed in (False, True):
        if killed:  # what a call leaves that was killed in between
            folder.rename(tmp_path / ".hqq.before")
            folder.mkdir()
            (folder / "pyvenv.cfg").touch()
        with pytest.raises(ConfigError, match="failed with 1"):
            install("hqq", tmp_path, str(python), Console(quiet=True))
        assert (folder / "bin" / "python").read_text() == kept
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hqq", "python"]


def test_locks_pin_every_package_and_hold_their_toolkit() -> None:
    for toolkit in TOOLKITS.values():
        lines = [line for line in toolkit.lock.read_text().splitlines() if line and not line.startswith("#")]
        assert all("==" in line for line in lines), toolkit.name
        names = {line.partition("==")[0].lower() for line in lines}
        assert {toolkit.package, "torch", "transformers", "safetensors"} <= names, toolkit.name


def test_the_release_of_a_method_is_the_one_its_lock_holds() -> None:
    from quant.methods.registry import TOOLKIT_METHODS

    for method in TOOLKIT_METHODS.values():
        toolkit = TOOLKITS[method.toolkit]
        assert f"{toolkit.package}=={method.release}" in toolkit.lock.read_text().splitlines()


def test_the_verb_lists_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_hqq(tmp_path)
    assert cli.main(["toolkit", "list", "--dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"hqq: hqq {HQQ_RELEASE} in" in said
    assert "auto_round: not in" in said


def test_an_empty_variable_names_the_folder_that_runs_look_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITGRID_TOOLKITS", "")
    assert cli.main(["toolkit", "list", "hqq"]) == 0
    assert capsys.readouterr().out == "hqq: not in bitgrid-toolkits/hqq\n"
    assert toolkits_dir({"toolkits_dir": ""}) == tmp_path / "bitgrid-toolkits"


@pytest.mark.parametrize(("given", "told"), [(["list", "hqqq"], "unknown toolkit 'hqqq'; nearest: hqq"), (["install"], "which toolkit?")])
def test_a_toolkit_must_be_named_and_known(given: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toolkit", *given, "--dir", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_a_package_is_found_by_its_files(tmp_path: Path) -> None:
    assert installed_release(fake_hqq(tmp_path), "hqq") == HQQ_RELEASE
    assert installed_release(tmp_path / "hqq", "auto-round") is None
    assert importlib.util.find_spec("hqq") is None  # or the sweep above would prove less than it says
