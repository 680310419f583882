"""Whether `kt advise` is right: its advice beside both methods, carried out.

    python tests/benchmarks/advice.py DATA [DATA ...] --base MobileNetV2

For each DATA: advice from nothing and again with features cached, then `kt fit` and
`kt unfreeze-and-finetune` with 30% test images (where DATA names none), and the
accuracy of both phases on these. What is unfrozen is what the advice says, or else the
top stage. Fine-tuning counts as better if the
command's own test says so.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from fit_vs_recipe import run

import keras_transfer
from keras_transfer.evaluation.comparison import compare
from keras_transfer.evaluation.metrics import deciding_metric
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.evaluation.prediction import predict_sources
from keras_transfer.runs.run import Run

KT = Path(sys.executable).with_name("kt")


def probabilities(trained: Run, phase: str, sources: list[str]) -> np.ndarray:
    """float32 `[N, num_classes]` of images by a phase's model."""
    read = run_splits(trained).read
    found = {
        prediction.source: prediction.probabilities
        for prediction in predict_sources(load_model(trained, phase), sources, read)
    }
    return np.stack([found[source] for source in sources])


def measure(data: str, base: str, work: Path) -> bool:
    """Prints a line; whether the advice was right."""
    options = ["--base", base, "--cache-dir", work / "cache"]
    cold, _, _ = run(KT, "advise", data, *options, "--json")
    warm, _, text = run(KT, "advise", data, *options, "--json")
    advice = json.loads(text)
    run_dir = work / Path(data).name
    shares = ["--set", "splits.test=0.3"]
    named = ["--name", run_dir.name, "--runs-dir", work]
    fit, _, _ = run(KT, "fit", data, *options, *shares, *named)
    unfreeze = "all" if advice["method"] == "finetune-all" else "top"
    tune, _, _ = run(KT, "unfreeze-and-finetune", run_dir, "--unfreeze", unfreeze)
    trained = keras_transfer.open_run(run_dir)
    splits = run_splits(trained)
    sources, targets = splits.test.sources, splits.test.targets
    head, tuned = (
        probabilities(trained, phase, sources) for phase in ("fit", "finetune")
    )
    found = compare(deciding_metric(targets), targets, head, tuned)
    advised = advice["method"].startswith("finetune")
    print(
        f"{run_dir.name}: {advice['method']}, advised in {cold:.0f} s, with features "
        f"cached {warm:.0f} s; on {len(sources)} images head {found.before:.4f} "
        f"({fit:.0f} s), fine-tuned {found.after:.4f} ({tune:.0f} s), p = "
        f"{found.p_value:.3f}: {'right' if advised == found.is_better else 'wrong'}",
        flush=True,
    )
    return advised == found.is_better


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--base", default="MobileNetV2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        right = [measure(x, arguments.base, Path(folder)) for x in arguments.data]
    print(f"{sum(right)} of {len(right)} right")


if __name__ == "__main__":
    main()
