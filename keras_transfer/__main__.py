"""`python -m keras_transfer`: the command line without its script."""

from keras_transfer.cli import main

main()
