"""The compare page: grids of pictures, blind votes without JavaScript, and prompts of one's own."""

import html
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.testclient import TestClient

from lorascope.errors import ConfigError
from lorascope.evaluation.scores import read_scores, write_scores
from lorascope.run_folder import RunDir
from lorascope.web.compare import MAX_COLUMNS, Choice, Pictures
from lorascope.web.compare_page import strengths_of
from lorascope.web.services import Services
from lorascope.web.votes import read_votes


def folder(services: Services) -> Path:
    return services.workspace.runs_dir / "tiny"


def add_previews(run: Path, arms: dict[str, int]) -> None:
    """Previews of two prompts after every epoch, `arms` says of how many."""
    for arm, epochs in {"base": 0, **arms}.items():
        for epoch in range(1, epochs + 1) if epochs else [0]:
            for name in ("normal-000-0.png", "abstract-001-0.png"):
                place = RunDir(run).preview_path(arm, epoch, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(run / "images" / "base" / name, place)


def test_all_arms_at_strength_1_with_their_scores(services: Services) -> None:
    grid = Pictures(services.runs, "tiny").grid(Choice())
    assert [column.key for column in grid.columns] == ["base", "r4", "r8"]
    assert grid.ways[:2] == ("arms", "strengths")
    assert (grid.seeds, grid.seed) == ((0, 1), 0)
    assert [row.prompt for row in grid.rows] == ["picture 1 of blocks", "red", "blue", "luck", "joy"]
    scored = read_scores(RunDir(folder(services))).rows
    scores = {row.image: row.clip_score for row in scored if row.kind == "arm"}
    # The base's pictures are scored against others' prompts too, as a null.
    assert {row.image for row in scored if row.kind != "arm"} & scores.keys()
    for row in grid.rows:
        for cell in row.cells.values():
            assert cell.score == scores[cell.path] and cell.path.endswith("-0.png")
    mean = sum(scores[row.cells["r4"].path] for row in grid.rows) / 5
    assert grid.mean("r4") == pytest.approx(mean)
    other = Pictures(services.runs, "tiny").grid(Choice(seed=1, columns=("r8",)))
    assert other.seed == 1 and [column.key for column in other.columns] == ["base", "r8"]


def test_strengths_of_one_arm_from_the_sweep(services: Services) -> None:
    grid = Pictures(services.runs, "tiny").grid(Choice("strengths", "r8"))
    assert [column.name for column in grid.columns] == ["base", "strength 0.5", "strength 1"]
    assert grid.column("s0.5").full == "r8 at 0.5"  # type: ignore[union-attr]
    paths = [grid.rows[0].cells[column.key].path for column in grid.columns]
    assert paths[0].startswith("sweep/base/last-s0.00-") and paths[1].startswith("sweep/r8/last-s0.50-")
    assert all((folder(services) / path).is_file() for path in paths)


def test_epochs_of_one_arm_and_all_arms_at_one_epoch(services: Services) -> None:
    add_previews(folder(services), {"r4": 3, "r8": 2})
    grid = Pictures(services.runs, "tiny").grid(Choice("epochs", "r4"))
    assert [column.name for column in grid.columns][:4] == ["base", "epoch 1", "epoch 2", "epoch 3"]
    assert [row.prompt for row in grid.rows] == ["picture 1 of blocks", "joy"]
    assert grid.rows[0].cells["e2"].path == "previews/r4/epoch-0002/normal-000-0.png"
    steps = Pictures(services.runs, "tiny").grid(Choice("steps", epoch=3))
    assert steps.epochs == (1, 2, 3) and [column.key for column in steps.columns] == ["base", "r4", "r8"]
    cells = steps.rows[0].cells
    assert cells["r4"].path == "previews/r4/epoch-0003/normal-000-0.png"
    assert cells["r8"].path == "previews/r8/epoch-0002/normal-000-0.png", "it ended earlier"
    assert sorted(cells["r4"].steps) == [1, 2, 3] and steps.column("r4").full == "r4 after epoch 3"  # type: ignore[union-attr]


def test_before_the_scores_prompts_come_from_the_pictures(services: Services) -> None:
    run = folder(services)
    for name in ("scores.parquet", "sweep.parquet"):
        (run / name).unlink()
    grid = Pictures(services.runs, "tiny").grid(Choice("strengths"))
    assert grid.by == "arms" and [row.prompt for row in grid.rows][:2] == ["picture 1 of blocks", "red"]
    assert grid.mean("r4") is None
    shutil.rmtree(run / "images")
    assert Pictures(services.runs, "tiny").grid(Choice()).rows == ()


def test_a_damaged_score_file_is_told_and_the_pictures_stay(services: Services, client: TestClient) -> None:
    (folder(services) / "scores.parquet").write_bytes(b"no parquet")
    text = client.get("/runs/tiny/compare").text
    assert "not a readable score file" in text and text.count('class="look"') == 15


def test_the_page_shows_every_picture_lazily_and_hostile_prompts_as_text(
    services: Services, client: TestClient
) -> None:
    run = RunDir(folder(services))
    scores = read_scores(run)
    hostile = '"><script>alert(1)</script>\x1b[31m'
    rows = tuple(
        replace(row, prompt=hostile) if (row.category, row.prompt_index) == ("normal", 2) else row
        for row in scores.rows
    )
    write_scores(run, replace(scores, rows=rows))
    text = client.get("/runs/tiny/compare").text
    assert "<script>alert" not in text and "\x1b" not in text and "&lt;script&gt;alert(1)" in text
    looks = re.findall(r'<a class="look" href="([^"]+)"', text)
    assert len(looks) == 15 and text.count('loading="lazy"') == 15
    answer = client.get(html.unescape(looks[4]))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert client.get("/runs/none/compare").status_code == 404


def test_50_prompts_by_12_columns_are_quick(services: Services, client: TestClient) -> None:
    run = folder(services)
    shutil.rmtree(run / "images")
    for name in ("scores.parquet", "sweep.parquet"):
        (run / name).unlink()
    text = (run / "study.toml").read_text()
    ranks = [4, 8, *range(9, 19)]
    (run / "study.toml").write_text(re.sub(r"rank = \[[^\]]*\]", f"rank = {ranks}", text))
    info = PngInfo()
    info.add_itxt("prompt", "a prompt")
    for arm in ("base", *(f"r{rank}" for rank in ranks)):
        (run / "images" / arm).mkdir(parents=True)
        for index in range(50):
            Image.new("RGB", (4, 4)).save(run / "images" / arm / f"normal-{index:03d}-0.png", pnginfo=info)
    client.get("/runs/tiny/compare")
    started = time.perf_counter()
    text = client.get("/runs/tiny/compare").text
    assert time.perf_counter() - started < 1
    assert text.count('class="look"') == 50 * (MAX_COLUMNS + 1)
    assert text.count('name="column"') == 12


# -- votes ---------------------------------------------------------------------------------------------------


def begin(client: TestClient, **changed: str) -> str:
    data = {"by": "arms", "arm": "r4", "noise": "0", "epoch": "0", "a": "r4", "b": "base", "count": "5"}
    answer = client.post("/runs/tiny/compare/vote/begin", data={**data, **changed})
    assert answer.status_code == 303
    return str(answer.headers["location"])


def form_of(text: str) -> dict[str, str]:
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', text))


def test_a_vote_by_forms_alone_is_blind_kept_at_once_and_told_with_the_scores(
    services: Services, client: TestClient
) -> None:
    address, votes_file = begin(client), folder(services) / "votes.jsonl"
    for number, word in enumerate(("left", "right", "tie", "left", "left")):
        text = client.get(address).text
        assert f"{number + 1} of 5" in text
        for picture in re.findall(r'<img src="([^"]+)"', text):
            assert "images" not in picture and "path" not in picture
            assert client.get(html.unescape(picture)).content[:4] == b"RIFF"
        sent = {**form_of(text), "answer": word}
        assert client.post("/runs/tiny/compare/vote", data=sent).headers["location"] == address
        client.post("/runs/tiny/compare/vote", data=sent)  # sent again, as after a crash
        assert len(read_votes(votes_file)[0]) == number + 1
    text = client.get(address).text
    [first, *_] = votes = read_votes(votes_file)[0]
    assert {first.left, first.right} == {"r4", "base"} and f"/{first.left}/" in first.left_picture
    wins = sum(vote.preferred == "r4" for vote in votes)
    for page in (text, client.get("/runs/tiny/compare").text):
        assert f"r4 was preferred in {wins} of 4 votes without a tie" in page
        assert "exact binomial 95 % interval" in page and "on the same 5 prompts" in page


def test_a_stopped_vote_goes_on_where_it_stopped(client: TestClient) -> None:
    address = begin(client)
    client.post("/runs/tiny/compare/vote", data={**form_of(client.get(address).text), "answer": "tie"})
    stopped = client.get(f"{address}&stop=1").text
    assert "The one vote was a tie." in stopped and "Go on voting" in stopped
    assert "2 of 5" in client.get(address).text


def test_what_cannot_be_voted_on_is_one_line(client: TestClient) -> None:
    data = {"by": "arms", "arm": "r4", "noise": "0", "epoch": "0", "a": "r4", "b": "r4", "count": "5"}
    answer = client.post("/runs/tiny/compare/vote/begin", data=data)
    assert answer.status_code == 400 and "two different columns" in answer.text
    answer = client.post("/runs/tiny/compare/vote/begin", data={**data, "b": "r5"})
    assert answer.status_code == 404 and "no such column" in answer.text
    address = begin(client)
    wrong = {**form_of(client.get(address).text), "answer": "both"}
    assert client.post("/runs/tiny/compare/vote", data=wrong).status_code == 400
    assert client.get(f"{address.replace('/vote?', '/vote/picture?')}&index=9").status_code == 404
    del client.headers["x-csrf-token"]
    assert client.post("/runs/tiny/compare/vote/begin", data=data).status_code == 403


# -- prompts of one's own ------------------------------------------------------------------------------------


def test_a_prompt_of_ones_own_is_drawn_by_the_command_that_the_page_shows(
    services: Services, client: TestClient
) -> None:
    sent = {"prompt": "--json red's", "arm": ["r4"], "strengths": "0.5, 1", "seed": "3"}
    answer = client.post("/runs/tiny/compare/try", data=sent, headers={"hx-request": "true"})
    assert "lorascope draw runs/tiny" in html.unescape(answer.text) and 'hx-trigger="every 2s"' in answer.text
    [job] = services.queue.jobs()
    assert (job.kind, job.run, job.is_open) == ("draw", "tiny", True)
    assert services.queue.last_of("tiny") is None, "a study's state is not a try's"
    seen = re.search(r"seen=(\w+)", answer.text)[1]  # type: ignore[index]
    give_up = time.monotonic() + 60
    while services.queue.job(job.id).is_open and time.monotonic() < give_up:
        services.supervisor.look()
        time.sleep(0.2)
    assert services.queue.job(job.id).state == "done", services.supervisor.log_tail(job.id)
    found = client.get(f"/runs/tiny/compare/tries?seen={seen}").text
    assert "hx-trigger" not in found and html.unescape(found).count("--json red's") >= 1
    assert [name for name in ("base", "r4 at 0.5", "r4 at 1") if f"<b>{name}</b>" in found] == [
        "base",
        "r4 at 0.5",
        "r4 at 1",
    ]
    picture = html.unescape(re.findall(r'<img src="([^"]+)"', found)[0])
    assert client.get(picture).content[:4] == b"RIFF"
    assert "--json red" in client.get("/runs/tiny/compare").text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": " "}, "holds no words"),
        ({"arm": []}, "no arm was chosen"),
        ({"strengths": "much"}, "are no numbers"),
        ({"strengths": ","}, "give 1 to 8 numbers"),
        ({"strengths": "3"}, "must be from 0"),
        ({"arm": ["r5"]}, "is no arm of tiny"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_waits(
    services: Services, client: TestClient, changed: dict[str, object], words: str
) -> None:
    sent = {"prompt": "red", "arm": ["r4"], "strengths": "1", **changed}
    answer = client.post("/runs/tiny/compare/try", data=sent)  # type: ignore[arg-type]
    assert answer.status_code in (400, 404) and words in html.unescape(answer.text)
    assert services.queue.jobs() == []


def test_strengths_are_a_few_numbers() -> None:
    assert strengths_of(" 0.6,1 ,0.25") == [0.6, 1.0, 0.25]
    for text in ("", "a", "1;2", "1 " * 9):
        with pytest.raises(ConfigError):
            strengths_of(text)


def test_nothing_is_tried_before_training_has_ended(services: Services, client: TestClient) -> None:
    (folder(services) / "manifest.json").unlink()
    assert "Try a prompt" not in client.get("/runs/tiny/compare").text
    answer = client.post("/runs/tiny/compare/try", data={"prompt": "red", "arm": ["r4"]})
    assert answer.status_code == 400 and "no training has ended" in answer.text


def test_a_failed_try_is_told_with_its_command(services: Services, client: TestClient) -> None:
    job = services.queue.add("draw", "tiny", ["draw", "runs/tiny", "--prompt=red"], "tiny")
    services.queue.change(job.id, state="failed", message="out of memory", ended=1.0)
    text = client.get("/runs/tiny/compare/tries").text
    assert "out of memory" in text and "lorascope draw runs/tiny --prompt=red" in text
    stamp = re.search(r"seen=(\w+)", text)[1]  # type: ignore[index]
    assert client.get(f"/runs/tiny/compare/tries?seen={stamp}").status_code == 204


def test_the_styles_of_all_pages_are_whole(client: TestClient) -> None:
    """A brace that is left out hides every rule after it, of every page."""
    text = client.get("/static/web.css").text
    depths = [text[:end].count("{") - text[:end].count("}") for end in range(0, len(text), 50)]
    assert text.count("{") == text.count("}") and max(depths) <= 2 and min(depths) >= 0
