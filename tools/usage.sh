# For the scripts in the root. Sourced.

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
