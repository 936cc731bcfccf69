"""Prints the libraries in a folder of packages with their licences: ``licences.py SITE_PACKAGES``."""

import sys
from importlib.metadata import Distribution, distributions


def main() -> None:
    """One line for each library, by name."""
    found = sorted(distributions(path=[sys.argv[1]]), key=lambda one: one.name.lower())
    sys.stdout.writelines(
        f"{one.name} {one.version}: {_licence(one)}\n" for one in found if one.name != "wg-agent"
    )


def _licence(one: Distribution) -> str:
    """Return the licence as the library states it, the newer way first."""
    metadata = one.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classified = [
        value.rpartition(" :: ")[2]
        for value in metadata.get_all("Classifier", [])
        if value.startswith("License :: ")
    ]
    text = str(metadata.get("License", ""))
    if classified:
        return ", ".join(classified)
    return text if text and "\n" not in text else "see its files"


if __name__ == "__main__":
    main()
