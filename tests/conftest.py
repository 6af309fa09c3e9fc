"""Tiny real models and data: the same classes as Stable Diffusion v1.5, small enough to run in
milliseconds.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process here and those it starts: pytest runs several
for variable in [name for name in os.environ if name.startswith("LORASCOPE_")]:
    del os.environ[variable]

import gc
import hashlib
import io
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from bench_entries import PEERS_DIR
from lorascope.base.loading import Base, load_base
from lorascope.base.saving import save_ldm
from lorascope.bench.entries import Conditions
from lorascope.config import load_study
from lorascope.data.encoding import Encoded
from lorascope.machine.facts import package_version
from lorascope.machine.threads import limited_threads
from lorascope.sections import BaseSection
from lorascope.seeding import seeded
from lorascope.study import Study

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


_PINNED = Path(__file__).parents[1] / "constraints.txt"
_PINNED_PYTHON = (3, 11)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors under the pinned versions: others may warn of what nobody here has met."""
    pins = [line.partition("==") for line in _PINNED.read_text().splitlines() if "==" in line]
    others = [
        name
        for name, _, pin in pins
        if (found := package_version(name)) is not None and found.partition("+")[0] != pin.strip()
    ]
    if not others and sys.version_info[:2] == _PINNED_PYTHON:
        config.getini("filterwarnings").insert(0, "error")


# Files that take a minute or so. They go first, so that no process is left with one of them at the end.
_LONG = (
    "test_resuming",
    "test_pretended_cuda",
    "test_wheel",
    "test_study",
    "test_step",
    "test_run",
    "test_group",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Leave what is imported and collected out of every later garbage collection: it stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """Killed processes lose nothing that they wrote; only a machine that goes down would."""
    sync = os.fsync
    os.fsync = os.fstat  # type: ignore[assignment]  # complains of a closed file too
    yield
    os.fsync = sync


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """What a test made of the number of threads is of no concern to the next one."""
    yield
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _has_bf16_attention() -> bool:
    """Whether torch's own attention takes bf16 here, at lengths of images.

    By one thread: processes are forked from one that has imported this, and a pool would be lost to them.
    """
    query = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)
    try:
        with limited_threads(1):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
    except RuntimeError:
        return False
    return True


needs_bf16_attention = pytest.mark.skipif(
    not _has_bf16_attention(),
    reason="torch refuses bf16 attention where ATEN_CPU_CAPABILITY hides AVX-512 and oneDNN still sees AMX",
)


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the 256 bytes, alone and at the end of a word."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(b) for b in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    tokens = [*characters, *[c + "</w>" for c in characters], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def make_text_config(num_layers: int) -> CLIPTextConfig:
    """A small CLIP text tower for `make_tokenizer`'s vocabulary."""
    tokens = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return CLIPTextConfig(
        **tokens, hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=2
    )


def make_vae() -> AutoencoderKL:
    """A small autoencoder with random weights: 4 pixels a latent position, 4 channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.0,
    )


def make_pipeline_folder(folder: Path, seed: int = 0, **unet_config: Any) -> Path:
    """A complete Stable Diffusion pipeline folder with random weights; `unet_config` changes its U-Net's."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text = make_text_config(num_layers=2)
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**config | unet_config)
    vae = make_vae()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_scorer_folder(folder: Path) -> Path:
    """A CLIP model and processor folder with random weights."""
    torch.manual_seed(7)
    text = make_text_config(num_layers=1)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    ).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, make_tokenizer()).save_pretrained(folder)
    return folder


def make_pictures(count: int, seed: int = 0, side: int = 40) -> list[tuple[bytes, str]]:
    """PNG bytes and captions of distinct blocky pictures."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        blocks = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(buffer, format="PNG")
        rows.append((buffer.getvalue(), f"picture {index} of blocks"))
    return rows


def write_parquet(path: Path, rows: list[tuple[bytes, str]]) -> Path:
    """Rows in the layout of hub data sets: an image struct and a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "image": [{"bytes": picture, "path": None} for picture, _ in rows],
            "text": [text for _, text in rows],
        }
    )
    pq.write_table(table, path)
    return path


def make_study(study_file: Path, folder: Path, *overrides: str) -> Study:
    config = load_study(study_file, overrides=overrides, environment={})
    return Study(config, folder, cache_dir=study_file.parent / "cache")


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of everything that must not depend on interruptions."""
    paths = [
        *run.glob("adapters/**/adapter_*"),
        *run.glob("images/**/*.png"),
        *run.glob("previews/**/*.png"),
        *run.glob("sweep/**/*.png"),
        run / "sweep.parquet",
        *run.glob("copying/*.png"),
        run / "copying.json",
        run / "diagnosis.json",
        run / "scores.parquet",
        run / "metrics.jsonl",
        run / "data.json",
    ]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.exists()
    }


def run_unreported(study: Study) -> None:
    """All stages but the report, whose figures take as long as a tiny study's steps."""
    with study.working("test"):
        for stage in (
            study.check_inputs,
            study.prepare_data,
            study.encode,
            study.train,
            study.sample,
            study.check_merge,
            study.score,
            study.diagnose,
        ):
            stage()


