"""Draw the emoji of every vendor and say what each one shows.

Stage 1. Reads npm packages of SVG drawings, writes `drawings.npz` (pixels) and
`drawings.json` (subjects with names and keywords, and the rows of the pixels).
"""

import io
import json
import re
import subprocess
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from recipes.pocket.config import IMAGE_SIZE_PX, NPM_PACKAGES, VENDORS

FLAGS_GROUP, COMPONENT_GROUP = 9, 2
KEYCAP_SUBGROUP = 94
OPENMOJI_BRANDS = range(0xE040, 0xE070)


@dataclass(frozen=True)
class Subject:
    """What a drawing shows, whoever drew it."""

    id: str  # Unicode code points in lower case without variation selectors
    name: str
    keywords: tuple[str, ...]
    group: int  # emojibase's group and subgroup, -1 where it has none
    subgroup: int


@dataclass(frozen=True)
class Drawings:
    subjects: dict[str, Subject]
    pixels: np.ndarray  # (N, 64, 64, 3) uint8, on white
    vendor: list[str]  # of each of the N rows
    subject_id: list[str]  # of each of the N rows

    def rows_of(self, vendors: tuple[str, ...]) -> list[int]:
        """The rows drawn by any of `vendors`."""
        return [row for row, vendor in enumerate(self.vendor) if vendor in vendors]


def install_packages(work_dir: Path) -> Path:
    """Install the pinned packages below `work_dir` unless they are there; return `node_modules`."""
    modules = work_dir / "node_modules"
    missing = [
        f"{name}@{version}" for name, version in NPM_PACKAGES.items() if _version(modules / name) != version
    ]
    if missing:
        work_dir.mkdir(parents=True, exist_ok=True)
        command = [
            "npm",
            "install",
            "--prefix",
            str(work_dir),
            "--no-save",
            "--no-audit",
            "--no-fund",
            *missing,
        ]
        subprocess.run(command, check=True)
    return modules


def load_drawings(work_dir: Path) -> Drawings:
    """Load what `draw_all` wrote."""
    index = json.loads((work_dir / "drawings.json").read_text())
    subjects = {s["id"]: Subject(**{**s, "keywords": tuple(s["keywords"])}) for s in index["subjects"]}
    pixels = np.load(work_dir / "drawings.npz")["pixels"]
    return Drawings(subjects, pixels, index["vendor"], index["subject_id"])


def draw_all(work_dir: Path) -> Drawings:
    """Draw every usable emoji of every vendor at 64 px on white (about 2 minutes on one core)."""
    if (work_dir / "drawings.json").exists():
        return load_drawings(work_dir)
    modules = install_packages(work_dir)
    subjects = _read_subjects(modules)
    pixels, vendors, subject_ids = [], [], []
    for vendor in VENDORS:
        icons = json.loads((modules / "@iconify-json" / vendor / "icons.json").read_text())
        for subject_id, icon in sorted(_match_icons(modules, vendor, icons, subjects).items()):
            pixels.append(_draw(icons, icon))
            vendors.append(vendor)
            subject_ids.append(subject_id)
    used = set(subject_ids)
    np.savez(work_dir / "drawings.npz", pixels=np.stack(pixels))
    index = {
        "subjects": [asdict(subject) for subject in subjects.values() if subject.id in used],
        "vendor": vendors,
        "subject_id": subject_ids,
    }
    (work_dir / "drawings.json").write_text(json.dumps(index))
    return load_drawings(work_dir)


def _version(package: Path) -> str | None:
    manifest = package / "package.json"
    return json.loads(manifest.read_text())["version"] if manifest.exists() else None


