"""Writes the features of data as files that other benchmarks read.

    python tests/benchmarks/features.py DIR DATA [DATA ...] --base efficientnet_lite0

Each DIR/NAME.npz has `x` float32 `[N, D]` and `y` int64 `[N]` of all images.
"""

import argparse
from pathlib import Path

import numpy as np

from keras_transfer.config import load_config
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.workflows.inputs import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--base", default="efficientnet_lite0")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for data in arguments.data:
        config = load_config(None, {"data": data, "base": arguments.base})
        inputs = prepare(config, makes_run=False)
        part = frozen_base(inputs.config)
        found = frozen_features(part, inputs.splits, 0, Storage())
        splits = inputs.splits.keep(found.extraction.digests)
        tables = [table for _, table in splits.items() if len(table)]
        x = np.concatenate([found.rows(table.sources)[:] for table in tables])
        y = np.concatenate([table.targets for table in tables])
        name = Path(data).stem
        np.savez(arguments.folder / f"{name}.npz", x=x, y=y)
        print(f"{name}: {len(y):,} images", flush=True)


if __name__ == "__main__":
    main()
