#!/usr/bin/env bash
# What one launch of a loss with gradient does to a GPU, as Nsight Compute counts it: instructions, issue slots, hit
# rates of the caches, bytes of memory per logit, and what warps wait for.
#   scripts/profile.sh [BACKEND [TOKENS [VOCAB]]]      BACKEND: as `dcpo bench --backend` takes it
set -u
cd "$(dirname "$0")/.."
backend=${1:-cuda} tokens=${2:-4096} vocab=${3:-151936}
command -v ncu >/dev/null || { echo "ncu is not installed: nothing was profiled"; exit 0; }
metrics=gpu__time_duration.sum,smsp__inst_executed.sum,smsp__issue_active.avg.pct_of_peak_sustained_active
metrics+=,l1tex__t_sector_hit_rate.pct,lts__t_sector_hit_rate.pct,dram__bytes_read.sum,dram__bytes_write.sum
metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active

echo "$backend, $tokens x $vocab bf16"
ncu --target-processes all --clock-control none --kernel-name regex:^fused --launch-count 1 --kill yes \
  --metrics "$metrics" --section WarpStateStats --page raw --print-units base \
  "${PYTHON:-python3}" -m dcpo_kernels.cli bench --tokens "$tokens" --vocab "$vocab" \
  --backend "$backend" --peers none --seconds 0 |
  awk -v logits=$((tokens * vocab)) '
    { print; gsub(",", "", $3) }
    $1 ~ /^dram__bytes_(read|write)\.sum$/ { bytes += $3 }
    $1 == "smsp__inst_executed.sum" { instructions = 32 * $3 }
    END {
      if (!bytes) exit 1
      printf "per logit: %.3f bytes of memory, %.2f instructions\n", bytes / logits, instructions / logits
    }'
