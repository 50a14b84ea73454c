"""A pytest plugin that makes the pytests of all ranks run as one.

Each rank's output goes to a file of its own; all ranks run the same tests in the same order; after
each test they tell each other how it went, and a failure anywhere stops all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ["ORCHESTRATOR_TEST_FOLDER"])
_RANK = next(os.environ[n] for n in ("HOROVOD_RANK", "PMI_RANK", "PMIX_RANK") if n in os.environ)

# At import, which is before pytest starts to capture.
_file = os.open(FOLDER / f"rank-{_RANK}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
os.dup2(_file, 1)
os.dup2(_file, 2)

_BACKEND = os.environ["ORCHESTRATOR_TEST_BACKEND"]
SIZE = int(os.environ["ORCHESTRATOR_TEST_SIZE"])
several = pytest.mark.several  # needs more ranks than one: not collected on one
three = pytest.mark.three  # costly, and says most where every part is uneven: on three ranks only
once = pytest.mark.once  # and does not depend on the backend: on three ranks of Horovod only
runtime: Any = None
figures: dict[str, float] = {}
_session: Any = None
_outcomes: dict[str, str] = {}
_durations: dict[str, float] = {}


def pytest_sessionstart(session: pytest.Session) -> None:
    global runtime, _session
    import orchestrator

    _session = session
    runtime = orchestrator.init(seed=7)
    assert runtime.backend == _BACKEND, runtime.backend
    assert runtime.size == SIZE, runtime.size


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "several: needs more ranks than one")
    config.addinivalue_line("markers", "three: on three ranks only")
    config.addinivalue_line("markers", "once: on three ranks of Horovod only")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    left_out = {"several"} if SIZE == 1 else set()
    left_out |= {"three", "once"} if SIZE != 3 else set()
    left_out |= {"once"} if _BACKEND != "horovod" else set()
    items[:] = [i for i in items if not any(i.get_closest_marker(name) for name in left_out)]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    everyone = runtime.communicator.allgather_object([item.nodeid for item in session.items])
    if any(other != everyone[0] for other in everyone):
        raise pytest.UsageError(f"The ranks collect different tests: {everyone}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _durations[report.nodeid] = _durations.get(report.nodeid, 0.0) + report.duration
    if report.failed:
        # At once: the end of the session may never come, if the others wait for this rank.
        print(f"\n{report.longreprtext}\n{report.capstderr}", flush=True)
    worse = report.outcome != "passed" and _outcomes.get(report.nodeid) != "failed"
    if worse or report.nodeid not in _outcomes:
        _outcomes[report.nodeid] = report.outcome


def pytest_runtest_logfinish(nodeid: str) -> None:
    everyone = runtime.communicator.allgather_object((nodeid, _outcomes[nodeid]))
    if any(other != everyone[0] for other in everyone) or _outcomes[nodeid] == "failed":
        _session.shouldfail = f"stopped on all ranks; by rank: {everyone}"


def pytest_sessionfinish(exitstatus: int) -> None:
    record = {
        "exit": int(exitstatus),
        "outcomes": _outcomes,
        "durations": _durations,
        "figures": figures,
    }
    (FOLDER / f"rank-{_RANK}.json").write_text(json.dumps(record))
