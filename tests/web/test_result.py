"""The result page: the verdict and why, files made of an arm by real commands, what is missing."""

import io
import json
import shutil
import time
import zipfile

import pytest
from safetensors import safe_open
from starlette.testclient import TestClient

from lorascope.errors import ConfigError, StorageError
from lorascope.web import results
from lorascope.web.adapter_files import plain_stem
from lorascope.web.commands import CommandError, as_argument, how_made, make_file, run_command
from lorascope.web.queue import in_shell
from lorascope.web.results import Export, read_result
from lorascope.web.services import Services


def test_the_page_says_what_the_report_says(services: Services, client: TestClient) -> None:
    folder = services.workspace.runs_dir / "tiny"
    found = read_result(folder)
    report = (folder / "report.html").read_text(encoding="utf-8")
    text = client.get("/runs/tiny/result").text
    assert f'<h2 id="verdict-title">{found.verdict["verb"]} <em>' in text
    why = report.split('<ul class="whys">')[1].split("</ul>")[0]
    assert why.count("<li>") == 2
    assert " ".join(why.split()) in " ".join(text.split())  # the same rows by the same template
    for picture in found.verdict["hero"]:
        assert f"{picture.arm}: {picture.prompt} (seed {picture.seed})" in text
    shown = text.split('<img src="')[1].split('"')[0].replace("&amp;", "&")
    assert client.get(shown).headers["content-type"] == "image/webp"
    assert 'href="/plan?next=tiny"' in text
    assert 'sandbox="allow-scripts allow-downloads"' in text
    assert found.next_toml.splitlines()[0] in text
    assert "selected>" in text.split('name="arm"')[1].split("</select>")[0]


def test_a_file_is_made_by_the_command_that_is_shown(services: Services, client: TestClient) -> None:
    asked = {"arm": "r4", "layout": "kohya", "strength": "0.5", "bake": "true"}
    made = client.post("/runs/tiny/export", data=asked, headers={"hx-request": "true"})
    assert made.status_code == 200
    path = services.workspace.files_dir / "tiny" / "tiny-r4-strength-0.5.safetensors"
    assert "lorascope export runs/tiny --arm=r4 --format=kohya --strength=0.5" in made.text
    assert "&lt;lora:tiny-r4-strength-0.5:1&gt;" in made.text
    assert "only the base it was trained on can use it" in made.text  # the command's note
    answer = client.get(made.text.split('href="')[1].split('"')[0])
    assert answer.content == path.read_bytes()
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == f'attachment; filename="{path.name}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    with safe_open(path, "pt") as file:
        assert file.metadata()["lorascope_strength"] == "0.5"
    assert how_made(services.workspace, path) is not None


def test_without_javascript_the_page_shows_what_was_made(services: Services, client: TestClient) -> None:
    answer = client.post("/runs/tiny/export", data={"arm": "r8", "layout": "peft", "strength": "0.5"})
    assert answer.status_code == 303
    text = client.get(answer.headers["location"]).text
    assert "tiny-r8-peft" in text
    assert "the verdict uses 0.5" in text
    assert 'value="r8" selected' in text
    archive = client.get("/files/download?path=files/tiny/tiny-r8-peft")
    assert 'filename="tiny-r8-peft.zip"' in archive.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(archive.content)) as found:
        assert found.testzip() is None
        assert "tiny-r8-peft/adapter_model.safetensors" in found.namelist()


def test_a_merged_model_goes_through_the_queue(services: Services, client: TestClient) -> None:
    answer = client.post(
        "/runs/tiny/export", data={"arm": "r4", "layout": "merged-diffusers", "strength": "0.5"}
    )
    assert answer.headers["location"] == "/runs/tiny/result#exports"
    (job,) = services.queue.jobs()
    assert (job.kind, job.run) == ("export", "tiny")
    assert "--strength=0.5" in job.arguments  # though nobody asked to bake it in
    text = client.get("/runs/tiny/exports").text
    assert 'hx-trigger="every 2s"' in text
    give_up = time.monotonic() + 60
    while services.queue.job(job.id).is_open and time.monotonic() < give_up:
        services.supervisor.look()
        time.sleep(0.2)
    text = client.get("/runs/tiny/exports").text
    assert "merged in float32" in text  # the command's note
    assert "every 2s" not in text
    archive = client.get(text.split('href="')[1].split('"')[0].replace("&amp;", "&"))
    with zipfile.ZipFile(io.BytesIO(archive.content)) as found:
        assert "tiny-r4-strength-0.5-merged/model_index.json" in found.namelist()


