"""`python -m odcheap.predict EXPORT_DIR IMAGE_OR_FOLDER...`: what an exported student sees in pictures.

Needs onnxruntime, numpy and pillow. An export folder holds a copy of this very file: `python predict.py IMAGE...` works
there without odcheap.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

SLIMMEST = 100  # a picture's longer side over its shorter one
SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
PREPROCESS, LABELS, CARD = "preprocess.json", "labels.json", "README.md"
SUM = re.compile(r"^([0-9a-f]{64})  (\S+)$", re.MULTILINE)  # a line of the card: sha256 and file
AT_ONCE = 32  # pictures
BATCHES, ROUNDS, PAUSE = (1, 64), 5, 0.02  # of timings; in the pause (seconds) another session's threads fall asleep


class Refused(ValueError):
    """One line on what cannot be done with what was given."""


class BrokenPicture(Refused):
    """A file that is no picture, or only a part of one."""


class Timing(NamedTuple):
    p50: float  # seconds: the median, and what 95 of 100 stay below
    p95: float


def decode(path: str | Path) -> Image.Image:
    """The picture in RGB, upright as its EXIF data say; `BrokenPicture` where it cannot be read as a whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about odd EXIF data, very many pixels; errors matter
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                rgb = to_rgb(image)
    except (Exception, MemoryError) as error:  # on damaged files Pillow's many readers raise errors of every kind
        reason = str(error).partition("\n")[0][:160] or type(error).__name__
        raise BrokenPicture(f"{path} cannot be read as a picture ({reason})") from error
    if max(rgb.size) > SLIMMEST * min(rgb.size):
        raise BrokenPicture(f"{path} has {rgb.width} x {rgb.height} pixels: too slim to be made square")
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey repeated, CMYK and palettes translated, alpha left out; 16-bit grey divided by 256: Pillow would clip it."""
    if image.mode in ("I", "F"):
        raise BrokenPicture(f"32-bit pixels ({image.mode}), whose range nobody tells")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def prepared(path: str | Path, preprocess: dict[str, Any]) -> np.ndarray:
    """The picture as the network wants it, (3, H, W) float32 in [0, 1]: the middle of it, at the shorter side given."""
    image, (height, width), shorter = decode(path), preprocess["size"], preprocess["shorter_side"]
    scaled = tuple(shorter if side == min(image.size) else int(shorter * side / min(image.size)) for side in image.size)
    image = image.resize(scaled, Image.Resampling[preprocess["interpolation"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(255)


def session(model: bytes, threads: int = 0, provider: str = "CPUExecutionProvider") -> Any:
    """An ONNX Runtime session; `threads=0` takes all cores. `Refused` where it cannot be."""
    try:
        import onnxruntime  # here: whoever only decodes pictures does without it

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        made = onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # its own errors have no common kind
        raise Refused(f"ONNX Runtime cannot load the model ({str(error)[:160]})") from error
    if provider not in made.get_providers():
        raise Refused(f"ONNX Runtime has no working {provider} here and would silently take another")
    return made


def answerer(made: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Images (n, 3, H, W) -> logits (n, K)."""
    (images,) = made.get_inputs()
    fixed = images.shape[0] if isinstance(images.shape[0], int) else None
    return in_batches(lambda batch: made.run(None, {images.name: batch})[0], fixed)


