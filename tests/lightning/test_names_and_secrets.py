"""Names that are no UTF-8, secrets in loggers' addresses, parameters of other kinds: saved, left out, no failure."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from tests.laws.test_faults import assert_trained_alike, ending
from tests.lightning.test_loggers import Spy
from tests.models import random_images
from tests.runs import Classifier, Pictures, events, fit, loader, messages, quiet, saved
from vit_explain_callback import Probe, load_run
from vit_explain_callback.lightning.weights import sample_weights
from vit_explain_callback.page.document import render_page
from vit_explain_callback.system.terminal import redacted

SECRETS = [
    "https://me:S3CRET@host.org/runs",
    "https://S3CRET@host.org/runs",
    "s3://key:S3/CR+ET=S3CRET@bucket/runs",
    "https://host.org/runs?api_key=S3CRET&x=1",
    "postgresql+psycopg2://me:S3CRET@10.0.0.1:5432/mlflow",
    "https:/me:S3CRET@host.org/runs",
    "abfs://container@account.dfs.core.windows.net/?sig=S3CRET",
]
TEXTS = [
    *(f"cannot reach {url}: no network" for url in SECRETS),
    "ConnectionError('401 for url: https://host/?token=S3CRET')",
    "{'api_key': 'S3CRET', \"token\": \"S3CRET\"}",
    "WANDB_API_KEY=S3CRET is wrong",
    "Authorization: Bearer S3CRET-S3CRET",
    "headers={'Authorization': 'Basic S3CRETS3CRET'}",
    "aws_secret_access_key=S3CRET, password=S3CRET",
]
PLAIN = [
    "C:/Users/me@home/runs",
    "file:///home/me@work/runs",
    "class_token=0, prefix_tokens=5 of 17 tokens",
    "https://host.org/runs/3",
    "Expected `target` classes in 0 … 4",
    "removal='tokens'; see https://pytorch.org",
]


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_are_left_out(text: str) -> None:
    assert "S3CRET" not in redacted(text)
    assert "***" in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


class Remote(Spy):
    """A logger whose address has a secret in it, which its errors repeat."""

    def __init__(self, url: str, fails: bool) -> None:
        super().__init__()
        self.url, self.fails = url, fails

    @property
    def save_dir(self) -> str:
        return self.url

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.fails:
            raise ConnectionError(f"401 Unauthorized for {self.url}")
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("url", [url for url in SECRETS if "://" in url])  # else it is the name of a folder here
@pytest.mark.parametrize("fails", [False, True])
def test_no_secret_of_a_logger_is_shown_or_written(
    tmp_path: Path, url: str, fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = quiet(["rollout"], num_images=2, page=True, block_statistics=True)
    trainer, _, said = ending(callback, tmp_path, Classifier(), logger=Remote(url, fails), max_epochs=1)
    assert trainer.global_step == 4
    assert [one for one in said if "cannot write to Remote" in one or not fails]
    shown = [*capsys.readouterr(), *said, *(path.as_posix() for path in tmp_path.rglob("*"))]
    assert not [text for text in shown if "S3CRET" in text]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"S3CRET" in path.read_bytes()]
    assert list(tmp_path.rglob("step_*"))


def test_the_greeting_hides_the_address_of_a_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = quiet(["rollout"], num_images=2)
    logger = TensorBoardLogger("memory://me:S3CRET@runs")
    *_, said = ending(callback, tmp_path, Classifier(), logger=logger, max_epochs=1)
    printed = capsys.readouterr().out
    assert "tensorboard --logdir memory://***@runs" in printed
    assert "S3CRET" not in printed + "".join(said)


NAMES = ["caf\udce9", "\ud800", "ok\udcff/part", "日本", "a\x00b", "tab\tnew\nline"]


class Named(Pictures):
    @property
    def classes(self) -> list[str]:
        return [*NAMES[:4], "plain"]


@pytest.mark.parametrize("given", ["data set", "option"])
def test_names_that_are_no_utf8_are_saved_under_others(tmp_path: Path, given: str) -> None:
    images, labels = random_images(5), torch.arange(5)
    masks = torch.zeros(5, 32, 32, dtype=torch.bool)
    masks[:, :16] = True
    options: dict[str, Any] = {"class_names": Named().classes} if given == "option" else {}
    callback = quiet(
        ["rollout"],
        images=(images, labels),
        regions=dict.fromkeys(NAMES, masks),
        page=True,
        num_shown=3,
        detail="full",
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(callback, tmp_path, max_epochs=1, validation=loader(Named()))
    assert messages(caught) == []
    folder = Path(trainer.log_dir or "") / "explanations"
    run = load_run(folder)
    assert list(run.probe.class_names or ()) == ["caf\\udce9", "\\ud800", "ok\\udcff/part", "日本", "plain"]
    assert {"caf\\udce9", "\\ud800", "ok\\udcff/part", "日本"} < set(run.probe.regions)
    board = events(trainer)
    assert board.Scalars("explain/lift/caf\\udce9/rollout")[-1].step == 4
    assert "explain/lift/日本/rollout" in board.Tags()["scalars"]
    for name in ("report.html", "summary.txt"):
        (folder / name).read_text(encoding="utf-8")
    render_page(folder).encode("utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
@pytest.mark.parametrize("name", ["caf\udce9", "日本", "a b", "\udcff\udcfe"])
@pytest.mark.parametrize("kind", ["none", "csv"])
def test_a_folder_whose_name_is_no_utf8(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    logger: Any = False if kind == "none" else CSVLogger(folder, name="", version=name)
    callback = quiet(["rollout"], num_images=2, page=True, block_statistics=True)
    _, weights, said = ending(callback, folder, Classifier(), logger=logger, max_epochs=1)
    assert [text for text in said if "goes on" in text] == []
    (page_file,) = folder.rglob("report.html")
    assert "<title>" in page_file.read_text(encoding="utf-8")
    assert load_run(page_file.parent).steps == [0, 4]
    assert "vit-explain report" in capsys.readouterr().out
    _, plain, _ = ending(None, tmp_path / "plain", Classifier(), max_epochs=1)
    assert_trained_alike(weights, plain)


class NoView(Tensor):
    """As quantised parameters of some libraries: it takes none of the usual calls."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("flatten", "view", "reshape", "cpu", "to", "any"):
            raise NotImplementedError(f"{function.__name__} is not implemented")
        return super().__torch_function__(function, types, args, kwargs or {})


