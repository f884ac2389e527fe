"""Redraw every picture of docs/images, or print the figures that the README quotes.

python -m tools.plots [figures]
"""

from __future__ import annotations

import argparse

from tools.plots.records import figures


def main() -> None:
    """Write the pictures, or print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("pictures", "figures"), default="pictures")
    if parser.parse_args().what == "figures":
        for name, value in figures().items():
            print(f"{name:48}{value:10.3f}")
        return
    from tools.plots.pictures import IMAGES, PICTURES

    for picture in PICTURES:
        data = picture.png()
        (IMAGES / picture.name).write_bytes(data)
        print(f"{picture.name}: {len(data) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
