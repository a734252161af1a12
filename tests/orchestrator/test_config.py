"""Wrong names, keys, types and sweeps are refused on the driver, with what is allowed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from orchestrator.config import help_text
from orchestrator.errors import ConfigError
from orchestrator.grid import compose_with
from orchestrator.hydra_bridge import Composer
from tests.orchestrator.small_conf import composer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    return composer(tmp_path_factory.mktemp("conf"))


WRONG = [
    ("method=hes", "unknown method 'hes'; nearest: hess; allowed: aware, hess, plain"),
    ("metod=hess", "unknown key 'metod'; nearest: method"),
    ("metod=hess,plain", "unknown axis 'metod'; nearest: method"),
    ("cluster=ther", "unknown cluster 'ther'; nearest: there"),
    ("cluster.adress=x", "unknown key of cluster in settings 'adress'; nearest: address"),
    ("task.params.windw=3", "unknown key of task.params in task ppl 'windw'; nearest: window"),
    ("+task.params.more=3", "+ adds keys only to mappings that are empty"),
    ("method.rounding.params.damp=3", "method.rounding.params of method plain is an empty mapping without key 'damp'"),
    ("+surprise=3", "unknown key 'surprise'"),
    ("task.params.window=long", "task.params.window=long is text, expected a whole number like 128"),
    ("task.params.window=1.5", "task.params.window=1.5 is a number, expected a whole number like 128"),
    ("task.params.window=true", "task.params.window=true is true or false, expected a whole number like 128"),
    ("task.params.window={a: 1}", "is a mapping, expected a whole number"),
    ("task.params={windw: 3}", "unknown key of task.params in task ppl 'windw'; nearest: window"),
    ("task.params.window.x=1", "task.params.window of task ppl is the value 128, not a mapping"),
    (
        "model.hub.id=12",
        r"model.hub.id=12 is a whole number, expected text like tiny; quote it for text: model.hub.id=\'12\'",
    ),
    ("model.dtype=float31", "unknown model.dtype 'float31'; nearest: float32"),
    ("method.propagation=quantised", "unknown method.propagation 'quantised'; nearest: quantized"),
    ("method.rounding.kind=gtpq", "kind is a fact about the code behind method plain, not a choice; choose another method"),
    ("task.kind=other", "kind is a fact about the code behind task ppl"),
    ("method.rounding={kind: gptq}", "kind is a fact about the code"),
    ("+method.rounding.params.grid=g_assym", "unknown method.rounding.params.grid 'g_assym'; nearest: g_asym"),
    ("scheme.weight.bits=9", "scheme=w4: weight.bits=9 is not between 1 and 8"),
    ("scheme.weight.granularity=chanel", "unknown scheme.weight.granularity 'chanel'; nearest: channel"),
    ("scheme.weight.group_size=64", "give a group_size with granularity 'group'"),
    ("scheme.weight.bits=2,9", "scheme=w4[weight.bits=9]: weight.bits=9"),
    ("method=[plain,hess]", "a cell takes one method; to sweep, write method=plain,hess with -m"),
    ("~method", "every cell has exactly one method"),
    ("+method=hess", "every cell has exactly one method"),
    ("~tracking", "tracking is missing; every sweep has one: give tracking=NAME, such as tracking=none"),
    ("~cluster.kind", "cluster={'address': None} names no kind; every sweep has one: give cluster=NAME, such as cluster=in_process"),
    ("~store", "store is missing; every sweep has one: give store=FOLDER"),
    ("method=glob(z*)", "matches no option of method; it has: aware, hess, plain"),
    ("transform@method.transforms.scale=clip", "method=plain does not take transform@method.transforms.scale=clip"),
    ("method=aware,hess transform@method.transforms.scale=clip", "method=hess does not take"),
    ("store=a,b", "store cannot be swept: one store holds the whole sweep"),
    ("cluster=here,there", "cluster cannot be swept"),
    ("tracking.kind=a,b", "tracking cannot be swept"),
    ("data_dir=a,b", "data_dir cannot be swept"),
    ("models_dir=a,b", "models_dir cannot be swept: the folder serves every model of the sweep; sweep model=a,b instead"),
    ("sweep=none,other", "sweep cannot be swept"),
    ("hints.x=1,2", "hints cannot be swept"),
    ("hydra.verbose=true,false", "hydra cannot be swept"),
    ("replicate.seed=interval(0,1)", "an interval has no list of values"),
    ("model=ti{ny", "model=ti{ny: mismatched input '{' expecting <EOF>; write KEY=VALUE, and text with other"),
    ("store=/home/jörg/store", "store=/home/jörg/store: a character that has no place there; write KEY=VALUE"),
    ("model", "model: missing EQUAL at '<EOF>'; write KEY=VALUE"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=lambda x: x.replace(" ", "_")[:40])
def test_wrong_input_says_what_is_allowed(small: Composer, line: str, message: str) -> None:
    overrides = line.split(" ") if line.startswith("method=aware") else [line]
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose_with(small, overrides, multirun=True)


@pytest.mark.parametrize("line", ["method=plain,hess", "scheme=glob(w4*)", "replicate.seed=range(3)"])
def test_a_sweep_without_m_says_to_add_it(small: Composer, line: str) -> None:
    with pytest.raises(ConfigError, match=r"is a sweep over several values: add -m \(bitgrid run -m"):
        compose_with(small, [line], multirun=False)


def test_a_whole_number_is_a_number(small: Composer) -> None:
    cell = compose_with(small, ["method=hess", "method.rounding.params.damp=1"], multirun=False).cells[0]
    assert cell.method.values["rounding"]["params"]["damp"] == 1


def test_null_in_the_yaml_takes_any_type(small: Composer) -> None:
    cell = compose_with(small, ["scheme.activation={bits: 8}", "model.hub.revision=12"], multirun=False).cells[0]
    assert cell.scheme.values["activation"] == {"bits": 8}
    assert cell.model.values["hub"]["revision"] == 12


def test_a_value_that_must_be_given_is_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    needing = composer(tmp_path_factory.mktemp("conf"), model__asks="hub: {id: '???'}\ndtype: float32\n")
    with pytest.raises(ConfigError, match=r"model=asks needs a value: model.hub.id is"):
        compose_with(needing, ["model=asks"], multirun=False)
    assert compose_with(needing, ["model=asks", "model.hub.id=x"], multirun=False).cells[0].model.values["hub"] == {"id": "x"}


def test_a_broken_yaml_file_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    broken = composer(tmp_path_factory.mktemp("conf"), model__broken="source: [1\n")
    with pytest.raises(ConfigError, match=r"broken.yaml"):
        compose_with(broken, ["model=broken"], multirun=False)


def test_a_missing_folder_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Composer.at(str(tmp_path_factory.mktemp("conf") / "nowhere"))


def test_help_names_the_shipped_options() -> None:
    assert {"none", "demo", "examples", "gptq", "ray_local"} <= set(help_text().replace(",", " ").split())


def test_composing_imports_no_heavy_library() -> None:
    heavy = ("torch", "ray", "mlflow", "pandas", "numpy", "transformers", "pyarrow")
    code = (
        "import sys; from orchestrator.grid import compose_grid; from orchestrator.config import help_text; help_text(); "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
