#!/usr/bin/env bash
# Trains on the machines of a DeepSpeed hostfile and starts again after a fault, without machines that do not answer and without
# one whose GPU or driver failed.
#   docs/launch/hostfile.sh HOSTFILE --recipe my.yaml [other flags of scripts/train.py]
# MIN_HOSTS: with fewer it waits for the others (default 1; their number, to never go on without one).
set -u
hosts=${1:?"usage: hostfile.sh HOSTFILE --recipe NAME_OR_FILE [flags]"}
shift
# deepspeed would take a file that is missing as one with this machine alone.
[[ -r $hosts ]] || { echo "$hosts: there is no such hostfile" >&2; exit 2; }
hosts=$(realpath "$hosts")
cd "$(dirname "$0")/../.."
most=${MOST_STARTS:-20} pause=${PAUSE_SECONDS:-30} min_hosts=${MIN_HOSTS:-1}
# All machines share the checkout. The run writes there how it ended, because a launcher may make 1 of any code.
ended=$PWD/hostfile-$$.exit
trap 'rm -f "$ended"' EXIT

# ssh to a machine whose link is gone would wait for hours, and deepspeed with it.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=3"

# Prints the machines that cannot be reached, all asked at once; three times, since one connection may fail by chance.
unreachable() {
  local host
  for host in $(sed 's/#.*//' "$hosts" | awk 'NF {print $1}'); do
    (
      for _ in 1 2 3; do
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true </dev/null >/dev/null 2>&1 && exit
        sleep 1
      done
      echo "$host"
    ) &
  done
  wait
}

# The hostfile's name of this host, if it has it; one of the two may have a domain.
named() {
  sed 's/#.*//' "$hosts" | awk -v host="$1" '
    function short(name) { if (name !~ /^[0-9.]+$/) sub(/[.].*/, "", name); return name }
    NF && short($1) == short(host) { print $1; exit }'
}
failed=

# Heeded when deepspeed has ended. The run itself stops in order when any of its ranks gets SIGUSR1 or SIGTERM.
stopped=0
trap 'stopped=1' TERM INT USR1

code=1
for ((start = 1; start <= most; start++)); do
  ((stopped)) && exit "$code"
  mapfile -t gone < <({ unreachable; tr ' ' '\n' <<<"$failed"; } | awk 'NF && !seen[$1]++')
  without=()
  if ((${#gone[@]})); then
    left=$(($(sed 's/#.*//' "$hosts" | awk 'NF' | wc -l) - ${#gone[@]}))
    echo "do not answer to ssh, or failed: ${gone[*]}; left: $left host(s)" >&2
    # force_multi, because with one host left deepspeed would start the ranks on this machine, whichever that is.
    without=(--force_multi --exclude "$(IFS=@; echo "${gone[*]}")")
  fi
  rm -f "$ended"
  reason=
  if ((${#gone[@]} && left < min_hosts)); then
    code=255
  else
    .venv/bin/deepspeed --hostfile "$hosts" "${without[@]}" scripts/train.py "$@" --resume auto --exit-file "$ended"
    code=$?
    [[ -s $ended ]] && read -r code reason <"$ended" && echo "the run says: $reason" >&2
    case $code in
      0) exit 0 ;; # completed, or asked to stop
      2 | 3 | 4) exit "$code" ;; # a mistake in the recipe, the run ended itself, or out of memory: a person has to look
      77) # a GPU or driver failed: "host NAME: ..."
        host=${reason#host } host=${host%%:*}
        name=$(named "$host") known=$(sed 's/#.*//' "$hosts" | awk 'NF' | wc -l)
        failed+=" $name"
        if [[ -z $name ]] || (($(wc -w <<<"$failed") > known - min_hosts)); then
          echo "host $host failed, and without it there are too few of $hosts" >&2
          exit 77
        fi
        ;;
    esac
  fi
  ((stopped)) && exit "$code"
  echo "start $start of $most ended with code $code; again in $pause s" >&2
  sleep "$pause"
done
exit "$code"
