"""Run one cell, or a whole comparison: `python run.py --help`."""

from harness.start import main

if __name__ == "__main__":
    main()
