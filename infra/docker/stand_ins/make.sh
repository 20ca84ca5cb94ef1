#!/usr/bin/env bash
# Makes stand-ins for the official images that docker-compose.yml and the Dockerfile name, for hosts that can pull none:
#
#     infra/docker/stand_ins/make.sh FOLDER [python|kafka|redis|prometheus|grafana]
#
# Debian's packages, Kafka's locked jars and this machine's Python 3.12 ($STAND_IN_PYTHON) go into images under the
# official names and tags. Needs root, debootstrap and a docker engine. FOLDER keeps the root file system for the next
# call. A stand-in has the entry point, user, paths and health check commands that the composition relies on, and no more;
# these images are for trying the composition, not for serving.
set -euo pipefail

folder="$(realpath -m "${1:?usage: infra/docker/stand_ins/make.sh FOLDER [python|kafka|redis|prometheus|grafana]}")"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../../.." && pwd)"
suite=bookworm
debian=baton-stand-in/debian:$suite
export DOCKER_BUILDKIT=0

# Prints the image of the repository $1 that the composition or the Dockerfile names, with its tag.
wanted() { grep -ohE "(image: |FROM )$1:[^ ]+" "$root/docker-compose.yml" "$root/infra/docker/Dockerfile" \
    | head -n 1 | cut -d' ' -f2; }

# Builds $1 from the Dockerfile on standard input and the context $2. Reaches the package mirror as the host does.
build() { docker build --quiet --network host --tag "$1" --file - "$2"; }

make_debian() {
    if ! docker image inspect "$debian" >/dev/null 2>&1; then
        mkdir -p "$folder"
        [[ -e "$folder/$suite/whole" ]] || {
            rm -rf "${folder:?}/$suite"
            debootstrap --variant=minbase --include=ca-certificates "$suite" "$folder/$suite" >"$folder/debootstrap.log"
            touch "$folder/$suite/whole"
        }
        # The host's certificates: where a proxy speaks for the package index, only the host knows whom to trust.
        cp -L /etc/ssl/certs/ca-certificates.crt "$folder/$suite/etc/ssl/certs/"
        tar -C "$folder/$suite" -c . | docker import - "$debian" >/dev/null
    fi
}

make_python() {
    local context home
    home="$("${STAND_IN_PYTHON:-python3.12}" -c 'import sys; print(sys.base_prefix)')"
    context="$(mktemp -d)"
    mkdir "$context/bin"
    cp -rL "$home/lib" "$context/lib"
    rm -rf "$context"/lib/python3.12/{test,site-packages,config-3.12*} "$context"/lib/libpython3.12.a
    find "$context" -name __pycache__ -prune -exec rm -rf {} +
    cp -L "$home/bin/python3.12" "$context/bin/python3.12"
    build "$(wanted python)" "$context" <<END
FROM $debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends \
        libbz2-1.0 libffi8 liblzma5 libncursesw6 libnsl2 libreadline8 libsqlite3-0 libssl3 libtirpc3 libuuid1 zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY . /usr/local/
RUN ldconfig && ln -s python3.12 /usr/local/bin/python && ln -s python3.12 /usr/local/bin/python3 \
    && python -m ensurepip --upgrade
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt UV_SYSTEM_CERTS=1
CMD ["python3"]
END
    rm -rf "$context"
}

make_kafka() {
    local context
    context="$(mktemp -d)"
    mkdir "$context/libs"
    cp "$("$root/infra/local/in_env.sh" python -c 'from infra.local.kafka import kafka_jars; print(kafka_jars())')"/*.jar \
        "$context/libs/"
    cp "$here/kafka_run.sh" "$context/run"
    build "$(wanted apache/kafka)" "$context" <<END
FROM $debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends openjdk-17-jre-headless \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home appuser \
    && install -d -o appuser -g appuser /opt/kafka/config /mnt/shared/config /var/lib/kafka/data /etc/kafka/secrets
COPY libs /opt/kafka/libs
COPY run /etc/kafka/docker/run
USER appuser
VOLUME ["/etc/kafka/secrets", "/var/lib/kafka/data", "/mnt/shared/config"]
EXPOSE 9092
CMD ["/etc/kafka/docker/run"]
END
    rm -rf "$context"
}

make_redis() {
    build "$(wanted redis)" "$here" <<END
FROM $debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/* && install -d -o redis -g redis /data
VOLUME /data
WORKDIR /data
EXPOSE 6379
CMD ["redis-server"]
END
}

make_prometheus() {
    build "$(wanted prom/prometheus)" "$here" <<END
FROM $debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus busybox \
    && rm -rf /var/lib/apt/lists/* && ln -s /bin/busybox /usr/local/bin/wget \
    && install -d -o nobody -g nogroup /prometheus /etc/prometheus
USER nobody
VOLUME /prometheus
WORKDIR /prometheus
EXPOSE 9090
ENTRYPOINT ["/usr/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
END
}

# Debian has no Grafana. This one only answers the health check, and says so to who looks at it.
make_grafana() {
    build "$(wanted grafana/grafana)" "$here" <<END
FROM $debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends busybox \
    && rm -rf /var/lib/apt/lists/* && ln -s /bin/busybox /usr/local/bin/wget \
    && useradd --uid 472 --gid 0 grafana && install -d -o grafana -g root /var/lib/grafana /usr/share/stand-in/api \
    && echo 'A stand-in: no Grafana is installed here.' | tee /usr/share/stand-in/index.html \
        > /usr/share/stand-in/api/health
USER grafana
EXPOSE 3000
CMD ["/bin/busybox", "httpd", "-f", "-p", "3000", "-h", "/usr/share/stand-in"]
END
}

make_debian
for image in ${2:-python kafka redis prometheus grafana}; do
    echo "$image"
    "make_$image"
done