def in_batches(run: Callable[[np.ndarray], np.ndarray], fixed: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """The same for any number of images where `run` takes `fixed` of them: the last image fills up."""
    if fixed is None:
        return run

    def ask(batch: np.ndarray) -> np.ndarray:
        whole = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % fixed, axis=0)])
        return np.concatenate([run(part) for part in np.split(whole, len(whole) // fixed)])[: len(batch)]

    return ask


def answers(
    ask: Callable[[np.ndarray], np.ndarray], paths: list[Path], preprocess: dict[str, Any]
) -> Iterator[tuple[Path, np.ndarray | BrokenPicture]]:
    """For each file its logits (K,), or why there are none; a few pictures are in memory at once."""
    for k in range(0, len(paths), AT_ONCE):
        found: dict[Path, np.ndarray | BrokenPicture] = {}
        for path in paths[k : k + AT_ONCE]:
            try:
                found[path] = prepared(path, preprocess)
            except BrokenPicture as error:
                found[path] = error
        readable = [path for path, value in found.items() if isinstance(value, np.ndarray)]
        if readable:
            found |= zip(readable, ask(np.stack([found[path] for path in readable])), strict=True)
        yield from found.items()


def checked(folder: Path, name: str) -> bytes:
    """The file's content; `Refused` unless its sha256 is the one in the export's card."""
    try:
        card, content = (folder / CARD).read_text(encoding="utf-8"), (folder / name).read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{folder / name}: cannot be checked ({error})") from error
    known = {found[2]: found[1] for found in SUM.finditer(card)}
    if name not in known:
        raise Refused(f"{folder / name}: is no file of this export; there are {', '.join(known) or 'none'}")
    if hashlib.sha256(content).hexdigest() != known[name]:
        raise Refused(f"{folder / name}: was changed after the export (its sha256 in {CARD} is another)")
    return content


def pictures_in(given: list[str]) -> Iterator[Path]:
    """The files, and those below folders that are pictures by their names; what cannot be looked into itself."""
    for top in given:
        found: list[Path] = []
        for where, _, names in os.walk(top, onerror=lambda error, found=found: found.append(Path(error.filename))):
            named = (Path(where, name) for name in names if name.lower().endswith(SUFFIXES) and name[0] != ".")
            found += filter(os.path.isfile, named)
        yield from sorted(found)


def plain(text: object) -> str:
    """What a terminal shows as it is: control signs, line ends and the like become visible escapes."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(text))


def predict(folder: Path, model: str, given: list[str], as_json: bool) -> int:
    preprocess, labels = (json.loads(checked(folder, name)) for name in (PREPROCESS, LABELS))
    ask = answerer(session(checked(folder, model)))
    if not (paths := list(dict.fromkeys(pictures_in(given)))):
        raise Refused(
            f"{', '.join(given) or 'IMAGE_OR_FOLDER'}: no pictures there ({', '.join(sorted(SUFFIXES)[:6])}, ...)"
        )
    rows = []
    for path, logits in answers(ask, paths, preprocess):
        if isinstance(logits, BrokenPicture):
            print(f"error: {plain(logits)}", file=sys.stderr)
            continue
        shares = np.exp(logits.astype(np.float64) - logits.max())
        shares /= shares.sum()
        rows.append((path, [(labels[k], float(shares[k])) for k in np.argsort(-shares, kind="stable")[:3]]))
    if as_json:
        found = [{"path": str(p), "label": best[0][0], "probability": best[0][1]} for p, best in rows]
        print(json.dumps(found, indent=1))
    else:
        show([(plain(p), *(f"{plain(name)} {share:.3f}" for name, share in best)) for p, best in rows])
    return int(len(rows) < len(paths))


def show(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def random_images(batch: int, size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).random((batch, *size), dtype=np.float32)


def side_by_side(works: dict[Any, Callable[[], object]], seconds: float) -> dict[Any, Timing]:
    """What each takes, over about so many seconds each, in turns: what slows the machine down slows all of them."""
    taken: dict[Any, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS):
        for name, work in works.items():
            time.sleep(PAUSE)
            work()
            end = time.perf_counter() + seconds / ROUNDS
            while time.perf_counter() < end or len(taken[name]) <= turn:
                began = time.perf_counter()
                work()
                taken[name].append(time.perf_counter() - began)
    return {name: Timing(statistics.median(t), sorted(t)[int(0.95 * (len(t) - 1))]) for name, t in taken.items()}


def bench(folder: Path, seconds: float = 2.0) -> int:
    """Times every artefact here, with one thread and with all."""
    size, works = (3, *json.loads(checked(folder, PREPROCESS))["size"]), {}
    for path, threads in [(path, threads) for path in sorted(folder.glob("*.onnx")) for threads in (1, 0)]:
        made = session(checked(folder, path.name), threads)
        fixed = made.get_inputs()[0].shape[0]
        for batch in (fixed,) if isinstance(fixed, int) else BATCHES:
            images, ask = random_images(batch, size), answerer(made)
            works[path.name, batch, threads] = lambda ask=ask, images=images: ask(images)
    print(f"{len(works)} timings of {seconds:g} s each, in turns", file=sys.stderr)
    rows = [("file", "images", "threads", "median ms", "95 % below")]
    for (name, batch, threads), found in side_by_side(works, seconds).items():
        rows.append((name, str(batch), str(threads or "all"), *(f"{1000 * time:.3f}" for time in found)))
    show(rows)
    return 0


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 where a picture could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="EXPORT_DIR IMAGE_OR_FOLDER", help="EXPORT_DIR: if not beside this")
    parser.add_argument("--model", default="student.onnx", help="another file of the export (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a list of {path, label, probability}")
    parser.add_argument("--bench", action="store_true", help="time every artefact on this machine")
    given = parser.parse_args(arguments)
    folder, paths = Path(__file__).parent, given.paths
    if paths and all(os.path.isfile(os.path.join(paths[0], name)) for name in (PREPROCESS, CARD)):
        folder, paths = Path(paths[0]), paths[1:]
    try:
        if not (folder / PREPROCESS).is_file():
            raise Refused(f"EXPORT_DIR={(paths or [''])[0]}: is no export; python -m odcheap.export JOB_DIR makes one")
        return bench(folder) if given.bench else predict(folder, given.model, paths, given.json)
    except (Refused, OSError) as error:
        line = str(error)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        line = f"{folder}: its files do not fit together ({error!r})"
    print(f"error: {plain(line)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
