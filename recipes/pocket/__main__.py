"""Make the pocket world: a small Stable Diffusion, a cartoon data set and a scorer.

Command:  python -m recipes.pocket --work-dir build/pocket --out src/lorascope/pocket
Time:     about 3 hours on one busy CPU core with bf16 matrix units (VAE 17, text encoder 8, U-Net 86,
          scorer 69 minutes); `--preset cpu-longer --stages unet evaluate` after it 2 h 15 min more.
          `--preset gpu` trains on more drawings for longer and has not been run.
Score:    R@5 among 100 captions: scorer 0.76 (aim 0.9), base 0.85 and after `cpu-longer` 0.95 (aim 0.8);
          EXPERIMENTS.md has the rest.

Interrupted, the same command goes on from the last checkpoint in the work directory.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from recipes.pocket.base import build_pipeline, contact_sheet, draw_prompts, save_base
from recipes.pocket.captions import known_subjects, prompt_of, subject_captions
from recipes.pocket.cards import write_cards
from recipes.pocket.cartoon import write_cartoon, write_prompts
from recipes.pocket.checkpoint import save_half
from recipes.pocket.config import (
    CARTOON_VENDOR,
    CPU,
    CPU_LONGER,
    DRAFT_SIZE_PX,
    GPU,
    IMAGE_SIZE_PX,
    SCORER_TEST_VENDOR,
    VENDORS,
    PocketConfig,
)
from recipes.pocket.contrastive import caption_table
from recipes.pocket.drawings import Drawings, Subject, draw_all
from recipes.pocket.evaluate import (
    choose_subjects,
    samples_seen,
    score_drawings,
    score_images,
    seconds_spent,
)
from recipes.pocket.prompts import ABSTRACT, NORMAL
from recipes.pocket.scorer import save_scorer, train_scorer
from recipes.pocket.text import encode_captions, train_text_encoder
from recipes.pocket.tokenizer import save_tokenizer, train_tokenizer
from recipes.pocket.unet import train_unet
from recipes.pocket.vae import encode_drawings, normalize_latents, reconstruction_l1, train_vae

OTHER_VENDORS = tuple(vendor for vendor in VENDORS if vendor not in (SCORER_TEST_VENDOR, CARTOON_VENDOR))
PRESETS = {"cpu": CPU, "cpu-longer": CPU_LONGER, "gpu": GPU}
STAGES = ("data", "vae", "text", "scorer", "unet", "evaluate")


@dataclass(frozen=True)
class World:
    """What every stage needs: settings, places, drawings and their split."""

    config: PocketConfig
    work_dir: Path
    out_dir: Path
    device: torch.device
    log: Callable[..., None]
    drawings: Drawings
    pixels: Tensor  # (N, 3, 64, 64) uint8
    known: list[Subject]
    split: dict[str, list[int]]

    def subject_index(self, rows: list[int]) -> Tensor:
        """The place of each row's subject among all subjects."""
        place = {subject_id: i for i, subject_id in enumerate(self.drawings.subjects)}
        return torch.tensor([place[self.drawings.subject_id[row]] for row in rows])


