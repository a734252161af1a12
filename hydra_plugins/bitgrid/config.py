"""`hydra/launcher=bitgrid` and `hydra/sweeper=bitgrid`: flat typed settings.

Hydra executes this module before it is in `sys.modules`: dataclasses here cannot use postponed annotations.
"""

from dataclasses import dataclass, field
from typing import Dict, Optional  # noqa: UP035 - OmegaConf 2.3 reads these spellings on every Python

from hydra.core.config_store import ConfigStore


@dataclass
class BitgridLauncherConf:
    """Bitgrid's own cells run where `cluster` says. The rest is for task functions that are not bitgrid's."""

    _target_: str = "hydra_plugins.bitgrid.launcher.BitgridLauncher"
    address: Optional[str] = None  # noqa: UP045
    """Of a Ray cluster that runs already; null starts one on this machine."""
    num_cpus: Optional[int] = None  # noqa: UP045
    """Cores of the cluster started here; null: all."""
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0
    auth: str = "disabled"
    """Ray's authentication: token or disabled."""


@dataclass
class BitgridSweeperConf:
    _target_: str = "hydra_plugins.bitgrid.sweeper.BitgridSweeper"
    params: Optional[Dict[str, str]] = field(default=None)  # noqa: UP006, UP045
    """The grid, as in Hydra's basic sweeper; the command line wins."""
    max_batch_size: Optional[int] = None  # noqa: UP045
    """For task functions that are not bitgrid's; a grid of bitgrid's own is always planned as a whole."""


ConfigStore.instance().store(group="hydra/launcher", name="bitgrid", node=BitgridLauncherConf, provider="bitgrid")
ConfigStore.instance().store(group="hydra/sweeper", name="bitgrid", node=BitgridSweeperConf, provider="bitgrid")