def train_only(study: Study) -> Path:
    with study.working("test"):
        for stage in (study.prepare_data, study.encode, study.train):
            stage()
    return study.run_dir.path


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder; never write into it."""
    return make_pipeline_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP folder; never write into it."""
    return make_scorer_folder(tmp_path_factory.mktemp("scorers") / "scorer")


@pytest.fixture(scope="session")
def conditions(pipeline_folder: Path) -> Conditions:
    """A benchmark's, on the tiny base."""
    return Conditions(str(pipeline_folder), 64, 4, "cpu", 1, str(PEERS_DIR))


@pytest.fixture(scope="session")
def workload(conditions: Conditions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the benchmark's entries read; never write into it."""
    from lorascope.bench.entry import prepare_workload

    folder = tmp_path_factory.mktemp("workload")
    prepare_workload(conditions, folder)
    return folder


@pytest.fixture
def forked_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's processes are forked from one that has the libraries: many are started in its tests,
    and peak memory is of no account there.
    """
    monkeypatch.setattr("lorascope.bench.entry._START_METHOD", "forkserver")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["lorascope.bench.entry"])


@pytest.fixture
def base(pipeline_folder: Path) -> Base:
    """The tiny base, loaded by the real loader."""
    return load_base(BaseSection(model=str(pipeline_folder)), torch.device("cpu"))


@pytest.fixture
def own_copy(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Stable Diffusion folder, to write into."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))


@pytest.fixture
def checkpoint(base: Base, tmp_path: Path) -> Path:
    """The tiny base as one checkpoint file in fp32."""
    save_ldm(base, tmp_path / "base.safetensors", torch.float32)
    return tmp_path / "base.safetensors"


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path) -> None:
    """The tiny base's configurations in place of SD v1.5's in the package."""
    for module in ("configs", "saving"):
        monkeypatch.setattr(f"lorascope.base.{module}.SD15_DIR", pipeline_folder)


@pytest.fixture
def exact_base(base: Base) -> Base:
    """The same tiny base, computing in float64, for tests that two ways of computing are one: they differ by
    1e-13 whatever kernels a processor has, and fp32 adapters and losses round both alike.
    """
    for part in (base.unet, base.text_encoder, base.vae):
        part.double()
    return base


@pytest.fixture
def pictures(base: Base) -> Encoded:
    """Ten encoded pictures with five captions, made up."""
    generator = seeded("pictures")
    states = base.encode_text(["", *[f"picture {index}" for index in range(5)]])
    mean = torch.randn(10, 4, 8, 8, generator=generator)
    std = torch.rand(10, 4, 8, 8, generator=generator) * 0.1
    return Encoded(
        latents=tuple(torch.stack([mean, std], dim=1).unsqueeze(1)),
        captions=tuple(f"picture {index % 5}" for index in range(10)),
        digests=tuple(f"{index:064x}" for index in range(10)),
        repeats=(1,) * 10,
        caption_index=torch.arange(10) % 5 + 1,
        text_states=states.clone(),
    )


@pytest.fixture(scope="session")
def picture_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty captioned pictures in one Parquet file."""
    return write_parquet(tmp_path_factory.mktemp("pictures") / "pictures.parquet", make_pictures(20))


@pytest.fixture(scope="session")
def study_file(
    pipeline_folder: Path,
    scorer_folder: Path,
    picture_parquet: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "prompts.txt").write_text("[normal]\npicture 1 of blocks\nred\nblue\n[abstract]\nluck\njoy\n")
    path = folder / "tiny.toml"
    path.write_text(
        f"""
        base.model = "{pipeline_folder}"
        data = {{ source = "{picture_parquet}", resolution_px = 32, heldout_share = 0.2 }}
        arms = [{{ rank = [4, 8], alpha_per_rank = 2, lr = 1e-3 }}]
        train = {{ epochs = 3, checkpoint_every_steps = 2, num_probe = 4 }}
        sample = {{ prompts = "{folder / "prompts.txt"}", steps = 2, seeds = [0, 1], batch_size = 9 }}
        score = {{ model = "{scorer_folder}", resamples = 200 }}
        diagnose = {{ strengths = [0.5, 1.0], num_prompts = 2, steps = 2, num_guidance_prompts = 1 }}
        """
    )
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def finished(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; never write into it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    make_study(study_file, run).run()
    return run
