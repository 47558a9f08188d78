"""What the figures of docs/results.md were made with, at the head of that document.

python benchmarks/environment.py
"""

from importlib.metadata import version

from _document import put_section
from _machine import machine

from flexalign.evaluation.summary import environment

FURTHER = ("trl", "accelerate", "datasets")


def main() -> None:
    found, here = environment(), machine()
    packages = {**found["packages"], **{name: version(name) for name in FURTHER}}
    text = (
        f"`make results` was run with flexalign "
        f"{found['flexalign']}, Python {found['python']}, "
        f"{', '.join(f'{name} {number}' for name, number in packages.items())} on {found['system']}, "
        f"{here['cores']} cores of {here['cpu']}. The whole set is in `constraints.txt`.\n"
    )
    put_section("environment", text)
    print(text)


if __name__ == "__main__":
    main()
