#!/usr/bin/env bash
#SBATCH --job-name=opd-stream
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
# A run on two nodes that share nothing but the store: one has the student and trains, the other
# has the teacher. Called again, it goes on where it was. `store` of the config lies on a shared disk.
#   sbatch examples/deploy/slurm.sh my.yaml 8
set -euo pipefail
config=${1:?usage: slurm.sh CONFIG ROUNDS}
rounds=${2:?usage: slurm.sh CONFIG ROUNDS}
name=$(basename "$config" .yaml)
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT  # if one node fails, the other one ends, too

on_a_node() {  # $1: folder of the run; the others: stages of each round; ends its subshell
  local folder=$1; shift
  # shellcheck disable=SC2016 # the node's shell fills these in
  exec srun --nodes=1 --ntasks=1 --exact bash -euc '
    config=$1; folder=$2; rounds=$3; shift 3
    for ((round = 0; round < rounds; round++)); do
      for stage in "$@"; do
        opd-stream "$stage" "$config" --round "$round" --follow --run-dir "$folder"
      done
    done' node "$config" "$folder" "$rounds" "$@"
}

on_a_node "runs/$name" generate train &
on_a_node "runs/$name-teacher" score &
wait -n
wait -n
srun --nodes=1 --ntasks=1 opd-stream evaluate "$config" --policy-version "$rounds" --run-dir "runs/$name"
