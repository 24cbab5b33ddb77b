#!/usr/bin/env bash
# Train on a Cloud TPU slice, from any machine with gcloud:
#   launch/tpu/run.sh --name=sdxl --zone=us-west4-a --type=v5litepod-16 --workdir=gs://BUCKET/sdxl \
#       [--version=RUNTIME] [--python=COMMAND] [--project=ID] [--spot] [--delete] [--poll=SECONDS] [--dry_run] \
#       -- --config=configs/sdxl.py:lora ...
# Queues a slice unless one of this name is there, copies the committed tree, installs on all workers, starts
# launch/train.py on them and follows the first one's log. When the slice is taken away, queues another one; training
# goes on from the last checkpoint in the workdir. The slice stays at the end; --delete removes it.
# After a lost connection run the same command again: it follows the job that runs. --dry_run prints the commands.
set -euo pipefail
cd "$(dirname "$0")/../.."

NAME='' ZONE='' TYPE='' WORKDIR='' PROJECT='' SPOT='' DELETE='' DRY_RUN='' POLL=30
VERSION=v2-alpha-tpuv5-lite PYTHON=python3.11
while (($#)); do
    case $1 in
        --name=* | --zone=* | --type=* | --version=* | --workdir=* | --project=* | --python=* | --poll=*)
            flag=${1%%=*} && flag=${flag#--} && printf -v "${flag^^}" %s "${1#*=}" ;;
        --spot) SPOT=--spot ;;
        --delete) DELETE=yes ;;
        --dry_run) DRY_RUN=yes ;;
        --) shift && break ;;
        *) echo "error: $1 is no flag of this script: put what launch/train.py is to get after --." >&2 && exit 2 ;;
    esac
    shift
done
for flag in NAME ZONE TYPE WORKDIR; do
    [[ ${!flag} ]] || { echo "error: --${flag,,} is missing: the head of launch/tpu/run.sh explains it." >&2 && exit 2; }
done
(($#)) || { echo "error: Nothing to run: give -- and the flags of launch/train.py, --config=FILE first." >&2 && exit 2; }
WHERE=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
TRAIN=$(printf '%q ' .venv/bin/python launch/train.py "$@" "--workdir=$WORKDIR")
ARCHIVE=${TMPDIR:-/tmp}/mlcm_jax-$NAME.tar.gz

run() { if [[ $DRY_RUN ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }
queued() { run gcloud compute tpus queued-resources "$@" "${WHERE[@]}"; }
workers() { run gcloud compute tpus tpu-vm ssh "$NAME" "--worker=$1" "--command=$2" "${WHERE[@]}"; }
state() {
    local answer
    if answer=$(queued describe "$NAME" '--format=value(state.state)' 2>/dev/null); then echo "$answer"; else echo ABSENT; fi
}

create() {
    queued create "$NAME" "--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$VERSION" ${SPOT:+"$SPOT"}
}

ready() { # wait for the slice; queue one where there is none
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        case $now in
            ABSENT) create ;;
            FAILED | SUSPENDED) queued delete "$NAME" --force --quiet ;;
            *) sleep "$POLL" ;;
        esac
    done
}

start() { # install on all workers, and start what runs on when the connection ends
    run git archive --format=tar.gz --prefix=mlcm_jax/ "--output=$ARCHIVE" HEAD
    run gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME:mlcm_jax.tar.gz" --worker=all "${WHERE[@]}"
    # Ubuntu 22.04, which these machines have, brings Python 3.10.
    workers all "tar xzf mlcm_jax.tar.gz && cd mlcm_jax && { $PYTHON -m venv .venv || { sudo apt-get update -q && \
sudo apt-get install -qy $PYTHON-venv && $PYTHON -m venv .venv; }; } && .venv/bin/python -m pip install -q -e .[tpu]"
    workers all "cd mlcm_jax && rm -f train.status && { setsid nohup bash -c '${TRAIN//\'/\'\\\'\'}; \
echo \$? >train.status' >train.log 2>&1 </dev/null & echo \$! >train.pid; }"
}

# shellcheck disable=SC2016  # the workers' shells expand these
runs() { workers 0 'kill -0 $(cat mlcm_jax/train.pid) && test ! -e mlcm_jax/train.status' >/dev/null 2>&1; }
# shellcheck disable=SC2016
follow() { workers 0 'cd mlcm_jax && tail -n +1 -F train.log --pid=$(cat train.pid) && exit $(cat train.status)'; }

if [[ $DRY_RUN ]]; then
    create && start && follow
else
    while true; do
        ready
        if ! runs; then start; fi
        status=0 && follow || status=$?
        # 2: a setting that cannot work, which another slice does not help
        if [[ $status == 0 || $status == 2 ]]; then break; fi
        sleep "$POLL" # the state of a pre-empted slice changes a little later
        if [[ $(state) == ACTIVE ]]; then break; fi
        echo "The slice is gone: waiting for another one." >&2
    done
fi
if [[ $DELETE ]]; then queued delete "$NAME" --force --quiet; fi
exit "${status:-0}"
