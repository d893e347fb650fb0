"""The wheel holds every package, the recipes and the embedded data."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"mmbase.configs", "mmbase.data.emoji"}
    for name in ("mmbase", "mmbase_kernels", "mmbase_bench"):
        folder = ROOT / table["package-dir"][name]
        for path in folder.rglob("__init__.py"):
            found.add(".".join([name, *path.parent.relative_to(folder).parts]))
    assert set(table["packages"]) == found
    assert list(ROOT.glob("configs/*.yaml"))
    assert len(list(ROOT.glob("mmbase/data/emoji/*.tar"))) == 7
