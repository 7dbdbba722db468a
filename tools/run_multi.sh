# For run_train_multi.sh and run_eval_multi.sh: run main_multi_gpu.py with "${options[@]}" and the arguments, on this
# machine or, with NNODES, as one of several machines; and again, up to MAX_RESTARTS times, when it fails.
# Sourced. Needs root, then options, and again: the further options of a restart.

usage_error() {
    echo "${0##*/}: $1" >&2
    exit 2
}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
source "$root/tools/usage.sh"

# show_options: print the options of main_multi_gpu.py.
show_options() {
    printf '\nOptions of main_multi_gpu.py:\n\n'
    PYTHONDONTWRITEBYTECODE=1 "$PYTHON" "$root/main_multi_gpu.py" -h || true
}

# prepare [ARGUMENT ...]: check the variables and the arguments, and set `start` to the words of the command.
prepare() {
    NNODES=${NNODES:-1} MAX_RESTARTS=${MAX_RESTARTS:-0}
    if [[ ! $NNODES =~ ^[1-9][0-9]*$ || ! $MAX_RESTARTS =~ ^[0-9]+$ ]]; then
        usage_error 'NNODES and MAX_RESTARTS take whole numbers'
    fi
    if (( MAX_RESTARTS > 0 )); then
        if [[ -z ${OUTPUT:-} ]]; then
            usage_error 'MAX_RESTARTS needs OUTPUT, the run folder to go on in'
        fi
        if [[ " $* " == *' MODEL.RESUME '* ]]; then
            usage_error 'MAX_RESTARTS needs -resume, not -opts MODEL.RESUME'
        fi
    fi
    if (( NNODES > 1 )); then
        if [[ -z ${MASTER:-} || -z ${NODE_RANK:-} ]]; then
            usage_error 'NNODES needs MASTER=host:port, the same on all, and NODE_RANK=0..'
        fi
        start=("$PYTHON" -m paddle.distributed.launch --nnodes "$NNODES" --rank "$NODE_RANK"
               --master "$MASTER" --log_dir "${OUTPUT:-output}/launch_$NODE_RANK")
        if [[ -n ${NPROCS:-} ]]; then start+=(--nproc_per_node "$NPROCS"); fi
        start+=("$root/main_multi_gpu.py")
    else
        start=("$PYTHON" "$root/main_multi_gpu.py")
        if [[ -n ${NPROCS:-} ]]; then options+=(-nprocs "$NPROCS"); fi
    fi
}

# stop_child: ask the program to stop, if it runs.
stop_child() {
    if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}

# wait_for_child: wait until the program ends, and set `code` to its exit code.
wait_for_child() {
    local before
    while :; do                                     # a trapped signal ends the waiting with a code of its own
        before=$signals
        code=0
        wait "$child" || code=$?
        if (( signals == before )); then return; fi
    done
}

# run_multi [ARGUMENT ...]: run the program, restart it after failures, and exit with its code.
# `signals` counts the requests to stop; after one, nothing is started again.
run_multi() {
    local child='' code='' restarts=0 signals=0 resume=()
    guard
    trap 'signals=$((signals + 1)); stop_child' TERM INT
    while :; do
        "${guard[@]}" "${start[@]}" "${options[@]}" "$@" "${resume[@]}" &
        child=$!
        if (( signals )); then stop_child; fi       # the signal came before there was a child
        wait_for_child
        child=''                                    # its number may be another program's by now
        # The launcher ends with the number of its signal, else with the code of the first process that failed
        if (( NNODES > 1 && (code == 15 || code == 2 && signals) )); then code=75; fi
        # Stopped before it could listen: there was nothing to save
        if (( signals && code == 143 )); then code=75; fi
        case $code in
        0 | 2 | 75) exit "$code" ;;                 # done, a mistake, stopped
        esac
        if (( signals || restarts >= MAX_RESTARTS )); then exit "$code"; fi
        restarts=$((restarts + 1))
        echo "${0##*/}: ended with code $code; starting again ($restarts of $MAX_RESTARTS)" >&2
        sleep 2
        if (( signals )); then exit 75; fi
        resume=("${again[@]}")
    done
}
