"""What the tests on a real cluster share: the cluster, and a project's root to submit from."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from . import cluster as clusters
from .project import make_project


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(clusters.cluster())
        except clusters.Unavailable as reason:
            pytest.skip(str(reason))
        yield


@pytest.fixture(scope="session")
def project(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("slurm") / "project")
