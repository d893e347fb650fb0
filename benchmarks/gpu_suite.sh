#!/usr/bin/env bash
# Everything a GPU can show for what exists: correctness in bf16 before any timing, then the benchmarks.
#
#   benchmarks/gpu_suite.sh OUT [PART...]
#       parts, the most important first: environment correctness attention loss layer_norm block train_step ceilings offline
#
# One call stops by itself within MMBASE_SUITE_SECONDS (570): a part begins only where its time limit still fits. The
# next call goes on: OUT/parts.tsv records how each part ended, what ended well is skipped, what was never run comes
# before what failed, and a benchmark cut off by its time keeps the cases that it has. All limits together are under 25
# minutes. The exit code is 0 where all ended well, 1 where a part failed or passed its limit, 3 where parts are left.
# OUT is flat, of small files; take it along to go on elsewhere, packed where few files come back:
#   benchmarks/gpu_suite.sh suite; tar -czf "$OUT/suite.tar.gz" suite
# Nothing is installed and no network is used. Where packages are missing, MMBASE_WHEELS names a folder of wheels
# (benchmarks/peers.sh --wheels), which are unpacked beside the path. Without a GPU the same parts run at tiny sizes on the
# CPU, which shows that the suite works and nothing else.
#
# PYTHON: interpreter (python3). MMBASE_COMMIT: the commit, where the code lies without its repository.
# MMBASE_SUITE_LOSS: options of `mmbase bench loss` in place of --sizes 65536 --widths 768 --dtypes bf16.
set -uo pipefail

all=(environment correctness attention loss layer_norm block train_step ceilings offline)
if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,22s/^# \{0,1\}//p' "$0" >&2
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

# Time limit in seconds of each part; together under 25 minutes.
limit() {
    case $1 in
    environment) echo 30 ;;
    correctness) echo 280 ;;
    attention) echo 320 ;;
    loss) echo 200 ;;
    layer_norm | block) echo 180 ;;
    train_step) echo 90 ;;
    ceilings) echo 30 ;;
    offline) echo 120 ;;
    *) return 1 ;;
    esac
}

# A benchmark of many cases: the most important first, none begun once two thirds of its limit are over, and none
# measured again that the last call measured.
bench() {
    "$python" -m mmbase bench "$1" --resume --seconds $(($(limit "$1") * 2 / 3)) --output "$out" "${@:2}"
}

part() {
    case $1 in
    environment) environment ;;
    correctness)
        if ((gpu)); then
            workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $(($(nproc) / 2))") # it compiles, mostly
            # shellcheck disable=SC2086 # two words or none
            "$python" -m pytest -m gpu tests/kernels tests/losses tests/models/test_on_gpu.py tests/data/test_timing.py -q --maxfail=20 --durations=5 -p no:cacheprovider $workers
        else # nothing can run: the tests are found
            "$python" -m pytest -m gpu tests/kernels tests/losses tests/models/test_on_gpu.py tests/data/test_timing.py -q --collect-only -p no:cacheprovider
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
    attention)
        if ((gpu)); then
            bench attention --device cuda --dtypes bf16 fp16
        else
            bench attention --device cpu --batch 2 --shapes vit-b-32 text-captions --repeats 2 --threads 1 \
                --contenders sdpa-flash sdpa-cudnn padded-flash mmbase-auto mmbase-triton
        fi
        ;;
    layer_norm)
        if ((gpu)); then
            bench layer_norm --device cuda --dtypes bf16 --shapes vit-b-16 text vit-l-14 vit-b-16-small
        else
            bench layer_norm --device cpu --batch 2 --shapes text --operators add_layer_norm gelu head --repeats 2 \
                --threads 1 --contenders eager mmbase-torch mmbase-triton
        fi
        ;;
    block)
        if ((gpu)); then
            bench block --device cuda --dtypes bf16
        else
            bench block --device cpu --batch 1 --shapes vit-b-32 --repeats 2 --threads 1
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

run_part() {
    local name=$1 seconds begun code result
    seconds=$(limit "$name")
    if ((SECONDS + seconds + 10 > budget)); then
        echo "left  $name: it may take $seconds s, and $((budget - SECONDS)) s of $budget are left; call again to go on"
        left=1
        return
    fi
    echo "== $name, at most $seconds s, $(date -u +%FT%TZ)" | tee -a "$log"
    begun=$SECONDS
    timeout --kill-after=10 "$seconds" bash -c "part $name" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
    0) result=ok ;;
    3) result="cases are left" left=1 ;;
    124 | 137) result="over its limit of $seconds s" failed=1 ;;
    *) result="failed, exit $code" failed=1 ;;
    esac
    grep -v "^$name"$'\t' "$state" >"$state.new"
    printf '%s\t%s\t%d s\n' "$name" "$result" $((SECONDS - begun)) >>"$state.new"
    mv "$state.new" "$state"
}

# A part in a shell of its own, so that its time limit ends everything it started.
export -f part environment bench limit
export python out gpu
budget=${MMBASE_SUITE_SECONDS:-570}
failed=0 left=0 gpu=
for name in "${@:-${all[@]}}"; do
    if ! seconds=$(limit "$name"); then
        echo "error: there is no part '$name'; parts: ${all[*]}" >&2
        exit 2
    fi
    if ((seconds + 10 > budget)); then
        echo "error: MMBASE_SUITE_SECONDS=$budget is too little for $name, which may take $seconds s: give more" >&2
        exit 2
    fi
done
new=() again=()
for name in "${@:-${all[@]}}"; do
    if grep -q "^$name"$'\tok' "$state"; then
        echo "skip  $name: done before"
    elif grep -q "^$name"$'\t' "$state"; then
        again+=("$name")
    else
        new+=("$name")
    fi
done
if ((${#new[@]} + ${#again[@]})); then
    gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
    [[ -n $gpu ]] || exit 2
fi
for name in "${new[@]}" "${again[@]}"; do
    run_part "$name"
done
echo "== how the parts ended"
cat "$state"
((failed)) && exit 1
((left)) && exit 3
exit 0
