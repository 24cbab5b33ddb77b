#!/usr/bin/env bash
# Train on GPUs of a Slurm cluster, from the folder of the project on a file system that all nodes share:
#   launch/slurm/run.sh --name=sdxl --nodes=2 --gpus_per_node=8 --time=24:00:00 --workdir=/shared/runs/sdxl \
#       [--partition=NAME] [--account=NAME] [--dry_run] -- --config=configs/sdxl.py:lora ...
# `make .venv EXTRAS=cuda` comes first. One process a GPU, which is what jax expects of Slurm. Before the time is over,
# and when the job has to make room, it saves a checkpoint, queues itself again and goes on from there. The log is
# WORKDIR/slurm.log. --dry_run prints the command.
set -euo pipefail
cd "$(dirname "$0")/../.."

NAME='' NODES='' GPUS_PER_NODE='' TIME='' WORKDIR='' PARTITION='' ACCOUNT='' DRY_RUN=''
while (($#)); do
    case $1 in
        --name=* | --nodes=* | --gpus_per_node=* | --time=* | --workdir=* | --partition=* | --account=*)
            flag=${1%%=*} && flag=${flag#--} && printf -v "${flag^^}" %s "${1#*=}" ;;
        --dry_run) DRY_RUN=yes ;;
        --) shift && break ;;
        *) echo "error: $1 is no flag of this script: put what launch/train.py is to get after --." >&2 && exit 2 ;;
    esac
    shift
done
for flag in NAME NODES GPUS_PER_NODE TIME WORKDIR; do
    [[ ${!flag} ]] || { echo "error: --${flag,,} is missing: the head of launch/slurm/run.sh explains it." >&2 && exit 2; }
done
(($#)) || { echo "error: Nothing to run: give -- and the flags of launch/train.py, --config=FILE first." >&2 && exit 2; }

run() { if [[ $DRY_RUN ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }

run mkdir -p "$WORKDIR"
run sbatch "--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" "--gpus-per-node=$GPUS_PER_NODE" \
    "--time=$TIME" --exclusive --requeue --signal=B:TERM@300 --open-mode=append "--output=$WORKDIR/slurm.log" \
    ${PARTITION:+"--partition=$PARTITION"} ${ACCOUNT:+"--account=$ACCOUNT"} \
    launch/slurm/job.sh "$@" "--workdir=$WORKDIR"
