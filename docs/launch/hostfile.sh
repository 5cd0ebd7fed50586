#!/usr/bin/env bash
# Trains on the machines of a DeepSpeed hostfile and starts again after a fault.
#   docs/launch/hostfile.sh HOSTFILE --recipe my.yaml [other flags of scripts/train.py]
set -u
hosts=${1:?"usage: hostfile.sh HOSTFILE --recipe NAME_OR_FILE [flags]"}
shift
cd "$(dirname "$0")/../.."
most=${MOST_STARTS:-20} pause=${PAUSE_SECONDS:-30}
# All machines share the checkout. The run writes there how it ended, because a launcher may make 1 of any code.
ended=$PWD/hostfile-$$.exit
trap 'rm -f "$ended"' EXIT

# Heeded when deepspeed has ended. The run itself stops in order when any of its ranks gets SIGUSR1 or SIGTERM.
stopped=0
trap 'stopped=1' TERM INT USR1

for ((start = 1; start <= most; start++)); do
  rm -f "$ended"
  .venv/bin/deepspeed --hostfile "$hosts" scripts/train.py "$@" --resume auto --exit-file "$ended"
  code=$?
  [[ -s $ended ]] && read -r code reason <"$ended" && echo "the run says: $reason" >&2
  case $code in
    0) exit 0 ;; # completed, or asked to stop
    2 | 3) exit "$code" ;; # a mistake in the recipe, or the run ended itself: a person has to look
  esac
  ((stopped)) && exit "$code"
  echo "start $start of $most ended with code $code; again in $pause s" >&2
  sleep "$pause"
done
exit "$code"
