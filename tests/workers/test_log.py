"""The log of a stage on a disk that is full."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from workers.failures import LOG
from workers.process import logged

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full answers as a full disk does")
def test_a_log_without_room_is_the_stage_s_error_and_no_traceback_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LOG).symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as told, logged([tmp_path]):
        logging.getLogger("workers").info("a line")
    assert told.value.errno == errno.ENOSPC
    assert capfd.readouterr() == ("", "")
