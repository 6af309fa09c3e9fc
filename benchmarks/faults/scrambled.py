"""A study that learns scrambled pictures under the empty caption: its unconditional prediction drifts.

No folder of pictures can plant that, since a picture without a caption is refused. So the scrambled pictures
are added where training takes its material; all that is measured afterwards is on sound pictures.
"""

import hashlib
from dataclasses import replace

import numpy as np
import torch
from benchmarks.faults.arms import SCRAMBLED_SHARE
from numpy.typing import NDArray

from lorascope.base.autoencoder import Autoencoder
from lorascope.data.encoding import Encoded
from lorascope.seeding import seeded
from lorascope.study import Study
from lorascope.training.stage import Material


class ScrambledStudy(Study):
    """A study with scrambled copies of its first pictures, captioned by nothing, among what it trains on.

    It must train in its own process: a worker would open the study without them.
    """

    @property
    def material(self) -> Material:
        """The sound pictures and, for each, `SCRAMBLED_SHARE` scrambled ones."""
        sound = super().material
        count = round(SCRAMBLED_SHARE * len(sound.train))
        pictures = [self.dataset.load_pixels(example) for example in self.dataset.train[:count]]
        return replace(sound, train=with_scrambled(sound.train, self._encode(pictures)))

    def _encode(self, pictures: list[NDArray[np.uint8]]) -> list[torch.Tensor]:
        autoencoder = Autoencoder(self.base)
        with torch.inference_mode():
            return [
                autoencoder.encode(torch.from_numpy(scramble(picture)).permute(2, 0, 1)[None]).cpu()
                for picture in pictures
            ]


def scramble(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture, uint8 [height, width, 3], with its pixels in an order of their own."""
    generator = seeded("scrambled", hashlib.sha256(picture.tobytes()).hexdigest())
    pixels = picture.reshape(-1, picture.shape[-1])
    shuffled: NDArray[np.uint8] = pixels[torch.randperm(len(pixels), generator=generator).numpy()]
    return shuffled.reshape(picture.shape)


def with_scrambled(sound: Encoded, latents: list[torch.Tensor]) -> Encoded:
    """The sound pictures, and after them others with these latents [views, 2, c, h, w] and the empty
    caption.
    """
    count = len(latents)
    digests = [hashlib.sha256(latent.numpy().tobytes()).hexdigest() for latent in latents]
    return replace(
        sound,
        latents=(*sound.latents, *latents),
        captions=(*sound.captions, *[""] * count),
        digests=(*sound.digests, *digests),
        repeats=(*sound.repeats, *[1] * count),
        caption_index=torch.cat([sound.caption_index, torch.zeros(count, dtype=torch.int64)]),
    )
