"""The seed tutorial's three snippets and their combination, in one process and on two ranks."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest

from orchestrator.communicators.single import SingleCommunicator
from orchestrator.runtime import Runtime
from tests import tutorial
from tests.distributed.launcher import launch


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def function(snippet: str):
        runtime = Runtime(SingleCommunicator(), seed=3)
        with runtime.use():
            return tutorial.run(runtime, snippet)

    return function


def best(losses: list[float]) -> int:
    return losses.index(min(losses))


def improvements(losses: list[float]) -> list[int]:
    lowest, found = math.inf, []
    for epoch, loss in enumerate(losses):
        if loss < lowest:
            lowest, found = loss, [*found, epoch]
    return found


@pytest.mark.slow
def test_model_checkpoint(run):
    facts = run("checkpoint")
    losses = facts["history"]["val_loss"]
    assert len(losses) == 12
    names = {
        f"best_model_epoch_{epoch + 1:02d}_val_loss_{losses[epoch]:.2f}.keras": epoch
        for epoch in improvements(losses)
    }
    assert sorted(facts["files"]) == sorted(names) == facts["left"]
    assert len(names) > 1
    for name, epoch in names.items():
        assert facts["files"][name]["weights"] == facts["by_epoch"][epoch]
        assert facts["files"][name]["val_loss"] == pytest.approx(losses[epoch], rel=1e-5)


def test_early_stopping(run):
    facts = run("stopping")
    losses = facts["history"]["val_loss"]
    lowest, chosen = math.inf, 0
    for epoch, loss in enumerate(losses):  # better by more than 0.001
        if loss < lowest - 0.001:
            lowest, chosen = loss, epoch
    assert len(losses) < 60, "it stopped"
    assert len(losses) - 1 == chosen + 5, "after five epochs without"
    assert facts["weights"] == facts["by_epoch"][chosen]
    assert facts["weights"] != facts["by_epoch"][-1]


@pytest.mark.slow
def test_reduce_lr_on_plateau(run):
    facts = run("plateau")
    rates = [*facts["history"]["learning_rate"], facts["learning_rate"]]
    assert len(rates) == 41
    assert rates[0] == pytest.approx(1e-2)
    cuts = [after / before for before, after in itertools.pairwise(rates)]
    cuts = [cut for cut in cuts if cut != 1]
    assert len(cuts) >= 2
    assert cuts[:2] == pytest.approx([0.2, 0.2], rel=1e-5)
    assert min(rates) >= 1e-5 * (1 - 1e-6)
    assert facts["left"] == []


def check_combination(facts) -> None:
    history = facts["history"]
    losses, rates = history["val_loss"], history["learning_rate"]
    epoch = best(losses)
    assert len(losses) < tutorial.EPOCHS, "it stopped early"
    assert len(losses) - 1 == epoch + 15
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] <= 1e-3 * (1 + 1e-6), "the rate fell before the stop"
    assert facts["left"] == ["best_model.keras"]
    saved = facts["files"]["best_model.keras"]
    assert saved["weights"] == facts["by_epoch"][epoch], "the file is the best epoch's"
    assert saved["val_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert saved["val_accuracy"] == pytest.approx(history["val_accuracy"][epoch], rel=1e-6)
    assert saved["val_accuracy"] >= 0.95
    assert saved["optimizer"] == "Adam"
    assert facts["weights"] == facts["by_epoch"][epoch], "and so are the weights at the end"
    assert facts["weights"] != facts["by_epoch"][-1]


@pytest.mark.slow
def test_combination(run):
    facts = run("combination")
    check_combination(facts)


@pytest.mark.slow
@pytest.mark.distributed
def test_combination_on_two_ranks(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    finished = launch("horovod", 2, ["-m", "tests.tutorial", str(folder)], tmp_path)
    assert finished.returncode == 0, finished.output
    assert finished.left == []
    lines = re.findall(r"FACTS (\{.*\})", finished.output)
    assert len(lines) == 1, finished.output
    facts = json.loads(lines[0])
    assert facts["size"] == 2
    check_combination(facts)
    assert facts["weights_by_rank"] == [facts["weights"]] * 2
