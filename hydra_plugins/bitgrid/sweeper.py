"""`hydra/sweeper=bitgrid`: the whole grid at once. The work is in `orchestrator.launch`."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class BitgridSweeper(Sweeper):
    """A grid of bitgrid's own task function is composed once and run as a whole; other task functions get Hydra's basic sweeper."""

    def __init__(self, params: dict[str, str] | None = None, max_batch_size: int | None = None) -> None:
        self.params = params
        self.max_batch_size = max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def sweep(self, arguments: list[str]) -> Any:
        from orchestrator.launch import is_bitgrid_task, sweep_grid

        assert self.config is not None, "setup comes first"
        assert self.hydra_context is not None
        if is_bitgrid_task(self.task_function):
            return sweep_grid(self.config, arguments)
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        basic = BasicSweeper(self.max_batch_size, self.params)
        basic.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        return basic.sweep(arguments)
