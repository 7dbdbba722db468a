# For the scripts in the root. Sourced.

# guard: set `guard` to the words before a command that the kernel ends with this script, however that ends. They are of
# util-linux 2.33; without it there are none.
guard() {
    guard=(setpriv --pdeathsig KILL)
    "${guard[@]}" true 2>/dev/null || guard=()
}

# show_usage SCRIPT [WORD ...]: print the comment at the head of SCRIPT and succeed, if a WORD asks for help; else fail.
show_usage() {
    local script=$1 word
    shift
    for word; do
        case $word in
        -h | -help | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
            return 0
            ;;
        esac
    done
    return 1
}
