#!/usr/bin/env bash
# Train on Google Kubernetes Engine, as a JobSet (which the cluster needs installed, 0.8 or newer):
#   launch/gke/run.sh --name=sdxl --image=IMAGE --hosts=4 --workdir=gs://BUCKET/sdxl [--namespace=NAME] [--dry_run] \
#       --tpu=tpu-v5-lite-podslice --topology=4x4 --chips_per_host=4 -- --config=configs/sdxl.py:lora ...
#   launch/gke/run.sh --name=sdxl --image=IMAGE --hosts=2 --workdir=gs://BUCKET/sdxl \
#       --gpu=nvidia-h100-80gb --gpus_per_host=8 -- --config=configs/sdxl.py:lora ...
# IMAGE: docker build --build-arg=EXTRAS=tpu (or cuda) -f launch/gke/Dockerfile -t IMAGE . && docker push IMAGE
# A host that fails or is taken away makes all hosts start again, up to 100 times, from the last checkpoint; a setting
# that cannot work ends the job. --dry_run prints what would be applied.
set -euo pipefail

NAME='' IMAGE='' HOSTS='' WORKDIR='' NAMESPACE=default TPU='' TOPOLOGY='' CHIPS_PER_HOST='' GPU='' GPUS_PER_HOST=''
DRY_RUN=''
while (($#)); do
    case $1 in
        --name=* | --image=* | --hosts=* | --workdir=* | --namespace=* | --tpu=* | --topology=* | --chips_per_host=* | \
            --gpu=* | --gpus_per_host=*)
            flag=${1%%=*} && flag=${flag#--} && printf -v "${flag^^}" %s "${1#*=}" ;;
        --dry_run) DRY_RUN=yes ;;
        --) shift && break ;;
        *) echo "error: $1 is no flag of this script: put what launch/train.py is to get after --." >&2 && exit 2 ;;
    esac
    shift
done
needed=(NAME IMAGE HOSTS WORKDIR)
if [[ $GPU ]]; then needed+=(GPUS_PER_HOST); else needed+=(TPU TOPOLOGY CHIPS_PER_HOST); fi
for flag in "${needed[@]}"; do
    [[ ${!flag} ]] || { echo "error: --${flag,,} is missing: the head of launch/gke/run.sh explains it." >&2 && exit 2; }
done
(($#)) || { echo "error: Nothing to run: give -- and the flags of launch/train.py, --config=FILE first." >&2 && exit 2; }

TRAIN=$(printf '%q ' python launch/train.py "$@" "--workdir=$WORKDIR")
if [[ $GPU ]]; then
    SELECTOR="cloud.google.com/gke-accelerator: $GPU"
    RESOURCE="nvidia.com/gpu: $GPUS_PER_HOST"
    # GKE tells TPU hosts about each other; GPU hosts have the job's own numbers.
    TRAIN+="--coordinator_address=$NAME-hosts-0-0.$NAME:8476 --num_processes=$HOSTS --process_id=\$JOB_COMPLETION_INDEX"
else
    SELECTOR="cloud.google.com/gke-tpu-accelerator: $TPU
                cloud.google.com/gke-tpu-topology: $TOPOLOGY"
    RESOURCE="google.com/tpu: $CHIPS_PER_HOST"
fi

manifest() {
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  namespace: $NAMESPACE
  annotations: # all hosts of one slice
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 60
              nodeSelector:
                $SELECTOR
              containers:
                - name: train
                  image: $IMAGE
                  ports: [{containerPort: 8476}]
                  resources: {limits: {$RESOURCE}}
                  command: [bash, -c]
                  args:
                    - |-
                      exec $TRAIN
YAML
}
run() { if [[ $DRY_RUN ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }

run kubectl apply -f - < <(manifest)
if [[ $DRY_RUN ]]; then manifest; fi
HOST="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
echo "Follow it: kubectl --namespace=$NAMESPACE logs --follow --tail=-1 --selector=$HOST"
echo "End it: kubectl --namespace=$NAMESPACE delete jobset $NAME"
