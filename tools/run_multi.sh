# For run_train_multi.sh and run_eval_multi.sh: main_multi_gpu.py with "${options[@]}" and the arguments, on this machine or,
# with NNODES, as one of several; and once more, up to MAX_RESTARTS times, when it fails. Sourced; needs root, then options, and
# again, the options of a further start.

usage_error() {
    echo "${0##*/}: $1" >&2
    exit 2
}

[[ -n ${PYTHON:-} ]] || { [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python; } || PYTHON=python
source "$root/tools/usage.sh"

show_options() {
    printf '\nOptions of main_multi_gpu.py:\n\n'
    PYTHONDONTWRITEBYTECODE=1 "$PYTHON" "$root/main_multi_gpu.py" -h || true
}

prepare() {
    NNODES=${NNODES:-1} MAX_RESTARTS=${MAX_RESTARTS:-0}
    [[ $NNODES =~ ^[1-9][0-9]*$ && $MAX_RESTARTS =~ ^[0-9]+$ ]] || usage_error 'NNODES and MAX_RESTARTS take whole numbers'
    [[ $MAX_RESTARTS == 0 || -n ${OUTPUT:-} ]] || usage_error 'MAX_RESTARTS needs OUTPUT, the run folder to go on in'
    [[ $MAX_RESTARTS == 0 || " $* " != *' MODEL.RESUME '* ]] || usage_error 'MAX_RESTARTS needs -resume, not -opts MODEL.RESUME'
    if (( NNODES > 1 )); then
        [[ -n ${MASTER:-} && -n ${NODE_RANK:-} ]] || usage_error 'NNODES needs MASTER=host:port, the same on all, and NODE_RANK=0..'
        start=("$PYTHON" -m paddle.distributed.launch --nnodes "$NNODES" --rank "$NODE_RANK" --master "$MASTER"
               --log_dir "${OUTPUT:-output}/launch_$NODE_RANK" ${NPROCS:+--nproc_per_node "$NPROCS"} "$root/main_multi_gpu.py")
    else
        start=("$PYTHON" "$root/main_multi_gpu.py")
        [[ -z ${NPROCS:-} ]] || options+=(-nprocs "$NPROCS")
    fi
}

run_multi() {
    local child='' code='' restarts=0 stopped='' resume=()
    guard
    trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
    while :; do
        "${guard[@]}" "${start[@]}" "${options[@]}" "$@" "${resume[@]}" &
        child=$!
        [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null || true        # it came before there was a child
        while :; do                             # a trapped signal ends the waiting, not the child
            code=0
            wait "$child" || code=$?
            (( code > 128 )) && kill -0 "$child" 2>/dev/null || break
        done
        # The launcher ends with the number of the signal that it got, else with the code of its first process that failed
        (( NNODES > 1 )) && [[ $code == 15 || $code == 2 && $stopped ]] && code=75
        [[ $stopped && $code == 143 ]] && code=75   # before it could listen: there was nothing to save
        [[ $code != 0 && $code != 2 && $code != 75 && ! $stopped && $restarts -lt $MAX_RESTARTS ]] || exit "$code"
        restarts=$((restarts + 1))
        echo "${0##*/}: ended with code $code; starting again ($restarts of $MAX_RESTARTS)" >&2
        sleep 2
        [[ -z $stopped ]] || exit 75
        resume=("${again[@]}")
    done
}
