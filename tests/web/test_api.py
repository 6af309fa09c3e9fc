"""The JSON API: what it tells and does, what it refuses, and that its description has all of it."""

import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from lorascope.errors import ConfigError
from lorascope.report.page import verdict_of
from lorascope.run_folder import RunDir
from lorascope.web.api import router
from lorascope.web.home import delete_run
from lorascope.web.services import Services
from web_client import TOKEN, web_client

JSON = {"content-type": "application/json"}
NO_JSON = "body: is no JSON object: send one, with `Content-Type: application/json`"


@pytest.fixture
def client(services: Services) -> Iterator[TestClient]:
    with web_client(services, signed_in=False) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        client.headers["accept"] = "*/*"
        yield client


def refused(answer: object) -> tuple[int, str]:
    """Status and line of an error, which is nothing else."""
    content = answer.json()  # type: ignore[attr-defined]
    assert list(content) == ["error"] and "\n" not in content["error"]
    return answer.status_code, content["error"]  # type: ignore[attr-defined]


def test_the_description_lists_every_route_with_a_summary(client: TestClient) -> None:
    described = client.get("/api/openapi.json").json()
    found = {
        (method.upper(), path): facts
        for path, methods in described["paths"].items()
        for method, facts in methods.items()
    }
    assert set(found) == {
        (method, route.path_format)  # type: ignore[attr-defined]
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    for facts in found.values():
        assert facts["summary"] and facts["description"]
        assert facts["security"] == [{"HTTPBearer": []}]
        assert "4XX" in facts["responses"] and "422" not in facts["responses"]
    assert "HTTPValidationError" not in described["components"]["schemas"]
    assert len({facts["operationId"] for facts in found.values()}) == len(found)


@pytest.mark.parametrize("path", ["/api/openapi.json", "/api/runs", "/api/runs/tiny", "/api/nothing"])
def test_nothing_is_told_without_the_token(services: Services, path: str) -> None:
    with web_client(services, signed_in=False) as client:
        assert refused(client.get(path)) == (
            401,
            "no token: send `Authorization: Bearer TOKEN`, or open the printed address",
        )
        client.headers["authorization"] = "Bearer wrong"
        assert client.get(path).status_code == 401
        assert client.post("/api/studies", json={}).status_code == 401


def test_a_browser_needs_the_token_of_forms_too(services: Services) -> None:
    with web_client(services) as client:
        assert client.get("/api/runs").status_code == 200
        del client.headers["x-csrf-token"]
        assert refused(client.delete("/api/runs/tiny"))[0] == 403
        elsewhere = client.delete("/api/runs/tiny", headers={"origin": "https://elsewhere.example"})
        assert refused(elsewhere)[0] == 403
    assert (services.workspace.runs_dir / "tiny").exists()


def test_runs_are_told_as_their_folders_have_them(services: Services, client: TestClient) -> None:
    [run] = client.get("/api/runs").json()
    assert run == client.get("/api/runs/tiny").json()
    assert (run["name"], run["state"], run["arms"]) == ("tiny", "done", ["r4", "r8"])
    assert [stage["name"] for stage in run["stages"]][-1] == "report"
    assert all(stage["seconds"] is not None for stage in run["stages"])
    assert (run["progress"], run["job"], run["failed_arms"]) == (None, None, {})
    keep = json.loads((services.workspace.runs_dir / "tiny" / "diagnosis.json").read_text())["keep"]
    assert run["keep"] == (keep and {key: keep[key] for key in ("arm", "epoch", "strength")})
    assert refused(client.get("/api/runs/other"))[0] == 404


def test_what_is_kept_is_told(services: Services, client: TestClient) -> None:
    path = services.workspace.runs_dir / "tiny" / "diagnosis.json"
    record = json.loads(path.read_text())
    keep = {"arm": "r4", "epoch": "best", "strength": 0.5, "style": None, "retention": 0.9}
    path.write_text(json.dumps({**record, "keep": keep}))
    told = client.get("/api/runs/tiny").json()
    assert told["keep"] == {"arm": "r4", "epoch": "best", "strength": 0.5}
    assert told["headline"] == "Keep r4 at 0.5"
    services.runs._kept.clear()
    path.write_text(json.dumps({**record, "keep": {"arm": "r4"}}))
    assert client.get("/api/runs/tiny").json()["keep"] is None


def test_curves_come_in_as_few_points_as_asked(services: Services, client: TestClient) -> None:
    arms = client.get("/api/runs/tiny/metrics").json()["arms"]
    records = [
        json.loads(line)
        for line in (services.workspace.runs_dir / "tiny" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [
        [record["step"], record["loss"]]
        for record in records
        if record["kind"] == "train" and record["arm"] == "r4"
    ]
    assert arms["r4"]["loss"] == losses
    assert arms["r4"]["step"] == losses[-1][0]
    assert [epoch for epoch, _ in arms["r4"]["heldout"]] == [1, 2, 3]
    [[step, mean]] = client.get("/api/runs/tiny/metrics?points=1").json()["arms"]["r4"]["loss"]
    middle = (losses[0][0] + losses[-1][0]) / 2
    assert (step, mean) == (middle, pytest.approx(sum(loss for _, loss in losses) / len(losses)))
    assert refused(client.get("/api/runs/tiny/metrics?points=0"))[0] == 422
    assert refused(client.get("/api/runs/tiny/metrics?points=many"))[0] == 422
    assert refused(client.get("/api/runs/other/metrics"))[0] == 404


def test_a_loss_that_is_no_number_is_null(services: Services, client: TestClient) -> None:
    path = services.workspace.runs_dir / "tiny" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 99, "epoch": 9, "arm": "r4", "loss": NaN}\n')
    assert client.get("/api/runs/tiny/metrics").json()["arms"]["r4"]["loss"][-1] == [99, None]


def test_the_verdict_is_that_of_the_report(services: Services, client: TestClient) -> None:
    told = client.get("/api/runs/tiny/verdict").json()
    answer = verdict_of(RunDir(services.workspace.run_dir("tiny")))
    assert told == {
        "keep": answer.keep,
        "headline": answer.headline,
        "sentences": list(answer.sentences),
        "decision": answer.decision,
        "epoch": answer.epoch,
        "strength": answer.strength,
        "tag": answer.tag,
    }


def test_a_study_is_started_once_under_a_name(services: Services, client: TestClient) -> None:
    asked = {"name": "new", "toml": 'preset = "smoke"'}
    answer = client.post("/api/studies", json=asked)
    assert answer.status_code == 201
    job = answer.json()["job"]
    assert job["command"] == "lorascope study runs/new/study.toml --run-dir runs/new"
    assert (job["state"], job["run"]) == ("queued", "new")
    assert answer.json()["run"] == client.get("/api/runs/new").json()
    assert answer.json()["run"]["state"] == "waiting"
    assert (services.workspace.runs_dir / "new" / "study.toml").exists()
    assert refused(client.post("/api/studies", json=asked))[0] == 409
    assert refused(client.post("/api/studies", json={**asked, "name": "tiny"}))[0] == 409
    assert [job["id"] for job in client.get("/api/jobs").json()] == [job["id"]]


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"name": "new", "toml": "train.epoch = 1"}, 400, "new: train.epoch: unknown key"),
        ({"name": "new", "toml": "train.epochs ="}, 400, "new: not valid TOML"),
        ({"name": "new", "toml": 'data.source = "/etc"'}, 403, "data.source = "),
        ({"name": "../new", "toml": ""}, 422, "name: "),
        ({"name": "new"}, 422, "toml: "),
        ({"name": "new", "toml": 'name = "\ud800"'}, 422, "toml: "),
        ([], 422, "body: is no JSON object: send one"),
    ],
)
def test_a_study_that_cannot_run_is_refused(
    services: Services, client: TestClient, asked: object, status: int, said: str
) -> None:
    found, line = refused(client.post("/api/studies", content=json.dumps(asked), headers=JSON))
    assert found == status and line.startswith(said)
    assert services.queue.jobs() == []
    assert [path.name for path in services.workspace.runs_dir.iterdir()] == ["tiny"]


