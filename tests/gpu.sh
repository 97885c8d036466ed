#!/bin/bash
# All that needs a GPU, in one call of at most ten minutes: bash tests/gpu.sh [OUT.md]
#
# On a fresh machine: WHEELS=folder installs the requirements from its wheels. PYTHON=name is the
# interpreter. Without CUDA it is a dry run: the tests are skipped, the benchmarks are tiny.
# Every part has its own time limit; a part that fails is written down, and the next one runs.
cd "$(dirname "$0")/.." || exit 1
out=${1:-gpu.md}
python=${PYTHON:-python3}
ends=$((SECONDS + ${LIMIT:-570}))

if [ -n "$WHEELS" ] && ! $python -c "import torch, transformers, peft, pytest" 2>/dev/null; then
    $python -m pip install -q --no-index --find-links "$WHEELS" -r requirements.txt pytest
fi
cuda=$($python -c "import torch; print(int(torch.cuda.is_available()))")
size=()
if [ "$cuda" != 1 ]; then
    size=(--hidden_size=32 --num_hidden_layers=2 --num_attention_heads=2 --patch_size=16
          --global_crops_size=32 --local_crops_size=16 --dino_head_out_dim=64 --head_hidden_dim=32
          --freeze_backbone_layers=1 --n_steps=1 --rounds=1 --batch_size=2 --device=cpu)
fi

part() {  # title, limit in seconds, command: its last lines and its status go to $out
    local title=$1 limit=$2 left=$((ends - SECONDS)) began=$SECONDS log status
    shift 2
    printf '\n## %s\n\n```\n$ %s\n' "$title" "$*" >> "$out"
    if [ "$left" -le 5 ]; then
        printf 'not run: no time left\n```\n' >> "$out"
        return
    fi
    log=$(mktemp)
    timeout $((limit < left ? limit : left)) "$@" > "$log" 2>&1
    status=$?
    tail -n 60 "$log" | cut -c1-200 >> "$out"
    printf '```\n\nstatus %s, %s s\n' "$status" "$((SECONDS - began))" >> "$out"
    rm -f "$log"
    echo "$title: status $status, $((SECONDS - began)) s"
}

{
    echo "# On a GPU"
    echo
    $python -c "import platform, torch, transformers, peft
print('torch', torch.__version__, '| transformers', transformers.__version__, '| peft',
      peft.__version__, '| python', platform.python_version())
print('CUDA', torch.version.cuda, '|', torch.cuda.get_device_name() if torch.cuda.is_available()
      else 'dry run without CUDA')"
    git log -1 --format='commit %h' 2>/dev/null
} > "$out"

bench="$python bench.py"
part "Tests" 200 $python -m pytest -q tests/test_cuda.py tests/test_sync.py
# paper Table 10: ViT-S/16, 2 x 224 + 8 x 96; time and peak memory of every strategy
part "Strategies, ViT-S/16" 120 $bench --what=strategy --batch_size=64 "${size[@]}"
part "A step of DINO, ViT-S/16" 60 $bench --what=step --batch_size=64 --num_workers=8 "${size[@]}"
part "A step of DINOv2, ViT-S/14" 60 $bench --what=step --ibot=true --model_type=dinov2 \
    --patch_size=14 --global_crops_size=224 --local_crops_size=98 --batch_size=64 \
    --num_workers=8 "${size[@]}"
part "A step of DINO, compiled" 90 $bench --what=step --compile=true --batch_size=64 \
    --num_workers=8 "${size[@]}"
part "A step of DINO, ViT-B/16" 60 $bench --what=step --batch_size=64 --hidden_size=768 \
    --num_attention_heads=12 --num_workers=8 "${size[@]}"
part "Augmentation" 60 $bench --what=augment "${size[@]}"
part "The demo" 60 $python train.py config/phantom.py --max_iterations=60 --eval_interval=0 \
    --model_name=gpu-demo --out_dir="$(mktemp -d)/demo" --device=$([ "$cuda" = 1 ] && echo cuda || echo cpu)
cat "$out"
