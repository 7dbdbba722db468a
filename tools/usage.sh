# For the scripts in the root. Sourced.

# guard: set `guard` to a prefix of commands that lets the kernel end them with this script, however that ends.
# It needs util-linux 2.33; without it the prefix is empty.
guard() {
    guard=(setpriv --pdeathsig KILL)
    "${guard[@]}" true 2>/dev/null || guard=()
}

# show_usage SCRIPT [WORD ...]: if a WORD asks for help, print the comment at the head of SCRIPT; else fail.
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
