"""Stop writing while there is still room for what others write: a log on a full disk stops a run."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

SPARE_BYTES = 64 * 2**20


def check_space(folder: Path) -> None:
    """Refuse to write where fewer than `SPARE_BYTES` could be written, so that they are left to the run's own files.

    Args:
        folder: Of the files; it need not be there yet.

    Raises:
        OSError: If the disk is nearly full, or if its largest file is near the largest size that is allowed.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    room = shutil.disk_usage(there).free
    limit = None if resource is None else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit is not None and limit != resource.RLIM_INFINITY:
        room = min(room, limit - max((file.stat().st_size for file in there.iterdir() if file.is_file()), default=0))
    if room < SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{max(0, room) / 2**20:.1f} MB can be written to {there}, and the last {SPARE_BYTES // 2**20} MB are left "
            "to the run itself, so that nothing more is added. Free some space, or log elsewhere",
        )