def _read_subjects(modules: Path) -> dict[str, Subject]:
    """Unicode's subjects without flags, skin tones and keycaps, then OpenMoji's own pictograms."""
    subjects = {}
    skip: set[str] = set()
    for entry in json.loads((modules / "emojibase-data/en/data.json").read_text()):
        subject_id = _subject_id(entry["hexcode"])
        skip.update(_subject_id(skin["hexcode"]) for skin in entry.get("skins", []))
        group = entry.get("group", COMPONENT_GROUP)
        if group in (FLAGS_GROUP, COMPONENT_GROUP) or entry["subgroup"] == KEYCAP_SUBGROUP:
            skip.add(subject_id)
            continue
        name = _plain(entry["label"])
        keywords = tuple(dict.fromkeys(k for k in map(_plain, entry.get("tags", [])) if k and k != name))
        subjects[subject_id] = Subject(subject_id, name, keywords, group, entry["subgroup"])
    chars = json.loads((modules / "@iconify-json/openmoji/chars.json").read_text())
    for hexcode, icon in sorted(chars.items()):
        subject_id = _subject_id(hexcode)
        if subject_id in subjects or subject_id in skip or re.search(r"flag|skin-tone|keycap|regional", icon):
            continue
        if int(subject_id.split("-")[0], 16) in OPENMOJI_BRANDS:
            continue
        subjects[subject_id] = Subject(subject_id, _plain(re.sub(r"\d+$", "", icon)), (), -1, -1)
    return subjects


def _match_icons(
    modules: Path, vendor: str, icons: dict[str, Any], subjects: dict[str, Subject]
) -> dict[str, str]:
    """Which icon of a vendor draws which subject: by code point where the package says, else by name."""
    chars = json.loads((modules / "@iconify-json" / vendor / "chars.json").read_text())
    known = icons["icons"].keys() | icons.get("aliases", {}).keys()
    matches: dict[str, str] = {}
    for hexcode, icon in sorted(chars.items()):
        if _subject_id(hexcode) in subjects and icon in known:
            matches.setdefault(_subject_id(hexcode), icon)
    if matches:
        return matches
    by_name = {_compact(name): name for name in sorted(known)}
    other_names = _other_names(modules)
    for subject in subjects.values():
        if subject.group < 0:
            continue
        for name in (subject.name, f"{subject.name} face", *other_names.get(subject.id, ())):
            icon = by_name.get(_compact(name))
            if icon is not None:
                matches.setdefault(subject.id, icon)
    return matches


def _other_names(modules: Path) -> dict[str, list[str]]:
    """Older names of a subject: other vendors' icons and their aliases."""
    names: dict[str, list[str]] = {}
    for vendor in ("noto", "twemoji"):
        package = modules / "@iconify-json" / vendor
        aliases: dict[str, list[str]] = {}
        for alias, target in json.loads((package / "icons.json").read_text()).get("aliases", {}).items():
            aliases.setdefault(target["parent"], []).append(alias)
        for hexcode, icon in json.loads((package / "chars.json").read_text()).items():
            names.setdefault(_subject_id(hexcode), []).extend([icon, *aliases.get(icon, [])])
    return names


def _draw(icons: dict[str, Any], icon: str) -> np.ndarray:
    """Draw one icon as (64, 64, 3) uint8 on white."""
    alias = icons.get("aliases", {}).get(icon, {})
    data = icons["icons"][alias.get("parent", icon)]
    width = data.get("width", icons.get("width", 16))
    height = data.get("height", icons.get("height", 16))
    left, top = data.get("left", 0), data.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{data["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=IMAGE_SIZE_PX,
        height=IMAGE_SIZE_PX,
        background="#ffffff",
        skip_system_fonts=True,
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if drawn.size != (IMAGE_SIZE_PX, IMAGE_SIZE_PX):  # an icon that is not square
        square = Image.new("RGB", (IMAGE_SIZE_PX, IMAGE_SIZE_PX), "white")
        drawn.thumbnail(square.size)
        square.paste(drawn, ((IMAGE_SIZE_PX - drawn.width) // 2, (IMAGE_SIZE_PX - drawn.height) // 2))
        drawn = square
    image = np.asarray(drawn)
    return image[:, ::-1].copy() if alias.get("hFlip") else image


def _subject_id(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _plain(text: str) -> str:
    """Lower-case words without accents and punctuation, as a caption writes them."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9']+", " ", ascii_text.replace("'", "")).split())


def _compact(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
