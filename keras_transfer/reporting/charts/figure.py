"""A figure that notebooks show; imported when the first chart is drawn."""

import io

from matplotlib.figure import Figure


class Chart(Figure):
    """A matplotlib figure that a notebook shows without `pyplot`.

    IPython knows how to show a `Figure` only after the inline backend was loaded, which
    `pyplot` does. This one says itself what it looks like.
    """

    def _repr_png_(self) -> bytes:
        """Draws the figure as a PNG file, for IPython."""
        from keras_transfer.reporting.charts.output import save_png

        file = io.BytesIO()
        save_png(self, file, dpi=130)
        return file.getvalue()
