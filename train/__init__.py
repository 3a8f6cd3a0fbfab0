"""Entry points for training and evaluation; run them as `python -m train.<name> --help`."""