def test_a_refusal_is_shown_with_its_remedy(services: Services, client: TestClient) -> None:
    folder = services.workspace.runs_dir / "tiny"
    (folder / "adapters" / "r4" / "adapter_config.json").unlink()
    answer = client.post("/runs/tiny/export", data={"arm": "r4"}, headers={"hx-request": "true"})
    assert answer.headers["hx-retarget"] == "#notice"
    assert "was removed after training: put the file back" in answer.text
    with pytest.raises(CommandError, match="must be above 0"):
        make_file(services.workspace, ["export", "runs/tiny", "--arm=r4", "--strength=3"], folder / "out")


def test_what_is_not_offered_is_refused(services: Services, client: TestClient) -> None:
    found = read_result(services.workspace.runs_dir / "tiny")
    for wrong in ({"arm": "../r4"}, {"layout": "pickle"}, {"checkpoint": "first"}):
        asked = {"arm": "r4", "layout": "kohya", "checkpoint": "last", **wrong}
        with pytest.raises(ConfigError, match="choose one of"):
            Export.of(found, asked["arm"], asked["layout"], asked["checkpoint"], 1.0, False, False)
        assert client.post("/runs/tiny/export", data=asked).status_code == 400
    assert client.post("/runs/tiny/export", data={"arm": "r4", "strength": "much"}).status_code == 422
    assert not services.workspace.files_dir.exists()


def test_an_unfinished_run_says_what_is_missing(services: Services, client: TestClient) -> None:
    folder = services.workspace.runs_dir / "tiny"
    manifest = json.loads((folder / "manifest.json").read_text())
    for stage in ("diagnose", "report"):
        del manifest["stages"][stage]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in ("diagnosis.json", "report.html", "sweep.parquet"):
        (folder / name).unlink()
    text = client.get("/runs/tiny/result").text
    assert "not diagnosed yet" in text
    assert 'class="whys"' not in text
    assert "/plan?next=" not in text
    assert "/runs/tiny/report" not in text
    (folder / "scores.parquet").unlink()
    manifest["stages"].pop("score")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "No verdict" in (text := client.get("/runs/tiny/result").text)
    assert "not scored yet" in text
    shutil.rmtree(folder / "adapters")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "stages": {}}))
    with pytest.raises(StorageError, match="nothing to report yet"):
        read_result(folder)
    text = client.get("/runs/tiny/result").text
    assert "There is no result yet" in text
    assert 'href="/runs/tiny">Go to the run' in text
    assert client.get("/runs/gone/result").status_code == 404


def test_a_failed_arm_is_shown_as_failed(services: Services, client: TestClient) -> None:
    path = services.workspace.runs_dir / "tiny" / "adapters" / "r8" / "training.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "failed": "the loss was <b>NaN</b> at step 3"}))
    for name in ("scores.parquet", "sweep.parquet", "diagnosis.json"):
        (path.parents[2] / name).unlink()
    text = client.get("/runs/tiny/result").text
    assert "<b>r8</b> failed: the loss was &lt;b&gt;NaN&lt;/b&gt; at step 3" in text
    assert "<option disabled>r8 (failed)</option>" in text
    assert client.post("/runs/tiny/export", data={"arm": "r8"}).status_code == 400


def test_a_command_that_takes_too_long_is_ended(services: Services) -> None:
    with pytest.raises(CommandError, match="took longer"):
        run_command(services.workspace, ["env"], limit_s=0.01)


def test_the_working_folder_holds_no_modules_of_ours(services: Services) -> None:
    folder = services.workspace.folder
    (folder / "lorascope.py").write_text("raise SystemExit('taken for lorascope')")
    (folder / "-x.safetensors").touch()
    assert as_argument(services.workspace, folder / "-x.safetensors") == "./-x.safetensors"
    with pytest.raises(CommandError, match="no study.toml here"):
        run_command(services.workspace, ["next", "runs/no such"])
    assert in_shell(["next", "runs/no such"]) == "lorascope next 'runs/no such'"


def test_names_of_files_say_what_is_in_them(services: Services) -> None:
    workspace = services.workspace
    wish = Export("r 4", "merged-ldm", "best", 0.25, True, True)
    out = wish.out(workspace, "tiny", "my/study")
    assert out == workspace.files_dir / "tiny" / "my_study-r_4-best-strength-0.25-as-lora-merged.safetensors"
    assert wish.arguments(workspace, "tiny", out)[1:5] == [
        "runs/tiny",
        "--arm=r 4",
        "--format=merged-ldm",
        "--checkpoint=best",
    ]
    assert set(results.MERGED) < set(results.FORMAT_WORDS)
    assert plain_stem("...") == "adapter"
