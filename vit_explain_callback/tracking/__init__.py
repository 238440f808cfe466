"""Follow the explanations of a model over a run, without Lightning."""

from typing import TYPE_CHECKING

from vit_explain_callback.system.lazy import lazy

if TYPE_CHECKING:
    from vit_explain_callback.tracking.history import History
    from vit_explain_callback.tracking.probe import Probe
    from vit_explain_callback.tracking.run import Run, load_run
    from vit_explain_callback.tracking.run_folder import RunFolder
    from vit_explain_callback.tracking.snapshot import Reliability, Snapshot
    from vit_explain_callback.tracking.writers import FolderWriter, RunEnd, TensorBoardWriter, Writer

__all__ = [
    "FolderWriter",
    "History",
    "Probe",
    "Reliability",
    "Run",
    "RunEnd",
    "RunFolder",
    "Snapshot",
    "TensorBoardWriter",
    "Writer",
    "load_run",
]

_HOMES = {
    "FolderWriter": "writers",
    "History": "history",
    "Probe": "probe",
    "Reliability": "snapshot",
    "Run": "run",
    "RunEnd": "writers",
    "RunFolder": "run_folder",
    "Snapshot": "snapshot",
    "TensorBoardWriter": "writers",
    "Writer": "writers",
    "load_run": "run",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
