"""Compares the quick learning curve of a report with that of `kt advise`.

Run: python tests/benchmarks/learning_curve.py RUN [RUN ...]

For each finished run of a linear head, both are measured on its training images, whose
features are in the cache: shares, the metric with its 95% interval, and the seconds of
CPU time that the quick one took with the run's L2 strength.
"""

import sys
import time

from keras_transfer.advice.probe import (
    QUICK_SHARES,
    learning_curve,
    probe,
    quick_learning_curve,
)
from keras_transfer.evaluation.of_run import run_splits
from keras_transfer.events import SILENT
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.runs.run import open_run


def main() -> None:
    for name in sys.argv[1:]:
        run = open_run(name)
        config = run.config
        listed = run_splits(run)
        storage = Storage(run.manifest.precision, quality=True)
        found = frozen_features(frozen_base(config), listed, 0, storage, SILENT)
        splits = usable_splits(config, listed, found.extraction)
        started = time.process_time()
        quick = quick_learning_curve(config, splits, found, run.manifest.l2)
        seconds = time.process_time() - started
        curve, _ = learning_curve(
            config, splits, probe(config, splits, found), QUICK_SHARES
        )
        print(f"{name}: {len(splits.train):,} images, quick: {seconds:.2f} s of CPU")
        print("  quick:  ", *(f"{count:,}: {one}" for count, one in quick), sep="  ")
        print("  advise: ", *(f"{share}: {one}" for share, one in curve.items()))


if __name__ == "__main__":
    main()
