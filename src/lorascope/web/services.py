"""What every page works with: workspace, queue, supervisor, runs."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from lorascope.run_folder import RunDir
from lorascope.web.metrics import MetricsReader
from lorascope.web.queue import Queue
from lorascope.web.runs import Runs
from lorascope.web.supervisor import Supervisor
from lorascope.web.workspace import Workspace


@dataclass
class Services:
    """Made once for a server."""

    workspace: Workspace
    queue: Queue
    supervisor: Supervisor
    runs: Runs
    readers: dict[str, MetricsReader] = field(default_factory=dict)
    plans: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)  # by digest, with their time

    def reader(self, name: str) -> MetricsReader:
        """The reader of a run's curves, which remembers how far it has read."""
        if name not in self.readers:
            self.readers[name] = MetricsReader(RunDir(self.workspace.run_dir(name)))
        return self.readers[name]


def services_of(request: Request) -> Services:
    """The server's services."""
    services: Services = request.app.state.services
    return services
