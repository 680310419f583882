"""Formats that the decoder's graph does not decode -> pixels or PNG.

Reading order: convert, limits, pixels, tiff, dicom, silence.
"""
