"""Write the weights between two models, and beyond them, as models of their own.

    python examples/paper/between.py REFERENCE ALIGNED --lambda 0.5,1.5,2 -o out/between

A plain model can be served and measured by vLLM, which takes no ``interpolate:``. What is there is
passed over. One file of the reference is in memory at a time; each model takes its room on the disk.
"""

import argparse
from pathlib import Path

from flexalign.models.interpolation import interpolate


def main() -> None:
    """Write one model for each λ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("aligned")
    parser.add_argument("--lambda", dest="lams", required=True, help="such as 0.5,1.5,2")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--by-id", action="store_true", help="special tokens differ in name alone")
    options = parser.parse_args()

    for lam in options.lams.split(","):
        folder = options.output / f"lambda={float(lam):g}"
        if not folder.exists():
            interpolate(options.reference, options.aligned, float(lam), folder, by_id=options.by_id)
        print(folder)


if __name__ == "__main__":
    main()
