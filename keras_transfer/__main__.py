"""Entry point of `python -m keras_transfer`, which is the same as `kt`."""

from keras_transfer.cli import main

main()