def parameter(values: Any) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


PARAMETERS: dict[str, Any] = {
    "sparse": lambda: parameter(torch.eye(3).to_sparse()),
    "sparse, not coalesced": lambda: parameter(
        torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 1]]), torch.ones(2), (3, 3))
    ),
    "csr": lambda: parameter(torch.eye(3).to_sparse_csr()),
    "meta": lambda: parameter(torch.empty(3, device="meta")),
    "complex": lambda: parameter(torch.ones(3, dtype=torch.complex64)),
    "float8": lambda: parameter(torch.ones(3).to(torch.float8_e4m3fn)),
    "integers": lambda: parameter(torch.arange(3)),
    "booleans": lambda: parameter(torch.ones(3, dtype=torch.bool)),
    "quantised": lambda: parameter(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
    "a subclass": lambda: parameter(torch.ones(3).as_subclass(NoView)),
    "empty": lambda: parameter(torch.empty(0, 3)),
    "one number": lambda: parameter(torch.tensor(3.0)),
    "not contiguous": lambda: parameter(torch.rand(4, 5).t()[::2]),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:Sparse invariant checks")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_of_every_kind_are_looked_at(kind: str) -> None:
    module = nn.Module()
    module.first, module.other, module.last = (
        nn.Parameter(torch.ones(2)),
        PARAMETERS[kind](),
        nn.Parameter(torch.ones(2)),
    )
    seen = sample_weights(module)
    assert seen.equal(sample_weights(module))
    assert seen.dtype is torch.uint8
    with torch.no_grad():
        module.last[1] = 2
    assert not seen.equal(sample_weights(module))


class Embeds(Classifier):
    """Has a sparse parameter, or gradients of that kind, beside its ViT."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.eye(5), freeze=False, sparse=True)
        if kind != "gradient":
            self.other = PARAMETERS[kind]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels) + self.table(labels).square().mean()


@pytest.mark.parametrize("kind", ["gradient", "sparse"])
def test_a_sparse_parameter_fails_no_snapshot(tmp_path: Path, kind: str) -> None:
    callback = quiet(["rollout"], num_images=2)
    trainer, weights, said = ending(callback, tmp_path / "with", Embeds(kind), max_epochs=1)
    _, plain, _ = ending(None, tmp_path / "without", Embeds(kind), max_epochs=1)
    assert said == []
    assert [one.step for one in saved(trainer)] == [0, 4]
    assert all(a.to_dense().equal(b.to_dense()) for a, b in zip(weights, plain, strict=True))


def test_a_probe_keeps_what_it_was_given() -> None:
    masks = torch.ones(2, 8, 8, dtype=torch.bool)
    probe = Probe.of(random_images(2), regions={"object": masks}, class_names=("a", "b"))
    assert (list(probe.regions), list(probe.class_names or ())) == (["object"], ["a", "b"])
