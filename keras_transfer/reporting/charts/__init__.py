"""Charts: each function takes arrays and returns a matplotlib `Figure`.

There is one definition of each chart for three readers: the report page (`themed_svg`),
files for papers and slides (`save_png`), and notebooks, which show a figure by
themselves. Titles are left to the page around a chart. matplotlib is imported when the
first chart is drawn, and never its global state (`pyplot`).
"""

from keras_transfer.reporting.charts.classes import class_bars, confusion_matrix
from keras_transfer.reporting.charts.confidence import (
    accuracy_coverage_curve,
    reliability_diagram,
)
from keras_transfer.reporting.charts.curves import (
    precision_recall_curves,
    roc_curves,
)
from keras_transfer.reporting.charts.images import (
    feature_map,
    image_grid,
    overlay,
)
from keras_transfer.reporting.charts.output import save_png, themed_svg
from keras_transfer.reporting.charts.ranking import draw_chart
from keras_transfer.reporting.charts.style import theme_css
from keras_transfer.reporting.charts.training import (
    epoch_curves,
    l2_path,
    layer_rates,
    learning_curve,
)

__all__ = [
    "accuracy_coverage_curve",
    "class_bars",
    "confusion_matrix",
    "draw_chart",
    "epoch_curves",
    "feature_map",
    "image_grid",
    "l2_path",
    "layer_rates",
    "learning_curve",
    "overlay",
    "precision_recall_curves",
    "reliability_diagram",
    "roc_curves",
    "save_png",
    "theme_css",
    "themed_svg",
]
