"""This package holds what is timed, against whom, with the bytes each must move. `python -m bench --help`."""
