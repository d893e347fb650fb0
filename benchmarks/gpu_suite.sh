#!/usr/bin/env bash
# Everything a GPU can show for what exists: correctness in bf16 before any timing, ceilings, offline check, loss, step.
#
#   benchmarks/gpu_suite.sh OUT [PART...]     parts: environment correctness ceilings offline loss train_step (all)
#
# Resumable: OUT/parts.tsv records how each part ended; one that ended well is skipped the next time. A part that fails or
# passes its time limit is recorded and the rest goes on; the exit code is then 1. At most 10 minutes in all; OUT is flat
# and holds at most 8 small files. Nothing is installed and no network is used. Where packages are missing, MMBASE_WHEELS
# names a folder of wheels (benchmarks/peers.sh --wheels), which are unpacked beside the path. Without a GPU the same parts
# run at tiny sizes on the CPU, which shows that the suite works and nothing else.
#
# PYTHON: interpreter (python3). MMBASE_COMMIT: the commit, where the code lies without its repository.
# MMBASE_SUITE_LOSS: options of `mmbase bench loss` in place of --sizes 65536 --widths 768 --dtypes bf16.
set -uo pipefail

all=(environment correctness ceilings offline loss train_step)
if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}
wheels=${MMBASE_WHEELS:+$(realpath "$MMBASE_WHEELS")}
cd "$(dirname "$0")/.." || exit 2
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
export PYTHONPATH=$unpacked:.:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [[ -n $wheels ]]; then
    for wheel in "$wheels"/*.whl; do
        "$python" -m zipfile -e "$wheel" "$unpacked" || exit 2
    done
fi
log=$out/suite.log
state=$out/parts.tsv
touch "$state"

# Time limit in seconds of each part; together under ten minutes.
limit() {
    case $1 in
    environment) echo 30 ;;
    correctness) echo 140 ;;
    ceilings) echo 40 ;;
    offline) echo 60 ;;
    loss) echo 210 ;;
    train_step) echo 90 ;;
    *) return 1 ;;
    esac
}

part() {
    case $1 in
    environment) environment ;;
    correctness)
        if ((gpu)); then
            "$python" -m pytest -m gpu tests/kernels tests/losses -q --maxfail=20 --durations=5 -p no:cacheprovider
        else # nothing can run: the tests are found
            "$python" -m pytest -m gpu tests/kernels tests/losses -q --collect-only -p no:cacheprovider
        fi
        ;;
    ceilings)
        if ((gpu)); then
            "$python" -m mmbase_bench.ceilings --device cuda --output "$out/ceilings.json"
        else
            "$python" -m mmbase_bench.ceilings --device cpu --size 256 --widths 64 --output "$out/ceilings.json"
        fi
        ;;
    offline)
        if ((gpu)); then
            "$python" -m mmbase_kernels.offline --targets sm_90 --json "$out/offline.json"
        else # the whole table takes two cores minutes
            "$python" -m mmbase_kernels.offline --targets sm_90 --kernels merge --json "$out/offline.json"
        fi
        ;;
    loss)
        if ((gpu)); then
            # shellcheck disable=SC2086 # options, split at spaces
            "$python" -m mmbase bench loss ${MMBASE_SUITE_LOSS:---sizes 65536 --widths 768 --dtypes bf16} --output "$out"
        else
            "$python" -m mmbase bench loss --device cpu --sizes 64 --widths 64 --repeats 2 --threads 1 \
                --directions forward+backward --contenders openclip mmbase-torch mmbase-triton --output "$out"
        fi
        ;;
    train_step)
        if ((gpu)); then
            "$python" -m mmbase bench train_step --models ViT-B-32 --batch 256 --pairs 20 --device cuda \
                --output "$out/train_step.json"
        else
            "$python" -m mmbase bench train_step --models ViT-B-32 --batch 1 --pairs 1 --precisions fp32 \
                --output "$out/train_step.json"
        fi
        ;;
    esac
}

environment() {
    if ((gpu)); then nvidia-smi; fi
    "$python" - <<'PYTHON'
import importlib, importlib.metadata, sys

import torch

print("python", sys.version.split()[0], "torch", torch.__version__, "triton", importlib.metadata.version("triton"))
for index in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(index))
if not torch.cuda.is_available():
    print("no GPU: tiny sizes on the CPU, which only show that the suite works")
missing = []
for name in ("mmbase.training.run", "mmbase_kernels", "open_clip", "matplotlib", "pytest"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(f"{name}: {error}")
for name in ("siglip_kernel", "memeff"):  # peers: their rows say what is wrong with them
    try:
        importlib.import_module(name)
        print("peer", name, "imports")
    except Exception as error:
        print("peer", name, "does not import:", error)
if missing:
    sys.exit("missing: " + "; ".join(missing) + "; name a folder of wheels in MMBASE_WHEELS")
PYTHON
}

# A part in a shell of its own, so that its time limit ends everything it started.
export -f part environment
export python out gpu
failed=0 gpu=
for name in "$@"; do
    if ! limit "$name" >/dev/null; then
        echo "error: there is no part '$name'; parts: ${all[*]}" >&2
        exit 2
    fi
done
for name in "${@:-${all[@]}}"; do
    if grep -q "^$name"$'\tok' "$state"; then
        echo "skip  $name: done before"
        continue
    fi
    seconds=$(limit "$name")
    gpu=${gpu:-$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')}
    [[ -n $gpu ]] || exit 2
    echo "== $name, at most $seconds s, $(date -u +%FT%TZ)" | tee -a "$log"
    begun=$SECONDS
    timeout --kill-after=10 "$seconds" bash -c "part $name" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
    0) result=ok ;;
    124 | 137) result="over its limit of $seconds s" failed=1 ;;
    *) result="failed, exit $code" failed=1 ;;
    esac
    grep -v "^$name"$'\t' "$state" >"$state.new"
    printf '%s\t%s\t%d s\n' "$name" "$result" $((SECONDS - begun)) >>"$state.new"
    mv "$state.new" "$state"
done
echo "== how the parts ended"
cat "$state"
exit "$failed"
