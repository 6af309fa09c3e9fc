"""Make the pocket world: a small Stable Diffusion, a cartoon data set and a scorer.

Command: python -m recipes.pocket --work-dir build/pocket --out src/lorascope/pocket
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.pocket.base import build_pipeline, contact_sheet, draw_prompts, save_base
from recipes.pocket.captions import known_subjects, prompt_of, subject_captions
from recipes.pocket.cartoon import write_cartoon, write_prompts
from recipes.pocket.contrastive import caption_table
from recipes.pocket.config import (
    CARTOON_VENDOR,
    DRAFT_SIZE_PX,
    IMAGE_SIZE_PX,
    SCORER_TEST_VENDOR,
    VENDORS,
    PocketConfig,
)
from recipes.pocket.drawings import draw_all
from recipes.pocket.prompts import ABSTRACT, NORMAL
from recipes.pocket.scorer import save_scorer, train_scorer
from recipes.pocket.text import encode_captions, train_text_encoder
from recipes.pocket.tokenizer import save_tokenizer, train_tokenizer
from recipes.pocket.unet import train_unet
from recipes.pocket.vae import encode_drawings, normalize_latents, reconstruction_l1, save_vae, train_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", default="all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = PocketConfig()

    def log(**record: Any) -> None:
        record["time"] = round(time.time())
        with (args.work_dir / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        print(record, flush=True)

    drawings = draw_all(args.work_dir)
    known = known_subjects(drawings, config.unet)
    split = write_cartoon(drawings, config, NORMAL, args.work_dir, args.out)
    write_prompts(known, NORMAL, ABSTRACT, args.out.parent / "prompts" / "pocket.txt")
    log(stage="cartoon", known=len(known), **{name: len(rows) for name, rows in split.items()})
    if args.stage == "cartoon":
        return
    pixels = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2)
    test_rows = split["test"] + drawings.rows_of((SCORER_TEST_VENDOR,))
    others = tuple(v for v in VENDORS if v not in (SCORER_TEST_VENDOR, CARTOON_VENDOR))
    if args.stage in ("all", "text"):
        subjects = list(drawings.subjects.values())
        captions, fits = caption_table(subjects, config.seed)
        tokenizer = train_tokenizer(captions, config.text.vocab_size)
        index = {subject.id: i for i, subject in enumerate(subjects)}
        text_rows = drawings.rows_of(tuple(v for v in VENDORS if v not in (SCORER_TEST_VENDOR, CARTOON_VENDOR)))
        subject_index = torch.tensor([index[drawings.subject_id[row]] for row in text_rows])
        encoder = train_text_encoder(
            tokenizer, pixels[text_rows], subject_index, captions, fits, config.text, config.seed, args.work_dir, device, log
        )
        save_tokenizer(tokenizer, args.out / "base" / "tokenizer")
        encoder.half().save_pretrained(args.out / "base" / "text_encoder")
        if args.stage == "text":
            return
    if args.stage in ("all", "scorer"):
        subjects = list(drawings.subjects.values())
        captions, fits = caption_table(subjects, config.seed)
        tokenizer = train_tokenizer(captions, config.scorer.vocab_size)
        index = {subject.id: i for i, subject in enumerate(subjects)}
        others = tuple(v for v in VENDORS if v not in (SCORER_TEST_VENDOR, CARTOON_VENDOR))
        scorer_rows = sorted(split["train"] + drawings.rows_of(others))
        subject_index = torch.tensor([index[drawings.subject_id[row]] for row in scorer_rows])
        known_ids = {subject.id for subject in known}
        row_weights = torch.tensor(
            [config.scorer.known_weight if drawings.subject_id[row] in known_ids else 1.0 for row in scorer_rows]
        )
        scorer = train_scorer(
            tokenizer, pixels[scorer_rows], subject_index, row_weights, captions, fits, config.scorer, config.seed,
            args.work_dir, device, log,
        )  # fmt: skip
        save_scorer(scorer, tokenizer, args.out / "scorer")
        if args.stage == "scorer":
            return
    if args.stage in ("all", "vae"):
        others = tuple(v for v in VENDORS if v not in (SCORER_TEST_VENDOR, CARTOON_VENDOR))
        vae_rows = sorted(split["train"] + drawings.rows_of(others))
        vae = train_vae(pixels[vae_rows], config.vae, config.seed, args.work_dir, device, log)
        normalize_latents(vae, encode_drawings(vae, pixels[drawings.rows_of(config.unet.vendors)], device))
        log(stage="vae", test_l1=reconstruction_l1(vae, pixels[test_rows], device))
        save_vae(vae, args.out / "base" / "vae")
        if args.stage == "vae":
            return
    base = args.out / "base"
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval()
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    known_ids = {subject.id: i for i, subject in enumerate(known)}
    unet_rows = [row for row in drawings.rows_of(config.unet.vendors) if drawings.subject_id[row] in known_ids]
    subject_index = torch.tensor([known_ids[drawings.subject_id[row]] for row in unet_rows])
    latents = {
        size // 4: encode_drawings(vae, _resized(pixels[unet_rows], size), device)
        for size in (DRAFT_SIZE_PX, IMAGE_SIZE_PX)
    }
    captions = [caption for subject in known for caption in subject_captions(subject, config.seed)]
    states = encode_captions(encoder, tokenizer, captions, device).unflatten(0, (len(known), -1))
    empty_state = encode_captions(encoder, tokenizer, [""], device)[0]
    log(stage="unet", subjects=len(known), drawings=len(unet_rows),
        latent_std={size: [round(float(x), 3) for x in z.std((0, 2, 3))] for size, z in latents.items()})
    by_name = {subject.name: subject for subject in known}
    prompts = [prompt_of(by_name[name]) for name in NORMAL]
    for samples, average in train_unet(
        latents, subject_index, states, empty_state, config.unet, config.text, config.seed, args.work_dir, device, log
    ):
        pipeline = build_pipeline(vae, encoder, tokenizer, average.eval())
        size_px = DRAFT_SIZE_PX if samples <= config.unet.draft_samples else IMAGE_SIZE_PX
        sheet = contact_sheet(draw_prompts(pipeline, prompts, config.seed, size_px), 13, 64)
        sheet.save(args.work_dir / f"sheet-{samples:07d}.png")
        save_base(pipeline, base)


def _resized(pixels: torch.Tensor, size_px: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 averaged down to `size_px`."""
    return F.avg_pool2d(pixels.float(), pixels.shape[-1] // size_px).round().to(torch.uint8)


if __name__ == "__main__":
    main()
