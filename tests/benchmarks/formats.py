"""What formats.to_png converts, what it survives, and what it costs.

    python tests/benchmarks/formats.py [--mutations 300] [--photo PHOTO]

Prints tables: (a) the files that were tried, made by Pillow, pillow-heif, pydicom and
by hand, and whether their pixels are those that they were made of (of DICOM, those that
pydicom shows); (b) mutations of each kind, converted in a process of its own; (c) the
CPU time of converting and decoding a photo in each format; (d) images of as many
pixels as are decoded.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "data"), str(TESTS.parent)]

import made_formats  # noqa: E402
from made_formats import Made, dicom, heic, saved, shown, tiff  # noqa: E402

from keras_transfer.data.formats.convert import to_png  # noqa: E402

MEGABYTES = 6000


def tried() -> None:
    print("| kind | files | as they were made | of lossy files, largest difference |")
    print("| --- | --- | --- | --- |")
    for kind, make in made_formats.ALL.items():
        groups: dict[str, list[Made]] = {}
        for name, made in make().items():
            groups.setdefault(
                name.rpartition(", ")[0] if kind == "array" else name.partition(",")[0],
                [],
            ).append(made)
        for name, files in groups.items():
            differences = [difference(made) for made in files]
            wrong = sum(
                d > m.tolerance for d, m in zip(differences, files, strict=True)
            )
            right = "yes" if not wrong else f"{wrong} are not"
            lossy = [d for d in differences if d]
            largest = max(lossy, default="")
            print(f"| {kind}: {name} | {len(files)} | {right} | {largest} |")


def difference(made: Made) -> int:
    return int(abs(shown(made.encoded).astype(int) - made.expected).max())


def in_process(code: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2])}
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=environment
    )


def mutations(count: int) -> None:
    print(
        "| kind | mutations | converted | refused | other errors | printed | "
        "longest, s | peak memory, MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in made_formats.ALL:
        arguments = [str(count), "0", str(MEGABYTES), kind]
        done = in_process([made_formats.__file__, *arguments])
        if done.returncode:
            print(f"| {kind} | {count} | | | | {done.stderr[-300:]} | | |")
            continue
        found = json.loads(done.stdout)[kind]
        print(f"| {kind} | {count} | {found['converted']} | {found['refused']} | "
              f"{len(found['errors'])} | {int(bool(done.stderr))} | "
              f"{found['longest']:.3f} | {found['peak_mb']:,.0f} |")  # fmt: skip


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The median of CPU times."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * sorted(times)[len(times) // 2]


def costs(photo: Image.Image) -> None:
    from keras_transfer.data.decode import make_decoder

    decode = make_decoder(224)
    print("| photo | format | file, KB | PNG, KB | to_png, ms | with decoding, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size, repeats in (((224, 224), 50), ((640, 427), 20), ((4000, 3000), 3)):
        image = photo.resize(size, Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        files = {
            "JPEG": saved(image, "JPEG", quality=85),
            "TIFF, none": saved(image, "TIFF"),
            "TIFF, LZW": saved(image, "TIFF", compression="tiff_lzw"),
            "TIFF, 16-bit gray": saved(
                Image.fromarray(pixels[..., 1].astype(np.uint16) * 257), "TIFF"
            ),
            "HEIC": heic(image, quality=80, chroma=420, matrix_coefficients=6),
            "AVIF": saved(image, "AVIF", quality=80, speed=10),
            "DICOM, 8-bit RGB": dicom(pixels),
            "DICOM, 16-bit, window": dicom(
                pixels[..., 1].astype(np.uint16) * 16,
                WindowCenter=2000,
                WindowWidth=4000,
            ),
            "DICOM, JPEG 2000": compressed(image),
            "array": made_formats.npy(pixels),
        }
        for name, encoded in files.items():
            converting = milliseconds(lambda e=encoded: to_png(e), repeats)
            decoding = milliseconds(lambda e=encoded: decode(e), repeats)
            is_kept = name == "JPEG"
            print(f"| {size[0]}x{size[1]} | {name} | {len(encoded) / 1000:,.0f} | "
                  f"{'' if is_kept else f'{len(to_png(encoded)) / 1000:,.0f}'} | "
                  f"{'' if is_kept else f'{converting:.2f}'} | {decoding:.2f} |"
                  )  # fmt: skip


def compressed(image: Image.Image) -> bytes:
    encoded = saved(image, "JPEG2000", no_jp2=True)
    return dicom(
        np.asarray(image),
        "1.2.840.10008.1.2.4.90",
        PhotometricInterpretation="YBR_RCT",
        PixelData=made_formats.encapsulate([encoded]),
    )


def limits() -> None:
    """Prints the peak memory of converting images of as many pixels as are decoded."""
    print("| file | pixels | peak memory, MB | CPU, s |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        side = 13_377
        for name, size, make in (
            ("TIFF, RGB, deflate", side, large_tiff),
            ("DICOM, 16-bit, window", side, large_dicom),
            ("DICOM, JPEG, YBR_FULL_422", 6680, lambda n: large_jpeg(n)),
            ("DICOM, JPEG 2000, RGB", 6680, lambda n: compressed(blank(n))),
            ("HEIC", 6680, lambda n: heic(blank(n), quality=30, chroma=420)),
            ("AVIF", 6680, lambda n: saved(blank(n), "AVIF", speed=10)),
        ):
            path.write_bytes(make(size))
            code = (
                "import sys, time, made_formats; made_formats.to_png(sys.argv[1]); "
                "print(f'{made_formats.peak_megabytes():,.0f} | "
                "{time.process_time():.1f}')"
            )
            done = in_process(["-c", code, str(path)])
            figures = done.stdout.strip() or done.stderr[-300:]
            print(f"| {name} | {size}x{size} | {figures} |", flush=True)


def blank(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), (200, 100, 50))


def large_dicom(side: int) -> bytes:
    return dicom(np.zeros((side, side), np.uint16), WindowCenter=9, WindowWidth=9)


def large_jpeg(side: int) -> bytes:
    return dicom(
        np.zeros((side, side, 3), np.uint8),
        "1.2.840.10008.1.2.4.50",
        PhotometricInterpretation="YBR_FULL_422",
        PixelData=made_formats.encapsulate([saved(blank(side), "JPEG")]),
    )


def large_tiff(side: int) -> bytes:
    """A TIFF of black, whose strips share the bytes that they are decoded from."""
    rows = 64
    whole = zlib.compress(bytes(side * rows * 3))
    last = zlib.compress(bytes(side * (side % rows) * 3))
    strips = side // rows

    def at(place: int) -> bytes:
        return tiff(
            [np.zeros((1, 1, 3), np.uint8)],
            **{"t256": side, "t257": side, "t259": 8, "t278": rows},
            t273=[place + 2**17] * strips + [place + 2**17 + len(whole)],
            t279=[len(whole)] * strips + [len(last)],
        )

    place = len(at(0))
    return at(place).ljust(place + 2**17) + whole + last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=300)
    parser.add_argument("--photo", type=Path)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    photo = Image.fromarray(load_sample_images().images[0])
    if arguments.photo:
        photo = Image.open(io.BytesIO(arguments.photo.read_bytes())).convert("RGB")
    tried()
    print()
    mutations(arguments.mutations)
    print()
    costs(photo)
    print()
    limits()