def test_a_command_is_paused_resumed_and_cancelled(services: Services, client: TestClient) -> None:
    job = services.supervisor.enqueue("study", "tiny", ["study"], run="tiny")
    states = [
        client.post(f"/api/jobs/{job.id}/{action}").json()["state"]
        for action in ("pause", "resume", "cancel", "resume")
    ]
    assert states == ["paused", "queued", "cancelled", "queued"]
    assert client.get("/api/runs/tiny").json()["job"]["id"] == job.id
    assert refused(client.post("/api/jobs/99/pause"))[0] == 404
    assert refused(client.post(f"/api/jobs/{job.id}/explode"))[0] == 422


def test_a_run_is_deleted_unless_it_is_in_the_queue(services: Services, client: TestClient) -> None:
    folder = services.workspace.runs_dir / "tiny"
    job = services.supervisor.enqueue("export", "r4 of tiny", ["export"], run="tiny")
    assert refused(client.delete("/api/runs/tiny")) == (400, "tiny: is in the queue: cancel it first")
    with pytest.raises(ConfigError, match="is in the queue: cancel it first"):
        delete_run(services, "tiny")
    client.post(f"/api/jobs/{job.id}/cancel")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert client.delete("/api/runs/tiny").json() == {"freed_bytes": size}
    assert not folder.exists()
    assert client.get("/api/jobs").json() == []
    assert refused(client.delete("/api/runs/tiny"))[0] == 404


def test_files_of_adapters_are_sent_as_attachments(services: Services, client: TestClient) -> None:
    folder = services.workspace.runs_dir / "tiny"
    for path in ("adapter_model.safetensors", "adapter_config.json", "best/adapter_model.safetensors"):
        answer = client.get(f"/api/runs/tiny/files/adapters/r4/{path}")
        assert answer.content == (folder / "adapters" / "r4" / path).read_bytes()
        assert answer.headers["content-type"] == "application/octet-stream"
        name = path.rpartition("/")[2]
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'


@pytest.mark.parametrize(
    "path",
    [
        "study.toml",
        "manifest.json",
        "adapters",
        "adapters/r4",
        "adapters/../manifest.json",
        "adapters%2f..%2f..%2f..%2fout.json",
        "adapters/r4/out.json",
        "adapters/r4/notes.txt",
        "adapters/r4/gone.safetensors",
        "/etc/passwd",
    ],
)
def test_no_other_file_is_sent(services: Services, client: TestClient, path: str) -> None:
    work = services.workspace.folder
    (work / "out.json").write_text("{}")
    (work / "runs" / "tiny" / "adapters" / "r4" / "out.json").symlink_to(work / "out.json")
    (work / "runs" / "tiny" / "adapters" / "r4" / "notes.txt").write_text("")
    assert refused(client.get(f"/api/runs/tiny/files/{path}"))[0] in (403, 404)


def test_what_is_not_there_is_an_error_of_the_same_form(client: TestClient) -> None:
    assert refused(client.get("/api/nothing"))[0] == 404
    assert refused(client.put("/api/runs"))[0] == 405
    assert refused(client.post("/api/studies", content="{", headers=JSON)) == (422, NO_JSON)
    assert refused(client.post("/api/studies", content='{"name": "new", "toml": ""}')) == (422, NO_JSON)
