"""A workspace with a finished run called `tiny`, and a signed-in client of its web app."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lorascope.web.services import Services
from web_client import make_services, web_client


@pytest.fixture
def services(tmp_path: Path, finished: Path) -> Services:
    services = make_services(tmp_path / "work")
    shutil.copytree(finished, services.workspace.runs_dir / "tiny")
    return services


@pytest.fixture
def client(services: Services) -> Iterator[TestClient]:
    with web_client(services) as client:
        yield client
