"""Sampling: equal to diffusers' own pipeline, paired noise, PNG text chunks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm, Kind
from lorascope.base.loading import Base
from lorascope.errors import RunError, StorageError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import (
    Job,
    Painter,
    PictureWriter,
    batches_of,
    denoise,
    draw_all,
    draw_pictures,
    initial_noise,
    latent_shape_of,
    plan_jobs,
    save_picture,
)
from lorascope.machine.threads import limited_threads
from lorascope.sections import REFERENCE_TARGETS, SampleSection

PROMPTS = [Prompt("normal", 0, "a rocket"), Prompt("abstract", 0, "luck, 幸運")]
ARM = Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)
# fp32: 1.2e-7 * sqrt(300) products summed in another order, through 12 layers, times guidance: 4e-5 of values
# about 1.
DRAWN = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def bank(base: Base) -> AdapterBank:
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [ARM])
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return bank


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_base_row_equals_diffusers_own_pipeline(
    base: Base, bank: AdapterBank, scheduler: str, guidance: float
) -> None:
    section = SampleSection(steps=4, guidance=guidance, scheduler=scheduler)  # type: ignore[arg-type]
    jobs = plan_jobs(PROMPTS, [3])
    shape = latent_shape_of(base, 32)
    bank.attach()
    _, ours = draw_pictures(base, bank, [Slice(0, 0.0), Slice(0)], jobs, shape, section)
    bank.detach()
    pipeline = StableDiffusionPipeline.from_pretrained(base.folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    other = {"euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}.get(scheduler)
    if other:
        pipeline.scheduler = other.from_config(pipeline.scheduler.config)
    latents = torch.stack([initial_noise(job, shape) for job in jobs])
    theirs = pipeline(
        [prompt.text for prompt in PROMPTS],
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=latents,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours[0], theirs, **DRAWN)
    assert not torch.allclose(ours[1], theirs, rtol=1e-2, atol=1e-2)


def test_noise_depends_on_seed_and_prompt_alone() -> None:
    jobs = plan_jobs(PROMPTS, [0, 1])
    noises = [initial_noise(job, (4, 8, 8)) for job in jobs]
    assert torch.equal(noises[0], initial_noise(Job(Prompt("other", 9, "a rocket"), 0), (4, 8, 8)))
    assert len({noise.sum().item() for noise in noises}) == 4


def test_batches_cover_the_plan_in_order_and_hold_all_models() -> None:
    jobs = plan_jobs(PROMPTS, range(5))
    batches = list(batches_of(jobs, num_slices=3, batch_size=10))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert [job for batch in batches for job in batch] == jobs
    assert [len(batch) for batch in batches_of(jobs, num_slices=30, batch_size=10)] == [1] * 10


def test_pictures_are_8_bit_rgb_of_the_resolution(base: Base, bank: AdapterBank) -> None:
    bank.attach()
    pictures, latents = draw_pictures(
        base,
        bank,
        [Slice(0, 0.0), Slice(0)],
        plan_jobs(PROMPTS, [0]),
        latent_shape_of(base, 32),
        SampleSection(steps=2),
    )
    bank.detach()
    assert (
        pictures.shape == (2, 2, 32, 32, 3)
        and pictures.dtype == torch.uint8
        and latents.shape == (2, 2, 4, 8, 8)
    )


def test_broken_weights_are_named_as_such(base: Base, bank: AdapterBank) -> None:
    bank.parameters.fill_(float("nan"))
    bank.attach()
    with pytest.raises(RunError, match="latents that are not finite"):
        draw_pictures(base, bank, [Slice(0)], plan_jobs(PROMPTS, [0]), (4, 8, 8), SampleSection(steps=1))
    bank.detach()


def test_guidance_one_runs_no_unconditional_branch(base: Base, bank: AdapterBank) -> None:
    bank.attach()
    bank.select([Slice(0)])
    text = base.encode_text(["", "a", "b"]).clone()
    text[0] = float("nan")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = denoise(base, noise, text[None], SampleSection(steps=2, guidance=1.0))
    bank.detach()
    assert plain.isfinite().all()


def test_a_png_carries_its_origin_and_round_trips(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    job = Job(PROMPTS[1], 7)
    path = tmp_path / "r4" / job.file_name
    save_picture(path, pixels, job, "r4", SampleSection())
    assert path.name == "abstract-000-7.png"
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), pixels)
        facts = {key: picture.text[key] for key in ("prompt", "seed", "arm", "steps", "guidance")}  # type: ignore[attr-defined]
    assert facts == {"prompt": "luck, 幸運", "seed": "7", "arm": "r4", "steps": "30", "guidance": "7.5"}
    content = path.read_bytes()
    save_picture(path, pixels, job, "r4", SampleSection())
    assert path.read_bytes() == content


def test_a_prefix_comes_before_every_prompt_that_is_drawn_and_leaves_the_noise_alone(
    base: Base, bank: AdapterBank, tmp_path: Path
) -> None:
    shape = latent_shape_of(base, 32)
    prefixed = SampleSection(steps=2, prompt_prefix="sks, ")
    bank.attach()
    _, ours = draw_pictures(base, bank, [Slice(0)], plan_jobs(PROMPTS[:1], [3]), shape, prefixed)
    text = base.encode_text(["", "sks, a rocket"])[None]
    expected = denoise(base, initial_noise(plan_jobs(PROMPTS[:1], [3])[0], shape)[None], text, prefixed)
    bank.detach()
    torch.testing.assert_close(ours[0], expected, rtol=1e-5, atol=1e-6)  # the very same passes
    save_picture(
        tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), plan_jobs(PROMPTS, [3])[0], "r4", prefixed
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["prompt"] == "a rocket" and picture.text["prompt_prefix"] == "sks, "  # type: ignore[attr-defined]


def test_a_trained_text_encoder_gives_each_slice_its_own_text(exact_base: Base) -> None:
    """Strength 0 beside an adapter on the text encoder: the base's slice stays the base's, the other one
    differs.
    """
    base = exact_base
    jobs, shape, section = plan_jobs(PROMPTS, [3]), latent_shape_of(base, 32), SampleSection(steps=3)
    plain = AdapterBank(base.components, resolve_targets(base.unet, ["to_q"]), [ARM]).attach()
    _, expected = draw_pictures(base, plain, [Slice(0, 0.0)], jobs, shape, section)
    plain.detach()
    bank = AdapterBank(
        base.components, resolve_targets(base.text_encoder, ["q_proj", "fc1"], "text_encoder"), [ARM]
    ).attach()
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    _, latents = draw_pictures(base, bank, [Slice(0, 0.0), Slice(0)], jobs, shape, section)
    bank.detach()
    # between the passes in float64 the scheduler rounds to fp32, 1.2e-7, times guidance 7.5 and 3 steps
    torch.testing.assert_close(latents[0], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents[1], expected[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_guidance_from_the_base_takes_its_prediction_at_the_arms_own_latents(
    exact_base: Base, component: str
) -> None:
    """Against a loop that asks the base and the adapter one after the other."""
    base = exact_base
    jobs, shape, section = plan_jobs(PROMPTS, [3]), latent_shape_of(base, 32), SampleSection(steps=3)
    names = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "fc1"]}[component]
    targets = resolve_targets(base.components[component], names, component)
    bank = AdapterBank(base.components, targets, [ARM]).attach()
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    painter = Painter(base, bank, shape, section, [prompt.text for prompt in PROMPTS], "base")
    painter.select([Slice(0, 0.5), Slice(0)])
    _, found = painter.draw(2, jobs)
    captions = [prompt.text for prompt in PROMPTS]
    for strength, latents in zip((0.5, 1.0), found, strict=True):
        scheduler = DDIMScheduler.from_config(base.scheduler_config)
        scheduler.set_timesteps(section.steps)
        x = torch.stack([initial_noise(job, shape) for job in jobs])
        for timestep in scheduler.timesteps:
            predictions = []
            for acting, texts in ((0.0, [""] * 2), (strength, captions)):
                bank.select([Slice(0, acting)])
                with torch.no_grad():
                    states = base.encode_text(texts).to(base.unet.dtype)
                    predictions.append(base.unet(x.double(), timestep, states).sample.float())
            empty, prompted = predictions
            x = scheduler.step(empty + section.guidance * (prompted - empty), timestep, x).prev_sample
        # as above: fp32 between passes, times guidance and steps
        torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-5)
    bank.detach()


MODELS = [("base", Slice(0, 0.0)), ("r4", Slice(0))]
FEW = SampleSection(steps=2, batch_size=4)


def draw_into(folder: Path, base: Base, bank: AdapterBank, section: SampleSection = FEW) -> dict[str, bytes]:
    """All pictures of four jobs with two models, by name."""
    bank.attach()
    try:
        jobs = plan_jobs(PROMPTS, [0, 1])
        draw_all(
            base,
            bank,
            MODELS,
            jobs,
            latent_shape_of(base, 32),
            section,
            lambda name, job: folder / name / job.file_name,
        )
    finally:
        bank.detach()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_all_is_drawn_as_batches_draw_it_but_for_rounding(
    base: Base, bank: AdapterBank, tmp_path: Path
) -> None:
    drawn = draw_into(tmp_path, base, bank)
    assert len(drawn) == 2 * 4
    bank.attach()
    jobs = plan_jobs(PROMPTS, [0, 1])
    pictures, _ = draw_pictures(
        base, bank, [item for _, item in MODELS], jobs, latent_shape_of(base, 32), FEW
    )
    bank.detach()
    for (name, _), row in zip(MODELS, pictures.numpy(), strict=True):
        for job, pixels in zip(jobs, row, strict=True):
            with Image.open(tmp_path / name / job.file_name) as picture:
                assert abs(np.asarray(picture).astype(int) - pixels).max() <= 1


def test_missing_pictures_are_drawn_again_to_the_same_bytes(
    base: Base, bank: AdapterBank, tmp_path: Path
) -> None:
    whole = draw_into(tmp_path, base, bank)
    (tmp_path / "r4" / "normal-000-1.png").unlink()
    assert draw_into(tmp_path, base, bank) == whole


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("kind", ["lora", "tlora"])
def test_batches_side_by_side_give_pictures_equal_but_for_rounding(
    base: Base, kind: Kind, batch_size: int, tmp_path: Path
) -> None:
    """T-LoRA too, of which each thread masks what acts at its own step; of two pictures at once each thread
    has one, and one model follows the other.
    """
    section = FEW.model_copy(update={"batch_size": batch_size})
    arm = ARM.model_copy(update={"kind": kind, "min_rank": 1 if kind == "tlora" else None})
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [arm])
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = draw_into(tmp_path / "alone", base, bank, section)
        torch.set_num_threads(2)
        together = draw_into(tmp_path / "together", base, bank, section)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert alone.keys() == together.keys()
    for name in alone:
        first, second = (
            np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("alone", "together")
        )
        assert abs(first - second).max() <= 1


def test_out_of_memory_halves_the_pictures_at_once_and_goes_on(
    base: Base,
    bank: AdapterBank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes: list[int] = []
    draw = Painter.draw

    def limited(self: Painter, num_slices: int, jobs: list[Job], *rest: object) -> object:
        sizes.append(num_slices * len(jobs))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, num_slices, jobs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Painter, "draw", limited)
    with (
        caplog.at_level("WARNING", logger="lorascope"),
        limited_threads(1),
    ):  # a thread draws a part of a batch
        drawn = draw_into(tmp_path, base, bank)
    assert len(drawn) == 8 and sizes == [4, 2, *[1] * 8]
    assert [record.message for record in caplog.records] == [
        "sample   out of memory: going on with 2 pictures at once",
        "sample   out of memory: going on with 1 pictures at once",
    ]
    monkeypatch.setattr(
        Painter, "draw", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(RunError, match=r"out of memory with one picture at once .*lower data.resolution_px"):
        draw_into(tmp_path / "none", base, bank)


def test_an_interruption_leaves_what_was_drawn(
    base: Base, bank: AdapterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, left = draw_into(tmp_path / "whole", base, bank), [2]
    draw = Painter.draw

    def interrupted(self: Painter, *arguments: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return draw(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Painter, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt), limited_threads(1):
            draw_into(tmp_path / "parts", base, bank)
    assert len(list((tmp_path / "parts").rglob("*.png"))) == 4
    assert draw_into(tmp_path / "parts", base, bank) == whole


def test_a_denoising_that_is_stopped_ends_before_its_next_step(base: Base, bank: AdapterBank) -> None:
    steps: list[int] = []
    bank.attach().select([Slice(0)])
    text = base.encode_text(["", "a"])[None]
    with pytest.raises(KeyboardInterrupt):
        denoise(
            base,
            torch.zeros(1, 4, 8, 8),
            text,
            SampleSection(steps=9),
            lambda: steps.append(1) or len(steps) == 3,
        )  # type: ignore[func-returns-value]
    bank.detach()
    assert len(steps) == 3


def test_text_is_encoded_once_for_all_batches(
    base: Base, bank: AdapterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []
    encode = Base.encode_text
    monkeypatch.setattr(
        Base, "encode_text", lambda self, texts: captions.extend(texts) or encode(self, texts)
    )
    draw_into(tmp_path, base, bank)
    assert captions == ["", "a rocket", "luck, 幸運"]


def test_a_picture_that_cannot_be_written_is_an_error_of_the_stage(
    base: Base, bank: AdapterBank, tmp_path: Path
) -> None:
    (tmp_path / "r4").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="r4.*cannot be written"):
        draw_into(tmp_path, base, bank)
    with pytest.raises(StorageError, match="cannot be written"), PictureWriter() as writer:
        writer.save(
            tmp_path / "r4" / "a.png", np.zeros((8, 8, 3), np.uint8), plan_jobs(PROMPTS, [0])[0], "r4", FEW
        )
