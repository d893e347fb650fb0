"""The import direction of docs/ARCHITECTURE.md, and what must not be imported at module level."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"mmbase": ROOT / "mmbase", "mmbase_kernels": ROOT / "kernels/mmbase_kernels"}

SHARED = {"mmbase.errors", "mmbase.files", "mmbase.keyed"}
ALLOWED = {
    "mmbase_kernels": {"mmbase_kernels"},
    "mmbase.data": {"mmbase.data"},
    "mmbase.models": {"mmbase.models", "mmbase_kernels"},
    "mmbase.losses": {"mmbase.losses", "mmbase_kernels"},
    "mmbase.training": {
        "mmbase.training",
        "mmbase.models",
        "mmbase.losses",
        "mmbase.data",
        "mmbase.config",
        "mmbase_kernels.banner",
    },
    "mmbase.evaluation": {"mmbase.evaluation", "mmbase.models", "mmbase.losses", "mmbase.data"},
}
LAZY = {
    "torchvision",
    "timm",
    "transformers",
    "open_clip",
    "matplotlib",
    "webdataset",
    "pyarrow",
    "datasets",
    "tensorboard",
    "wandb",
}
TORCH_FREE = [
    "mmbase",
    "mmbase.cli",
    "mmbase.config",
    "mmbase.cli_data",
    "mmbase.cli_training",
    "mmbase.data.config",
    "mmbase.data.datasheet",
    "mmbase.data.filters",
    "mmbase.data.image",
    "mmbase.data.pack",
    "mmbase.data.shards",
    "mmbase.data.tokenizer",
    "mmbase.evaluation.templates",
    "mmbase.models.config",
    "mmbase.models.zoo",
    "mmbase.plan",
    "mmbase.provenance",
    "mmbase.training.checkpoint_config",
    "mmbase.training.checkpoint_store",
    "mmbase.training.checkpoint_upload",
    "mmbase.training.config",
    "mmbase.training.curriculum",
    "mmbase.training.curriculum_config",
    "mmbase.training.flops",
    "mmbase.training.guard_config",
    "mmbase.training.measured",
    "mmbase.training.parallel_config",
    "mmbase.training.schedule",
    "mmbase.training.tracking_config",
    "mmbase.training.units",
    "mmbase.training.watch",
]


def modules():
    for name, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


def imported(tree, top_level_only):
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)


def room(module):
    return next((name for name in ALLOWED if module == name or module.startswith(name + ".")), None)


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value).rpartition("/")[2])
def test_direction(module, path):
    tree = ast.parse(path.read_text())
    here = room(module)
    for name in imported(tree, top_level_only=False):
        assert not name.startswith("mmbase.cli") or module == "mmbase.__main__", f"{module} imports the command line"
        if here is None or name.partition(".")[0] not in SOURCES or name in SHARED:
            continue
        assert any(name == ok or name.startswith(ok + ".") for ok in ALLOWED[here]), f"{module} imports {name}"
    for name in imported(tree, top_level_only=True):
        assert name.partition(".")[0] not in LAZY, f"{module} imports {name} at module level"


def test_torch_free_modules():
    code = f"import sys, importlib\nfor m in {TORCH_FREE!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
