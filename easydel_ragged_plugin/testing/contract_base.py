"""What all tests of the contracts share: what is under test, what it declares, and how it is called."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from .batches import Batch, Case, Row, build_batch
from .cases import CASES, case_named

__all__ = ["ContractBase"]


class ContractBase:
    """What a subclass sets, and the calls that its tests make.

    The fixture ``driver`` calls what is under test. It has ``version``; ``call(batch, host_writes=False)``, whose
    result has ``output`` and ``pages`` in NumPy; ``expected(batch, outcome)``, the oracle's output and pages; and
    ``outcomes``, where tests of one class share runs.
    """

    known_failures: ClassVar[dict[str, str]] = {}
    cases: ClassVar[tuple[Case, ...]] = CASES
    law_case: ClassVar[Case] = case_named("mixed")
    """Tests that bring their own rows take its geometry and dtypes, so that they share compiled programs."""

    any_row_order: bool = True
    """Whether rows may come in any order; otherwise rows with one new token come first."""

    poison: Literal["nan", "finite"] = "nan"
    """What slots hold that no query sees."""

    @pytest.fixture
    def driver(self) -> Any:
        """Calls what is under test."""
        raise NotImplementedError(f"{type(self).__name__} must define the fixture `driver`")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize tests that take a case with the class's own cases."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=[case.name for case in self.cases])

    @pytest.fixture(autouse=True)
    def _declared(self, request: pytest.FixtureRequest) -> None:
        case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
        if case is not None:
            self._require(request.getfixturevalue("driver"), case)
        names = [request.node.name, request.node.originalname] + ([case.name] if case is not None else [])
        for name in names:
            if name in self.known_failures:
                request.applymarker(pytest.mark.xfail(strict=True, reason=self.known_failures[name]))
                break

    def _missing(self, driver: Any, case: Case) -> str | None:
        """What of ``case`` is not declared, or None."""
        raise NotImplementedError

    def _require(self, driver: Any, case: Case) -> None:
        """Skip, with the reason, where ``case`` is not of the version or not declared."""
        if driver.version not in case.versions:
            pytest.skip(f"no {driver.version} cache has this geometry: {case.about}")
        missing = self._missing(driver, case)
        if missing is not None:
            pytest.skip(missing)

    def _rows(self, *pairs: tuple[int, int]) -> Case:
        """The geometry of ``law_case`` with these rows, (context, new tokens) each."""
        return dataclasses.replace(self.law_case, rows=tuple(Row(*pair) for pair in pairs))

    def _build(self, driver: Any, case: Case, seed: int = 0) -> Batch:
        self._require(driver, case)
        return build_batch(case, driver.version, seed, self.poison)

    def _call(self, driver: Any, batch: Batch, **how: Any) -> Any:
        return driver.call(batch, **how)

    def _run(self, driver: Any, case: Case) -> tuple[Batch, np.ndarray, np.ndarray, Any]:
        """The batch of ``case``, the expected output and pages, and what was got; once for all tests of the class."""
        outcomes = driver.outcomes
        if case not in outcomes:
            batch = self._build(driver, case)
            try:
                outcome = self._call(driver, batch)
                outcomes[case] = (batch, *driver.expected(batch, outcome), outcome)
            except Exception as error:  # any failure of what is tested is every dependent test's failure
                outcomes[case] = error
        found = outcomes[case]
        if isinstance(found, Exception):
            raise found
        return found