def main() -> None:
    """Run the chosen stages in order."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m recipes.pocket",
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="downloads, checkpoints, metrics.jsonl, sheets"
    )
    parser.add_argument("--out", type=Path, required=True, help="the package's pocket folder")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: gpu where there is one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = PRESETS[args.preset or ("gpu" if device.type == "cuda" else "cpu")]
    args.work_dir.mkdir(parents=True, exist_ok=True)

    def log(**record: Any) -> None:
        line = json.dumps({**record, "time": round(time.time())})
        with (args.work_dir / "metrics.jsonl").open("a") as stream:
            stream.write(line + "\n")
        print(line, flush=True)

    drawings = draw_all(args.work_dir)
    known = known_subjects(drawings, config.unet)
    split = write_cartoon(drawings, config, NORMAL, args.work_dir, args.out)
    write_prompts(known, NORMAL, ABSTRACT, args.out.parent / "evaluation" / "prompt_lists" / "pocket.txt")
    pixels = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2)
    world = World(config, args.work_dir, args.out, device, log, drawings, pixels, known, split)
    log(stage="data", known=len(known), **{name: len(rows) for name, rows in split.items()})
    if "vae" in args.stages:
        make_vae(world)
    if "text" in args.stages:
        make_text_encoder(world)
    if "scorer" in args.stages:
        make_scorer(world)
    if "unet" in args.stages:
        make_unet(world)
    if "evaluate" in args.stages:
        evaluate(world)


def make_vae(world: World) -> None:
    """Train the autoencoder on all vendors but EmojiOne, and of the cartoon its training rows only."""
    config, drawings = world.config, world.drawings
    rows = sorted(world.split["train"] + drawings.rows_of(OTHER_VENDORS))
    vae = train_vae(world.pixels[rows], config.vae, config.seed, world.work_dir, world.device, world.log)
    latents = encode_drawings(vae, world.pixels[drawings.rows_of(config.unet.vendors)], world.device)
    normalize_latents(vae, latents.to(world.device))
    save_half(vae, world.out_dir / "base" / "vae")


def make_text_encoder(world: World) -> None:
    """Train the base's tokenizer and text encoder on all vendors but EmojiOne and the cartoon."""
    config, drawings = world.config, world.drawings
    captions, fits = caption_table(list(drawings.subjects.values()), config.seed)
    tokenizer = train_tokenizer(captions, config.text.vocab_size)
    rows = drawings.rows_of(OTHER_VENDORS)
    encoder = train_text_encoder(
        tokenizer, world.pixels[rows], world.subject_index(rows), captions, fits, config.text, config.seed,
        world.work_dir, world.device, world.log,
    )  # fmt: skip
    save_tokenizer(tokenizer, world.out_dir / "base" / "tokenizer")
    save_half(encoder, world.out_dir / "base" / "text_encoder")


def make_scorer(world: World) -> None:
    """Train the scorer on all vendors but EmojiOne, and of the cartoon its training rows only."""
    config, drawings = world.config, world.drawings
    captions, fits = caption_table(list(drawings.subjects.values()), config.seed)
    tokenizer = train_tokenizer(captions, config.scorer.vocab_size)
    rows = sorted(world.split["train"] + drawings.rows_of(OTHER_VENDORS))
    known_ids = {subject.id for subject in world.known}
    weights = [config.scorer.known_weight if drawings.subject_id[row] in known_ids else 1.0 for row in rows]
    scorer = train_scorer(
        tokenizer, world.pixels[rows], world.subject_index(rows), torch.tensor(weights), captions, fits,
        config.scorer, config.seed, world.work_dir, world.device, world.log,
    )  # fmt: skip
    save_scorer(scorer, tokenizer, world.out_dir / "scorer")


def make_unet(world: World) -> None:
    """Train the denoiser; at every checkpoint, draw the normal prompts and replace the base's folder."""
    config, drawings, device = world.config, world.drawings, world.device
    base_dir = world.out_dir / "base"
    vae, encoder, tokenizer = _load_frozen_parts(base_dir)
    place = {subject.id: i for i, subject in enumerate(world.known)}
    rows = [row for row in drawings.rows_of(config.unet.vendors) if drawings.subject_id[row] in place]
    subject_index = torch.tensor([place[drawings.subject_id[row]] for row in rows])
    latents = {
        size_px // 4: encode_drawings(vae, _resized(world.pixels[rows], size_px), torch.device("cpu"))
        for size_px in (DRAFT_SIZE_PX, IMAGE_SIZE_PX)
    }
    captions = [caption for subject in world.known for caption in subject_captions(subject, config.seed)]
    states = encode_captions(encoder, tokenizer, captions, torch.device("cpu")).unflatten(
        0, (len(world.known), -1)
    )
    empty_state = encode_captions(encoder, tokenizer, [""], torch.device("cpu"))[0]
    world.log(stage="unet", subjects=len(world.known), drawings=len(rows))
    vae.to(device)
    encoder.to(device)
    by_name = {subject.name: subject for subject in world.known}
    prompts = [prompt_of(by_name[name]) for name in NORMAL]
    start = UNet2DConditionModel.from_pretrained(base_dir / "unet") if config.unet.goes_on else None
    for samples, average in train_unet(
        latents,
        subject_index,
        states,
        empty_state,
        config.unet,
        config.text,
        config.seed,
        world.work_dir,
        device,
        world.log,
        start,
    ):
        pipeline = build_pipeline(vae, encoder, tokenizer, average.eval())
        size_px = DRAFT_SIZE_PX if samples <= config.unet.draft_samples else IMAGE_SIZE_PX
        sheet = contact_sheet(draw_prompts(pipeline, prompts, config.seed, size_px), 13, IMAGE_SIZE_PX)
        sheet.save(world.work_dir / f"sheet-{samples:07d}.png")
        save_base(pipeline, base_dir)


