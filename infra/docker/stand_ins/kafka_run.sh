#!/bin/bash
# As in the official image: server.properties is the mounted file plus KAFKA_* variables, and the log is formatted once.
set -euo pipefail
config=/opt/kafka/config/server.properties
options=(${KAFKA_HEAP_OPTS:-} -XX:+UseSerialGC -XX:+ExitOnOutOfMemoryError -Djava.awt.headless=true
    -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -cp '/opt/kafka/libs/*')

cat /mnt/shared/config/server.properties >"$config"
for name in $(compgen -e KAFKA_); do
    [[ "$name" == KAFKA_HEAP_OPTS ]] && continue
    key="${name#KAFKA_}"
    key="${key,,}"
    printf '\n%s=%s' "${key//_/.}" "${!name}" >>"$config"
done

java "${options[@]}" kafka.tools.StorageTool format --ignore-formatted --cluster-id "$CLUSTER_ID" --config "$config"
exec java "${options[@]}" kafka.Kafka "$config"
