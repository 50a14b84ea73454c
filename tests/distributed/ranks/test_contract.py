"""Horovod and MPI keep the contract."""

from __future__ import annotations

import pytest

from tests.distributed import contract


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
def test_contract(check, communicator):
    check(communicator)
