#!/bin/sh
# What findmnt, lsfd and df do on a mount that hangs, as a test in shell: sh examples/testing/hung_mount.sh
# Needs stubfs and stubfsctl on the PATH. Everything ends with this script, however it ends.
set -eu
work=$(mktemp -d)
mkdir "$work/mnt" "$work/real"
echo contents >"$work/real/file"
socket=$work/sock

finish() {
    stubfsctl "$socket" quit || true
    rm -r "$work/real" && rmdir "$work/mnt" "$work"
}
stubfs --exit-with-pid $$ --socket-path "$socket" --mode proxy --proxy-dir "$work/real" "$work/mnt"
trap finish EXIT

fail() { echo "FAILED: $*" >&2; exit 1; }

exec 9<"$work/mnt/file"                      # somebody has a file open
stubfsctl "$socket" mode stub                # and now the server hangs

# findmnt reads a table and asks nobody.
findmnt --noheadings --output FSTYPE "$work/mnt" | grep -qx fuse.stubfs || fail "findmnt does not show the mount"
echo "findmnt: answers"

# lsfd asks the file system about a file on it.
lsfd -p $$ >"$work/real/lsfd" &
lsfd=$!
if stubfsctl "$socket" wait-held --timeout 2 --pid $lsfd >/dev/null 2>&1; then
    echo "lsfd: hangs, in: $(stubfsctl "$socket" held --pid $lsfd)"
else
    wait $lsfd
    grep -q "$work/mnt/file\|/file" "$work/real/lsfd" || fail "lsfd does not show the file"
    echo "lsfd: answers"
fi

# df asks every file system that it is to tell about, and one that hangs keeps it from telling about the others.
df "$work/mnt" >/dev/null 2>&1 &
df=$!
stubfsctl "$socket" wait-held --timeout 10 --pid $df >/dev/null || fail "df does not wait"
echo "df: hangs, in: $(stubfsctl "$socket" held --pid $df)"

# Not being there in time has an exit code of its own.
code=0
stubfsctl "$socket" wait-held 100 --timeout 0.1 2>/dev/null || code=$?
[ $code -eq 4 ] || fail "wait-held ended with $code"

# The server comes back.
stubfsctl "$socket" mode proxy --proxy-dir "$work/real"
wait $df || fail "df ended with an error"
wait $lsfd 2>/dev/null || true
[ "$(cat <&9)" = contents ] || fail "the open file has other contents"
exec 9<&-
echo "the server is back: df has ended, and the open file can be read"
