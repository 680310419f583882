"""Odd files: tiny, huge, nearly black or white, blank, blurry, of extreme shape.

What is odd is measured on the file or on the pixels that the base sees. What more than
a tenth of the images are, and more than 20 of them, is a property of the data, not of
some odd files, and is told in one finding without suspects.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from keras_transfer.findings.finding import Finding, Severity, Suspect, counted
from keras_transfer.findings.images import AuditedImages

UNUSABLE = "unusable files"
"""Kind of the finding about files that are left out."""

_MOST_ODD = 0.1  # of the images; with more, being so is usual in the data
_FEW_ODD = 20  # images that one can look at, whatever share of the data they are

_TINY = 32
"""Shorter side in pixels. The last feature map of the usual bases has one cell for 32 x
32 pixels."""
_SMALL = 64
"""Median of the shorter sides in pixels, below which the finding is about the data.
Digits of 8 and CIFAR-10 of 32 pixels are below; bases were trained on 224 and more."""
_TIMES = 4.0
"""Ratio of a side to the median of the data that is odd. In five sample data sets of
web photos, X-rays and faces, at most 0.5% of the images are 4 times as large."""
_HUGE = 1_000  # side of a square of as many pixels; smaller images cost no time
_EXTREME = 1 / 0.35
"""Longer side over the shorter. Source: CleanVision 0.3, issue `odd_aspect_ratio`. It
must also be twice the median of the data."""
_DARK = 40.0
"""Of 255: by Cantelli's inequality, at least 80% of the pixels are below the mean plus
two standard deviations of luminance. Of 8,600 sample images none is below 45, and none
is as near to white."""
_BLANK = 3.0  # standard deviation of luminance; that of the sample images is 6 and more
_UNUSUAL = 3.5
"""Modified z-score. Source: Iglewicz & Hoaglin 1993, "How to Detect and Handle
Outliers"."""
_BLURRED = 20.0
"""Variance of the Laplacian. With photos blurred by a Gaussian whose standard deviation
is 1% of their longer side, 95% are below 15; without, it is 54 and more."""
_LEAST_SPREAD = 0.25  # of logarithms; images of nearly equal sharpness are all sharp
FEWEST_COMPARED = 20
"""Images that a median absolute deviation is computed from, to find blurry ones."""


@dataclass(frozen=True)
class _Oddity:
    """A way in which files are odd.

    Attributes:
        kind: The finding's kind.
        numbers: `[N]` measured numbers.
        is_odd: bool `[N]`.
        what: What the odd images are, with the meaning of the number.
        fix: What to do.
        severity: Severity of the finding about some images.
        largest_first: Whether large numbers are the most suspicious.
    """

    kind: str
    numbers: np.ndarray
    is_odd: np.ndarray
    what: str
    fix: str
    severity: Severity = "low"
    largest_first: bool = False


def odd_file_findings(images: AuditedImages) -> list[Finding]:
    """Finds files that are odd by their size, shape, brightness or sharpness.

    Args:
        images: The images. Those whose quality is not known are left out.
    """
    rows = np.flatnonzero(images.quality["bytes"] > 0)
    quality = images.quality[rows]
    if not len(rows):
        return []
    found = list(_all_small(quality))
    for measure in (_sizes, _shapes, _brightness, _blur):
        for oddity in measure(quality):
            if oddity.is_odd.any():
                found.append(_finding(oddity, images, rows))
    return found


def unusable_findings(skipped: Mapping[str, str]) -> list[Finding]:
    """Tells of files that cannot be used.

    Args:
        skipped: The reason for each, by source.
    """
    if not skipped:
        return []
    return [
        Finding(
            kind=UNUSABLE,
            severity="medium",
            message=f"{counted(len(skipped), 'file')} cannot be read or decoded, and "
            f"{'is' if len(skipped) == 1 else 'are'} left out. Mend or remove "
            f"{'it' if len(skipped) == 1 else 'them'}.",
            suspects=tuple(
                Suspect(path=source, other=reason) for source, reason in skipped.items()
            ),
            figures={"images": float(len(skipped))},
        )
    ]


def _finding(oddity: _Oddity, images: AuditedImages, rows: np.ndarray) -> Finding:
    """Tells of the odd images, or of all images if oddity is usual in the data."""
    odd = np.flatnonzero(oddity.is_odd)
    count, share = len(odd), len(odd) / len(rows)
    figures = {"images": float(count), "share": share}
    are, total = "is" if count == 1 else "are", counted(len(rows), "image")
    if share > _MOST_ODD and count > _FEW_ODD:
        return Finding(
            kind=oddity.kind,
            severity=oddity.severity,
            message=f"{count:,} of {total} ({share:.0%}) {are} "
            f"{oddity.what}: this is a property of the data. {oddity.fix}",
            figures=figures,
        )
    sign = -1 if oddity.largest_first else 1
    order = odd[np.argsort(sign * oddity.numbers[odd], kind="stable")]
    sources = images.table.sources
    return Finding(
        kind=oddity.kind,
        severity=oddity.severity,
        message=f"{count:,} of {total} {are} {oddity.what}. {oddity.fix}",
        suspects=tuple(
            Suspect(path=sources[rows[i]], score=float(oddity.numbers[i]))
            for i in order
        ),
        figures=figures,
    )


