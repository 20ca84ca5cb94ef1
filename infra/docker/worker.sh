#!/bin/sh
# Starts a worker in a container: `worker.sh prefill` or `worker.sh decode`. Peers pull KV from the container's own
# address, which is known only here; of several the first is taken unless BATON_TRANSFER_HOST names another.
set -eu
own_addresses="$(hostname -i)"
export BATON_TRANSFER_HOST="${BATON_TRANSFER_HOST:-${own_addresses%% *}}"
export BATON_NAME="${BATON_NAME:-$1-$(hostname)}"
exec python -m "services.$1"
