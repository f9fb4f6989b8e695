"""Comparisons without the pictures that take most of their time."""

import pytest


@pytest.fixture
def pdfs() -> None:
    """Asked for by a test that looks at the PDFs."""


@pytest.fixture(autouse=True)
def no_pdfs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a comparison's time goes into its PDFs: they are drawn where a test asks for `pdfs`."""
    if "pdfs" not in request.fixturenames:
        monkeypatch.setattr("evals.page.comparison_page.as_pdf", lambda figure: b"%PDF")
