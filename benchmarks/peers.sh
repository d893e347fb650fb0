#!/usr/bin/env bash
# The peers' environment: what mmbase is measured against, at pinned versions.
#
#   benchmarks/peers.sh FOLDER                      a virtual environment with everything, torch included (about 5.5 GB)
#   benchmarks/peers.sh FOLDER --torch-from PYTHON  shares torch and what else that interpreter has (about 0.1 GB)
#   benchmarks/peers.sh --wheels FOLDER             no environment: the wheels that gpu_suite.sh needs on a machine with
#                                                   torch but without network (Python 3.12, Linux x86-64), for MMBASE_WHEELS
#
# PYTHON (default python3) makes the environment. OpenCLIP's trainer needs webdataset 0.2.86 and pandas.
set -euo pipefail

peers=(open-clip-torch==3.3.0 webdataset==0.2.86 pandas siglip-kernel==0.1.2 memeff==0.3.1)
modules=(open_clip open_clip_train.main webdataset pandas siglip_kernel memeff)
python=${PYTHON:-python3}

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# Wheels for another machine: pydantic with its compiled core, the rest pure Python.
download_wheels() {
    local flags=(--quiet --disable-pip-version-check --only-binary=:all: --python-version 3.12 --implementation cp
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$1")
    "$python" -m pip download "${flags[@]}" pydantic
    "$python" -m pip download "${flags[@]}" --no-deps \
        open-clip-torch==3.3.0 ftfy wcwidth braceexpand webdataset==0.2.86 siglip-kernel==0.1.2 memeff==0.3.1 \
        pytest-xdist execnet
    ls "$1"
}

# Append another interpreter's site-packages to the path of the new environment, after its own.
share() {
    local theirs ours
    theirs=$("$2" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    ours=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$theirs" >"$ours/shared_torch.pth"
    "$1/bin/python" -c 'import torch; print("shares torch", torch.__version__)'
}

report() {
    local failed=0 module
    for module in "${modules[@]}"; do
        if ! "$1/bin/python" - "$module" <<'PYTHON'; then failed=1; fi
import importlib, importlib.metadata, sys

name = sys.argv[1]
package = {"open_clip": "open-clip-torch", "open_clip_train.main": "open-clip-torch"}.get(name, name.replace("_", "-"))
try:
    importlib.import_module(name)
except Exception as error:
    first = (str(error).strip() or "no message").splitlines()[0]
    print(f"FAIL  {name}: {type(error).__name__}: {first}")
    sys.exit(1)
print(f"ok    {name} {importlib.metadata.version(package)}")
PYTHON
    done
    ((failed == 0)) || echo "a peer that does not import is reported as such by the benchmarks, never dropped"
}

[[ $# -ge 1 ]] || usage
if [[ $1 == --wheels ]]; then
    [[ $# -eq 2 ]] || usage
    download_wheels "$2"
    exit
fi
[[ $1 != -* ]] || usage
folder=$1
"$python" -m venv "$folder"
case "${2:-}" in
"") ;;
--torch-from) [[ $# -eq 3 ]] || usage && share "$folder" "$3" ;;
*) usage ;;
esac
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir "${peers[@]}"
report "$folder"
