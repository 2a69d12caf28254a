#!/bin/sh
# A delayed mount by the commands of spfs, for scripts: exit codes and --json. As root: sh examples/delayed_mount.sh
# Needs spfs and spfs-manager on the PATH (./bootstrap sh examples/delayed_mount.sh). A directory that does not exist yet
# plays the server. Everything that is made here is taken away at the end, however it ends.
set -eu
reader= writer=
work=$(mktemp -d)
mkdir "$work/data"
export SPFS_MANAGER_SOCK="$work/manager/spfs-manager.sock"

finish() {
    [ -z "${reader:-}${writer:-}" ] || kill $reader $writer 2>/dev/null || true
    spfs shutdown --unmount --force 2>/dev/null || true
    umount "$work/data" 2>/dev/null || true       # the real one
    rm -r "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

fail() { echo "FAILED: $*" >&2; exit 1; }

# expect CODE COMMAND...: 0 done, 1 it failed, 2 usage, 3 the machine lacks something, 4 not done in time
expect() {
    wanted=$1; shift
    code=0
    "$@" || code=$?
    [ $code -eq "$wanted" ] || fail "$* ended with $code, not $wanted"
}

# json EXPRESSION: of what is read, as "it". (jq does that, too, where it is installed.)
json() { python3 -c "import json, sys; it = json.load(sys.stdin); print($1)"; }

spfs-manager -d --work-dir "$work/manager"

# Restore: what the programs will open is made on the stand-in. Nothing is read from it: it is a scaffold.
spfs mount data "$work/data"
: >"$work/data/input"
expect 1 spfs mount data "$work/data" 2>"$work/error"
echo "twice: $(cat "$work/error")"
expect 2 spfs mode stub 2>/dev/null               # which mount?

# Stub: whoever touches it waits from now on, and gets no error.
spfs mode stub data
cat "$work/data/input" >"$work/answer" & reader=$!
echo from the writer | dd of="$work/data/log" status=none & writer=$!
until [ "$(spfs held --json | json 'len({entry["pid"] for entry in it})')" -eq 2 ]; do :; done
spfs held data --json | json '", ".join(sorted("a %s of %s waits" % (e["operation"], e["name"] or e["path"]) for e in it))'

# The real file system is asked for. It is tried until it comes; to give up waiting for it changes nothing.
spfs replace data --source "$work/server" --type none --options bind
expect 4 spfs wait data --timeout 0.5 2>/dev/null
spfs status data --json | json '"the server is late: %s" % it["mounts"][0]["replace"]["last_attempts"][-1]["error"]'

# It comes. The programs go on, on it.
mkdir "$work/server"
echo the real contents >"$work/server/input"
spfs wait data --timeout 60 --json >"$work/report"
json '"%s, a blackout of %.1f ms, %d left" % (it["replace"]["phase"], it["replace"]["report"]["blackout"] * 1000,
    len(it["replace"]["report"]["left"]))' <"$work/report"
wait $reader || fail "the reader ended with an error"
wait $writer || fail "the writer ended with an error"
reader= writer=
[ "$(cat "$work/answer")" = "the real contents" ] || fail "the reader has read $(cat "$work/answer")"
[ "$(cat "$work/server/log")" = "from the writer" ] || fail "the server lacks what the writer wrote"
[ "$(findmnt --noheadings --output FSTYPE "$work/data")" != fuse.stubfs ] || fail "the stand-in is still there"
echo "both programs went on without an error, on the real file system"

# What happened, for people; a page for the browser with --output FILE.html.
spfs timeline data | sed -n 's/^.*\(gone: replaced\).*$/timeline: \1/p' | head -n 1