def evaluate(world: World) -> None:
    """Measure the folders as they are on disk, and write `quality.json`, cards and contact sheets."""
    config = world.config
    subjects = choose_subjects(world.known, NORMAL)
    scorer_dir = world.out_dir / "scorer"
    scorer = CLIPModel.from_pretrained(scorer_dir, dtype=torch.float32).eval()
    scorer_tokenizer = CLIPTokenizer.from_pretrained(scorer_dir)
    scorer_r1, scorer_r5 = score_drawings(
        scorer, scorer_tokenizer, world.drawings, SCORER_TEST_VENDOR, subjects
    )
    vae = AutoencoderKL.from_pretrained(world.out_dir / "base" / "vae", torch_dtype=torch.float32).eval()
    test_rows = world.split["test"] + world.drawings.rows_of((SCORER_TEST_VENDOR,))
    vae_l1 = reconstruction_l1(vae, world.pixels[test_rows], torch.device("cpu"))
    pipeline = StableDiffusionPipeline.from_pretrained(world.out_dir / "base", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = draw_prompts(pipeline, [prompt_of(subject) for subject in subjects], config.seed, IMAGE_SIZE_PX)
    contact_sheet(images, 10, IMAGE_SIZE_PX).save(world.work_dir / "sheet-known.png")
    abstract = draw_prompts(pipeline, list(ABSTRACT), config.seed, IMAGE_SIZE_PX)
    contact_sheet(abstract, 5, IMAGE_SIZE_PX).save(world.work_dir / "sheet-abstract.png")
    base_r1, base_r5 = score_images(scorer, scorer_tokenizer, images, subjects)
    records = [json.loads(line) for line in (world.work_dir / "metrics.jsonl").read_text().splitlines()]
    quality = {
        "scorer_r1": round(scorer_r1, 3),
        "scorer_r5": round(scorer_r5, 3),
        "base_r1": round(base_r1, 3),
        "base_r5": round(base_r5, 3),
        "num_captions": len(subjects),
        "scorer_test": f"{SCORER_TEST_VENDOR} drawings, a vendor that the scorer never saw",
        "base_test": "one image per subject at 30 DDIM steps, guidance 7.5, judged by the scorer",
        "vae_l1": round(vae_l1, 4),
        "unet_params": sum(p.numel() for p in pipeline.unet.parameters()),
        "scorer_params": sum(p.numel() for p in scorer.parameters()),
        "known_subjects": len(world.known),
        "samples": samples_seen(records),
        "seconds": seconds_spent(records),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "config": asdict(config),
    }
    (world.out_dir / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    world.log(
        stage="evaluate", **{key: quality[key] for key in ("scorer_r1", "scorer_r5", "base_r1", "base_r5")}
    )
    write_cards(world.out_dir, quality)


def _load_frozen_parts(base_dir: Path) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    vae = AutoencoderKL.from_pretrained(base_dir / "vae", torch_dtype=torch.float32).eval()
    encoder = CLIPTextModel.from_pretrained(base_dir / "text_encoder", dtype=torch.float32).eval()
    return vae, encoder, CLIPTokenizer.from_pretrained(base_dir / "tokenizer")


def _resized(pixels: Tensor, size_px: int) -> Tensor:
    """(N, 3, H, W) uint8 averaged down to `size_px`."""
    return F.avg_pool2d(pixels.float(), pixels.shape[-1] // size_px).round().to(torch.uint8)


if __name__ == "__main__":
    main()
