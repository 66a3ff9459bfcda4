#!/bin/sh
# Entry point of every AMPD container. The cluster's secret signs the tickets with which workers read each
# other's KV; whichever container starts first makes it, in the volume that they share (AMPD_CLUSTER_SECRET,
# 64 hex digits, overrides it). `ln` is atomic: one of several that make it at once wins, all read the winner's.
set -eu
secret_file=${AMPD_SECRET_DIR:-/var/lib/ampd/secret}/cluster.hex
if [ -z "${AMPD_CLUSTER_SECRET:-}" ]; then
  if [ ! -s "$secret_file" ]; then
    umask 077
    draft=$(mktemp "$secret_file.XXXXXX")
    od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n' >"$draft"
    ln "$draft" "$secret_file" 2>/dev/null || [ -s "$secret_file" ]
    rm -f "$draft"
  fi
  AMPD_CLUSTER_SECRET=$(cat "$secret_file")
  export AMPD_CLUSTER_SECRET
fi
exec "$@"
