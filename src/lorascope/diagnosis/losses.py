"""Denoising losses of the base and of trained arms at fixed noise, after training: on training pictures, on
held-out ones and on the base's own drawings, with caption and without.

Every model meets the same noise and timesteps, one in each band, drawn by a picture's digest; so differences
between models are paired, and the same pictures give the same losses again. A picture costs each model eight
passes through the U-Net.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lorascope.adapters.bank import Slice
from lorascope.adapters.mixed import Bank
from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.console import Tally
from lorascope.data.encoding import Encoded
from lorascope.data.pictures import RefusedError, open_picture
from lorascope.diagnosis.loss_figures import Losses, SetLosses
from lorascope.errors import RunError, first_line
from lorascope.store import read_regular
from lorascope.training.probe import NUM_BANDS, Probe, band_names, probe_losses

MAX_PICTURES = 100  # of training and of held-out pictures
NUM_DRAWINGS = 16
_TEXTS_AT_ONCE = 64


def measure_tables(
    base: Base,
    bank: Bank,
    slices_by_name: Mapping[str, Slice],
    train: Encoded,
    heldout: Encoded,
    drawings: Encoded,
    tally: Tally,
    num_drawings: int = NUM_DRAWINGS,
) -> Losses:
    """Losses of each picture under the base and each slice of the attached bank, and guidance on drawings.

    `drawings` are the base's own, with their prompts as captions (`encode_drawings`). Of each set some
    pictures are measured, as `choose_pictures` has them. `tally` counts a picture under a model,
    `count_probes` in all. The bank's selection is another one afterwards.
    """
    slices = [Slice(0, 0.0), *slices_by_name.values()]
    train, heldout, drawings = choose_pictures(train, heldout, drawings, num_drawings)
    guidance = _Guidance(len(slices), len(drawings))

    def count(done: Probe) -> None:
        if done.band == NUM_BANDS - 1:
            tally.advance(done.num_slices * len(done.pictures))

    def compare(done: Probe) -> None:
        guidance.take(done)
        count(done)

    def measure(pictures: Encoded, take: Callable[[Probe], None]) -> SetLosses:
        losses = probe_losses(base, bank, slices, pictures, (True, False), take)
        return SetLosses(*losses.double().numpy())

    bands = tuple(band_names(len(base.alphas_cumprod)))
    sets = measure(train, count), measure(heldout, count), measure(drawings, compare)
    return Losses(tuple(slices_by_name), bands, *sets, guidance.cosines)


def choose_pictures(
    train: Encoded, heldout: Encoded, drawings: Encoded, num_drawings: int = NUM_DRAWINGS
) -> tuple[Encoded, Encoded, Encoded]:
    """The pictures of each set that are measured, in the order of their digests.

    At most `MAX_PICTURES` held-out ones, as many training pictures (`MAX_PICTURES` where none are held out)
    and `num_drawings` drawings. A picture that is there twice is taken once.
    """
    heldout = _some(heldout, MAX_PICTURES)
    return _some(train, len(heldout) or MAX_PICTURES), heldout, _some(drawings, num_drawings)


def _some(pictures: Encoded, count: int) -> Encoded:
    """`count` different pictures, or as many as there are; digests come in no order of content."""
    first = {digest: index for index, digest in reversed(list(enumerate(pictures.digests)))}
    return pictures.subset([first[digest] for digest in sorted(first)[:count]])


def count_probes(
    num_arms: int, train: Encoded, heldout: Encoded, drawings: Encoded, num_drawings: int = NUM_DRAWINGS
) -> int:
    """What `measure_tables` counts in all: pictures times models, the base among them."""
    return (1 + num_arms) * sum(map(len, choose_pictures(train, heldout, drawings, num_drawings)))


class _Guidance:
    """Cosines of guidance vectors with the base's, which comes first with every picture."""

    def __init__(self, num_models: int, num_pictures: int) -> None:
        self.cosines = np.full((num_models, num_pictures, NUM_BANDS), np.nan)
        self._of_base: dict[tuple[int, ...], torch.Tensor] = {}  # directions [B, d] by band and pictures

    @torch.inference_mode()
    def take(self, done: Probe) -> None:
        """Keep the cosines of a probe: NaN where the base's vector is zero, 0 where only the model's is.

        A model that predicts velocities has the same ones: there the vector is that of the noise times a
        factor of the timestep.
        """
        captioned, uncaptioned = (part.flatten(2).cpu().double() for part in done.predictions)
        vectors = captioned - uncaptioned  # (S, B, d)
        lengths = vectors.norm(dim=2, keepdim=True)
        directions = torch.where(lengths == 0, 0.0, vectors / lengths)
        place = (done.band, *done.pictures.tolist())
        if done.first_slice == 0:
            self._of_base[place] = torch.where(lengths[0] == 0, torch.nan, directions[0])
        cosines = (directions * self._of_base[place]).sum(dim=2).clamp(-1, 1)
        rows = slice(done.first_slice, done.first_slice + done.num_slices)
        self.cosines[rows, done.pictures.numpy(), done.band] = cosines.numpy()


@torch.inference_mode()
def encode_drawings(base: Base, paths: Sequence[Path], captions: Sequence[str], keep_text: bool) -> Encoded:
    """Pictures that the base drew, encoded by its VAE, with the captions they were drawn from.

    `keep_text` off leaves the text states out, for a bank that adapts the text encoder. Raises `RunError` for
    a file that is no picture.
    """
    autoencoder, latents, digests = Autoencoder(base), [], []
    for path in paths:
        pixels, digest = _read_drawing(path)
        latents.append(autoencoder.encode(pixels).cpu())
        digests.append(digest)
    autoencoder.warn_of_overflows()
    texts = list(dict.fromkeys(["", *captions]))
    rows = {caption: row for row, caption in enumerate(texts)}
    parts = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
    return Encoded(
        latents=tuple(latents),
        captions=tuple(captions),
        digests=tuple(digests),
        repeats=(1,) * len(paths),
        caption_index=torch.tensor([rows[caption] for caption in captions], dtype=torch.int64),
        text_states=torch.cat([base.encode_text(part) for part in parts]) if keep_text else None,
    )


def _read_drawing(path: Path) -> tuple[torch.Tensor, str]:
    """A picture uint8 [1, 3, H, W] and the digest of its file."""
    try:
        content = read_regular(path, RunError)
        pixels = np.array(open_picture(content))
    except (FileNotFoundError, RefusedError) as error:
        raise RunError(
            f"{path}: cannot be read as a picture ({first_line(error)}): delete it and run "
            "`lorascope diagnose` again"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None], hashlib.sha256(content).hexdigest()
