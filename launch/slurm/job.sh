#!/usr/bin/env bash
# What sbatch runs on the job's first node (launch/slurm/run.sh): launch/train.py in all tasks, with its own flags.
set -uo pipefail

stopped=''
srun --kill-on-bad-exit=0 .venv/bin/python launch/train.py "$@" &
step=$!
# Slurm sends SIGTERM 300 s before the end of the job's time, and when the job has to make room. srun passes it on.
trap 'stopped=yes; kill -TERM "$step"' TERM
wait "$step"
status=$?
if [[ $stopped ]]; then
    wait "$step" # the signal ended the first wait
    status=$?
    if [[ $status != 0 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$status"
