import subprocess
import sys

import pytest

from mmbase.errors import MmbaseError
from mmbase.evaluation.templates import class_name_sets, class_names, fill, resolve_templates, template_sets


def test_openclip_lists_are_those_of_the_installed_package():
    from open_clip import zero_shot_metadata as theirs

    assert [fill(t, "cat") for t in resolve_templates("openai")] == [t("cat") for t in theirs.OPENAI_IMAGENET_TEMPLATES]
    assert [fill(t, "cat") for t in resolve_templates("imagenet-simple")] == [
        t("cat") for t in theirs.SIMPLE_IMAGENET_TEMPLATES
    ]
    assert resolve_templates("imagenet") == resolve_templates("openai")
    assert class_names("imagenet") == list(theirs.IMAGENET_CLASSNAMES)


def test_sizes_of_the_published_sets():
    assert len(resolve_templates("imagenet")) == 80
    assert len(resolve_templates("imagenet-simple")) == 7
    assert len(class_names("imagenet")) == 1000


def test_every_set_resolves_to_templates_with_one_slot():
    for name in template_sets():
        templates = resolve_templates(name)
        assert all(template.count("{}") == 1 for template in templates)
        assert len(set(templates)) == len(templates)
    assert all(class_names(name) for name in class_name_sets())


def test_own_templates():
    assert resolve_templates("a sketch of {}") == ["a sketch of {}"]
    assert resolve_templates(("{}", "two {}s")) == ["{}", "two {}s"]
    assert resolve_templates("none") == ["{}"]


def test_fill_leaves_braces_of_the_class_name_alone():
    assert fill("a {} here", "{} set {x}") == "a {} set {x} here"


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("imagnet", "did you mean 'imagenet'"),
        ("a photo of a cat", "needs '{}'"),
        ("{} and {}", "2 times '{}'"),
        (["a {}", "a {name}"], "'a {name}' has 0 times"),
        ([], "empty"),
        ([3], "template 3 has 0 times"),
    ],
)
def test_unusable_templates_are_explained_on_one_line(templates, message):
    with pytest.raises(MmbaseError) as error:
        resolve_templates(templates)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_class_names_give_the_nearest():
    with pytest.raises(MmbaseError, match="did you mean 'imagenet'"):
        class_names("imagenet1k")


def test_evaluation_imports_neither_torch_nor_open_clip():
    code = (
        "import sys, mmbase.evaluation.report, mmbase.evaluation.card;"
        "from mmbase.evaluation.templates import *; resolve_templates('imagenet'); class_names('imagenet');"
        "found = [m for m in ('torch', 'torchvision', 'open_clip', 'matplotlib') if m in sys.modules];"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
