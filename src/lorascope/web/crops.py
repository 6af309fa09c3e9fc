"""What training would take of a picture: the bucket that it goes to, and the part that is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorascope.data.pictures import choose_bucket, crop_box, plan_buckets
from lorascope.errors import ConfigError
from lorascope.sections import DataSection

RESOLUTIONS = (64, 256, 384, 512, 640, 768, 1024)


@dataclass(frozen=True)
class Crop:
    """A picture of `width_px` x `height_px`, the part of it that is kept, and the size that this is brought
    to.
    """

    width_px: int
    height_px: int
    left: int
    top: int
    right: int
    bottom: int
    to_width: int
    to_height: int

    @property
    def outline(self) -> str:
        """The path of what is cut off: the picture's frame, and within it that of the kept part."""
        return (
            f"M0 0H{self.width_px}V{self.height_px}H0Z"
            f"M{self.left} {self.top}V{self.bottom}H{self.right}V{self.top}Z"
        )

    @property
    def lost_percent(self) -> int:
        """How much of the picture is cut off."""
        kept = (self.right - self.left) * (self.bottom - self.top)
        return round(100 * (1 - kept / (self.width_px * self.height_px)))

    @property
    def enlarged(self) -> float:
        """How many times the kept part is enlarged; below 1 it is made smaller."""
        return self.to_width / (self.right - self.left)


def buckets_of(resolution_px: int, buckets: bool) -> list[tuple[int, int]]:
    """The sizes that pictures are brought to, with the defaults of the study file.

    Raises `ConfigError` for a resolution that no study has.
    """
    if not 16 <= resolution_px <= 4096 or resolution_px % 8:
        raise ConfigError(f"{resolution_px} px: the resolution is a multiple of 8 from 16 to 4096")
    if not buckets:
        return [(resolution_px, resolution_px)]
    defaults = DataSection()
    if found := plan_buckets(resolution_px, defaults.bucket_step_px, defaults.bucket_max_ratio):
        return found
    raise ConfigError(
        f"{resolution_px} px: no bucket with sides of multiples of {defaults.bucket_step_px} px fits in: "
        "raise the resolution, or leave buckets out"
    )


def crop_of(width_px: int, height_px: int, buckets: Sequence[tuple[int, int]]) -> Crop:
    """What is kept of a picture of this size."""
    bucket = choose_bucket(width_px, height_px, buckets)
    return Crop(width_px, height_px, *crop_box(width_px, height_px, *bucket), *bucket)
