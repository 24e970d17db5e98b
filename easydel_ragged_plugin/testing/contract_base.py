"""What all tests of the contract share: the operation, what it declares, and how it is called."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from .batches import Batch, Case, build_batch
from .capabilities import Capabilities
from .cases import CASES, case_named
from .driver import Driver, Outcome

__all__ = ["LAW_CASE", "ContractBase"]

LAW_CASE = case_named("mixed")
"""Tests that bring their own rows take its geometry, so that they share compiled programs."""


@functools.lru_cache(maxsize=1)
def _driver_for(operation: type[Any], contract: str) -> Driver:
    """One driver at a time: pytest runs class by class, and outcomes hold whole caches."""
    return Driver(operation)


class ContractBase:
    """What a subclass sets, and the calls that its tests make."""

    capabilities: ClassVar[Capabilities] = Capabilities()
    known_failures: ClassVar[dict[str, str]] = {}
    cases: ClassVar[tuple[Case, ...]] = CASES

    @pytest.fixture
    def operation(self) -> type:
        """The operation class under test; the same class each time."""
        raise NotImplementedError(
            f"{type(self).__name__} must define the fixture `operation`, returning an operation class"
        )

    @pytest.fixture
    def driver(self, operation: type) -> Driver:
        """Calls the operation as the host does. Tests of one class share it, with its programs and outcomes."""
        return _driver_for(operation, f"{type(self).__module__}.{type(self).__qualname__}")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise tests that take a case with the class's own cases."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=[case.name for case in self.cases])

    @pytest.fixture(autouse=True)
    def _declared(self, request: pytest.FixtureRequest) -> None:
        case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
        if case is not None:
            missing = self.capabilities.lacks(case)
            if missing is not None:
                pytest.skip(f"the operation does not declare: {missing}")
            version = request.getfixturevalue("driver").version
            if version not in case.versions:
                pytest.skip(f"no {version} cache has this geometry: {case.about}")
        names = [request.node.name, request.node.originalname] + ([case.name] if case is not None else [])
        for name in names:
            if name in self.known_failures:
                request.applymarker(pytest.mark.xfail(strict=True, reason=self.known_failures[name]))
                break

    @property
    def _poison(self) -> Literal["nan", "finite"]:
        return "nan" if self.capabilities.nan_in_dead_slots else "finite"

    def _call(self, driver: Driver, batch: Batch, **how: Any) -> Outcome:
        if not self.capabilities.compute_dtype_none_keeps_precision:
            how.setdefault("compute_dtype", batch.case.np_dtype)
        return driver.call(batch, **how)

    def _build(self, driver: Driver, case: Case, seed: int = 0) -> Batch:
        return build_batch(case, driver.version, seed, self._poison)

    def _run(self, driver: Driver, case: Case) -> tuple[Batch, np.ndarray, np.ndarray, Outcome]:
        outcomes = driver.outcomes
        if case.name not in outcomes:
            batch = self._build(driver, case)
            try:
                outcomes[case.name] = (batch, *batch.expected(), self._call(driver, batch))
            except Exception as error:  # any failure of the operation is every dependent test's failure
                outcomes[case.name] = error
        found = outcomes[case.name]
        if isinstance(found, Exception):
            raise found
        return found
