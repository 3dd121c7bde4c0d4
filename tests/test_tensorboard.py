"""Meta-training in TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trainings import SMALL, make_rule

from l2l_fast.meta import MetaTrainer
from l2l_fast.meta.log import tensorboard
from l2l_fast.problems import Quadratic

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tensorboard_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="install the package tensorboard"):
        tensorboard(tmp_path)

    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            written.append(("flush", 0, 0))

    module = type(sys)("tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    MetaTrainer(make_rule(), Quadratic(), SMALL).fit(on_update=tensorboard(tmp_path))
    assert [step for name, _, step in written if name == "meta/loss"] == list(range(1, 13))
    assert [step for name, _, step in written if name == "meta/validation_loss"] == [5, 10]
