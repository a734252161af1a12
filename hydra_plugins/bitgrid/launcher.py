"""`hydra/launcher=bitgrid`: takes the jobs of any sweeper. The work is in `orchestrator.launch`."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class BitgridLauncher(Launcher):
    """The jobs of bitgrid's own task function become one grid; any other task function runs as one Ray call per job."""

    def __init__(self, address: str | None, auth: str | None, num_cpus: int | None, cpus_per_job: float, gpus_per_job: float) -> None:
        self.cluster = {"address": address, "auth": auth, "num_cpus": num_cpus}
        self.per_job = {"num_cpus": cpus_per_job, "num_gpus": gpus_per_job}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from orchestrator.launch import Launch, is_bitgrid_task, launch_cells, launch_opaque

        launch = Launch(self.hydra_context, self.task_function, self.config, job_overrides, initial_job_idx)
        if is_bitgrid_task(self.task_function):
            return launch_cells(launch)
        return launch_opaque(launch, self.cluster, self.per_job)
