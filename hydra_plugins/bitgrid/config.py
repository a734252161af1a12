"""`hydra/launcher=bitgrid` and `hydra/sweeper=bitgrid`: flat typed settings.

Hydra executes this module before it is in `sys.modules`: dataclasses here cannot use postponed annotations.
"""

from dataclasses import dataclass
from typing import Dict, Optional  # noqa: UP035 - spellings that OmegaConf 2.3 reads on every Python

from hydra.core.config_store import ConfigStore


@dataclass
class BitgridLauncherConf:
    """Bitgrid's own cells run as `cluster` says. These settings are for task functions that are not bitgrid's."""

    _target_: str = "hydra_plugins.bitgrid.launcher.BitgridLauncher"
    address: Optional[str] = None  # noqa: UP045
    """host:port of a Ray cluster that runs already, or auto; null starts one on this machine."""
    auth: Optional[str] = None  # noqa: UP045
    """Ray's authentication: token, disabled, or null for what `cluster.auth` does when null."""
    num_cpus: Optional[int] = None  # noqa: UP045
    """Cores of a cluster started here; null: all."""
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0


@dataclass
class BitgridSweeperConf:
    """A grid of bitgrid's own is composed once and planned as a whole."""

    _target_: str = "hydra_plugins.bitgrid.sweeper.BitgridSweeper"
    params: Optional[Dict[str, str]] = None  # noqa: UP006, UP045
    """The grid, as in Hydra's basic sweeper; the command line wins."""
    max_batch_size: Optional[int] = None  # noqa: UP045
    """Jobs per launch, for task functions that are not bitgrid's."""


ConfigStore.instance().store(group="hydra/launcher", name="bitgrid", node=BitgridLauncherConf, provider="bitgrid")
ConfigStore.instance().store(group="hydra/sweeper", name="bitgrid", node=BitgridSweeperConf, provider="bitgrid")
