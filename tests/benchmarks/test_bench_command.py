"""``mmbase bench`` as a person meets it: subjects, one-line mistakes, no torch before it is needed."""

import subprocess
import sys

import pytest

from mmbase import cli
from mmbase_bench import SUBJECTS


def bench(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mmbase", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_subjects_are_listed_without_torch():
    code = "import sys; sys.argv[1:] = ['bench', '--help']\nfrom mmbase.cli import app\n"
    code += "app(standalone_mode=False)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    for subject, meaning in SUBJECTS.items():
        assert any(line.split() == [subject, *meaning.split()] for line in lines)


def test_no_subject_lists_them_too(monkeypatch, capsys):
    assert bench(monkeypatch) == 0
    assert "train_step" in capsys.readouterr().out


@pytest.mark.parametrize("subject", SUBJECTS)
def test_options_of_a_subject(subject, monkeypatch, capsys):
    assert bench(monkeypatch, subject, "--help") == 0
    printed = capsys.readouterr().out
    assert f"usage: mmbase bench {subject}" in printed and "--output" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lose"], "there is no benchmark 'lose'; did you mean 'loss'"),
        (["loss", "--size", "4"], "unknown option '--size'; did you mean '--sizes'"),
        (["loss", "--sizes", "many"], "invalid int value: 'many'"),
        (["loss", "--sizes", "0"], "--sizes=0 must be at least 1"),
        (["loss", "--repeats", "1"], "--repeats=1 must be at least 2"),
        (["loss", "--dtypes", "fp3"], "--dtypes='fp3' is not one of fp32, fp16, bf16; did you mean 'fp32'"),
        (["loss", "--kinds", "sofmax"], "did you mean 'softmax'"),
        (["loss", "--contenders", "mmbase-tritn"], "did you mean 'mmbase-triton'"),
        (["loss", "--device", "gpu"], "--device='gpu' is no device; use cpu, cuda"),
        (["loss", "--device", "cuda:99"], "CUDA devices; use"),
        (["attention", "--shapes", "vit-b-23"], "did you mean 'vit-b-32'"),
        (["attention", "--directions", "backwards"], "did you mean 'backward'"),
        (["attention", "--batch", "0"], "--batch=0 must be at least 1"),
        (["attention", "--resume"], "--resume goes on from the JSON in --output, which is missing: name the folder"),
        (["layer_norm", "--operators", "gelo"], "did you mean 'gelu'"),
        (["block", "--contenders", "open-clip"], "did you mean 'openclip'"),
        (["distributed_loss", "--kinds", "x"], "--kinds='x' is not one of softmax, sigmoid"),
        (["distributed_loss", "--processes", "0"], "--processes=0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(arguments, message, monkeypatch, capsys):
    assert bench(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.strip().splitlines()) == 1
