"""A small configuration folder of its own, so that tests of composing do not change with the shipped options."""

from __future__ import annotations

from pathlib import Path

from orchestrator.hydra_bridge import Composer

TASK = "version: 1\ntext: {file: d}\nprimary: nll\nmetrics: {nll: {higher_is_better: false}}\n"
FILES = {
    "config": """
defaults:
  - model: tiny
  - method: plain
  - scheme: w4
  - calibration: text
  - task: ppl
  - replicate: r0
  - cluster: here
  - tracking: none
  - _self_
  - sweep: none
  - override hydra/sweeper: bitgrid
store: some/store
models_dir: null
data_dir: null
hints: {}
""",
    "model/tiny": "hub: {id: tiny, revision: null}\ndtype: float32\n",
    "model/large": "hub: {id: large, revision: abc}\ndtype: bfloat16\n",
    "model/larger": "hub: {id: larger, revision: abd}\ndtype: bfloat16\n",
    "method/plain": "rounding: {kind: rtn, version: 1, needs: [], params: {}}\ntransforms: {}\npropagation: original\n",
    "method/hess": """
rounding:
  kind: gptq
  version: 1
  needs: [hessian]
  params: {damp: 0.01, block_size: 128, act_order: true, outlier_columns: "${.block_size}"}
transforms: {}
propagation: original
""",
    "method/aware": """
defaults:
  - /transform@transforms.scale: search
  - _self_
rounding: {kind: rtn, version: 1, needs: [], params: {}}
propagation: original
""",
    "transform/search": "kind: awq\nversion: 1\nneeds: [absmean]\nparams: {scale_grid: 20, max_shrink: 0.5}\n",
    "transform/clip": "kind: clip\nversion: 1\nneeds: []\nparams: {steps: 10}\n",
    "scheme/w4": "weight: {bits: 4, symmetric: false, granularity: channel, group_size: null}\nactivation: null\nkv: null\n",
    "scheme/w4g64": "weight: {bits: 4, symmetric: false, granularity: group, group_size: 64}\nactivation: null\nkv: null\n",
    "scheme/w2": "weight: {bits: 2, symmetric: false, granularity: channel, group_size: null}\nactivation: null\nkv: null\n",
    "scheme/w8a8": "weight: {bits: 8}\nactivation: {bits: 8}\nkv: null\n",
    "calibration/text": "text: {file: d, split: rows}\nsamples: 8\nsequence_length: 64\nsampling: windows\n",
    "calibration/other": "text: {file: e, split: rows}\nsamples: 16\nsequence_length: 64\nsampling: windows\n",
    "task/ppl": f"kind: perplexity\n{TASK}params: {{window: 128, folder: '${{data_dir}}'}}\n",
    "task/div": f"kind: divergence\n{TASK}params: {{window: 128}}\n",
    "replicate/r0": "seed: 0\n",
    "replicate/r1": "seed: 1\n",
    "cluster/here": "kind: in_process\naddress: null\n",
    "cluster/there": "kind: ray_existing\naddress: null\n",
    "tracking/none": "kind: none\n",
    "sweep/none": "# @package _global_\nsweep: {name: null, exclude: [], only_if: [], zip: [], extra: []}\n",
}
"""Config path ▸ yaml."""


def write_conf(folder: Path, **more: str) -> Path:
    """The files above and `more` (with `__` for `/` in names) in a folder."""
    for path, text in {**FILES, **{k.replace("__", "/"): v for k, v in more.items()}}.items():
        file = folder / f"{path}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def composer(folder: Path, **more: str) -> Composer:
    return Composer.at(str(write_conf(folder, **more)))
