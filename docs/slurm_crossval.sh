#!/usr/bin/env bash
# Cross-validation on a Slurm cluster: each line of RUN/commands/<n>_<stage>.txt is one job, each file one array.
#
#   comnet crossval DATALIST --output_dir RUN --dry_run      # writes the command files; give --models, --config here
#   bash docs/slurm_crossval.sh RUN [sbatch options...]      # e.g. --partition=gpu --gres=gpu:1 --time=24:00:00
#
# Give both in the same folder, with the environment active: the commands hold paths relative to it. A stage starts when
# all of the stage before it has succeeded. After a failure or a time limit, the same two commands again: training goes
# on from its last epoch, and what is scored already is not scored again.
set -euo pipefail

run=${1:?name the output folder of comnet crossval}
shift
mkdir -p "$run/logs"

after=()
for file in "$run"/commands/*.txt; do
  stage=$(basename "$file" .txt)
  # Exit code 3 says that some subjects could not be scored: a warning, as in comnet crossval.
  job=$(sbatch --parsable "$@" ${after[@]+"${after[@]}"} \
    --job-name="$stage" --array="1-$(wc -l <"$file")" --output="$run/logs/${stage}_%a.log" \
    --wrap="bash -c \"\$(sed -n \"\${SLURM_ARRAY_TASK_ID}p\" '$file')\" || [ \$? -eq 3 ]")
  echo "$stage: job ${job%%;*}"
  after=(--dependency="afterok:${job%%;*}")
done