def _all_small(quality: np.ndarray) -> Iterator[Finding]:
    shorter = np.minimum(quality["width"], quality["height"])
    median = float(np.median(shorter))
    if median >= _SMALL:
        return
    sizes = np.unique(np.stack([quality["width"], quality["height"]]), axis=1)
    if sizes.shape[1] == 1:
        said = f"All images are {sizes[0, 0]} x {sizes[1, 0]} pixels"
    else:
        said = f"Half of the images have a side of at most {median:.0f} pixels"
    yield Finding(
        kind="small images",
        severity="low",
        message=f"{said}: they are enlarged for a base that was trained on 224 pixels "
        "and more. Use larger originals if there are any.",
        figures={"pixels": median},
    )


def _sizes(quality: np.ndarray) -> Iterator[_Oddity]:
    width, height = (quality[name].astype(float) for name in ("width", "height"))
    shorter = np.minimum(width, height)
    usual = float(np.median(shorter))
    yield _Oddity(
        "tiny images",
        shorter,
        (shorter <= _TINY) & (shorter * _TIMES <= usual),
        f"tiny: the shorter side, the score in audit.csv, is at most {_TINY} pixels, "
        f"while half of all images have {usual:.0f} or more",
        "Use larger originals, or leave such images out.",
    )
    side = np.sqrt(width * height)
    usual = float(np.median(side))
    yield _Oddity(
        "huge images",
        width * height / 1e6,
        (side >= _TIMES * usual) & (side >= _HUGE),
        f"huge: at least {_TIMES**2:.0f} times as many pixels as the median image; the "
        "score is in megapixels",
        "Scale such images down, which saves time, and see whether they show the same "
        "things.",
        largest_first=True,
    )


def _shapes(quality: np.ndarray) -> Iterator[_Oddity]:
    width, height = (quality[name].astype(float) for name in ("width", "height"))
    ratio = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
    yield _Oddity(
        "extreme shapes",
        ratio,
        (ratio >= _EXTREME) & (ratio >= 2 * np.median(ratio)),
        f"at least {_EXTREME:.1f} times as long as wide, the score in audit.csv; the "
        "base sees a picture squeezed into a square",
        "Crop such images to what matters.",
        largest_first=True,
    )


def _brightness(quality: np.ndarray) -> Iterator[_Oddity]:
    brightness, contrast = quality["brightness"], quality["contrast"]
    has_lost_bits = quality["is_nearly_black"]
    yield _Oddity(
        "12 bits in 16",
        brightness,
        has_lost_bits,
        "saved in 16 bits, of which at most 12 are used, and so nearly black",
        "Multiply the pixels by 16, or save such images in 8 bits.",
        "medium",
    )
    is_dark = (brightness + 2 * contrast <= _DARK) & ~has_lost_bits
    is_light = brightness - 2 * contrast >= 255 - _DARK
    yield _Oddity(
        "nearly black images",
        brightness,
        is_dark,
        "nearly black; the score in audit.csv is the mean brightness of 255",
        "Look whether there is anything to see.",
    )
    yield _Oddity(
        "nearly white images",
        brightness,
        is_light,
        "nearly white; the score in audit.csv is the mean brightness of 255",
        "Look whether there is anything to see.",
        largest_first=True,
    )
    yield _Oddity(
        "blank images",
        contrast,
        (contrast <= _BLANK) & ~is_dark & ~is_light & ~has_lost_bits,
        "of nearly one color; the score in audit.csv is the standard deviation of "
        "brightness",
        "Look whether there is anything to see.",
    )


def _blur(quality: np.ndarray) -> Iterator[_Oddity]:
    """Finds images that are blurred compared with others of the data.

    An image of little detail, such as a clear sky, has a low variance of the Laplacian
    too, but not in relation to its contrast. Small images are blurred by enlarging.
    """
    sharpness = np.maximum(quality["sharpness"].astype(float), 1e-3)
    contrast = np.maximum(quality["contrast"].astype(float), 1.0)
    shorter = np.minimum(quality["width"], quality["height"])
    is_compared = (shorter >= _SMALL) & (contrast > _BLANK)
    if is_compared.sum() < FEWEST_COMPARED:
        return
    is_odd = is_compared & (sharpness <= _BLURRED)
    for measure in (np.log(sharpness), np.log(sharpness / contrast**2)):
        is_odd &= _below_usual(measure, is_compared)
    yield _Oddity(
        "blurry images",
        sharpness,
        is_odd,
        "blurry compared with the others; the score in audit.csv is the variance of "
        f"the Laplacian, whose median is {np.median(sharpness[is_compared]):.0f}",
        "Leave such images out, unless images in use are as blurry.",
    )


def _below_usual(values: np.ndarray, is_compared: np.ndarray) -> np.ndarray:
    """Returns bool `[N]`: whether values are far below the median, by the MAD."""
    compared = values[is_compared]
    median = np.median(compared)
    spread = 1.4826 * np.median(np.abs(compared - median))  # sigma of a normal one
    result: np.ndarray = values < median - _UNUSUAL * max(spread, _LEAST_SPREAD)
    return result
